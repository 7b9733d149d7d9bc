"""What the gauges of a sampled step cost, beside a step that is not sampled: times in turn, in one process.

python -m tests.bench.gauge_cost -cn tiny [--rows 8] [--steps 12] [model.repeats=2 ...]
"""

import argparse
import os
import statistics
import time
from dataclasses import replace

import torch

from data.order.batches import Batch
from model.init import initialise
from parallel import groups as process_groups
from parallel.topology import resolve
from train.__main__ import compose
from train.job.build import Job, build_chunks, engine_of
from train.loop import train_step
from train.watch.gauges import Gauges

WARM_UP = 2


def make_job(settings: list[str], device: torch.device) -> Job:
    """The recipe's job in this process, without a corpus."""
    config = compose(settings, planned=True)
    config = replace(config, parallel=replace(config.parallel, expert=1))
    topology = resolve(config.parallel, config.model, 1)
    groups = process_groups.lay_out(topology)
    with torch.device(device):
        chunks = build_chunks(config, topology, groups, config.model.vocab_size or 4096)
    for chunk in chunks:
        initialise(chunk, chunk.sharded_state_dict(), config.seed)
    return Job(config, topology, groups, device, None, chunks)


def random_batch(job: Job, rows: int, seed: int) -> Batch:
    """Rows of four documents each."""
    length, generator = job.config.data.seq_length, torch.Generator().manual_seed(seed)
    documents = (torch.arange(length + 1) * 4 // (length + 1)).int().expand(rows, -1).contiguous()
    return Batch(torch.randint(0, job.vocab_size, (rows, length + 1), generator=generator), documents)


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-cn", default="tiny", help="recipe")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step, in one micro-batch")
    parser.add_argument("--steps", type=int, default=12, help="steps of each kind that are timed")
    asked, settings = parser.parse_known_args()
    device = process_groups.local_device()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    process_groups.start(device)
    job = make_job(["-cn", asked.cn, f"batch.micro={asked.rows}", f"batch.global={asked.rows}", *settings], device)
    engine = engine_of(job.chunks, job.config, job.groups, device)
    gauges = Gauges(job, engine)
    seconds: dict[str, list[float]] = {"plain": [], "sampled": [], "of that, after the step": []}
    for number in range(2 * (WARM_UP + asked.steps)):
        sampled, batch = number % 2 == 1, random_batch(job, asked.rows, number)
        begin = time.perf_counter()
        gauges.begin_step(sampled)
        _, grad_norm = train_step(job, engine, [batch], 1e-4)
        if device.type == "cuda":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        found = gauges.values(1e-4, grad_norm) if sampled else {}
        end = time.perf_counter()
        if number >= 2 * WARM_UP:
            seconds["sampled" if sampled else "plain"].append(end - begin)
            if sampled:
                seconds["of that, after the step"].append(end - middle)
    medians = {kind: statistics.median(each) for kind, each in seconds.items()}
    print(f"{asked.cn} {' '.join(settings)}: {asked.rows} x {job.config.data.seq_length} tokens on {device.type}")
    print("; ".join(f"{kind} {1e3 * value:.1f} ms" for kind, value in medians.items()))
    more, every = medians["sampled"] / medians["plain"] - 1, job.config.run.detail_every
    print(f"{len(found)} numbers; {more:.1%} of a step, {more / every:.3%} at run.detail_every={every}")


if __name__ == "__main__":
    main()
