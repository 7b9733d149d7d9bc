"""From each layout to each other one: the optimizer's moments tensor by tensor, the losses of the steps after it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from model.config import BalanceConfig, ModelConfig
from parallel import groups as process_groups
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, PIPELINED, build_tiny, start_engine, tiny_config
from tests.train.resized import train_steps
from tests.train.test_resize import LOSSES, held_pieces, whole
from train.job.build import Job
from train.job.checkpoint import load, save
from train.job.directory import COUNTS
from train.job.shelf import Shelf
from train.settings.run import BatchConfig, RunConfig

ROWS, SAVED = 4, 1
LAYOUTS: dict[str, tuple[ParallelConfig, ModelConfig]] = {
    "DP2": (ParallelConfig(expert=1), MODEL),
    "TP2": (ParallelConfig(tensor=2, expert=1, expert_tensor=2), MODEL),
    "EP2": (ParallelConfig(expert=2), MODEL),
    "PP2": (ParallelConfig(pipeline=2), PIPELINED),
    "CP2": (ParallelConfig(context=2, expert=1), MODEL),
    "TP2 x EP2": (ParallelConfig(tensor=2, expert=2), MODEL),
}
NAMES = list(LAYOUTS)
RING = list(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))  # each once to save and once to load
PAIRS = [(one, other) for one in NAMES for other in NAMES if one != other]


def _job(name: str, runs: Path) -> Job:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel, model = LAYOUTS[name]
    balance = BalanceConfig(weight=0.01, z_weight=0.001, mode="exact")  # the estimate of `online` follows the layout
    run = RunConfig(name=name.replace(" ", ""), dir=str(runs))
    run.path.mkdir(exist_ok=True)
    job = build_tiny(tiny_config(model, parallel, run=run, balance=balance))
    return replace(job, config=replace(job.config, batch=BatchConfig(global_=ROWS, micro=1)))


def _matrix(runs: Path, pairs: list[tuple[str, str]], steps: int) -> dict:
    """Saves on each layout and goes on there; loads on the others and goes on there."""
    process_groups.start(torch.device("cpu"))
    found, shelves = {}, {}
    for name in sorted({one for one, _ in pairs}):
        job = _job(name, runs)
        engine = start_engine(job)
        train_steps(job, engine, 1, SAVED)
        save(job, engine, SAVED, {})
        shelves[name] = Shelf(job.config.run.checkpoints)
        found[name, name] = held_pieces(engine), train_steps(job, engine, SAVED + 1, SAVED + steps)
    for one, other in pairs:
        job = _job(other, runs)
        engine = start_engine(job)
        load(engine, shelves[one].path(SAVED))
        found[one, other] = held_pieces(engine), train_steps(job, engine, SAVED + 1, SAVED + steps)
    return found


def _compare(ranks: list[dict], pairs: list[tuple[str, str]], tolerance: float) -> None:
    worst = {}
    for one, other in pairs:
        before, after = (whole([rank[key][0] for rank in ranks]) for key in ((one, one), (one, other)))
        assert before.keys() == after.keys()
        moments = [key for key in before if key.startswith("optimizer.exp_avg")]
        weights = [key for key in before if not key.startswith("optimizer.") and not key.endswith(COUNTS)]
        assert len(moments) == 2 * len(weights) > 60
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), f"{one} to {other}: {key}"
        expected, found = ranks[0][one, one][1], ranks[0][one, other][1]
        for step, (there, here) in enumerate(zip(expected, found, strict=True), start=SAVED + 1):
            for name in LOSSES:
                assert here[name] == pytest.approx(there[name], rel=tolerance), f"{one} to {other}: {name} of {step}"
                worst[one, other] = max(worst.get((one, other), 0.0), abs(here[name] / there[name] - 1))
    print(json.dumps({" to ".join(pair): f"{value:.1e}" for pair, value in worst.items()}, indent=1))


def test_from_each_layout_to_the_next(tmp_path):
    ranks = run_ranks(_matrix, 2, tmp_path, RING, 2, timeout=300)
    # Sums over ranks are taken in another order, and AdamW divides small gradients by their own size: see test_resize.
    _compare(ranks, RING, tolerance=1e-6)


@pytest.mark.slow  # six layouts to five others, ten steps each: minutes
def test_from_each_layout_to_each_other(tmp_path):
    ranks = run_ranks(_matrix, 2, tmp_path, PAIRS, 10, timeout=1500)
    _compare(ranks, PAIRS, tolerance=1e-5)
