"""What a save costs a run that goes on: for how long training stands still, how fast files come, what memory stays.

    torchrun --standalone --nproc-per-node=2 -m tests.bench.save_cost [-cn tiny] [--every 5] [--saves 6] [key=value ...]

Trains on random tokens, first without saves, then with one every so many steps, and prints one line each. The files go
to ``run.dir`` (default: a new directory of the machine's temporary one, which is removed); each checkpoint is deleted
before the next one is written, so that there need be room for one.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from data.order.batches import Batch
from model.init import initialise
from parallel import groups as process_groups
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
    """Makes room, while nothing is being written."""
    if job.is_first:
        for step in shelf.steps():
            shelf.delete(step)


def _measure(run: _Run, every: int, saves: int, say) -> None:
    checkpoints, shelf = Checkpoints(run.job, run.engine), Shelf(run.job.config.run.checkpoints)
    for _ in range(WARM_UP):
        run.step()
    begin = time.perf_counter()
    plain = [run.step() for _ in range(every * saves)]
    without = time.perf_counter() - begin
    say(f"a step without saves: {statistics.median(plain) * 1e3:.1f} ms; {_memory(run.job.device)}")
    checkpoints.save(0, {})  # plans, validates
    checkpoints.wait()
    say(f"the first save: {checkpoints.blocked:.3f} s to its end; {_memory(run.job.device)}")
    # Asked of the first process alone, which deletes it in a moment.
    size = from_first(lambda: sum(file.stat().st_size for file in shelf.path(shelf.steps()[-1]).iterdir()))
    checkpoints.blocked = 0.0
    blocked, settled, written, memory = [], [], [], []

    def settle() -> None:
        before = checkpoints.blocked
        checkpoints.settle()
        settled[-1] += checkpoints.blocked - before

    run.settle = settle
    begin, deleting = time.perf_counter(), 0.0
    for number in range(1, saves + 1):
        before, started = checkpoints.blocked, time.perf_counter()
        if not checkpoints.busy:
            _delete(run.job, shelf)
            deleting += time.perf_counter() - started
        started = time.perf_counter()
        checkpoints.save(number * every, {})
        blocked.append(checkpoints.blocked - before)
        settled.append(0.0)
        for _ in range(every):
            run.step()
            checkpoints.poll()
            if not checkpoints.busy and len(written) < number:
                written.append(time.perf_counter() - started)
                memory.append(psutil.Process().memory_info().rss / 1e9)
    steps, while_training = time.perf_counter() - begin - deleting, checkpoints.blocked
    checkpoints.wait()
    waited = checkpoints.blocked - while_training
    share = while_training / (steps - while_training)
    say(
        f"{saves} saves of {size / 1e9:.3f} GB, one every {every} steps: a save blocks "
        f"{statistics.median(blocked):.4f} s to start, {statistics.median(settled):.4f} s until it is copied, "
        f"{while_training / saves:.4f} s in all, {share:.2%} of the steps' time; the last: {waited:.3f} s at the end"
    )
    say(f"host memory after each save: {', '.join(f'{value:.3f}' for value in memory)} GB")
    if written:
        seconds = statistics.median(written)
        say(f"a save is there {seconds:.2f} s after it began: {size / seconds / 1e9:.2f} GB/s")
    say(f"{every * saves} steps: {without:.2f} s without, {steps:.2f} s with saves (writers share the processor)")
    say(f"afterwards: {_memory(run.job.device)}")


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
