"""Speed of a layout: forward and backward passes at several batch sizes, where their time goes, and a peer's.

Every contestant computes gradients in the model's type from nothing, as in a step's first micro-batch, over random
tokens whose rows are one document each; routing is what the drawn weights give. Steps follow each other without a
pause, as micro-batches do; medians are reported, of the slowest process where there are several.
"""

import datetime
import gc
import json
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from model.batch import MicroBatch, count_targets
from model.config import ModelConfig
from model.cost.cost import training_flops
from model.init import initialise
from model.network import LanguageModel
from parallel import groups as process_groups
from parallel.alone import as_first_of
from parallel.collectives import max_over_all
from parallel.engine import Engine
from parallel.topology import Topology, resolve
from train.job.build import build_chunks, engine_of, gpu_or_cpu
from train.job.footprint import planned_vocab
from train.measure.breakdown import HEAD, ModuleTime, parts_of
from train.measure.peers import PEERS, missing
from train.measure.timing import WARM_UP, host_milliseconds, run_steps
from train.measure.verdict import Kernels
from train.settings.commands import BenchSettings
from train.settings.run import Config
from train.watch.speed import matmul_rate

MIXERS = "G*"  # the symbols of layers that mix tokens: as many as a model is said to have
SENT = "whose sending takes no time here"
LEARNING_RATE = 1e-5  # of whole steps; too small to change routing within a few


@dataclass(frozen=True)
class Timing:
    """One contestant at one size: medians over the repeats. Sequences are those of a data-parallel rank; speeds and
    memory are of a process."""

    name: str
    sequences: int
    milliseconds: float
    host_milliseconds: float
    tokens_per_second: float
    tflops: float
    share_of_matmul_rate: float
    peak_gigabytes: float | None


@dataclass
class Result:
    """What a benchmark writes."""

    about: dict[str, str]
    matmul_tflops: float
    timings: list[Timing] = field(default_factory=list)
    parts: dict[int, list[ModuleTime]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def random_batches(sequences: int, length: int, vocab_size: int, number: int, part: int = 0) -> list[Tensor]:
    """Tokens [sequences, length + 1] of each step; the same for every contestant, other ones for each ``part``."""
    generator = torch.Generator().manual_seed(sequences + 1_000_003 * part)
    return [torch.randint(0, vocab_size, (sequences, length + 1), generator=generator) for _ in range(number)]


@contextmanager
def counted(network: LanguageModel, groups: ProcessGroupCollection, tokens_RS: Tensor) -> Iterator[MicroBatch]:
    """A step's only micro-batch on this process, of rows that are one document each; its experts are counted as in
    training."""
    documents_RS = torch.zeros_like(tokens_RS)
    balances = network.balances().values()
    for balance in balances:
        balance.begin_step(recording=False)
    counts = groups.dp.size() * count_targets(documents_RS, network.config.mtp.steps)
    batch = MicroBatch.build(tokens_RS, documents_RS, counts, (groups.cp.rank(), groups.cp.size()))
    yield batch.to(process_groups.local_device())
    for balance in balances:
        balance.end_step()


def network_step(network: LanguageModel, groups: ProcessGroupCollection, tokens_RS: Tensor) -> None:
    """Our forward and backward pass."""
    with counted(network, groups, tokens_RS) as batch:
        network(batch).total.backward()


def engine_step(engine: Engine, tokens_RS: Tensor) -> None:
    """A whole step of training, as `train.loop` does it."""
    (network,) = engine.chunks
    with counted(network, engine.groups, tokens_RS) as batch:
        engine.train_step([batch], batch.tokens_KRL[0].numel(), LEARNING_RATE)


def about(config: Config, topology: Topology, device: torch.device, alone: bool = False) -> dict[str, str]:
    """Hardware, versions and sizes, as they stand beside every number.

    Args:
        alone: whether one process of the layout was timed, without the others.
    """
    gpu = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads",
        "processes": f"{topology}" + (f"; ONE OF THEM, with made-up rows from the others, {SENT}" if alone else ""),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "model": f"{config.model.pattern} x {config.model.repeats}, width {config.model.hidden_size}, "
        f"{config.model.experts} experts, top-{config.model.experts_per_token}, {config.model.dtype}",
        "data": f"random tokens, rows of {config.data.seq_length} that are one document each, "
        + ("experts in turn (balance.forced)" if config.balance.forced else "natural routing"),
    }


class _Bench:
    def __init__(
        self, config: Config, settings: BenchSettings, topology: Topology, groups: ProcessGroupCollection
    ) -> None:
        self.config, self.settings, self.topology, self.groups = config, settings, topology, groups
        self.device, self.vocab_size = process_groups.local_device(), planned_vocab(config, topology)
        self.speaks = torch.distributed.get_rank() == 0
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]
        self.rate = matmul_rate(self.device, dtype)
        self.result = Result(about(config, topology, self.device, settings.as_first_of > 0), self.rate / 1e12)

    def batches(self, sequences: int, number: int) -> list[Tensor]:
        """Tokens of this process's data-parallel rank, for each of a number of steps."""
        length = self.config.data.seq_length
        return random_batches(sequences, length, self.vocab_size, number, self.groups.dp.rank())

    def time(self, name: str, sequences: int, step: Callable[[Tensor], None], parameters: list[nn.Parameter]) -> Timing:
        """Milliseconds, speed and memory of a contestant at one size."""
        batches, gpu = self.batches(sequences, WARM_UP + self.settings.repeats), self.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        each = run_steps(step, parameters, batches, self.device)
        host = host_milliseconds(step, parameters, batches[0], self.device)
        peak = torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0
        slowest = max_over_all(torch.tensor([statistics.median(each), host, peak], device=self.device))
        milliseconds, host, peak = slowest.tolist()
        timing = self.row(name, sequences, milliseconds, host, peak if gpu else None, self.config.model)
        self.result.timings.append(timing)
        if self.speaks:
            print(line(timing), flush=True)
        return timing

    def row(
        self, name: str, sequences: int, milliseconds: float, host: float, memory: float | None, model: ModelConfig
    ) -> Timing:
        """A timing with the speeds that follow from it, of a process."""
        length = self.config.data.seq_length
        per_second = 1e3 * sequences * length * self.topology.data / self.topology.world / milliseconds
        flops = per_second * training_flops(model, self.config.mtp, self.vocab_size, length)
        return Timing(name, sequences, milliseconds, host, per_second, flops / 1e12, flops / self.rate, memory)

    def ours(self, network: LanguageModel) -> None:
        """Times our network at every size that it has memory for, with the table of its parts."""
        step, parameters = partial(network_step, network, self.groups), list(network.parameters())
        self.sizes("tessera", step, parameters)
        for timing in list(self.result.timings):
            (tokens_RS,) = self.batches(timing.sequences, 1)
            parts = parts_of(network, step, tokens_RS, timing.milliseconds, self.rate, self.config)
            self.result.parts[timing.sequences] = parts
            if self.settings.project > self.config.model.repeats:
                self.project(timing, next(part.milliseconds for part in parts if part.name == HEAD))

    def project(self, timing: Timing, head: float) -> None:
        """Adds what a model of more repeats would take: its layers as often as they were timed, one head."""
        model = replace(self.config.model, repeats=self.settings.project)
        times = model.repeats / self.config.model.repeats
        layers = sum(model.layers.count(symbol) for symbol in MIXERS)
        row = self.row(
            f"{layers} layers, projected",
            timing.sequences,
            max(timing.milliseconds - head, 0.0) * times + head,
            timing.host_milliseconds * times,
            None,
            model,
        )
        self.result.timings.append(row)
        if self.speaks:
            print(line(row), flush=True)

    def sizes(self, name: str, step: Callable[[Tensor], None], parameters: list[nn.Parameter]) -> None:
        """Times a contestant at every size that it has memory for; several processes must have it for all."""
        for sequences in self.settings.sequences:
            try:
                self.time(name, sequences, step, parameters)
            except torch.OutOfMemoryError:
                if self.topology.world > 1:
                    raise  # the others wait for this process
                self.result.left_out[f"{name} at {sequences} sequences"] = "out of memory"
                break

    def with_optimizer(self, network: LanguageModel) -> None:
        """Times whole steps of training: also the sum over ranks, clipping and AdamW on float32 copies."""
        try:
            engine = engine_of([network], self.config, self.groups, self.device)
        except torch.OutOfMemoryError:
            if self.topology.world > 1:
                raise
            self.result.left_out["tessera, whole step"] = "out of memory"
            return
        self.sizes("tessera, whole step", partial(engine_step, engine), [])

    def peers(self) -> None:
        """Times what others offer, one after the other."""
        for name, build in PEERS.items():
            reason = missing(name, self.config, self.topology.world)
            if reason:
                self.result.left_out[name] = reason
                continue
            step, parameters = build(self.config, self.vocab_size, self.device)
            self.sizes(name, step, parameters)
            del step, parameters
            gc.collect()


def line(timing: Timing) -> str:
    """A timing for the screen and for the page of results."""
    memory = "" if timing.peak_gigabytes is None else f"{timing.peak_gigabytes:.1f} GB"
    return (
        f"| {timing.name} | {timing.sequences} | {timing.milliseconds:.1f} ms | host {timing.host_milliseconds:.1f} ms "
        f"| {timing.tokens_per_second / 1e3:.1f}k tokens/s | {timing.tflops:.3g} TFLOP/s "
        f"| {timing.share_of_matmul_rate:.0%} of matmul | {memory} |"
    )


def results_page(result: Result) -> str:
    """The page of results: what ran where, timings, and where our time goes."""
    lines = [f"- {name}: {value}" for name, value in result.about.items()]
    lines += [f"- matrix products: {result.matmul_tflops:.3g} TFLOP/s measured"]
    lines += [f"- left out: {what}: {why}" for what, why in result.left_out.items()]
    lines += ["", "| | sequences | step | host | speed | operations | share | memory |", "|---" * 8 + "|"]
    lines += map(line, result.timings)
    for sequences, parts in result.parts.items():
        lines += ["", f"Where tessera's time goes at {sequences} sequences (ms, and the floor of its operations):", ""]
        lines += ["| | time | floor |", "|---|---|---|"]
        lines += [f"| {row.name} | {row.milliseconds:.2f} | {row.floor_milliseconds:.2f} |" for row in parts]
    return "\n".join(lines)


def bench_model(config: Config, settings: BenchSettings, topology: Topology, groups: ProcessGroupCollection) -> Result:
    """Times a model of ours at every size, and the peers'."""
    bench = _Bench(config, settings, topology, groups)
    if bench.speaks:
        print("\n".join(f"{name}: {value}" for name, value in bench.result.about.items()), flush=True)
    with torch.device(bench.device):
        (network,) = build_chunks(config, topology, groups, bench.vocab_size)
    initialise(network, network.sharded_state_dict(), config.seed)
    bench.ours(network)
    if settings.optimizer:
        bench.with_optimizer(network)
    del network
    gc.collect()
    if settings.peers:
        bench.peers()
    return bench.result


def write_results(results: Mapping[str, Result], path: Path) -> None:
    """The numbers as JSON, and beside it as a page."""
    path.write_text(json.dumps({key: asdict(value) for key, value in results.items()}, indent=1), encoding="utf-8")
    page = "\n\n".join(f"## {key}\n\n{results_page(value)}" for key, value in results.items())
    path.with_suffix(".md").write_text(f"# Measured\n\n{page}\n", encoding="utf-8")


def run_bench(configs: Mapping[str, Config], settings: BenchSettings) -> int:
    """The bench command in each of its processes: a recipe and its variants, by name, one after the other; the exit
    code. What is measured so far is on disk after each.
    """
    first, *_ = configs.values()
    device = gpu_or_cpu(first)
    with ExitStack() as stack:
        kernels = stack.enter_context(Kernels(first, device))
        if settings.as_first_of:
            stack.enter_context(as_first_of(settings.as_first_of, device))
        else:
            process_groups.start(device)
        kernels.require_right(torch.distributed.get_rank() == 0)
        _bench_all(configs, settings)
    return 0


def _bench_all(configs: Mapping[str, Config], settings: BenchSettings) -> None:
    first, *_ = configs.values()
    topology = resolve(first.parallel, first.model, torch.distributed.get_world_size())
    groups = process_groups.lay_out(topology)
    path, results = Path(settings.output), {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        results[name] = bench_model(config, settings, topology, groups)
        gc.collect()
        if torch.distributed.get_rank() == 0:
            write_results(results, path)
            print(f"\n{results_page(results[name])}\n\nwritten: {path} and {path.with_suffix('.md')}", flush=True)
    process_groups.stop()
