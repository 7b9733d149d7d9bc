"""Mixtures of experts of one process of several that share their experts; the others are made up, their rows are not.

python -m tests.bench.exchange -cn proxy [--parts 2] [--rows 2] [--layers 4] [--steps 100] [model.experts=256 ...]

Every process is taken to hold the same tokens as this one (`parallel.alone`), so what arrives has the sizes that a real
exchange would bring; no time is spent on a network. Without --steps: the time of a layer, forwards and
backwards, evenly used. With it: so many steps of random imbalance, and what they leave of the allocator's memory; exit
code 1 if that grows by more than a twentieth from the tenth step on.
"""

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch

from model.kernels.backends import column_linear, row_linear
from model.layers.dense import SwiGLUSubmodules
from model.layers.experts import MixtureOfExperts
from model.layers.router import route
from model.stack import hybrid_config
from parallel import groups as process_groups
from parallel.alone import as_first_of
from parallel.topology import ParallelConfig, resolve
from train.__main__ import compose

GROWTH, SETTLED = 1.05, 10
UNEVEN = 4.0  # standard deviations of the experts' logits, at most


def build(settings: list[str], parts: int, layers: int, device: torch.device) -> list[MixtureOfExperts]:
    """Layers of this process, with weights of no meaning."""
    config = compose(settings, planned=True)
    model = replace(config.model, shared_expert_size=0)
    topology = resolve(ParallelConfig(expert=parts, world=parts), model, parts)
    groups, linears = process_groups.lay_out(topology), SwiGLUSubmodules(column_linear, row_linear)
    with torch.device(device):
        made = [MixtureOfExperts(hybrid_config(model, config.mtp, topology), linears, groups) for _ in range(layers)]
        for parameter in (parameter for moe in made for parameter in moe.parameters()):
            torch.nn.init.normal_(parameter, std=0.02)
    return made


def step(made: list[MixtureOfExperts], tokens: int, spread: float, device: torch.device) -> float:
    """One forward and backward pass through all layers; the seconds that it took."""
    dtype, hidden = made[0].experts.weight1.dtype, made[0].config.hidden_size
    x = torch.randn(tokens, 1, hidden, device=device).to(dtype).requires_grad_()
    begin, out = time.perf_counter(), x
    with ExitStack() as stack:
        for moe in made:
            logits = torch.randn(tokens, moe.router.num_experts, device=device)
            logits += spread * torch.randn(moe.router.num_experts, device=device)
            _, weights, chosen = route(logits, moe.router.k)
            own = (weights.requires_grad_(), chosen)
            stack.enter_context(patch.object(moe.router, "forward", lambda *_, own=own: own))
            out = out + moe(out)[0]
        out.backward(torch.ones_like(out))
    for parameter in (parameter for moe in made for parameter in moe.parameters()):
        parameter.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def watch_memory(made: list[MixtureOfExperts], tokens: int, steps: int, device: torch.device) -> bool:
    """Steps of random imbalance; whether the memory that the allocator holds stays as it was after the first few."""
    settled = last = 0
    generator = torch.Generator().manual_seed(0)
    fullest = []
    for number in range(1, steps + 1):
        step(made, tokens, UNEVEN * float(torch.rand((), generator=generator)), device)
        fullest.append(max(moe.fullest for moe in made))
        for moe in made:
            moe.fullest = 0.0
        if device.type == "cuda":
            last = torch.cuda.memory_reserved(device)
        settled = last if number == SETTLED else settled
        if number in (1, SETTLED) or number % 25 == 0 or number == steps:
            print(f"step {number:3}: reserved {last / 1e9:.2f} GB, fullest so far {max(fullest):.2f} x an even share")
    found = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    peak, retries = found.get("allocated_bytes.all.peak", 0) / 1e9, found.get("num_alloc_retries", 0)
    print(f"peak {peak:.2f} GB, retries {retries}, reserved {last / max(settled, 1):.3f} x that of step {SETTLED}")
    return last <= GROWTH * settled


def main() -> int:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-cn", default="tiny", help="recipe")
    parser.add_argument("--parts", type=int, default=2, help="processes that share a layer's experts; 1: no exchange")
    parser.add_argument("--rows", type=int, default=2, help="sequences of this process's micro-batch")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0, help="of random imbalance")
    asked, settings = parser.parse_known_args()
    device, settings = process_groups.local_device(), ["-cn", asked.cn, *settings]
    process_groups.set_cuda_variables(ParallelConfig())
    tokens = asked.rows * compose(settings, planned=True).data.seq_length
    torch.manual_seed(0)
    print(f"{' '.join(settings)}: {asked.layers} mixtures, {tokens} tokens, {asked.parts} processes, on {device.type}")
    with as_first_of(asked.parts, device):
        made = build(settings, asked.parts, asked.layers, device)
        if asked.steps:
            return 0 if watch_memory(made, tokens, asked.steps, device) else 1
        seconds = [step(made, tokens, 0.0, device) for _ in range(10)][3:]
    print(f"{1e3 * statistics.median(seconds) / asked.layers:.2f} ms a layer, forwards and backwards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
