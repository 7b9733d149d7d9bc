"""What the launches of kernels cost: the step as it is, replayed as a CUDA graph, and compiled.

    python -m tests.bench.launches [--sequences 2] [--compile] [key=value ...]

The recipe `proxy` on one GPU, forward and backward, over one micro-batch of random tokens. A graph launches all kernels
of a step at once, so it gains at most the time in which the GPU waits for the next one; that is measured as well, from
the profiler's intervals of kernels.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from model.init import initialise
from parallel import groups as process_groups
from parallel.topology import resolve
from train.__main__ import compose
from train.job.build import build_chunks
from train.job.footprint import planned_vocab
from train.measure.bench import counted, random_batches
from train.measure.timing import WARM_UP, run_steps

REPEATS = 10


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


def main() -> None:
    """Prints a line for each way to run the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2, help="sequences of 4096 tokens in the micro-batch")
    parser.add_argument("--compile", action="store_true", help="also times the network as torch.compile makes it")
    asked, settings = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here: kernels are launched on one only")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    config = compose(["-cn", "proxy", *settings], planned=True)
    device = process_groups.local_device()
    process_groups.start(device)
    topology = resolve(config.parallel, config.model, 1)
    groups, vocab_size = process_groups.lay_out(topology), planned_vocab(config, topology)
    with torch.device(device):
        (network,) = build_chunks(config, topology, groups, vocab_size)
    initialise(network, network.sharded_state_dict(), config.seed)
    (tokens_RS,) = random_batches(asked.sequences, config.data.seq_length, vocab_size, 1)
    title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {asked.sequences} sequences"

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
        print(f"{title}: {milliseconds(graph.replay):.2f} ms as one CUDA graph", flush=True)
        graph.reset()

        if asked.compile:
            compiled = torch.compile(network)
            print(f"{title}: {milliseconds(lambda: step(compiled)):.2f} ms compiled", flush=True)
    process_groups.stop()


if __name__ == "__main__":
    main()
