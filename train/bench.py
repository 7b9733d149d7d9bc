"""Speed of one process: forward and backward passes at several batch sizes, where their time goes, and a peer's.

Every contestant computes gradients in the model's type from nothing, as in a step's first micro-batch, over random
tokens whose rows are one document each; routing is what the drawn weights give. Steps follow each other without a
pause, as micro-batches do; medians are reported.
"""

import datetime
import gc
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from model.attention import GatedAttention
from model.batch import MicroBatch, count_targets
from model.cost import TRAINING_FACTOR, forward_flops, training_flops
from model.deltanet import GatedDeltaNet
from model.experts import Experts, SharedExpert
from model.init import initialise
from model.loss import linear_cross_entropy
from model.norm import ZeroCentredRMSNorm
from model.router import Router
from parallel import groups as process_groups
from parallel.topology import resolve
from train.build import build_chunks
from train.config import Config
from train.footprint import planned_vocab
from train.peers import transformers_step
from train.requests import Measurement
from train.speed import matmul_rate

WARM_UP = 2
HOST_REPEATS = 3
# What a kind of module is called in the table, and the parts of `model.cost` that it computes.
PARTS: dict[type, tuple[str, tuple[str, ...]]] = {
    GatedDeltaNet: ("Gated DeltaNet", ("deltanet_projections", "deltanet_convolution", "delta_rule")),
    GatedAttention: ("attention", ("attention_projections", "attention_gate", "attention_scores")),
    Router: ("router", ("router",)),
    Experts: ("routed experts", ("routed_experts",)),
    SharedExpert: ("shared expert", ("shared_expert", "shared_expert_gate")),
    ZeroCentredRMSNorm: ("norms", ()),
}


@dataclass(frozen=True)
class Timing:
    """One contestant at one size: medians over the repeats."""

    name: str
    sequences: int
    milliseconds: float
    host_milliseconds: float
    tokens_per_second: float
    tflops: float
    share_of_matmul_rate: float
    peak_gigabytes: float | None


@dataclass(frozen=True)
class Part:
    """One kind of module in a step, all its layers together: time, and the time its operations need at least."""

    name: str
    milliseconds: float
    floor_milliseconds: float


@dataclass
class Result:
    """What a benchmark writes."""

    about: dict[str, str]
    matmul_tflops: float
    timings: list[Timing] = field(default_factory=list)
    parts: dict[int, list[Part]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class _Clock:
    """Points in time on a device: events of the GPU's own clock, or the host's where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first, last) -> float:
        """Milliseconds; waits for the device."""
        if not self.on_gpu:
            return 1e3 * (last - first)
        last.synchronize()
        return first.elapsed_time(last)


def run_steps(
    step: Callable[[Tensor], None], parameters: list[nn.Parameter], batches: Iterable[Tensor], device: torch.device
) -> list[float]:
    """Milliseconds of each step, back to back, after a warm-up; gradients are dropped between them."""
    clock, marks = _Clock(device), []
    for tokens_RS in batches:
        marks.append(clock.mark())
        step(tokens_RS)
        for parameter in parameters:
            parameter.grad = None
    marks.append(clock.mark())
    return [clock.between(first, last) for first, last in pairwise(marks)][WARM_UP:]


def host_milliseconds(step: Callable, parameters: list[nn.Parameter], tokens_RS: Tensor, device: torch.device) -> float:
    """Milliseconds until the host has launched a step on an idle device; on a CPU, of the step itself."""
    found = []
    for _ in range(HOST_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(tokens_RS)
        found.append(1e3 * (time.perf_counter() - start))
        for parameter in parameters:
            parameter.grad = None
    return statistics.median(found)


def random_batches(sequences: int, length: int, vocab_size: int, number: int) -> list[Tensor]:
    """Tokens [sequences, length + 1] of each step; the same for every contestant."""
    generator = torch.Generator().manual_seed(sequences)
    return [torch.randint(0, vocab_size, (sequences, length + 1), generator=generator) for _ in range(number)]


def network_step(network: nn.Module, device: torch.device, tokens_RS: Tensor) -> None:
    """Our forward and backward pass over rows that are one document each."""
    documents_RS = torch.zeros_like(tokens_RS)
    counts = count_targets(documents_RS, network.config.mtp.steps)
    balances = network.balances().values()
    for balance in balances:
        balance.begin_step(recording=False)
    network(MicroBatch.build(tokens_RS, documents_RS, counts).to(device)).total.backward()
    for balance in balances:
        balance.end_step()


class _Stopwatch:
    """Times the modules of `PARTS`, forwards and backwards, through hooks; what lies inside one counts as its."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.clock, self.marks = _Clock(device), defaultdict(list)
        self.hooks, inside = [], set()
        for module in network.modules():
            kind = next((kind for kind in PARTS if type(module) is kind), None)
            if kind is None or module in inside:
                continue
            inside.update(module.modules())
            self.hooks += [
                module.register_forward_pre_hook(partial(self._begin, kind)),
                module.register_forward_hook(partial(self._end, kind)),
                module.register_full_backward_pre_hook(partial(self._begin, kind)),
                module.register_full_backward_hook(partial(self._end, kind)),
            ]

    def _begin(self, kind: type, *_) -> None:
        self.marks[kind].append([self.clock.mark()])

    def _end(self, kind: type, *_) -> None:
        self.marks[kind][-1].append(self.clock.mark())

    def take(self) -> dict[type, float]:
        """Milliseconds since the start; removes the hooks."""
        for hook in self.hooks:
            hook.remove()
        return {kind: sum(self.clock.between(*pair) for pair in pairs) for kind, pairs in self.marks.items()}


def head_milliseconds(network: nn.Module, tokens: int, device: torch.device) -> float:
    """The head and its loss alone, forwards and backwards, at this number of tokens."""
    weight = network.output_layer.weight
    hidden = torch.randn(tokens, weight.shape[1], device=device).to(weight.dtype).requires_grad_()
    target = torch.randint(0, weight.shape[0], (tokens,), device=device)
    share = torch.full((tokens,), 1 / tokens, device=device)

    def step(_) -> None:
        linear_cross_entropy(hidden, weight, target, share, network.tp_group)[0].backward()

    return statistics.median(run_steps(step, [weight, hidden], [None] * (WARM_UP + 3), device))


def parts_of(network: nn.Module, step: Callable, batches: list[Tensor], total: float, rate: float, device, config):
    """The table of one size: each kind of module, the head, and what is left of a step."""
    watch = _Stopwatch(network, device)
    step(batches[-1])
    found = watch.take()
    for parameter in network.parameters():
        parameter.grad = None
    tokens, length = batches[-1][:, 1:].numel(), batches[-1].shape[1] - 1
    flops = forward_flops(config.model, config.mtp, network.vocab_size, length)

    def floor(names: Iterable[str]) -> float:
        return 1e3 * TRAINING_FACTOR * tokens * sum(flops.get(name, 0.0) for name in names) / rate

    rows = [Part(name, found[kind], floor(names)) for kind, (name, names) in PARTS.items() if kind in found]
    rows.append(Part("head and loss", head_milliseconds(network, tokens, device), floor(["head"])))
    rest = total - sum(row.milliseconds for row in rows)
    return [*rows, Part("rows to and from experts, residuals, embedding", rest, 0.0)]


def about(config: Config, device: torch.device) -> dict[str, str]:
    """Hardware, versions and sizes, as they stand beside every number."""
    gpu = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "model": f"{config.model.pattern} x {config.model.repeats}, width {config.model.hidden_size}, "
        f"{config.model.experts} experts, top-{config.model.experts_per_token}, {config.model.dtype}",
        "data": f"random tokens, rows of {config.data.seq_length} that are one document each, natural routing",
    }


class _Bench:
    def __init__(self, config: Config, settings: Measurement, device: torch.device, vocab_size: int) -> None:
        self.config, self.settings, self.device, self.vocab_size = config, settings, device, vocab_size
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]
        self.rate = matmul_rate(device, dtype)
        self.result = Result(about(config, device), self.rate / 1e12)

    def time(self, name: str, sequences: int, step: Callable, parameters: list[nn.Parameter]) -> Timing:
        length = self.config.data.seq_length
        batches = random_batches(sequences, length, self.vocab_size, WARM_UP + self.settings.repeats)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        each = run_steps(step, parameters, batches, self.device)
        host = host_milliseconds(step, parameters, batches[0], self.device)
        milliseconds, tokens = statistics.median(each), sequences * length
        per_second = 1e3 * tokens / milliseconds
        flops = per_second * training_flops(self.config.model, self.config.mtp, self.vocab_size, length)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        timing = Timing(name, sequences, milliseconds, host, per_second, flops / 1e12, flops / self.rate, peak)
        self.result.timings.append(timing)
        print(line(timing), flush=True)
        return timing

    def ours(self, network: nn.Module) -> None:
        """Times our network at every size, with the table of its parts."""
        step, parameters = partial(network_step, network, self.device), list(network.parameters())
        for sequences in self.settings.sequences:
            total = self.time("tessera", sequences, step, parameters).milliseconds
            batches = random_batches(sequences, self.config.data.seq_length, self.vocab_size, 1)
            rows = parts_of(network, step, batches, total, self.rate, self.device, self.config)
            self.result.parts[sequences] = rows

    def peer(self) -> None:
        """Times transformers at every size that it has memory for."""
        step, parameters = transformers_step(self.config.model, self.vocab_size, self.device)
        for sequences in self.settings.sequences:
            try:
                self.time("transformers", sequences, step, parameters)
            except torch.OutOfMemoryError:
                self.result.left_out[f"transformers at {sequences} sequences"] = "out of memory"
                break


def line(timing: Timing) -> str:
    """A timing for the screen and for the page of results."""
    memory = "" if timing.peak_gigabytes is None else f" | {timing.peak_gigabytes:.1f} GB"
    return (
        f"| {timing.name} | {timing.sequences} | {timing.milliseconds:.1f} ms | host {timing.host_milliseconds:.1f} ms "
        f"| {timing.tokens_per_second / 1e3:.1f}k tokens/s | {timing.tflops:.3g} TFLOP/s "
        f"| {timing.share_of_matmul_rate:.0%} of matmul{memory} |"
    )


def report(result: Result) -> str:
    """The page of results: what ran where, timings, and where our time goes."""
    lines = [f"{name}: {value}" for name, value in result.about.items()]
    lines += [f"matrix products: {result.matmul_tflops:.3g} TFLOP/s measured", "", *map(line, result.timings)]
    for sequences, parts in result.parts.items():
        lines += ["", f"where tessera's time goes at {sequences} sequences (ms, and the floor of its operations):", ""]
        lines += [f"| {row.name} | {row.milliseconds:.2f} | {row.floor_milliseconds:.2f} |" for row in parts]
    return "\n".join([*lines, *(f"left out: {what}: {why}" for what, why in result.left_out.items())])


def run_bench(config: Config, settings: Measurement) -> int:
    """The bench command in its process; returns the exit code."""
    device = process_groups.local_device()
    process_groups.start(device)
    topology = resolve(config.parallel, config.model, torch.distributed.get_world_size())
    groups, vocab_size = process_groups.lay_out(topology), planned_vocab(config, topology)
    bench = _Bench(config, settings, device, vocab_size)
    print("\n".join(f"{name}: {value}" for name, value in bench.result.about.items()), flush=True)
    with torch.device(device):
        (network,) = build_chunks(config, topology, groups, vocab_size)
    initialise(network, network.sharded_state_dict(), config.seed)
    bench.ours(network)
    del network
    gc.collect()
    if settings.peers:
        bench.peer()
    path = Path(settings.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(bench.result), indent=1), encoding="utf-8")
    print(f"\n{report(bench.result)}\n\nwritten: {path}", flush=True)
    process_groups.stop()
    return 0
