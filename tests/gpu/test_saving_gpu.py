"""Saves from a GPU while it trains on: copied beside the computation, written by a fork that cannot use CUDA."""

import faulthandler
import gc
import pickle
import time
from pathlib import Path

import pytest
import torch

from model.config import BalanceConfig
from parallel import groups as process_groups
from parallel.engine import Engine
from parallel.topology import resolve
from tests.dist import RankError, run_ranks
from tests.gpu.test_kernels_several import SMALL
from tests.parallel.tiny import VOCAB, fill, random_batch, start_engine, tiny_config
from tests.train.test_saving import numbers_of
from train.job.build import Job, build_chunks
from train.job.checkpoint import Checkpoints, load
from train.job.shelf import Shelf
from train.loop import train_step
from train.settings.run import RunConfig
from train.watch.hang import Watchdog

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def _job(runs: Path) -> Job:
    device = process_groups.local_device()
    process_groups.start(device, timeout_minutes=2)
    run = RunConfig(name="saving", dir=str(runs), keep=0)
    run.path.mkdir()
    config = tiny_config(SMALL, run=run, balance=BalanceConfig(weight=0.01, bias_rate=1e-3))
    topology = resolve(config.parallel, config.model, 1)
    groups = process_groups.lay_out(topology, timeout_minutes=2)
    with torch.device(device):
        chunks = build_chunks(config, topology, groups, VOCAB)
    job = Job(config, topology, groups, device, None, chunks)
    fill(job)
    return job


def _step(job: Job, engine: Engine, seed: int, settle=None) -> None:
    train_step(job, engine, [random_batch(8, seed)], 1e-2, settle=settle)


def _held() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _saves(runs: Path) -> dict:
    job = _job(runs)
    engine = start_engine(job)
    checkpoints, saved, held = Checkpoints(job, engine), {}, []
    checkpoints.save(0, {})  # before the first step
    checkpoints.wait()
    for step in (1, 2, 3):
        _step(job, engine, step)
        saved[step] = [x.cpu() for x in numbers_of(engine)]
        checkpoints.save(step, {})
        checkpoints.poll()
        _step(job, engine, 10 + step, checkpoints.settle)  # changes in place what is being saved
        checkpoints.poll()
        checkpoints.wait()
        held.append(_held())
    same = {}
    for step, numbers in saved.items():
        load(engine, Shelf(job.config.run.checkpoints).path(step))
        loaded = [x.cpu() for x in numbers_of(engine)]
        same[step] = len(loaded) == len(numbers) and all(map(torch.equal, loaded, numbers))
    return {
        "same": same,
        "failed": checkpoints.failed,
        "held": held,
        "steps": Shelf(job.config.run.checkpoints).steps(),
    }


def test_what_a_gpu_saves_is_the_state_of_its_step_and_memory_comes_back(tmp_path: Path):
    (found,) = run_ranks(_saves, 1, tmp_path, timeout=280, gpus=True)
    assert found["failed"] == "" and found["steps"] == [0, 1, 2, 3]
    assert found["same"] == {1: True, 2: True, 3: True}
    first, second, third = found["held"]
    # Five kilobytes come once with the second save; a copy of what was saved would be 190 MB.
    assert third == second and second - first < 2**20, "GPU memory after each save"


def _hangs(run: Path) -> None:
    faulthandler.dump_traceback_later(170)  # where it stands, should it not be ended
    job = _job(run / "runs")
    torch.distributed.all_reduce(torch.ones(4, device=job.device), group=job.groups.dp)
    process_groups.set_timeout(0.1)
    watchdog = Watchdog(run, 0.1, 0.1)
    watchdog.beat(3, "training")
    time.sleep(180)


def test_a_gpu_that_hangs_leaves_stacks_and_nccls_flight_record(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(RankError, match="exit code 1"):
        run_ranks(_hangs, 1, tmp_path, timeout=200, gpus=True)
    (stacks,) = (tmp_path / "logs").glob("hang_*.txt")
    assert "_hangs" in stacks.read_text()
    (record,) = (tmp_path / "logs").glob("hang_*.flight")
    entries = pickle.loads(record.read_bytes())["entries"]
    assert any("all_reduce" in entry["profiling_name"] for entry in entries), entries
