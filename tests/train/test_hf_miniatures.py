"""A miniature of each recipe of Qwen3.5's family trains on from an import, and resumes: the recipes' own lines, cut.

A miniature keeps what makes its model the one it is: pattern, head ratios, tied ends, experts, MTP, the numbers' type.
"""

import json
import shutil
from dataclasses import replace
from math import gcd
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.hf.families import QWEN3_5_MOE, QWEN3_NEXT, family_of
from tests.dist import run_ranks
from tests.train.hf_runs import (
    VOCAB,
    add_checkpoint,
    export_run,
    import_as,
    make_corpus,
    make_run,
    read_all,
    telling,
)
from tests.train.logs import read_metrics
from train.__main__ import compose
from train.__main__ import run as command
from train.job.shelf import Shelf

# Value heads a key head, query heads a key head of attention, tied ends: of their config.json.
FAMILY = {
    "qwen3_5_0_8b": (1, 4, True),
    "qwen3_5_2b": (1, 4, True),
    "qwen3_5_4b": (2, 4, True),
    "qwen3_5_9b": (2, 4, False),
    "qwen3_5_35b_a3b": (2, 8, False),
    "qwen3_5_122b_a10b": (4, 16, False),
    "qwen3_coder_next": (2, 8, False),
}
BLOCKS = 8  # layers: three of Gated DeltaNet, one of attention, and what stands behind each
WIDTHS = {"hidden_size": 32, "vocab_size": VOCAB, "head_dim": 16, "linear_key_dim": 16, "linear_value_dim": 16}
SECOND = {
    "-": {"dense_size": 48},
    "E": {"experts": 8, "experts_per_token": 2, "expert_size": 16, "shared_expert_size": 24},
}
STEPS, SAVED, LR = 2, 1, 1e-4
SHORT = [
    *(f"run.steps={STEPS}", f"run.save_every={SAVED}", "run.log_every=1", "run.eval_samples=1", "run.eval_prompts=0"),
    *("optim.warmup_steps=1", f"optim.lr={LR}", "optim.min_lr=0", "data.seq_length=64", "batch.global=4"),
    *("batch.micro=2", "wandb.mode=disabled"),
]
ALONE = [f"parallel.{size}" for size in ("world=null", "expert=1", "tensor=1", "pipeline=1")]


def miniature(recipe: str) -> ModelConfig:
    """The recipe's model with its first layers, few heads and narrow ones."""
    model = compose(["-cn", recipe], planned=True).model
    heads = gcd(model.attention_heads, model.key_value_heads) // 2
    linear = gcd(model.linear_key_heads, model.linear_value_heads) // 2
    return replace(
        model,
        pattern=model.layers[:BLOCKS],
        repeats=1,
        attention_heads=model.attention_heads // heads,
        key_value_heads=model.key_value_heads // heads,
        linear_key_heads=model.linear_key_heads // linear,
        linear_value_heads=model.linear_value_heads // linear,
        **WIDTHS,
        **SECOND["E" if "E" in model.layers else "-"],
    )


def start_from(recipe: str, place: Path, corpus: Path) -> dict[str, torch.Tensor]:
    """Makes the run ``RECIPE-base``: an import of a checkpoint with the recipe's model, as it is published."""
    shape = miniature(recipe)
    run = make_run(place / "trained", recipe, shape, corpus)
    add_checkpoint(run.run.path, telling(shape))
    published = QWEN3_NEXT if recipe == "qwen3_coder_next" else QWEN3_5_MOE
    family = published if "E" in shape.layers else family_of(shape)
    files = export_run(run, place / "files" / recipe, model_type=family.model_type)
    assert (files / "config.json").is_file()
    import_as(files, place / "runs", f"{recipe}-base")
    return telling(shape)


def line(recipe: str, place: Path, corpus: Path, *changes: str) -> list[str]:
    """The command line of a miniature. Its model is that of the import."""
    own = [f"run.dir={place / 'runs'}", f"data.corpus={corpus}", f"run.init={recipe}-base"]
    return ["train", "-cn", recipe, *SHORT, *own, *changes]


def lose_the_end(run: Path) -> None:
    """The run's last checkpoint is lost; what it had logged stays beside it."""
    shutil.copy(run / "metrics.jsonl", run / "first.jsonl")
    shutil.rmtree(Shelf(run / "checkpoints").path(STEPS))


def train_and_resume(place: Path, corpus: Path) -> None:
    """In a process of its own: each miniature to its end, and again from the checkpoint before it."""
    for recipe in FAMILY:
        assert command(line(recipe, place, corpus, *ALONE)) == 0
        lose_the_end(place / "runs" / recipe)
        assert command(line(recipe, place, corpus, *ALONE)) == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus: Path) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """Where the runs are, and the weights that each was imported with."""
    place = tmp_path_factory.mktemp("miniatures")
    imported = {recipe: start_from(recipe, place, corpus) for recipe in FAMILY}
    run_ranks(train_and_resume, 1, place, corpus, timeout=300)
    return place, imported


def assert_trained_and_resumed(run: Path) -> None:
    """Every step has its numbers, and those after the checkpoint came out twice alike."""
    first, last = (read_metrics(run / name) for name in ("first.jsonl", "metrics.jsonl"))
    numbers = [[entry[name] for name in ("step", "lm_loss", "mtp_loss/1", "grad_norm")] for entry in first]
    assert [step for step, *_ in numbers] == list(range(1, STEPS + 1))
    assert all(0 < number < 1e3 for entry in numbers for number in entry)
    again = [[entry[name] for name in ("step", "lm_loss", "mtp_loss/1", "grad_norm")] for entry in last]
    assert again[-1] == numbers[-1]
    starts = [json.loads(text)["step"] for text in (run / "history.jsonl").read_text().splitlines()]
    assert starts == [0, SAVED]


@pytest.mark.parametrize("recipe", FAMILY)
def test_a_miniature_trains_on_from_an_import_and_resumes(trained, recipe: str) -> None:
    place, imported = trained
    run = place / "runs" / recipe
    assert_trained_and_resumed(run)
    shape = miniature(recipe)
    ratios = shape.linear_value_heads // shape.linear_key_heads, shape.attention_heads // shape.key_value_heads
    assert (*ratios, shape.tied_embeddings) == FAMILY[recipe]
    weights = {
        name: x for name, x in read_all(Shelf(run / "checkpoints").path(SAVED)).items() if name in imported[recipe]
    }
    assert weights.keys() == imported[recipe].keys()
    for name, start in imported[recipe].items():
        # A step of AdamW changes a weight by its rate at most; bfloat16 rounds what is kept by 2^-9.
        moved = (weights[name].float() - start.float()).abs()
        assert (moved <= 1.5 * LR + start.float().abs() / 256).all(), name
    assert any(not torch.equal(weights[name], start) for name, start in imported[recipe].items())
