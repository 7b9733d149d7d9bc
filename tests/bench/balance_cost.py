"""What counting, balance loss and statistics cost a router, counted anywhere and timed where there is a GPU.

    python -m tests.bench.balance_cost [--sequences 8] [--micro-batches 4] [--step-ms 248.2]

The routers of the recipe `proxy`: 2048 wide, 512 experts, top-10. Counted are the tensor operations of one router's
forward and backward pass without GPU kernels, and the bytes that they read and write, by torch's dispatcher on tensors
without numbers: whatever a kernel fuses is less. Each row tells what comes on top of the row before it. Timed on a GPU
are the same passes with its kernels. One process, so that the sum over the ranks, of 8 bytes an expert, moves nothing.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import BalanceConfig
from model.layers.balance import RoutedTokens
from model.layers.forecast import histogram
from model.layers.router import Router
from model.stack import hybrid_config
from parallel import groups as process_groups
from parallel.topology import Topology
from train.__main__ import compose

MIXTURES = 4  # of proxy
BANDWIDTH = 4.8e12  # bytes a second of an H200's memory (NVIDIA's data sheet)
WARM_UP, REPEATS = 3, 20
ROUTING, BALANCE, STATISTICS, FORECAST = "routing alone", "counts and loss", "statistics", "forecast"
ADDS = {
    ROUTING: "",
    BALANCE: "with counts and balance loss (global and micro term)",
    STATISTICS: "on logged steps, with statistics",
    FORECAST: "with several micro-batches a step, foretelling and learning, once a step",
}


@dataclass(frozen=True)
class Case:
    """A router and one micro-batch of its tokens."""

    router: Router
    hidden_TH: Tensor
    tokens: RoutedTokens
    ids_T: Tensor
    micro_batches: int

    def passes(self, tokens: RoutedTokens | None) -> None:
        """Forward and backward of a micro-batch; without ``tokens`` nothing is balanced or counted."""
        weights, _ = self.router(self.hidden_TH, tokens)
        weights.sum().backward()
        self.router.weight.grad = self.hidden_TH.grad = None

    def step(self, kind: str) -> None:
        """A step of a router by the kind of what is asked of it."""
        if kind == ROUTING:
            self.passes(None)
            return
        told = None
        if kind == FORECAST:
            row = histogram(self.ids_T, self.tokens.weight_T > 0)
            told = torch.stack([row] * self.micro_batches)
        self.router.balance.begin_step(recording=kind == STATISTICS, histogram_MB=told)
        for _ in range(self.micro_batches if told is not None else 1):
            self.passes(self.tokens)
        self.router.balance.end_step()


def make_case(sequences: int, micro_batches: int, device: torch.device, groups) -> Case:
    """The case at ``sequences`` of 4096 tokens."""
    config = compose(["-cn", "proxy"])
    shape, length = config.model, config.data.seq_length
    count = sequences * length
    with torch.device(device):
        router = Router(hybrid_config(shape, config.mtp, balance=BalanceConfig()), groups)
        nn.init.normal_(router.weight, std=shape.init_std)
        hidden = torch.randn(count, shape.hidden_size, dtype=torch.bfloat16).requires_grad_()
        weight = torch.full((count,), 1 / count / micro_batches)
        ids = torch.randint(0, shape.vocab_size, (count,))
    tokens = RoutedTokens(weight, count * micro_batches, first=0, length=length, rows=sequences)
    return Case(router, hidden, tokens, ids, micro_batches)


class Counter(TorchDispatchMode):
    """Counts operations that move numbers, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def counted(case: Case, kind: str) -> tuple[int, int]:
    """Operations and bytes of a step."""
    with Counter() as counter:
        case.step(kind)
    return counter.operations, counter.bytes


def timed(case: Case, kind: str) -> tuple[float]:
    """Median milliseconds of a step on the GPU."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        case.step(kind)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return (statistics.median(times[WARM_UP:]),)


def added(case: Case, measure: Callable[[Case, str], tuple]) -> dict[str, tuple]:
    """What each kind of step adds to the one before it; the forecast, to as many micro-batches without it."""
    routing, balance, noted, told = (measure(case, kind) for kind in (ROUTING, BALANCE, STATISTICS, FORECAST))
    several = [case.micro_batches * number for number in balance]
    pairs = {BALANCE: (balance, routing), STATISTICS: (noted, balance), FORECAST: (told, several)}
    found = {kind: tuple(new - old for new, old in zip(*pair, strict=True)) for kind, pair in pairs.items()}
    return {ROUTING: routing} | found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 4096 tokens in a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches that a forecast is for")
    parser.add_argument("--step-ms", type=float, default=248.2, help="milliseconds of the whole model's step")
    asked = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = process_groups.lay_out(Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1))
    sizes = (asked.sequences, asked.micro_batches)
    title = f"{MIXTURES} routers, {asked.sequences} x 4096 tokens"
    print(f"| {title} | operations | GB | ms at {BANDWIDTH / 1e12} TB/s | of a step |\n|---|---|---|---|---|")
    for kind, (operations, count) in added(make_case(*sizes, torch.device("meta"), groups), counted).items():
        ms = 1e3 * MIXTURES * count / BANDWIDTH
        share = f"{ms / asked.step_ms:.2%}"
        row = (ADDS[kind] or kind, f"{MIXTURES * operations}", f"{MIXTURES * count / 1e9:.3f}", f"{ms:.3f}", share)
        print("| " + " | ".join(row) + " |")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        print(f"\n| {torch.cuda.get_device_name(device)}, torch {torch.__version__} | ms | of a step |\n|---|---|---|")
        for kind, (ms,) in added(make_case(*sizes, device, groups), timed).items():
            print(f"| {ADDS[kind] or kind} | {MIXTURES * ms:.3f} | {MIXTURES * ms / asked.step_ms:.2%} |")
    else:
        print("\nno GPU here: nothing was timed")
    process_groups.stop()


if __name__ == "__main__":
    main()
