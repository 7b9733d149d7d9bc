"""What a save costs a run that goes on: for how long training stands still, how fast files come, what memory stays.

    torchrun --standalone --nproc-per-node=2 -m tests.bench.save_cost [-cn tiny] [--every 5] [--saves 6] [key=value ...]

Trains on random tokens, first without saves, then with one every so many steps, and prints one line each; then a plain
file of a checkpoint's size, written by one process to the same disk, as the yardstick of its rate. The files go to
``run.dir`` (default: a new directory of the machine's temporary one, which is removed); each checkpoint is deleted when
the next one but one begins, so that there need be room for two.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from data.order.batches import Batch
from model.init import initialise
from parallel import groups as process_groups
from parallel.checkpoint.digest import begin_sync, sync
from parallel.collectives import from_first
from parallel.topology import resolve
from train.__main__ import compose
from train.job.build import Job, build_chunks, engine_of, gpu_or_cpu
from train.job.checkpoint import Checkpoints
from train.job.footprint import planned_vocab
from train.job.shelf import Shelf
from train.loop import train_step
from train.measure.bench import random_batches
from train.settings.run import Config

WARM_UP = 3
YARDSTICK_BYTES = 2**23  # of a write to the plain file


def _job(config: Config) -> Job:
    """A process's part of the job, without a corpus."""
    device = gpu_or_cpu(config)
    process_groups.start(device)
    topology = resolve(config.parallel, config.model, torch.distributed.get_world_size())
    groups, vocab_size = process_groups.lay_out(topology), planned_vocab(config, topology)
    with torch.device(device):
        chunks = build_chunks(config, topology, groups, vocab_size)
    for chunk in chunks:
        initialise(chunk, chunk.sharded_state_dict(), config.seed)
    return Job(config, topology, groups, device, None, chunks)


def _memory(device: torch.device) -> str:
    host = psutil.Process().memory_info().rss / 1e9
    if device.type != "cuda":
        return f"{host:.3f} GB of host memory"
    held, peak = torch.cuda.memory_allocated(device) / 1e9, torch.cuda.max_memory_allocated(device) / 1e9
    return f"{host:.3f} GB of host memory, {held:.3f} GB of GPU memory, {peak:.3f} GB at most"


class _Run:
    """Steps over the same random batches, with saves between them."""

    def __init__(self, job: Job) -> None:
        self.job, self.engine = job, engine_of(job.chunks, job.config, job.groups, job.device)
        rows, length = job.config.batch.global_ // job.topology.data, job.config.data.seq_length
        tokens = random_batches(rows, length, job.vocab_size, 1)[0].cpu()
        documents = torch.zeros_like(tokens, dtype=torch.int32)
        micro = job.config.batch.micro
        self.settle: Callable[[], None] | None = None
        self.batches = [Batch(*parts) for parts in zip(tokens.split(micro), documents.split(micro), strict=True)]

    def step(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        train_step(self.job, self.engine, self.batches, 1e-4, settle=self.settle)
        if self.job.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def _delete(job: Job, shelf: Shelf) -> None:
    """Makes room, also while another one is being written."""
    if job.is_first:
        for step in shelf.steps():
            shelf.delete(step)


def _disk_seconds(path: Path, size: int) -> float:
    """Seconds until a plain file of so many bytes, written by one thread, is on the disk, which begins at once."""
    block, done, begin = os.urandom(YARDSTICK_BYTES), 0, time.perf_counter()
    with path.open("wb", buffering=0) as raw:
        while done < size:
            written = raw.write(block[: size - done])
            begin_sync(raw.fileno(), done, written)
            done += written
        sync(raw)
    seconds = time.perf_counter() - begin
    path.unlink()
    return seconds


@dataclass
class _Save:
    """What one save cost: seconds for which training stood still, and those that its writer took.

    Attributes:
        start: until it had begun, without ``waited``, for the save before it. settle: until it was copied. finish: when
            its files were there; at the end of all also until they were. memory: of the host afterwards, in GB.
    """

    step: int
    start: float = 0.0
    waited: float = 0.0
    settle: float = 0.0
    finish: float = 0.0
    writing: float = 0.0
    memory: float = 0.0

    def line(self, size: int) -> str:
        return (
            f"save of step {self.step}: blocked {self.start:.4f} s to start, {self.waited:.4f} s by the save before, "
            f"{self.settle:.4f} s until it was copied, {self.finish:.4f} s to finish; its writer took "
            f"{self.writing:.3f} s, {size / self.writing / 1e9:.3f} GB/s; {self.memory:.3f} GB of host memory then"
        )


class _Saves:
    """Saves of a run with the cost of each, whenever it is finished."""

    def __init__(self, run: _Run) -> None:
        self.run, self.done = run, list[_Save]()
        self.checkpoints, self.shelf = Checkpoints(run.job, run.engine), Shelf(run.job.config.run.checkpoints)
        self._save: _Save | None = None

    def save(self, step: int) -> None:
        """Begins one, after that of before."""
        before, waited = self.checkpoints.blocked, self.checkpoints.waited
        last, self._save = self._save, _Save(step)
        self.checkpoints.save(step, {})
        self._save.waited = self.checkpoints.waited - waited
        self._save.start = self.checkpoints.blocked - before - self._save.waited
        self._note(last)

    def settle(self) -> None:
        """What the loop calls before the optimizer."""
        before = self.checkpoints.blocked
        self.checkpoints.settle()
        if self._save:
            self._save.settle += self.checkpoints.blocked - before

    def finish(self, how: Callable[[], None]) -> None:
        """What the loop calls between steps: poll, or wait at the end."""
        before = self.checkpoints.blocked
        how()
        if self._save:
            self._save.finish += self.checkpoints.blocked - before
        if not self.checkpoints.busy:
            last, self._save = self._save, None
            self._note(last)

    def _note(self, save: _Save | None) -> None:
        if save:
            assert not self.checkpoints.failed, self.checkpoints.failed
            save.writing = from_first(lambda: self.checkpoints.writing_seconds)
            save.memory = psutil.Process().memory_info().rss / 1e9
            self.done.append(save)


def _measure(run: _Run, every: int, saves: int, say: Callable[[str], None]) -> None:
    costs = _Saves(run)
    checkpoints, shelf = costs.checkpoints, costs.shelf
    for _ in range(WARM_UP):
        run.step()
    begin = time.perf_counter()
    plain = [run.step() for _ in range(every * saves)]
    without = time.perf_counter() - begin
    say(f"a step without saves: {statistics.median(plain) * 1e3:.1f} ms; {_memory(run.job.device)}")
    costs.save(0)  # plans, validates
    costs.finish(checkpoints.wait)
    # Asked of the first process alone, which deletes it in a moment.
    size = from_first(lambda: sum(file.stat().st_size for file in shelf.path(shelf.steps()[-1]).iterdir()))
    say(f"the first: {costs.done.pop().line(size)}")
    checkpoints.blocked, deleting = 0.0, 0.0
    run.settle = costs.settle
    begin = time.perf_counter()
    for number in range(1, saves + 1):
        started = time.perf_counter()
        _delete(run.job, shelf)
        deleting += time.perf_counter() - started
        costs.save(number * every)
        for _ in range(every):
            run.step()
            costs.finish(checkpoints.poll)
    steps, while_training = time.perf_counter() - begin - deleting, checkpoints.blocked
    costs.finish(checkpoints.wait)
    for cost in costs.done:
        say(cost.line(size))
    share = while_training / (steps - while_training)
    say(
        f"{saves} saves of {size / 1e9:.3f} GB, one every {every} steps: {while_training / saves:.4f} s blocked by "
        f"each, {share:.2%} of the steps' time; {checkpoints.blocked - while_training:.3f} s at the end for the last"
    )
    say(f"{every * saves} steps: {without:.2f} s without, {steps:.2f} s with saves (writers share the processor)")
    say(f"afterwards: {_memory(run.job.device)}")
    _delete(run.job, shelf)
    seconds = from_first(lambda: _disk_seconds(shelf.root / "yardstick", size))
    say(f"the disk: a plain file of {size / 1e9:.3f} GB in {seconds:.3f} s, {size / seconds / 1e9:.3f} GB/s")


def main() -> None:
    """Prints what was measured, on the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-cn", default="tiny", help="the recipe")
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    parser.add_argument("--saves", type=int, default=6, help="how many saves")
    asked, settings = parser.parse_known_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, as above")
    place = Path(tempfile.gettempdir()) / f"save_cost_{os.environ['MASTER_PORT']}"  # the same on every process
    config = compose(["-cn", asked.cn, f"run.dir={place}", "run.keep=1", *settings], planned=True)
    job = _job(config)

    def say(text: str) -> None:
        if job.is_first:
            print(text, flush=True)

    where = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "CPU"
    say(f"{asked.cn} on {job.topology.world} x {where}, torch {torch.__version__}, {job.topology}")
    try:
        _measure(_Run(job), asked.every, asked.saves, say)
    finally:
        process_groups.stop()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
