"""The largest model that trains a step on one GPU of a given memory, with and without the optimizer in the host's.

``python -m tests.bench.offload -cn proxy --gpu-gb 24 --without model.experts=60 --without model.experts=64
--offload "model.experts=64 model.repeats=4" [key=value ...]``: each size is a process of its own, whose allocator may
take so many GB. Those without offload run at once, since only whether they fit is asked of them (``--in-turn``: also
how fast they are), those with it one after the other. What it prints goes to the screen and to $OUT.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import traceback
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
OFFLOAD = ["engine=deepspeed", "deepspeed.zero=2", "deepspeed.offload=true"]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def host_gigabytes() -> float:
    """Memory of this machine that is taken, by whatever."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    kilobytes = {name: int(number) for name, number, *_ in lines}
    return (kilobytes["MemTotal:"] - kilobytes["MemAvailable:"]) / 1e6


def measure(config: Config, sequences: int) -> dict[str, float]:
    """Whole steps of training: parameters, seconds of the last one, tokens/s, gigabytes of the GPU and the host."""
    host_before, begin = host_gigabytes(), time.perf_counter()
    device = process_groups.local_device()
    process_groups.start(device)
    topology = resolve(config.parallel, config.model, 1)
    groups, vocab = process_groups.lay_out(topology), planned_vocab(config, topology)
    with torch.device(device):
        (network,) = build_chunks(config, topology, groups, vocab)
    initialise(network, network.sharded_state_dict(), config.seed)
    engine = engine_of([network], config, groups, device)
    length, start_seconds = config.data.seq_length, time.perf_counter() - begin
    for tokens_RS in random_batches(sequences, length, vocab, STEPS):
        begin = time.perf_counter()
        engine_step(engine, tokens_RS)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return {
        "parameters": sum(x.numel() for x in network.parameters()),
        "start_seconds": start_seconds,
        "seconds": seconds,
        "tokens_per_second": sequences * length / seconds,
        "gpu_gigabytes": torch.cuda.max_memory_allocated() / 1e9,
        "gpu_gigabytes_reserved": torch.cuda.max_memory_reserved() / 1e9,
        "host_gigabytes": host_gigabytes() - host_before,
    }


def run_one(arguments: argparse.Namespace, rest: list[str]) -> None:
    """One size in this process; out of memory is a result too."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.gpu_gb * 1e9 / total))
    config = compose(["-cn", arguments.cn, *rest], planned=True)
    try:
        found: dict = measure(config, arguments.sequences)
    except torch.OutOfMemoryError as error:
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        found = {"out_of_memory": str(error)[:200], "where": frames[-6:]}
    print("RESULT " + json.dumps({"settings": rest, "gpu_gb": arguments.gpu_gb} | found), flush=True)


def start(arguments: argparse.Namespace, settings: list[str]) -> subprocess.Popen[str]:
    """One size in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.offload", "-cn", arguments.cn, "--one"]
    command += ["--gpu-gb", str(arguments.gpu_gb), "--sequences", str(arguments.sequences)]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    environment = os.environ | place | {"MASTER_PORT": str(free_port())}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *settings], env=environment, stdout=pipe, stderr=pipe, text=True)


def outcome(process: subprocess.Popen[str], settings: list[str]) -> list[dict]:
    """What a size has told, printed as well."""
    stdout, stderr = process.communicate()
    lines = [line for line in stdout.splitlines() if line.startswith("RESULT ")]
    print(lines[-1] if lines else f"{settings}: exit {process.returncode}\n{stderr[-3000:]}", flush=True)
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def main() -> None:
    """Every size asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-cn", default="proxy")
    parser.add_argument("--gpu-gb", type=float, default=24.0)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--without", type=str.split, action="append", default=[], help="settings of a size")
    parser.add_argument("--offload", type=str.split, action="append", default=[], help="the same, with offload")
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--one", action="store_true")
    arguments, rest = parser.parse_known_args()
    if arguments.one:
        return run_one(arguments, rest)
    at_once = [] if arguments.in_turn else [[*rest, *size] for size in arguments.without]
    in_turn = [[*rest, *size] for size in arguments.without] if arguments.in_turn else []
    in_turn += [[*rest, *OFFLOAD, *size] for size in arguments.offload]
    results, kept = [], Path(os.environ.get("OUT", ".")) / "offload.json"
    processes = [start(arguments, settings) for settings in at_once]
    for process, settings in zip(processes, at_once, strict=True):
        results += outcome(process, settings)
    kept.write_text(json.dumps(results, indent=1))
    for settings in in_turn:
        results += outcome(start(arguments, settings), settings)
        kept.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
