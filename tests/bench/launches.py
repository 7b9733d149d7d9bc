"""What the launches of kernels cost: the step as it is, replayed as a CUDA graph, and compiled.

    python -m tests.bench.launches [-cn proxy] [--sequences 2] [--host] [--graph] [--compile] [key=value ...]

A recipe, `proxy` by default, on one GPU, forward and backward, over one micro-batch of random tokens. A graph launches
all kernels of a step at once, so it gains at most the time in which the GPU waits for the next one; that is measured as
well, from the profiler's intervals of kernels. ``--host`` says what the host does meanwhile, operation by operation.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from model.batch import MicroBatch
from model.init import initialise
from model.network import LanguageModel
from parallel import groups as process_groups
from parallel.topology import resolve
from train.__main__ import compose
from train.job.build import build_chunks, gpu_or_cpu
from train.job.footprint import planned_vocab
from train.measure.bench import counted, random_batches
from train.measure.timing import WARM_UP, host_milliseconds, run_steps

REPEATS = 10
PROFILED, SHOWN = 3, 28  # steps, and operations of the table


def milliseconds(step: Callable[[], object]) -> float:
    """Median of a step on the GPU, steps back to back."""
    each = run_steps(lambda _: step(), [], range(WARM_UP + REPEATS), torch.device("cuda"))
    return statistics.median(each)


def covered(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The time in which at least one of the intervals runs, and that from the first one's start to the last one's end.

    Both in the intervals' unit.
    """
    busy, ordered = 0.0, sorted(intervals)
    reached = begin = ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - begin


def host_table(step: Callable[[], object]) -> list[str]:
    """What the host spends its time on in a step, the most first: its own milliseconds and calls of each operation."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    launches = sum(row.count for row in rows if "LaunchKernel" in row.key) / PROFILED
    whole = sum(row.self_cpu_time_total for row in rows) / PROFILED / 1e3
    lines = [f"{launches:.0f} launches a step; with the profiler on, {whole:.1f} ms of the host:"]
    return lines + [
        f"  {row.self_cpu_time_total / PROFILED / 1e3:7.2f} ms {row.count / PROFILED:7.1f} x {row.key[:70]}"
        for row in rows[:SHOWN]
    ]


def as_graph(network: LanguageModel, batch: MicroBatch, step: Callable[[], object]) -> float:
    """Milliseconds of the step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    network.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        network(batch).total.backward()
    try:
        return milliseconds(graph.replay)
    finally:
        graph.reset()


def main() -> None:
    """Prints a line for each way to run the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2, help="sequences of 4096 tokens in the micro-batch")
    parser.add_argument("-cn", default="proxy", help="the recipe")
    parser.add_argument("--host", action="store_true", help="also what the host spends its time on")
    parser.add_argument("--graph", action="store_true", help="also times the step as one CUDA graph")
    parser.add_argument("--compile", action="store_true", help="also times the network as torch.compile makes it")
    asked, settings = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here: kernels are launched on one only")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    config = compose(["-cn", asked.cn, *settings], planned=True)
    device = gpu_or_cpu(config)
    process_groups.start(device)
    topology = resolve(config.parallel, config.model, 1)
    groups, vocab_size = process_groups.lay_out(topology), planned_vocab(config, topology)
    with torch.device(device):
        (network,) = build_chunks(config, topology, groups, vocab_size)
    initialise(network, network.sharded_state_dict(), config.seed)
    (tokens_RS,) = random_batches(asked.sequences, config.data.seq_length, vocab_size, 1)
    title = f"{asked.cn}, {torch.cuda.get_device_name(device)}, torch {torch.__version__}, {asked.sequences} sequences"

    with counted(network, groups, tokens_RS) as batch:

        def step(forward: Callable = network) -> None:
            network.zero_grad()  # drops the gradients
            forward(batch).total.backward()

        print(f"{title}: {milliseconds(step):.2f} ms, launched kernel by kernel", flush=True)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(REPEATS):
                step()
            torch.cuda.synchronize()
        kernels = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
        busy, whole = covered((event.time_range.start, event.time_range.end) for event in kernels)
        number = len(kernels) // REPEATS
        print(f"{title}: a kernel runs in {busy / whole:.2%} of the time; {number} kernels a step", flush=True)

        launched = host_milliseconds(lambda _: step(), [], None, device)
        print(f"{title}: the host has launched a step after {launched:.2f} ms", flush=True)
        if asked.host:
            print("\n".join(host_table(step)), flush=True)
        if asked.graph:
            print(f"{title}: {as_graph(network, batch, step):.2f} ms as one CUDA graph", flush=True)
        if asked.compile:
            compiled = torch.compile(network)
            print(f"{title}: {milliseconds(lambda: step(compiled)):.2f} ms compiled", flush=True)
    process_groups.stop()


if __name__ == "__main__":
    main()
