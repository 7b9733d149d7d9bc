"""vLLM serves what we train and export: the same numbers, the same text, drafts from the MTP layer, and a chat.

Opt-in, since it needs an environment with vLLM (README says how to make one) and minutes:

    ./launch.sh test tests/serving -m slow -s --vllm=PATH/bin/python [--served-run=runs/tiny]

Without ``--served-run`` it first trains `tiny` to its end.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.prepare.prepare import embedded_corpus
from data.read.corpus import Corpus
from model.config import ModelConfig
from tests.dist import run_ranks
from tests.serving.ours import answer, checkpoint_of
from tests.serving.server import NAME, Server, serve
from tests.train.hf_runs import add_checkpoint, export_run, import_as, make_corpus, make_run, telling
from train.settings.run import Config, load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
TEXTS, TEXT_TOKENS = 4, 251  # 1,000 predicted tokens
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 32
LENGTH = 256
# bfloat16 rounds activations by 2^-9 on either side, at other places, and sometimes another expert is chosen.
MEAN_DIFFERENCE = 0.05
NEAR_TIE = 0.5
DRAFTED = 200  # prompts whose drafts are counted
CHAT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
turns = [{"role": "user", "content": "def add(a, b):"}]
reply = client.chat.completions.create(model=sys.argv[2], messages=turns, max_tokens=16, temperature=0)
print(reply.choices[0].finish_reason, reply.usage.prompt_tokens, repr(reply.choices[0].message.content))
"""


@pytest.fixture(scope="module")
def python(request) -> Path:
    chosen = request.config.getoption("--vllm")
    if chosen is None:
        pytest.skip("needs an environment with vLLM: --vllm=PATH/bin/python")
    return Path(chosen)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def run(request, place: Path, python: Path) -> Config:
    """The trained `tiny`."""
    chosen = request.config.getoption("--served-run")
    if chosen is None:
        command = [sys.executable, "-m", "train", "train", "run.name=tiny", f"run.dir={place}", "wandb.mode=disabled"]
        subprocess.run(command, cwd=ROOT, check=True)
    return load_config(checkpoint_of(Path(chosen or place / "tiny")))


@pytest.fixture(scope="module")
def exported(run: Config, place: Path) -> Path:
    return export_run(run, place / "exported", dtype="bfloat16", max_length=LENGTH)


@pytest.fixture(scope="module")
def documents(run: Config) -> list[list[int]]:
    """The beginnings of held-out documents."""
    found = Corpus.open(embedded_corpus(run.data)).documents("heldout")
    return [x[:TEXT_TOKENS].tolist() for x in islice((x for x in found if len(x) > TEXT_TOKENS), PROMPTS)]


@pytest.fixture(scope="module")
def ours(exported: Path, place: Path, documents: list[list[int]]) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """Log-probabilities of the texts, likeliest continuations of the prompts, and what those were chosen by."""
    reference = checkpoint_of(import_as(exported, place / "runs", "served"))
    prompts = [document[:PROMPT_TOKENS] for document in documents]
    of_texts, tokens, chosen_by = run_ranks(answer, 1, reference, documents[:TEXTS], prompts, NEW_TOKENS, timeout=900)[
        0
    ]
    return np.array(of_texts), tokens, chosen_by


@pytest.fixture(scope="module")
def plain(python: Path, exported: Path, place: Path) -> Iterator[Server]:
    with serve(python, exported, place / "plain.log", LENGTH) as server:
        yield server


def compare_text(server: Server, documents: list[list[int]], ours, what: str) -> None:
    """Texts are equal up to a near tie, where either token may come first."""
    _, tokens, chosen_by = ours
    same = 0
    for row, document in enumerate(documents):
        theirs = server.greedy(document[:PROMPT_TOKENS], NEW_TOKENS)
        assert len(theirs) == NEW_TOKENS
        place = next((i for i in range(NEW_TOKENS) if theirs[i] != tokens[row][i]), NEW_TOKENS)
        same += place
        if place < NEW_TOKENS:
            scores = chosen_by[row, place]
            margin = float(scores[tokens[row][place]] - scores[theirs[place]])
            print(f"{what}: prompt {row} differs from its token {place} on, where ours led by {margin:.3f} nats")
            assert margin <= NEAR_TIE
    print(f"{what}: {same} of {len(documents) * NEW_TOKENS} tokens before the first difference of each text")


def test_log_probabilities(plain: Server, documents: list[list[int]], ours) -> None:
    theirs = np.array([plain.prompt_logprobs(document) for document in documents[:TEXTS]])
    difference = np.abs(theirs - ours[0])
    print(
        f"log-probabilities of {difference.size} held-out tokens: mean |difference| {difference.mean():.4f}, largest "
        f"{difference.max():.3f}; mean loss ours {-ours[0].mean():.4f}, vLLM {-theirs.mean():.4f}"
    )
    assert difference.size == 1000
    assert difference.mean() <= MEAN_DIFFERENCE


def test_greedy_text(plain: Server, documents: list[list[int]], ours) -> None:
    compare_text(plain, documents, ours, "without drafts")


def test_a_chat_through_the_openai_client(plain: Server, python: Path) -> None:
    result = subprocess.run([python, "-c", CHAT, plain.url, NAME], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    print("chat:", result.stdout.strip())
    reason, prompt_tokens, _ = result.stdout.split(maxsplit=2)
    assert reason in ("length", "stop") and int(prompt_tokens) > 5


def test_greedy_text_with_drafts(python: Path, exported: Path, place: Path, documents: list[list[int]], ours) -> None:
    with serve(python, exported, place / "drafts.log", LENGTH, drafts=2) as server:
        compare_text(server, documents, ours, "with drafts")
        found = server.drafts()
    rates = [found[f"accepted_tokens_per_pos/{position}"] / found["drafts"] for position in range(2)]
    print(f"with drafts: {found['drafts']:.0f} drafts, accepted by position {rates}")
    assert rates[0] > 0.2, "a trained MTP layer is often right"


@pytest.mark.parametrize("drafts", [2, 3])
def test_drafts_are_accepted_as_often_as_ours(
    run: Config, python: Path, exported: Path, place: Path, drafts: int
) -> None:
    """Token by token, on the same held-out prompts in bfloat16: what `evaluate` says is what serving will see."""
    output = place / f"acceptance-{drafts}.json"
    asked = [f"draft={drafts}", f"prompts={DRAFTED}", "dtype=bfloat16", "samples=2", f"output={output}"]
    command = [sys.executable, "-m", "train", "evaluate", f"run.name={run.run.name}", f"run.dir={run.run.dir}", *asked]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NPROC": "1"}, check=True)
    ours = json.loads(output.read_text())["drafts"]
    with serve(python, exported, place / f"acceptance-{drafts}.log", LENGTH, drafts) as server:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(server.greedy, ours["prompts"], map(len, ours["texts"])))
        found = server.drafts()
    theirs = [found[f"accepted_tokens_per_pos/{position}"] / found["drafts"] for position in range(drafts)]
    print(
        f"{len(ours['prompts'])} prompts; {sum(ours['rounds'])} drafts ours, {found['drafts']:.0f} vLLM; accepted up "
        f"to each token: ours {ours['cumulative']}, vLLM {theirs}"
    )
    # Texts part at near ties of bfloat16; a share of some thousand drafts has a standard deviation of 0.7 points.
    assert theirs == pytest.approx(ours["cumulative"], abs=0.02)


SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    attention_heads=4,
    key_value_heads=2,
    head_dim=32,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=64,
    linear_value_dim=64,
    experts=16,
    experts_per_token=4,
    expert_size=32,
    shared_expert_size=32,
    dtype="bfloat16",
)


def bigram(from_embedding: bool) -> dict[str, torch.Tensor]:
    """Our weights of a model whose layers add nothing: the next token follows from the last one alone.

    Its MTP layer hands on the embedding of the drafted token, as the trunk would, or the trunk's state instead.
    """
    weights = telling(SMALL)
    silent = ("out_proj.weight", "linear_proj.weight", "experts.weight2", "linear_fc2.weight", "norm.weight")
    for name, tensor in weights.items():
        if name.endswith(silent):
            tensor.zero_()
    whole, nothing = torch.eye(SMALL.hidden_size), torch.zeros(SMALL.hidden_size, SMALL.hidden_size)
    halves = [whole, nothing] if from_embedding else [nothing, whole]
    weights["mtp.layers.0.eh_proj.weight"] = torch.cat(halves, dim=1).bfloat16()
    return weights


@pytest.mark.parametrize(("from_embedding", "least", "most"), [(True, 1.0, 1.0), (False, 0.0, 0.05)])
def test_drafts_of_a_bigram_model(python: Path, place: Path, from_embedding: bool, least: float, most: float) -> None:
    name = f"bigram-{from_embedding}"
    (place / name).mkdir()
    run = make_run(place / name, name, SMALL, make_corpus(place / name))
    add_checkpoint(run.run.path, bigram(from_embedding))
    out = export_run(run, place / name / "out", max_length=LENGTH)
    with serve(python, out, place / f"{name}.log", LENGTH, drafts=2) as server:
        for start in range(4):
            server.greedy([start + 1, start + 100], 24)
        found = server.drafts()
    rate = found["accepted_tokens"] / found["draft_tokens"]
    print(f"{name}: {found['accepted_tokens']:.0f} of {found['draft_tokens']:.0f} drafted tokens accepted")
    assert found["draft_tokens"] >= 20
    assert least <= rate <= most
