"""From each layout to each other one: the optimizer's moments tensor by tensor, the losses of the steps after it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import BalanceConfig, ModelConfig
from parallel import groups as process_groups
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, PIPELINED, build_tiny, leave_layout, start_engine, tiny_config
from tests.train.resized import train_steps
from tests.train.test_resize import LOSSES, held_pieces, whole
from train.job.build import Job
from train.job.checkpoint import load, save
from train.job.directory import COUNTS
from train.job.shelf import Shelf
from train.settings.run import BatchConfig, RunConfig

ROWS, SAVED = 4, 1
# How far a layout may move the losses, in what other micro-batches move them by on the same layout: both only add the
# same numbers up in another order, which AdamW, dividing small gradients by their own size, carries on. Measured over
# two steps: micro-batches 1.0e-6, the ring of layouts 0.5e-7 to 1.5e-7.
TOLERANCE = 2
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
    leave_layout()
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
    found["other sums"] = _in_other_sums(runs, shelves["DP2"], steps)
    for one, other in pairs:
        job = _job(other, runs)
        engine = start_engine(job)
        load(engine, shelves[one].path(SAVED))
        found[one, other] = held_pieces(engine), train_steps(job, engine, SAVED + 1, SAVED + steps)
    return found


def _in_other_sums(runs: Path, shelf: Shelf, steps: int) -> list[dict]:
    """The steps of DP2 with micro-batches twice as large: nothing differs but in which order numbers are added."""
    job = _job("DP2", runs)
    job = replace(job, config=replace(job.config, batch=replace(job.config.batch, micro=2)))
    engine = start_engine(job)
    load(engine, shelf.path(SAVED))
    return train_steps(job, engine, SAVED + 1, SAVED + steps, micro=2)


def _apart(found: list[dict], expected: list[dict]) -> float:
    """The largest relative difference of any loss of any step."""
    pairs = list(zip(found, expected, strict=True))
    return max(abs(here[name] / there[name] - 1) for here, there in pairs for name in LOSSES)


def _compare(ranks: list[dict], pairs: list[tuple[str, str]]) -> None:
    noise = _apart(ranks[0]["other sums"], ranks[0]["DP2", "DP2"][1])
    apart = {}
    for one, other in pairs:
        before, after = (whole([rank[key][0] for rank in ranks]) for key in ((one, one), (one, other)))
        assert before.keys() == after.keys()
        moments = [key for key in before if key.startswith("optimizer.exp_avg")]
        weights = [key for key in before if not key.startswith("optimizer.") and not key.endswith(COUNTS)]
        assert len(moments) == 2 * len(weights) > 60
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), f"{one} to {other}: {key}"
        apart[f"{one} to {other}"] = _apart(ranks[0][one, other][1], ranks[0][one, one][1])
    print(json.dumps({"other micro-batches": noise} | apart, indent=1))
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < TOLERANCE * noise, f"{worst}: {apart[worst]:.1e}, where rounding alone makes {noise:.1e}"


def test_from_each_layout_to_the_next(tmp_path):
    _compare(run_ranks(_matrix, 2, tmp_path, RING, 2, timeout=300), RING)


@pytest.mark.slow  # six layouts to five others, ten steps each: minutes
def test_from_each_layout_to_each_other(tmp_path):
    _compare(run_ranks(_matrix, 2, tmp_path, PAIRS, 10, timeout=1500), PAIRS)
