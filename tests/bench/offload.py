"""The largest model that trains a step on one GPU of a given memory, with and without the optimizer in the host's.

``python -m tests.bench.offload -cn proxy --gpu-gb 24 --experts 64,80 --offload-experts 336 [key=value ...]``: each size
is a process of its own, whose allocator may take so many GB; what it prints goes to the screen and to $OUT.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from model.init import initialise
from parallel import groups as process_groups
from parallel.topology import resolve
from train.__main__ import compose
from train.job.build import build_chunks, engine_of
from train.job.footprint import planned_vocab
from train.measure.bench import engine_step, random_batches
from train.settings.run import Config

STEPS = 3  # the first one also compiles kernels


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def measure(config: Config, sequences: int) -> dict[str, float]:
    """Whole steps of training: parameters, seconds of the last one, tokens/s, gigabytes of the GPU and the host."""
    device = process_groups.local_device()
    process_groups.start(device)
    topology = resolve(config.parallel, config.model, 1)
    groups, vocab = process_groups.lay_out(topology), planned_vocab(config, topology)
    with torch.device(device):
        (network,) = build_chunks(config, topology, groups, vocab)
    initialise(network, network.sharded_state_dict(), config.seed)
    engine = engine_of([network], config, groups, device)
    length = config.data.seq_length
    for tokens_RS in random_batches(sequences, length, vocab, STEPS):
        begin = time.perf_counter()
        engine_step(engine, tokens_RS)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return {
        "parameters": sum(x.numel() for x in network.parameters()),
        "seconds": seconds,
        "tokens_per_second": sequences * length / seconds,
        "gpu_gigabytes": torch.cuda.max_memory_allocated() / 1e9,
        "gpu_gigabytes_reserved": torch.cuda.max_memory_reserved() / 1e9,
        "host_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def numbers(text: str) -> list[int]:
    """Of a list with commas."""
    return [int(number) for number in text.split(",")]


def run_one(arguments: argparse.Namespace, rest: list[str]) -> None:
    """One size in this process; out of memory is a result too."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.gpu_gb * 1e9 / total))
    config = compose(["-cn", arguments.cn, *rest], planned=True)
    try:
        found: dict = measure(config, arguments.sequences)
    except torch.OutOfMemoryError:
        found = {"out_of_memory": True}
    print("RESULT " + json.dumps({"settings": rest, "gpu_gb": arguments.gpu_gb} | found), flush=True)


def main() -> None:
    """Every size asked for, one process after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-cn", default="proxy")
    parser.add_argument("--gpu-gb", type=float, default=24.0)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--experts", type=numbers, default=[], help="without offload")
    parser.add_argument("--offload-experts", type=numbers, default=[])
    parser.add_argument("--one", action="store_true")
    arguments, rest = parser.parse_known_args()
    if arguments.one:
        return run_one(arguments, rest)
    offload = ["engine=deepspeed", "deepspeed.zero=2", "deepspeed.offload=true"]
    sizes = [(number, []) for number in arguments.experts] + [(number, offload) for number in arguments.offload_experts]
    results = []
    for number, engine in sizes:
        command = [sys.executable, "-m", "tests.bench.offload", "-cn", arguments.cn, "--one"]
        command += ["--gpu-gb", str(arguments.gpu_gb), "--sequences", str(arguments.sequences)]
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        environment = os.environ | place | {"MASTER_PORT": str(free_port())}
        done = subprocess.run(
            [*command, f"model.experts={number}", *engine, *rest], env=environment, capture_output=True, text=True
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        results += [json.loads(line.removeprefix("RESULT ")) for line in lines]
        print(lines[-1] if lines else f"{number} {engine}: exit {done.returncode}\n{done.stderr[-3000:]}", flush=True)
    Path(os.environ.get("OUT", ".")).joinpath("offload.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
