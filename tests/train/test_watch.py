"""Where time goes, who is late, and damage that nothing else would show."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engine_megatron import MegatronEngine
from tests.faults.harness import checkpoints, losses, start
from tests.faults.runs import campaign_config, make_corpus
from train.watch.goodput import DATA, KINDS, REDONE, TRAINING, Clock, seconds
from train.watch.hang import late


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@dataclass(frozen=True)
class FlipsWeight:
    """A bit of a weight of rank 1 flips when replicas are about to be compared."""

    def __call__(self, rank: int) -> None:
        real = MegatronEngine.gather_weights

        def damaged(engine: MegatronEngine) -> None:
            real(engine)
            weight: Any = dict(engine.chunks[0].named_parameters())["decoder.final_norm.weight"]
            if rank == 1:
                weight.data.view(torch.int32)[3] ^= 1

        MegatronEngine.gather_weights = damaged


@dataclass(frozen=True)
class ForgetsBits:
    """Rank 1 adds its gradients up to another sum each time."""

    def __call__(self, rank: int) -> None:
        sums = iter(range(100))
        if rank == 1:
            MegatronEngine.gradient_bits = lambda engine: next(sums)


# A save is overdue after each step.
LOOKS = {"save_minutes": 1e-5, "deterministic": True}


def test_looking_twice_changes_nothing_and_finds_what_is_damaged(tmp_path, corpus):
    run = {"steps": 3, "save_every": 0, "eval_every": 0, "verify_every": 2, "replicas_every": 2}
    looks = campaign_config(tmp_path, "looks", corpus, run=run | LOOKS)
    plain = campaign_config(tmp_path, "plain", corpus, run=run | {"verify_every": 0, "replicas_every": 0})
    for config in (looks, plain):
        assert start(config, 2, config.run.path / "log").wait() == 0
    assert losses(looks.run.path) == losses(plain.run.path)
    assert (checkpoints(looks.run.path), checkpoints(plain.run.path)) == ([1, 2, 3], [3])
    line = json.loads((looks.run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line["goodput"] < 1 and line["wall_seconds/starting"] > 0 and line["wall_seconds/redone"] == 0
    for inject, says in (
        (FlipsWeight(), "weights differ between processes that hold the same ones: decoder.final_norm.weight"),
        (ForgetsBits(), "process 1 computed a step twice and got other gradients"),
    ):
        broken = campaign_config(tmp_path, type(inject).__name__, corpus, run=run)
        assert start(broken, 2, broken.run.path / "log", inject).wait() == 1
        assert says in (broken.run.path / "log").read_text()


def test_the_clock_adds_up_over_starts():
    times = iter([10.0, 12.0, 15.0, 15.0, 16.0, 20.0, 20.0])
    clock = Clock(8.0, {TRAINING: 7.0, "wall": 8.0}, now=lambda: next(times))
    clock.started()
    for kind in (TRAINING, REDONE):
        with clock.spent(kind):
            pass
    totals = clock.totals()
    assert (totals["starting"], totals[TRAINING], totals[REDONE], totals[DATA]) == (2.0, 10.0, 1.0, 0.0)
    # One second before this start, two between its begin and its first step's, four after its last one's are neither.
    assert totals["wall"] == 8.0 + 12.0 == sum(totals[kind] for kind in KINDS)
    shown = clock.metrics()
    assert shown["goodput"] == 0.5 == shown["wall_seconds/training"] / sum(shown[seconds(kind)] for kind in KINDS)


def test_the_late_process_is_named():
    note = {"step": 7, "doing": "training", "moves": 14, "host": "node3", "pid": 4}
    behind = note | {"moves": 13}
    assert "process 1 gives no sign of life" in late([note, None], [1])
    assert "process 1 on node3, pid 4, last at step 7 gives no sign of life" in late([note, note], [1])
    assert late([note, behind, note], []) == "nothing moves, and all wait for process 1"
    assert "equally far: training" in late([note, note], [])
