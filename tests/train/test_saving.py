"""Saves while training goes on: what is saved is the state of its step, and a save that fails costs nothing else."""

import contextlib
import io
import os
import pickle
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from model.config import MtpConfig
from parallel import groups as process_groups
from parallel.checkpoint import host_memory, saving, stored, writer
from parallel.collectives import from_first
from parallel.engine import Engine
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, build_tiny, part_of, random_batch, start_engine, tiny_config
from train.job import checkpoint
from train.job.build import Job
from train.job.checkpoint import Checkpoints, load, starting_point
from train.job.mirror import Copier
from train.job.pace import pace_warning
from train.job.shelf import Shelf, why_broken
from train.loop import train_step
from train.settings.run import BatchConfig, RunConfig
from train.settings.tree import ConfigError

ROWS, SAVES = 4, 6


def _job(runs: Path) -> Job:
    run = RunConfig(name="saving", dir=str(runs), keep=0)
    run.path.mkdir(exist_ok=True)
    model = replace(MODEL, pattern="GE*E")
    job = build_tiny(tiny_config(model, ParallelConfig(expert=2), run=run, mtp=MtpConfig(steps=1)))
    return replace(job, config=replace(job.config, batch=BatchConfig(global_=ROWS, micro=ROWS // 2)))


def _is_tensor(data: object) -> bool:
    return isinstance(data, torch.Tensor)


class _Late(writer.Staging):
    """A copy that is done at the last moment that it may be, as a GPU's could be."""

    def __init__(self, buckets: list[writer.Bucket], steady: Collection[int]) -> None:
        self._steady, self.copying = steady, True
        sizes = [(x.nbytes, writer.storage_of(x) in steady) for _, items in buckets for _, x in items if _is_tensor(x)]
        assert sum(size for size, rests in sizes if rests) > 0.9 * sum(size for size, _ in sizes), "little can wait"
        self._buckets = [(name, [(item, self._copy(x, False)) for item, x in items]) for name, items in buckets]

    def _copy(self, data: object, of_steady: bool) -> object:
        is_meant = _is_tensor(data) and (writer.storage_of(data) in self._steady) == of_steady
        return data.clone() if is_meant else data

    def finish(self) -> list[writer.Bucket]:
        return [(name, [(item, self._copy(x, True)) for item, x in items]) for name, items in self._buckets]


def _step(job: Job, engine: Engine, step: int, settle: Callable[[], None] | None = None) -> None:
    train_step(job, engine, [part_of(random_batch(ROWS, step), job.groups.dp.rank(), 2)], 1e-2, settle=settle)


def numbers_of(engine: Engine) -> list[torch.Tensor]:
    """Every tensor of the model and the optimizer that this process holds, copied."""
    state = engine.sharded_state_dict(is_loading=False)
    entries = [*state["model0"].values(), *(piece for pieces in state["optimizer"].values() for piece in pieces)]
    return [entry.data.detach().clone() for entry in entries if isinstance(entry.data, torch.Tensor)]


def _while_training(job: Job, engine: Engine, checkpoints: Checkpoints) -> dict:
    """Three saves with steps between them; each step's numbers, and what is loaded of the saves afterwards."""
    saved, polls = {}, 0
    for step in (1, 2, 3):
        _step(job, engine, step)
        saved[step] = numbers_of(engine)
        with pytest.MonkeyPatch.context() as patch:
            if step == 2:
                patch.setattr(saving, "Staging", _Late)
            checkpoints.save(step, {})
        checkpoints.poll()  # as the loop does before it takes the next step
        _step(job, engine, 10 + step, checkpoints.settle)  # overwrites in place what is being written
        checkpoints.poll()
        polls += not checkpoints.busy
    checkpoints.wait()
    same = {}
    for step, numbers in saved.items():
        load(engine, Shelf(job.config.run.checkpoints).path(step))
        loaded = numbers_of(engine)
        same[step] = len(loaded) == len(numbers) and all(map(torch.equal, loaded, numbers))
    return {"same": same, "failed": checkpoints.failed, "blocked": checkpoints.blocked}


def _refuse(shelf: Shelf, step: int) -> Path:
    raise PermissionError(13, "Permission denied")


def _no_process(self: object) -> None:
    raise OSError(12, "Cannot allocate memory")


def _failures(job: Job, engine: Engine, checkpoints: Checkpoints) -> dict[str, str]:
    """What the processes hear of saves that one of them cannot write."""
    keep, found = writer._write_file, {}

    def full(directory: Path, bucket: writer.Bucket) -> writer.Written:
        raise OSError(28, "No space left on device")

    def killed(directory: Path, bucket: writer.Bucket) -> writer.Written:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("the process is dead")

    for step, (name, broken) in enumerate({"full disk": full, "killed writer": killed}.items(), start=4):
        writer._write_file = broken if job.rank == 1 else keep  # the writers are forks of this process
        checkpoints.save(step, {})
        checkpoints.wait()
        found[name] = checkpoints.failed
    writer._write_file = keep
    with pytest.MonkeyPatch.context() as patch:
        if job.rank == 1:
            patch.setattr("multiprocessing.context.ForkProcess.start", _no_process)
        checkpoints.save(6, {})
        checkpoints.wait()
        found["no process"] = checkpoints.failed
        from_first(lambda: Shelf(job.config.run.checkpoints).delete(6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.job.shelf.shutil.disk_usage", lambda path: SimpleNamespace(free=1))
        patch.setattr(Shelf, "delete", lambda self, step: None)
        checkpoints.save(6, {})
        found["no room"] = checkpoints.failed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Shelf, "prepare", lambda self, step: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
        checkpoints.save(6, {})
        found["read-only"] = checkpoints.failed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(job.config.run.path / "no temporary directory"))
        checkpoints.save(7, {})
        checkpoints.wait()
    found["afterwards"] = checkpoints.failed
    return found


def _impatient(job: Job, engine: Engine) -> tuple[list[str], float, float]:
    """What is said of saves that follow each other at once; seconds waited, and those of the last save."""
    often = replace(job, config=replace(job.config, run=replace(job.config.run, save_every=1)))
    checkpoints, shelf, said = Checkpoints(often, engine), Shelf(job.config.run.checkpoints), io.StringIO()
    with contextlib.redirect_stdout(said):
        for step in (9, 10, 11):
            checkpoints.save(step, {})
        checkpoints.wait()
    for step in (9, 10, 11):
        from_first(partial(shelf.delete, step))
    told = [line for line in said.getvalue().splitlines() if line.startswith("WARNING")]
    return told, checkpoints.waited, checkpoints.seconds


def _memory_over_saves(engine: Engine, checkpoints: Checkpoints, shelf: Shelf) -> list[int]:
    """Bytes of this process after each of some saves, and those of its part of the state."""
    found = []
    for _ in range(SAVES):
        checkpoints.save(8, {})
        checkpoints.wait()
        found.append(psutil.Process().memory_info().rss)
    torch.distributed.barrier()
    from_first(lambda: shelf.delete(8))
    return [*found, sum(x.nbytes for x in numbers_of(engine))]


def _met_while_copying(job: Job, engine: Engine, copies: int, patience_s: float) -> int:
    """How often a process was told that all wait for the first one's copy, which is done when asked so often."""
    checkpoints, met, left = Checkpoints(job, engine), [], iter(range(copies * job.is_first))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "COPY_POLL_S", 0.01)
        patch.setattr(Copier, "finish", lambda self, newest: next(left, None) is None)
        checkpoints.close(lambda: met.append(1), patience_s)
    return len(met)


def _fetched(job: Job) -> tuple[Path, int]:
    """Where a run without a checkpoint begins, and how often all met while the first one fetched that."""
    met, meet = [], checkpoint.max_over_all

    def fetch(run: RunConfig, shelf: Shelf) -> Path:
        time.sleep(0.2)
        return shelf.path(7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "COPY_POLL_S", 0.01)
        patch.setattr(checkpoint, "fetch_lost", fetch)
        patch.setattr(checkpoint, "max_over_all", lambda x: met.append(1) or meet(x))
        return checkpoint.newest_whole(job), len(met)


def _saves(runs: Path) -> dict:
    process_groups.start(torch.device("cpu"))
    job = _job(runs)
    engine = start_engine(job)
    checkpoints, shelf = Checkpoints(job, engine), Shelf(job.config.run.checkpoints)
    found = {"training": _while_training(job, engine, checkpoints)}
    found["failures"] = _failures(job, engine, checkpoints)
    found["impatient"] = _impatient(job, engine)
    found["memory"] = _memory_over_saves(engine, checkpoints, shelf)
    found["met"] = [_met_while_copying(job, engine, *how) for how in ((3, 60.0), (10**6, 0.1))]
    found["kept"] = shelf.steps(), sorted(path.name for path in shelf.root.iterdir() if path.suffix)
    found["whole"] = [why_broken(shelf.path(step), deep=True) for step in shelf.steps()]
    torch.distributed.barrier()  # both have read them
    _damage(job, {7: "__1_0.distcp", 3: ".metadata"})
    found["start"] = starting_point(job)
    _damage(job, {2: "__0_0.distcp", 1: "__1_1.distcp"})
    with pytest.raises(ConfigError) as refused:
        starting_point(job)
    found["none whole"] = str(refused.value)
    found["left"] = sorted(path.name for path in shelf.root.iterdir())
    found["fetched"] = _fetched(replace(job, config=replace(job.config, run=RunConfig("other", str(runs), mirror="x"))))
    return found


def _damage(job: Job, files: dict[int, str]) -> None:
    """Flips a bit in a file of each of some checkpoints."""
    torch.distributed.barrier()
    for step, name in files.items() if job.is_first else ():
        path = Shelf(job.config.run.checkpoints).path(step) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks(_saves, 2, tmp_path_factory.mktemp("runs"), timeout=300)


def test_what_is_saved_is_the_state_of_its_step(ranks):
    for rank in ranks:
        assert rank["training"]["same"] == {1: True, 2: True, 3: True}
        assert rank["training"]["failed"] == ""
        assert rank["training"]["blocked"] > 0


def test_a_save_that_one_process_cannot_write_is_told_on_all_and_leaves_nothing(ranks):
    for rank in ranks:
        assert "No space left on device" in rank["failures"]["full disk"]
        assert "the writing process died" in rank["failures"]["killed writer"]
        assert "GB are free, and a checkpoint takes" in rank["failures"]["no room"]
        assert "Permission denied" in rank["failures"]["read-only"]
        assert rank["failures"]["no process"] == "", "the process itself has written"
        assert rank["failures"]["afterwards"] == ""
        assert rank["kept"] == ([1, 2, 3, 7], [])
        assert rank["whole"] == [""] * 4


def test_a_save_that_waits_for_the_one_before_is_told_once_and_its_seconds_counted(ranks):
    for rank, (told, waited, seconds) in enumerate(found["impatient"] for found in ranks):
        assert len(told) == (rank == 0)
        assert waited > 0 and seconds > 0
    assert "choose run.save_every=" in ranks[0]["impatient"][0][0]


def test_what_to_choose_where_saves_come_faster_than_they_are_written():
    every = pace_warning(RunConfig(save_every=5), save_seconds=21.3, step_seconds=2.0)
    assert "one takes 21.3 s, as long as 11 steps" in every
    assert "choose run.save_every=11 or more (it is 5); metrics" in every
    both = pace_warning(RunConfig(save_every=5, save_minutes=0.5), save_seconds=40.0, step_seconds=4.0)
    assert "choose run.save_every=10 or more (it is 5) and run.save_minutes=0.7 or more (it is 0.5); metrics" in both
    # The last save of a run, or one that was asked for, may come soon after another: there is nothing to choose.
    assert pace_warning(RunConfig(save_every=11), save_seconds=21.3, step_seconds=2.0) == ""
    assert pace_warning(RunConfig(), save_seconds=1800.0, step_seconds=2.0) == ""


@pytest.mark.parametrize("make", (lambda x: x, lambda x: x[1:3], lambda x: x[:, 1], lambda x: x.T, lambda x: x[:0]))
def test_what_is_written_of_a_tensor_is_that_alone_and_copied_only_where_it_has_gaps(make):
    tensor = make(torch.arange(20.0).view(4, 5))
    alone = writer._alone(tensor)
    assert torch.equal(alone, tensor)
    assert alone.untyped_storage().nbytes() == tensor.nbytes, "PyTorch would write what lies beside it"
    assert (alone.untyped_storage().data_ptr() == tensor.data_ptr()) == (tensor.is_contiguous() and tensor.numel() > 0)


def test_copies_of_a_gpus_tensors_take_little_more_memory_than_their_numbers(monkeypatch):
    monkeypatch.setattr(host_memory, "BLOCK_BYTES", 2**15)
    shapes = [(), (0, 3), (7,), *[(33, 65)] * 40, (300, 200)]  # many just above a power of two, and one of many blocks
    kinds = (torch.float32, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.bool, torch.int64)
    tensors = [torch.randn(shape).to(kinds[number % len(kinds)]) for number, shape in enumerate(shapes)]
    copies = host_memory.host_copies(tensors, pin=False)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    bits = [(copy.dtype, copy.shape, copy.contiguous().view(-1).view(torch.uint8)) for copy in copies]
    for (dtype, shape, own), tensor in zip(bits, tensors, strict=True):
        assert (dtype, shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(own, tensor.view(-1).view(torch.uint8)), "written over by another one"
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in copies}
    held = sum(1 << (size - 1).bit_length() for size in storages.values())
    own = sum(x.nbytes for x in tensors)
    apart = sum(1 << (x.nbytes - 1).bit_length() for x in tensors if x.nbytes)
    # Left over: the end of each block, smaller than the tensors of that size, and half of the last block.
    assert held < 1.2 * own < 1.5 * own < apart


def test_a_gpus_state_is_written_from_its_copies(monkeypatch, tmp_path):
    """All of the way but the GPU itself, which tests/gpu/test_saving_gpu.py has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(writer, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(writer, "host_copies", lambda tensors, pin: host_memory.host_copies(tensors, pin=not pin))
    state = [torch.randn(5, 7), torch.randn(7, 5).T, torch.arange(3), torch.randn(6, 2)[2:4]]
    wanted = [x.clone() for x in state]
    staging = writer.Staging([("file", list(zip("abcd", state, strict=True)))], {writer.storage_of(state[0])})
    (bucket,) = staging.finish()
    for x in (state[0], *state[2:]):  # that with gaps goes PyTorch's own way, which is none from a CPU to a CPU
        x.zero_()
    assert [item for item, _ in bucket[1]] == list("abcd")
    assert all(torch.equal(copy, x) for (_, copy), x in zip(bucket[1], wanted, strict=True))


def test_all_meet_while_the_first_one_copies_and_give_it_up_in_time(ranks):
    done, given_up = (set(met) for met in zip(*(rank["met"] for rank in ranks), strict=True))
    assert done == {3}
    assert len(given_up) == 1 and 1 < min(given_up) <= 11  # 0.1 s, at least 0.01 s each


def test_memory_comes_back_after_each_save(ranks):
    for rank in ranks:
        *memory, state = rank["memory"]
        # Ten saves of 1.9 MB left 0.6 MB, which was Python's: a copy that stays would be a state for each save.
        assert memory[-1] - memory[1] < state, "a copy of the state, or as much else, stays after a save"


def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_used(ranks):
    for rank in ranks:
        assert rank["start"].name == "step_00000002"
        assert rank["left"] == [
            "step_00000001",
            "step_00000002",
            "step_00000003.broken",
            "step_00000007.broken",
        ]


def test_where_none_is_whole_nothing_begins_anew_and_all_stay(ranks):
    for rank in ranks:
        assert "has no checkpoint that is whole (step 2: __0_0.distcp is not as it was written" in rank["none whole"]
        assert "; step 1: __1_1.distcp is not" in rank["none whole"]
        assert rank["left"][:2] == ["step_00000001", "step_00000002"]


def test_all_meet_while_the_first_one_fetches_a_copy(ranks):
    assert {rank["fetched"][0].name for rank in ranks} == {"step_00000007"}
    assert all(2 < rank["fetched"][1] <= 21 for rank in ranks)  # 0.2 s, at least 0.01 s each


def test_each_file_of_a_checkpoint_is_on_the_disk_before_it_is_called_whole(tmp_path, monkeypatch):
    synced: list[tuple[int, int]] = []

    def note(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fsync", note)
    view = torch.zeros(2**20)[:4]
    item = stored._item(stored.StoredSlice("x", (4,), 0, (4,), torch.float32, lambda: view))
    written = writer._write_file(tmp_path, ("__0_0.distcp", [(item, view)]))
    assert written.digests["__0_0.distcp"].size < 2**12, "all of the storage is in the file, not the tensor alone"
    digests = writer.write_contents(tmp_path, Metadata({}), [written])
    files = list(tmp_path.iterdir())
    assert digests.keys() == {file.name for file in files} and len(files) == 3
    assert {(file.stat().st_ino, file.stat().st_size) for file in files} <= set(synced)


def test_a_writers_torn_report_is_a_failed_save():
    report = io.BytesIO(pickle.dumps(writer.Written(error="x" * 100))[:50])
    assert "the writing process died, and left a report that cannot be read" in writer._outcome(report).error
