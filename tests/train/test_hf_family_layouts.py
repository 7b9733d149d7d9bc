"""Checkpoints of transformers' Qwen3.5 classes train on in several processes, from the loss that they have there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM

from model.hf.families import QWEN3_5, QWEN3_5_MOE
from parallel import groups as process_groups
from parallel.engine_megatron import MegatronEngine
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.model.test_hf_families import their_config
from tests.parallel.tiny import leave_layout
from tests.train.hf_runs import SHAPE, VOCAB, import_as
from tests.train.test_hf_layouts import LOSS, TOKENS, job_on, micro_batch, tokens
from train.job.optim import adamw, decays
from train.job.shelf import Shelf
from train.settings.optim import OptimConfig

DENSE = replace(SHAPE, pattern="G-G-G-*-", dense_size=80, tied_embeddings=True, linear_value_heads=6)
EXPERTS = replace(SHAPE, linear_value_heads=8)
MODELS = {"dense": (QWEN3_5, DENSE, Qwen3_5ForCausalLM), "experts": (QWEN3_5_MOE, EXPERTS, Qwen3_5MoeForCausalLM)}
LAYOUTS = {
    "dense on TP2": ("dense", ParallelConfig(tensor=2, expert=1), DENSE),
    "dense on PP2": ("dense", ParallelConfig(pipeline=2, expert=1), replace(DENSE, pattern="G-G-|G-*-")),
    "experts on TP2": ("experts", ParallelConfig(tensor=2, expert=1), EXPERTS),
    "experts on EP2": ("experts", ParallelConfig(expert=2), EXPERTS),
    "experts on PP2": ("experts", ParallelConfig(pipeline=2, expert=1), replace(EXPERTS, pattern="GEGE|GE*E")),
}


def random_theirs(name: str) -> torch.nn.Module:
    """A model of transformers' as it starts, with weights large enough that every part counts."""
    family, shape, kind = MODELS[name]
    torch.manual_seed(1)
    model = kind(their_config(family, replace(shape, vocab_size=VOCAB))).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in key:
                parameter.mul_(5.0)
    return model


def losses_of(checkpoints: dict[str, Path]) -> dict[str, list[float]]:
    """On each process: the losses of two steps in each layout, empty where a process is no last stage."""
    process_groups.start(torch.device("cpu"))
    found = {}
    for name, (model, parallel, shape) in LAYOUTS.items():
        job = job_on(parallel, shape, checkpoints[model], mtp=0)
        engine = MegatronEngine(job.chunks, job.groups, adamw(OptimConfig()), job.device, decays)
        steps = [engine.train_step([micro_batch(0)], TOKENS, 1e-3)[0] for _ in range(2)]
        found[name] = [float(losses.by_step[0]) for outputs in steps for losses in outputs]
    leave_layout()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[dict[str, list[float]], dict[str, torch.nn.Module]]:
    """The losses of every layout, and the models of transformers' that they went on from."""
    place = tmp_path_factory.mktemp("families")
    theirs = {name: random_theirs(name) for name in MODELS}
    checkpoints = {}
    for name, model in theirs.items():
        model.save_pretrained(place / name)
        checkpoints[name] = Shelf(import_as(place / name, place / "runs", name) / "checkpoints").path(0)
    ranks = run_ranks(losses_of, 2, checkpoints, timeout=300)
    return {name: next(rank[name] for rank in ranks if rank[name]) for name in LAYOUTS}, theirs


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_loss_is_that_of_transformers(trained, name: str) -> None:
    losses, theirs = trained
    logits = theirs[LAYOUTS[name][0]](tokens()[:, :-1]).logits[0]
    assert logits.std() >= 0.3
    expected = float(torch.nn.functional.cross_entropy(logits, tokens()[0, 1:]))
    assert losses[name][0] == pytest.approx(expected, abs=LOSS)
    assert losses[name][1] < losses[name][0] - 0.01, "the same sequence again must be known better"
