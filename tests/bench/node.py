"""What the layouts of one node's cards are worth: speed of each, the exchange of experts, a save, and equal losses.

    python -m tests.bench.node [--cards 8] [--minutes 9] [--miniature] [--output node.json] [key=value ...]

Real-width blocks of the recipe `proxy`, natural routing. Speeds are of forward and backward passes over random tokens,
at 4 and at 12 blocks; a row "one card" is of the same cards each by itself, with all experts and nothing exchanged.
Then every layout trains 30 whole steps on real text (the embedded corpus) from equal weights, and their losses are
compared. One start of processes does it all, the most important first; what there is no time for, and layouts that do
not divide the cards, are named. Without GPUs, and with ``--miniature``, the same in small over gloo: that shows only
that it runs.
"""

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.dataset import Dataset
from model.init import initialise
from model.layers.router import Router
from parallel import groups as process_groups
from parallel.collectives import from_first, max_over_all, start_all_to_all
from parallel.topology import TopologyError, resolve
from tests.dist import run_ranks
from tests.parallel.tiny import leave_layout
from train.__main__ import compose
from train.job.build import Job, build_chunks, engine_of, gpu_or_cpu
from train.job.checkpoint import Checkpoints
from train.job.checkpoint import load as load_checkpoint
from train.job.footprint import planned_vocab
from train.job.progress import Progress
from train.job.shelf import Shelf
from train.loop import train_step
from train.measure.bench import bench_model, counted, network_step, random_batches
from train.measure.timing import run_steps
from train.measure.verdict import Kernels
from train.observe import step_metrics
from train.settings.commands import BenchSettings
from train.settings.run import Config
from train.settings.tree import ConfigError
from train.watch import metrics

LOSS_STEPS = 30
# Layouts add up in other orders, and bfloat16 rounds each addend to 2^-9: in the first steps that shows in the fourth
# digit of a loss; then near ties of experts go other ways, and paths part, by 1 % over 200 steps of `tiny`
# (tests/bench/RESULTS.md). A gradient that is not summed, or summed twice, is off by more within ten steps.
EARLY_STEPS, EARLY, LATE = 3, 2e-3, 2e-2
LONG_TOKENS = 65_536  # of a process, above which layers are computed again in the backward pass
MINIATURE = (
    *("model.vocab_size=2048", "model.hidden_size=32", "model.head_dim=16", "model.experts=16", "model.expert_size=16"),
    *("model.experts_per_token=4", "model.attention_heads=8", "model.linear_key_heads=4", "model.linear_value_heads=8"),
    *("model.linear_key_dim=16", "model.linear_value_dim=16", "model.shared_expert_size=16", "model.dtype=float32"),
    *("model.key_value_heads=2", "data.seq_length=64"),
)


@dataclass(frozen=True)
class Asked:
    """What is measured, and how large."""

    cards: int
    minutes: float
    miniature: bool
    output: str
    settings: tuple[str, ...]

    @property
    def blocks(self) -> tuple[int, int]:
        """Repeats of the four blocks."""
        return (1, 2) if self.miniature else (1, 3)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Of a data-parallel rank."""
        return (1, 2) if self.miniature else (2, 4, 8)

    @property
    def long(self) -> tuple[int, ...]:
        """Lengths of one sequence over context-parallel cards."""
        return (128, 256, 512) if self.miniature else (32_768, 131_072, 262_144)


@dataclass(frozen=True)
class Cell:
    """One thing to measure: what it is called, how, and the settings of its layout and sizes."""

    name: str
    measure: Callable[["Node", "Cell"], dict[str, Any]]
    settings: tuple[str, ...]
    sequences: tuple[int, ...] = ()


@dataclass
class Results:
    """What is written."""

    about: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)


def layouts(cards: int) -> dict[str, tuple[str, ...]]:
    """The settings of each layout of so many cards."""
    half = cards // 2
    found = {"one card": ("parallel.expert=1",), f"EP{cards}": (f"parallel.expert={cards}",)}
    if half > 1:
        found[f"EP{half} x DP{cards // half}"] = (f"parallel.expert={half}",)
        found[f"CP2 x EP{half}"] = ("parallel.context=2", f"parallel.expert={half}")
    return found | {f"CP{cards}": (f"parallel.context={cards}", f"parallel.expert={cards}")}


def cells(asked: Asked) -> list[Cell]:
    """Everything, the most important first."""
    own, few, many = layouts(asked.cards), *asked.blocks
    by_context = {name: settings for name, settings in own.items() if name.startswith("CP")}
    by_data = {name: settings for name, settings in own.items() if name not in by_context}
    size = f"model.repeats={few}"

    def speeds(layouts: dict[str, tuple[str, ...]], repeats: int) -> list[Cell]:
        return [
            Cell(f"{name}, {4 * repeats} blocks", speed, (*layout, f"model.repeats={repeats}"), asked.sequences)
            for name, layout in layouts.items()
        ]

    def long(length: int) -> list[Cell]:
        return [
            Cell(
                f"{name}, {4 * few} blocks, {length:,} tokens",
                speed,
                (*layout, size, f"data.seq_length={length}"),
                (1,),
            )
            for name, layout in by_context.items()
        ]

    piped = ("model.pattern=GEGE|GE*E", "parallel.pipeline=2", f"parallel.expert={max(1, asked.cards // 2)}")
    trained = [
        Cell(f"losses, {name}", losses, (*layout, size))
        for name, layout in {
            **own,
            "data parallel": ("parallel.expert=1",),
            f"PP2 x EP{max(1, asked.cards // 2)}": piped,
        }.items()
        if name != "one card"
    ]
    return [
        *speeds(by_data, few),
        *long(asked.long[1]),
        *trained,
        Cell("exchange", exchange, (*own[f"EP{asked.cards}"], size)),
        *speeds(by_data, many),
        *long(asked.long[0]),
        *long(asked.long[2]),
        Cell("save and load", save_and_load, (*own[f"EP{asked.cards}"], size)),
    ]


class Node:
    """One process: its device and what it has asked for."""

    def __init__(self, asked: Asked, device: torch.device) -> None:
        self.asked, self.device, self.began = asked, device, time.monotonic()
        self.speaks = dist.get_rank() == 0
        self.results = Results()

    def config(self, cell: Cell, *more: str) -> Config:
        """The recipe with the settings of a cell."""
        small = MINIATURE if self.asked.miniature else ()
        return compose(["-cn", "proxy", *small, *self.asked.settings, *cell.settings, *more], planned=True)

    def job(self, config: Config, dataset: Dataset | None = None) -> Job:
        """This process's part of a job, its weights drawn; the layout before it is left."""
        leave_layout()
        topology = resolve(config.parallel, config.model, self.asked.cards)
        groups, vocab_size = process_groups.lay_out(topology), planned_vocab(config, topology)
        with torch.device(self.device):
            chunks = build_chunks(config, topology, groups, vocab_size)
        for chunk in chunks:
            initialise(chunk, chunk.sharded_state_dict(), config.seed)
        return Job(config, topology, groups, self.device, dataset, chunks)

    def seconds(self) -> float:
        """Since the start, of the slowest process."""
        return float(max_over_all(torch.tensor([time.monotonic() - self.began], device=self.device)))

    def run(self, every: list[Cell]) -> Results:
        """All cells that time is left for; what was measured so far is on disk after each."""
        for cell in every:
            before = self.seconds()
            if before > 60 * self.asked.minutes:
                self.results.left_out[cell.name] = f"no time: {before:.0f} s had passed"
                continue
            try:
                found = cell.measure(self, cell)
            except (TopologyError, ConfigError, torch.OutOfMemoryError) as refused:
                self.results.left_out[cell.name] = str(refused).split("\n")[0]
                continue
            self.results.cells[cell.name] = found | {"seconds": round(self.seconds() - before, 1)}
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.speaks:
                print(f"{self.seconds_text()} {cell.name}: {json.dumps(self.results.cells[cell.name])}", flush=True)
                write(self.results, Path(self.asked.output))
        return self.results

    def seconds_text(self) -> str:
        """How far it is, for a line."""
        return f"[{time.monotonic() - self.began:.0f} s]"


def speed(node: Node, cell: Cell) -> dict[str, Any]:
    """Forward and backward passes of a layout at some sizes: of each process."""
    config = node.config(cell)
    leave_layout()
    topology = resolve(config.parallel, config.model, node.asked.cards)
    if cell.sequences[0] * config.data.seq_length // topology.context > LONG_TOKENS:
        config = node.config(cell, "parallel.recompute=full")
    groups = process_groups.lay_out(topology)
    settings = BenchSettings(
        sequences=cell.sequences,
        repeats=1 if node.asked.miniature else 3,
        peers=False,
        project=0 if topology.context > 1 else 12,
    )
    result = bench_model(config, settings, topology, groups)
    node.results.about = {**result.about, "processes": str(node.asked.cards), "model": "proxy"} | node.results.about
    return {
        f"{timing.sequences} x {config.data.seq_length}{', ' + timing.name if timing.name != 'tessera' else ''}": {
            "milliseconds": timing.milliseconds,
            "tokens_per_second": timing.tokens_per_second,
            "tflops": timing.tflops,
            "gigabytes": timing.peak_gigabytes,
        }
        for timing in result.timings
    }


def losses(node: Node, cell: Cell) -> dict[str, Any]:
    """Whole steps on real text from equal weights: the loss of each, and tokens a second of a process."""
    cards, steps = node.asked.cards, 6 if node.asked.miniature else LOSS_STEPS
    own = (f"run.steps={steps}", f"batch.global={2 * cards}", "batch.micro=2", "mtp.steps=1", "balance.mode=exact")
    config = node.config(cell, *own, "optim.warmup_steps=5", "optim.lr=3e-4", "data.corpus=embedded")
    listings = from_first(lambda: Dataset(config.data).listings)
    job = node.job(config, Dataset(config.data, shared=True, listings=listings))
    engine = engine_of(job.chunks, job.config, job.groups, job.device)
    progress, found, times = Progress(job, 0, {}, []), [], []
    with progress.loader() as loader:
        for step in range(1, steps + 1):
            batches = None
            while batches is None:
                batches = loader.poll(10.0)
            begin = time.perf_counter()
            outputs, norm = train_step(job, engine, batches, 3e-4 * min(1.0, step / 5))
            if node.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            values = step_metrics(job, outputs, detailed=False)
            found.append([values[metrics.LM_LOSS], values[metrics.mtp_loss(1)], norm])
    job.dataset.close()
    tokens = 2 * cards * config.data.seq_length / cards
    return {
        "tokens_per_second": tokens / statistics.median(times[2:]),
        "lm_loss": [row[0] for row in found],
        "mtp_loss": [row[1] for row in found],
        "grad_norm": [row[2] for row in found],
    }


def exchange(node: Node, cell: Cell) -> dict[str, Any]:
    """Rows of natural routing sent to the cards that hold their experts, by themselves; and how many there are."""
    config = node.config(cell)
    job = node.job(config)
    (network,), sequences = job.chunks, node.asked.sequences[-1]
    seen: list[Tensor] = []
    hook = network.moe_layers()[0].router.register_forward_hook(partial(_note_experts, seen))
    (tokens,) = random_batches(sequences, config.data.seq_length, job.vocab_size, 1, job.groups.dp.rank())
    network_step(network, job.groups, tokens)
    hook.remove()
    cards, own = node.asked.cards, dist.get_rank()
    owner_TK = seen[0] // (config.model.experts // cards)
    once_TP = torch.zeros(owner_TK.shape[0], cards, device=owner_TK.device).scatter_(1, owner_TK, 1.0)
    away_P = torch.arange(cards, device=owner_TK.device) != own
    rows, ranks = float((owner_TK != own).sum()), float(once_TP[:, away_P].sum())
    share = owner_TK.numel() // cards * cards
    x = torch.randn(share, config.model.hidden_size, device=node.device, dtype=next(network.parameters()).dtype)
    counts = [share // cards] * cards

    def send(_: int) -> None:
        start_all_to_all(x, counts, counts, dist.group.WORLD).wait()

    milliseconds = statistics.median(run_steps(send, [], range(8), node.device))
    sent = x.numel() * x.element_size() * (cards - 1) / cards
    return {
        "milliseconds": milliseconds,
        "gigabytes_per_second": sent / milliseconds / 1e6,
        "rows_a_token": rows / owner_TK.shape[0],
        "rows_a_token_once_a_card": ranks / owner_TK.shape[0],
    }


def _note_experts(seen: list[Tensor], router: Router, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
    seen.append(outputs[1].detach())


def save_and_load(node: Node, cell: Cell) -> dict[str, Any]:
    """A checkpoint of a smaller model, written while steps go on and read again: gigabytes a second of all cards."""
    place = Path(tempfile.gettempdir()) / "tessera_node"
    small = () if node.asked.miniature else ("model.experts=64",)
    config = node.config(cell, *small, f"run.dir={place}", "run.keep=1", f"batch.global={2 * node.asked.cards}")
    job = node.job(config)
    engine = engine_of(job.chunks, job.config, job.groups, job.device)
    checkpoints, shelf = Checkpoints(job, engine), Shelf(config.run.checkpoints)
    (tokens,) = random_batches(2, config.data.seq_length, job.vocab_size, 1, job.groups.dp.rank())

    def step() -> None:
        with counted(job.chunks[0], job.groups, tokens) as batch:
            engine.train_step([batch], batch.tokens_KRL[0].numel(), 1e-5, lambda *_: checkpoints.settle() or True)

    try:
        step()
        begin = time.perf_counter()
        checkpoints.save(1, {})
        while checkpoints.busy and node.seconds() < 60 * node.asked.minutes:
            step()
            checkpoints.poll()
        checkpoints.wait()
        written, blocked = time.perf_counter() - begin, checkpoints.blocked
        path = shelf.path(1)
        size = sum(file.stat().st_size for file in path.iterdir())
        begin = time.perf_counter()
        load_checkpoint(engine, path)
        read = time.perf_counter() - begin
        dist.barrier()
    finally:
        if node.speaks:
            shutil.rmtree(place, ignore_errors=True)
    gigabytes = size / 1e9
    return {
        "gigabytes": gigabytes,
        "written_gigabytes_per_second": gigabytes / written,
        "read_gigabytes_per_second": gigabytes / read,
        "blocked_seconds": blocked,
    }


def judge(results: Results, cards: int) -> dict[str, str]:
    """What must hold, in words: speeds against one card, long sequences against short ones, losses of all layouts."""
    found, verdicts = results.cells, {}

    def rate(cell: str, key: str) -> float | None:
        return found.get(cell, {}).get(key, {}).get("tokens_per_second")

    def compare(what: str, one: float | None, other: float | None, least: float) -> None:
        if one and other:
            share = one / other
            verdicts[what] = f"{share:.1%}, " + ("holds" if share >= least else f"DOES NOT HOLD: at least {least:.0%}")

    short = next((key for key in found.get("one card, 4 blocks", {}) if key.startswith("8 x")), "")
    compare(
        "EP of one card at 8 sequences", rate(f"EP{cards}, 4 blocks", short), rate("one card, 4 blocks", short), 0.9
    )
    long = f"CP{cards}, 4 blocks, 131,072 tokens"
    compare("CP at 131,072 tokens of one card's", rate(long, "1 x 131072"), rate("one card, 4 blocks", short), 0.6)
    trained = {name: cell["lm_loss"] for name, cell in found.items() if name.startswith("losses, ")}
    for name, own in list(trained.items())[1:]:
        first, base = next(iter(trained.items()))
        apart = [abs(x / y - 1) for x, y in zip(own, base, strict=True)]
        early, late = max(apart[:EARLY_STEPS]), max(apart)
        words = "holds" if early <= EARLY and late <= LATE else f"DOES NOT HOLD: at most {EARLY:.1%} and {LATE:.1%}"
        verdicts[f"{name} and {first}"] = f"{early:.3%} apart at first, {late:.3%} at most, {words}"
    return verdicts


def page(results: Results) -> str:
    """The page of results."""
    lines = [f"- {name}: {value}" for name, value in results.about.items()]
    lines += [f"- {name}: {value}" for name, value in results.verdicts.items()]
    lines += [f"- left out: {name}: {why}" for name, why in results.left_out.items()]
    lines += ["", "| | | ms | tokens/s of a card | TFLOP/s | GB |", "|---|---|---|---|---|---|"]
    for name, cell in results.cells.items():
        for size, row in cell.items():
            if isinstance(row, dict):
                memory = f"{row['gigabytes']:.1f}" if row["gigabytes"] else ""
                speeds = f"{row['milliseconds']:.1f} | {row['tokens_per_second']:,.0f} | {row['tflops']:.3g}"
                lines.append(f"| {name} | {size} | {speeds} | {memory} |")
    for name, cell in results.cells.items():
        plain = {key: value for key, value in cell.items() if isinstance(value, float) and key != "seconds"}
        if plain:
            lines += ["", f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in plain.items())]
    return "\n".join(["# One node", "", *lines, ""])


def write(results: Results, path: Path) -> None:
    """The numbers as JSON, and beside it as a page."""
    path.write_text(json.dumps(asdict(results), indent=1), encoding="utf-8")
    path.with_suffix(".md").write_text(page(results), encoding="utf-8")


def work(asked: Asked) -> Results:
    """One process's part."""
    config = compose(["-cn", "proxy", *(MINIATURE if asked.miniature else ()), *asked.settings], planned=True)
    device = gpu_or_cpu(config)
    with Kernels(config, device) as kernels:
        process_groups.start(device)
        node = Node(asked, device)
        kernels.require_right(node.speaks)
    results = node.run(cells(asked))
    results.verdicts = judge(results, asked.cards)
    if node.speaks:
        write(results, Path(asked.output))
    return results


def measure(asked: Asked) -> Results:
    """Starts the processes and waits for them; what they measured is on disk, and as a page on the screen."""
    gpus = torch.cuda.is_available() and not asked.miniature
    results, *_ = run_ranks(work, asked.cards, asked, timeout=60 * asked.minutes + 120, gpus=gpus)
    print(page(results), flush=True)
    return results


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    parser.add_argument("--miniature", action="store_true", help="small sizes over gloo")
    parser.add_argument("--output", default="node.json")
    asked, settings = parser.parse_known_args()
    if asked.cards < 2:
        parser.error("one card has no layouts: at least two are needed")
    small = asked.miniature or not torch.cuda.is_available()
    measure(Asked(asked.cards, asked.minutes, small, asked.output, tuple(settings)))


if __name__ == "__main__":
    main()
