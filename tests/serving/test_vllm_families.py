"""vLLM serves the Qwen3.5 forms of an export: dense with one matrix at both ends, and experts; as `test_vllm` does.

    ./launch.sh test tests/serving/test_vllm_families.py -m slow -s --vllm=PATH/bin/python

It trains two miniatures of 120 steps first, or takes ``dense`` and ``moe`` of ``--served-runs=DIR``.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data.prepare.prepare import embedded_corpus
from data.read.corpus import Corpus
from tests.dist import run_ranks
from tests.serving.ours import answer, checkpoint_of
from tests.serving.server import serve
from tests.serving.test_vllm import LENGTH, MEAN_DIFFERENCE, NEAR_TIE, ROOT, TEXT_TOKENS, python  # noqa: F401 (fixture)
from tests.train.hf_runs import export_run, import_as
from train.settings.run import Config, load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TEXTS, PROMPT_TOKENS, NEW_TOKENS, DRAFTED = 4, 32, 24, 100
DENSE = ["model.pattern=G-G-G-*-", "model.tied_embeddings=true", "model.dense_size=256"]
# Of a run: what it is trained with; of an export: which run, what its config.json calls itself.
RUNS = {"dense": DENSE, "moe": []}
FORMS = {"qwen3_5_text": "dense", "qwen3_5_moe_text": "moe"}


@dataclass(frozen=True)
class Form:
    """An export of a trained miniature."""

    name: str
    run: Config
    files: Path


@pytest.fixture(scope="module", params=FORMS)
def form(request, python, tmp_path_factory) -> Form:  # noqa: F811
    name, place = FORMS[request.param], tmp_path_factory.mktemp(request.param)
    chosen = request.config.getoption("--served-runs")
    if chosen is None:
        command = [sys.executable, "-m", "train", "train", f"run.name={name}", f"run.dir={place}", "run.steps=120"]
        subprocess.run([*command, "wandb.mode=disabled", *RUNS[name]], cwd=ROOT, check=True)
    run = load_config(checkpoint_of(Path(chosen or place) / name))
    files = export_run(run, place / "files", dtype="bfloat16", max_length=LENGTH, model_type=request.param)
    return Form(request.param, run, files)


def test_log_probabilities_text_and_drafts(form: Form, python: Path, tmp_path: Path) -> None:  # noqa: F811
    """One server for all: what it says of held-out text, its likeliest text, and how many drafts it accepts."""
    assert json.loads((form.files / "config.json").read_text())["model_type"] == form.name
    found = Corpus.open(embedded_corpus(form.run.data)).documents("heldout")
    documents = [x[:TEXT_TOKENS].tolist() for x in islice((x for x in found if len(x) > TEXT_TOKENS), TEXTS)]
    prompts = [document[:PROMPT_TOKENS] for document in documents]
    reference = checkpoint_of(import_as(form.files, tmp_path / "runs", "served"))
    of_texts, tokens, chosen_by = run_ranks(answer, 1, reference, documents, prompts, NEW_TOKENS, timeout=900)[0]
    ours = _evaluate(form, tmp_path / "drafts.json")

    with serve(python, form.files, tmp_path / "plain.log", LENGTH) as server:
        theirs = np.array([server.prompt_logprobs(document) for document in documents])
        texts = [server.greedy(prompt, NEW_TOKENS) for prompt in prompts]
    difference = np.abs(theirs - np.array(of_texts))
    print(f"{form.name}: {difference.size} tokens, mean |difference| {difference.mean():.4f}, {difference.max():.3f}")
    assert difference.size == TEXTS * (TEXT_TOKENS - 1)
    assert difference.mean() <= MEAN_DIFFERENCE
    for row, text in enumerate(texts):
        place = next((i for i in range(NEW_TOKENS) if text[i] != tokens[row][i]), None)
        if place is not None:  # equal up to a near tie, where either token may come first
            scores = chosen_by[row, place]
            assert float(scores[tokens[row][place]] - scores[text[place]]) <= NEAR_TIE

    with serve(python, form.files, tmp_path / "drafts.log", LENGTH, drafts=2) as server:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(server.greedy, ours["prompts"], map(len, ours["texts"])))
        counted = server.drafts()
    accepted = [counted[f"accepted_tokens_per_pos/{position}"] / counted["drafts"] for position in range(2)]
    print(f"{form.name}: {counted['drafts']:.0f} drafts, accepted {accepted}, ours {ours['cumulative']}")
    assert counted["drafts"] >= DRAFTED
    # A share of some thousand drafts has a standard deviation of 1 point; texts part at near ties of bfloat16.
    assert accepted == pytest.approx(ours["cumulative"], abs=0.03)


def _evaluate(form: Form, output: Path) -> dict:
    """What `evaluate` says of the drafts in bfloat16."""
    asked = ["draft=2", f"prompts={DRAFTED}", "dtype=bfloat16", "samples=2", "tokens=32", f"output={output}"]
    run = [f"run.name={form.run.run.name}", f"run.dir={form.run.run.dir}"]
    command = [sys.executable, "-m", "train", "evaluate", *run, *asked]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NPROC": "1"}, check=True)
    return json.loads(output.read_text())["drafts"]
