"""vLLM serves each kind of export: what it says of texts, and how many drafts it accepts, beside what `evaluate` says.

    ./launch.sh test tests/serving/test_vllm_kinds.py -m slow -s --vllm=PATH/bin/python

Nothing is trained: the next token of these models follows mostly from the last one, which its layers disturb a little,
so that some drafts are right and some are wrong.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import PrepareConfig
from data.prepare.prepare import prepare
from data.read.corpus import Corpus
from model.config import ModelConfig
from tests.dist import run_ranks
from tests.serving.ours import answer, checkpoint_of
from tests.serving.server import serve
from tests.serving.test_vllm import LENGTH, MEAN_DIFFERENCE, SMALL, python  # noqa: F401 (fixture)
from tests.train.hf_runs import VOCAB, add_checkpoint, export_run, import_as, make_run, telling
from train.__main__ import run as command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

EXPERTS = replace(SMALL, vocab_size=VOCAB)
DENSE = replace(EXPERTS, pattern="G-G-G-*-", dense_size=96)
MOE = {"model_type": "qwen3_5_moe_text"}
# Of each kind: the model, by its value heads a key head, and what `export` is asked for.
KINDS = {
    "qwen3_next": (EXPERTS, {"model_type": "qwen3_next"}),
    "dense, tied, ratio 1": (replace(DENSE, tied_embeddings=True, linear_value_heads=2), {}),
    "dense, untied, ratio 3": (replace(DENSE, linear_value_heads=6), {}),
    "experts as published": (EXPERTS, MOE),
    "experts packed, MTP's too": (EXPERTS, MOE | {"experts": "stacked"}),
    "experts one by one, ratio 4": (replace(EXPERTS, linear_value_heads=8), MOE | {"experts": "separate"}),
}
DISTURBANCE = 0.12  # of what layers add, beside telling weights: 80 to 98 % of the drafts begin right
ADDS = ("out_proj.weight", "linear_proj.weight", "experts.weight2", "linear_fc2.weight")
PROMPTS, PROMPT_TOKENS, TOKENS, TEXTS, TEXT_TOKENS = 100, 8, 32, 6, 24


def likely(shape: ModelConfig, known: int) -> dict[str, torch.Tensor]:
    """Our weights of a model that says, most of the time, what the last token alone leads to.

    Only of the ``known`` tokens, which our decoding chooses from: vLLM takes ids that no tokenizer has, too.
    """
    weights = telling(shape)
    head = "embedding.word_embeddings.weight" if shape.tied_embeddings else "output_layer.weight"
    weights[head][known:] = 0
    for name, tensor in weights.items():
        if name.endswith("norm.weight"):
            tensor.zero_()
        elif name.endswith(ADDS):
            tensor.mul_(DISTURBANCE)
    width = shape.hidden_size
    join = weights["mtp.layers.0.eh_proj.weight"]
    join[:, width:] *= DISTURBANCE
    join[:, :width] = torch.eye(width)
    if not shape.tied_embeddings:
        weights["output_layer.weight"].mul_(3)  # so that few tokens are near ties, which bfloat16 decides
        return weights
    # Tied, a token would lead to itself: signs before the head make another one of it.
    signs = -2.0 * torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(5))
    for name in ("decoder.final_norm.weight", "mtp.layers.0.final_layernorm.weight"):
        weights[name].copy_(signs)
    return weights


def counting(place: Path) -> Path:
    """A corpus of lines, a fifth of which are held out: prompts begin there."""
    (place / "text.txt").write_text("".join(f"{i} bottles and {i + 1} foxes jump over it\n" for i in range(2000)))
    settings = {"vocab_size": 300, "sample_by": "line", "heldout_fraction": 0.2}
    return prepare(PrepareConfig(input=str(place / "text.txt"), output=str(place / "corpus"), **settings))


def measure(run: Path, output: Path) -> tuple[dict, list[list[int]], list[list[float]]]:
    """In a process of its own: the drafts that `evaluate` counts, some texts, and the log-probabilities of them."""
    asked = [f"prompts={PROMPTS}", f"prompt_tokens={PROMPT_TOKENS}", f"tokens={TOKENS}", "samples=2"]
    assert command(["evaluate", f"run={run}", "draft=2", "dtype=bfloat16", *asked, f"output={output}"]) == 0
    drafts = json.loads(output.read_text())["drafts"]
    texts = [prompt + text for prompt, text in zip(drafts["prompts"], drafts["texts"], strict=True)]
    texts = [text[:TEXT_TOKENS] for text in texts if len(text) >= TEXT_TOKENS][:TEXTS]
    return drafts, texts, answer(checkpoint_of(run), texts, texts, 1)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_served_with_drafts(python: Path, tmp_path: Path, kind: str) -> None:  # noqa: F811
    shape, settings = KINDS[kind]
    corpus = counting(tmp_path)
    run = make_run(tmp_path / "runs", "made", shape, corpus)
    add_checkpoint(run.run.path, likely(shape, Corpus.open(corpus).tokenizer().vocab_size))
    files = export_run(run, tmp_path / "files", max_length=LENGTH, **settings)
    back = import_as(files, tmp_path / "runs", "back", corpus=str(corpus), seq_length=64)
    ((drafts, texts, of_texts),) = run_ranks(measure, 1, back, tmp_path / "drafts.json", timeout=600)
    with serve(python, files, tmp_path / "server.log", LENGTH, drafts=2) as server:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(server.greedy, drafts["prompts"], map(len, drafts["texts"])))
        counted = server.drafts()
        theirs = np.array([server.prompt_logprobs(text) for text in texts])
    difference = np.abs(theirs - np.array(of_texts))
    accepted = [counted[f"accepted_tokens_per_pos/{position}"] / counted["drafts"] for position in range(2)]
    print(
        f"{kind}: {difference.size} tokens, mean |difference| {difference.mean():.4f}, {difference.max():.3f}; "
        f"{counted['drafts']:.0f} drafts, accepted {accepted}, ours {drafts['cumulative']}"
    )
    assert difference.mean() <= MEAN_DIFFERENCE
    assert counted["drafts"] >= PROMPTS
    assert 0.02 < drafts["cumulative"][1] < 0.98, "else it says little that both accept the same share"
    # A share of a thousand drafts has a standard deviation of 1.6 points; texts part at near ties of bfloat16.
    assert accepted == pytest.approx(drafts["cumulative"], abs=0.05)
