"""What a corpus of 100,000 shards costs a job of 512 processes on 64 machines.

    python -m tests.bench.corpus_at_scale [--dir DIR] [--tables open,reads,...]       prints the tables of RESULTS.md

The product's own code reads made-up shards. `open` has a real corpus directory of that many shards, all of them links
to a few real ones, and opens it in the eight processes of a machine. The other tables need sizes only: their shards
have the tokens and documents of real ones, in arrays that take no memory. A table that breaks a bound says so and ends
with an error.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from data.config import DataConfig, PrepareConfig
from data.dataset import Dataset
from data.loader import Loader
from data.order.batches import BatchSchedule
from data.order.mixture import MixedStream, Mixture
from data.order.stream import TokenStream
from data.prepare.shard_writer import ShardWriter
from data.read.faults import Faults
from data.read.manifest import HELDOUT, TRAIN, Manifest, ShardInfo, file_info, write_manifest
from data.read.readers import Reader, Subset
from data.read.unit_cache import UnitCache
from data.read.units import Sizes, Unit, token_dtype

SHARDS, SHARD_DOCUMENTS = 100_000, 100_000
SHARD_TOKENS: int = PrepareConfig.shard_tokens
VOCAB, EOD = 151_936, 0
LENGTH, GLOBAL = 4096, 1024  # 4.2 million tokens a step
NODES, LOCAL = 64, 8
GIB = 2**30


class MadeUp(Reader):
    """Shards of documents of equal length, read in the thread that asks; `reads` counts how often."""

    in_process = True

    def __init__(self, shards: int, tokens: int = SHARD_TOKENS, documents: int = SHARD_DOCUMENTS) -> None:
        self.path, self.vocab_size = f"{shards} made-up shards", VOCAB
        self._shards, self._tokens, self._documents = shards, tokens, documents
        self.reads = 0

    @property
    def num_units(self) -> int:
        return self._shards

    @property
    def num_bytes(self) -> int:
        return 4 * self._tokens * self._shards

    @property
    def identity(self) -> list[Any]:
        return ["made up", self._shards, self._tokens, self._documents]

    def label(self, unit: int) -> str:
        return f"shard {unit}"

    def read(self, unit: int, faults: Faults) -> Unit:
        self.reads += 1
        lengths = np.diff(np.linspace(0, self._tokens, self._documents + 1).astype(np.int64))
        # One number, seen as many: it counts as bytes in every budget, and takes none.
        return Unit.from_lengths(np.broadcast_to(np.int32(unit % VOCAB), self._tokens), lengths)

    def known(self) -> Sizes:
        each = np.ones(self._shards, dtype=np.int64)
        return Sizes(each * self._documents, each * self._tokens, each * 0, "made up")


def stream_of(reader: Reader, shuffle_bytes: int) -> TokenStream:
    """The stream of a training run over a reader, with the memory that a run has."""
    sizes = reader.known()
    assert sizes is not None
    cache = UnitCache([(reader, sizes)], num_bytes=shuffle_bytes)
    return TokenStream(reader, sizes, LENGTH, 0, shuffle_bytes, cache=cache)


def require(holds: bool, what: str) -> None:
    """Ends the benchmark where a bound does not hold."""
    if not holds:
        raise SystemExit(f"does not hold: {what}")


def shards_of(stream: TokenStream, numbers: range) -> np.ndarray:
    """int64 [samples]: the shard in which each sample of a step begins."""
    places = [stream._find(index) for index in numbers]
    return np.array([int(stream._unit_layout(place.epoch)[0][place.spans[0][0]]) for place in places])


def mixing_table(root: Path) -> str:
    """Shards in a batch, and how far its kinds are from the corpus's: chi-square over that of random drawing."""
    lines = [
        "| tokens of a shard | `data.shuffle_bytes` | shards open | shards in a batch | kinds 4 | 10 | 30 | 100 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = [(SHARD_TOKENS, 8), (SHARD_TOKENS, 16), (SHARD_TOKENS, 32), (2 * SHARD_TOKENS, 16), (2 * SHARD_TOKENS, 32)]
    for tokens, gib in cases:
        stream = stream_of(MadeUp(SHARDS, tokens), gib * GIB)
        steps = np.random.default_rng(0).integers(0, stream.samples_per_epoch // GLOBAL, 100)
        batches = [shards_of(stream, range(step * GLOBAL, (step + 1) * GLOBAL)) for step in steps.tolist()]
        distinct = min(len(set(batch.tolist())) for batch in batches)
        require(distinct >= 32, f"{distinct} shards in a batch with {gib} GiB")
        ratios = []
        for kinds in (4, 10, 30, 100):  # the corpus is sorted by kind
            expected = GLOBAL / kinds
            counts = [np.bincount(batch * kinds // SHARDS, minlength=kinds) for batch in batches]
            ratios.append(np.mean([((count - expected) ** 2 / expected).sum() for count in counts]) / (kinds - 1))
        is_usual = tokens == SHARD_TOKENS and gib * GIB >= DataConfig.shuffle_bytes
        require(max(ratios if is_usual else ratios[:2]) <= 1.5, f"chi-square {ratios} times that of random drawing")
        shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| 2^{tokens.bit_length() - 1} | {gib} GiB | {stream.lanes.count} | {distinct} | {shown} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def node_reads(shuffle_bytes: int, node: int, batch: int, steps: int, warm: int) -> tuple[int, int]:
    """(shards read after the first `warm` steps, most held) of one machine, whose processes share what is read."""
    reader = MadeUp(SHARDS)
    stream, each, held, before = stream_of(reader, shuffle_bytes), batch // NODES, 0, 0
    for step in range(steps):
        for index in stream.in_lanes(range(step * batch, (step + 1) * batch))[node * each : (node + 1) * each]:
            stream.ask(index)
            stream.sample(index)
        held = max(held, stream.cache.held)
        stream.release((step + 1) * batch)
        if step == warm:
            before = reader.reads
    return reader.reads - before, held


def reads_table(root: Path) -> str:
    """Shards that the whole job reads, over those that it trains on, from two of its machines."""
    lines = [
        "| `data.shuffle_bytes` | samples a step | shards read over trained on | open on a machine, at most |",
        "|---|---|---|---|",
    ]
    samples, nodes = 2_000_000, (0, 42)  # of the job; after a tenth of them, reads are counted
    for gib, batch in ((16, 1024), (16, 4096), (32, 1024), (16, 1536)):
        steps, warm = samples // batch, samples // batch // 10
        found = [node_reads(gib * GIB, node, batch, steps, warm) for node in nodes]
        trained = (steps - warm) * batch * LENGTH / SHARD_TOKENS
        ratio = sum(reads for reads, _ in found) * NODES / len(nodes) / trained
        # 1536 is no multiple of the lanes: the borders between machines move from step to step.
        require(ratio <= 1.2 or batch == 1536, f"{ratio:.2f} shards read for one that is trained on")
        lines.append(f"| {gib} GiB | {batch} | {ratio:.2f} | {max(held for _, held in found)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def subset_table(root: Path) -> str:
    """Bytes that an epoch of a subset reads, over the share that it keeps."""
    lines = [
        "| `data.subset` | shards read before the first step | tokens read over tokens kept, of an epoch |",
        "|---|---|---|",
    ]
    for fraction in (0.4167, 0.1, 0.01):
        base = MadeUp(4000, tokens=2**15, documents=100)
        stream = stream_of(Subset(base, fraction, seed=0), 2**26)
        before = base.reads
        for index in range(stream.samples_per_epoch):
            stream.ask(index)
            stream.sample(index)
            stream.release(index)
        ratio = (base.reads - before) * base.read(0, Faults()).num_tokens / stream.sizes.num_tokens
        require(ratio <= 1.3 and before <= 1, f"subset {fraction} reads {ratio:.2f} of what it keeps")
        lines.append(f"| {fraction} | {before} | {ratio:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def resident() -> int:
    """Bytes of memory that this process holds for itself; pages of mapped files, which it shares, are left out."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def memory_of_steps(workers: int, steps: int, every: int) -> list[tuple[int, int]]:
    """(bytes, units held) after each `every` steps of one rank of 64."""
    reader = MadeUp(2000, tokens=2**15, documents=100)
    reader.in_process = False
    sizes = reader.known()
    cache = UnitCache([(reader, sizes)], workers, num_bytes=2**24)
    stream = TokenStream(reader, sizes, 256, 0, 2**24, cache=cache)
    found = []
    with Loader(stream, BatchSchedule.constant(128), 2, 3, 64) as loader:
        for step in range(1, steps + 1):
            next(loader)
            if step % every == 0:
                found.append((resident(), stream.cache.held))
    return found


def memory_table(root: Path) -> str:
    """Memory of a rank over 10,000 steps."""
    lines = ["| `data.workers` | memory after 1,000 steps | after 10,000 | units held, at most |", "|---|---|---|---|"]
    for workers in (0, 2):
        found = memory_of_steps(workers, 10_000, 1000)
        memory, held = [size for size, _ in found], [units for _, units in found]
        require(max(memory) - memory[0] < 2**24, f"memory grows: {memory}")
        lines.append(f"| {workers} | {memory[0] / 1e6:.0f} MB | {memory[-1] / 1e6:.0f} MB | {max(held)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def sources_table(root: Path) -> str:
    """Memory of one process that reads 100 sources of equal weight, shards and budget a sixteenth of the real ones."""
    lines = ["| sources | bytes kept, over `data.shuffle_bytes` | shards read over trained on |", "|---|---|---|"]
    budget, tokens, steps, batch = 2**29, SHARD_TOKENS // 16, 240, 256
    for count in (1, 10, 100):
        readers = [MadeUp(1000, tokens, 1000) for _ in range(count)]
        pairs = [(reader, reader.known()) for reader in readers]
        cache = UnitCache(pairs, num_bytes=budget)
        streams = [
            TokenStream(reader, sizes, LENGTH, 0, budget // count, cache=cache, source=number)
            for number, (reader, sizes) in enumerate(pairs)
        ]
        cache.places = sum(stream.lanes.count for stream in streams)
        stream, most, before = MixedStream(streams, Mixture([(0, [1.0] * count)], seed=0), cache), 0, 0
        for step in range(steps):
            for index in stream.in_lanes(range(step * batch, (step + 1) * batch)):
                stream.ask(index)
                stream.sample(index)
            most = max(most, cache.kept_bytes)
            stream.release((step + 1) * batch)
            if step == steps // 6:
                before = sum(reader.reads for reader in readers)
        trained = steps * 5 / 6 * batch * LENGTH / tokens
        ratio = (sum(reader.reads for reader in readers) - before) / trained
        # Each source has a place that is read at, which needs a unit or two whatever the budget.
        require(most <= max(budget, 2 * count * 4 * tokens), f"{most} bytes are kept of {count} sources")
        lines.append(f"| {count} | {most / budget:.2f} | {ratio:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def write_corpus(output: Path, count: int = SHARDS) -> None:
    """A corpus of so many shards, which are links to four real ones."""
    generator = np.random.default_rng(0)
    lengths = np.diff(np.linspace(0, SHARD_TOKENS, SHARD_DOCUMENTS + 1).astype(np.int64))
    vocabulary = {"<|endoftext|>": EOD} | {f"t{number}": number for number in range(1, VOCAB)}
    output.mkdir()
    Backend(models.WordLevel(vocabulary, unk_token="t1")).save(str(output / "tokenizer.json"))
    np.save(output / "token_bytes.npy", np.ones(VOCAB, dtype=np.int32))
    writers = {split: ShardWriter(str(output), split, SHARD_TOKENS) for split in (TRAIN, HELDOUT)}
    for split, shards in ((TRAIN, 4), (HELDOUT, 1)):
        for _ in range(shards):
            tokens = (1 + (VOCAB - 1) * generator.random(SHARD_TOKENS) ** 4).astype(np.int32)
            tokens[np.cumsum(lengths) - 1] = EOD
            for document in np.split(tokens.astype(token_dtype(VOCAB)), np.cumsum(lengths)[:-1]):
                writers[split].add(document, len(document), "")
    splits = {split: writer.finish() for split, writer in writers.items()}
    real, shards = splits[TRAIN], []
    for number in range(count):
        info = real[number % len(real)]
        name = f"part-{number:06d}.parquet"
        os.link(output / info.file, output / name)
        shards.append(ShardInfo(name, info.size, info.sha256, info.documents, info.tokens, info.bytes))
    files = {name: file_info(output / f"{name}.{end}") for name, end in (("tokenizer", "json"), ("token_bytes", "npy"))}
    splits[TRAIN] = tuple(shards)
    write_manifest(str(output), Manifest(VOCAB, "<|endoftext|>", EOD, **files, source={}, splits=splits))


class Opening(NamedTuple):
    """What opening a corpus took of one process."""

    opened: float  # seconds
    first: float  # seconds to the first step
    cpu: float  # seconds of the processor until then
    memory: int  # bytes of its own


def link_corpora(root: Path, count: int) -> None:
    """Corpora of 1000 shards, which are links too."""
    root.mkdir()
    write_corpus(root / "first", 1000)
    for number in range(count):
        (root / f"{number:03d}").mkdir()
        for path in (root / "first").iterdir():
            os.link(path, root / f"{number:03d}" / path.name)
    shutil.rmtree(root / "first")


def settings(root: Path, subset: float = 1.0, sources: int = 1, workers: int = 0) -> DataConfig:
    """Of a job that reads one corpus of 100,000 shards, or many of 1000."""
    many = tuple((str(root / "sources" / f"{number:03d}"), 1.0) for number in range(sources))
    return DataConfig(
        corpus=str(root / "corpus"),
        sources=many if sources > 1 else (),
        workers=workers,
        seq_length=LENGTH,
        cache=str(root / "cache"),
        node_cache=str(root / "units"),
        subset=subset,
    )


def open_corpus(config: DataConfig, rank: int) -> Opening:
    """Opens the corpus as a rank of the job, and reads its first step."""
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    dataset = Dataset(config, shared=True)
    opened = time.perf_counter() - start
    schedule = BatchSchedule.constant(GLOBAL)
    with Loader(dataset.train_stream(0), schedule, GLOBAL // NODES // LOCAL, rank, NODES * LOCAL) as loader:
        next(loader)
        first, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Opening(opened, first, cpu, resident() - before)


def open_table(root: Path) -> str:
    """From opening to the first sample: the process that builds the index, then the eight of a machine at once."""
    if not (root / "corpus").exists():
        write_corpus(root / "corpus")
        link_corpora(root / "sources", 100)
    cases = (
        ("first process", 1, settings(root)),
        ("eight processes", LOCAL, settings(root)),
        ("first process, subset 0.4167", 1, settings(root, 0.4167)),
        ("first process, 100 sources", 1, settings(root, sources=100)),
        ("eight processes, 100 sources", LOCAL, settings(root, sources=100)),
    )
    lines = ["| | opened after | first step after | of the processor, each | memory of all |", "|---|---|---|---|---|"]
    for name, ranks, config in cases:
        with ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as pool:
            list(pool.map(time.sleep, [2.0] * ranks))  # all have started, and imported this file
            found = list(pool.map(open_corpus, [config] * ranks, range(ranks)))
        opened, first, cpu = (max(times) for times in zip(*((f.opened, f.first, f.cpu) for f in found), strict=True))
        memory = sum(opening.memory for opening in found) / 1e9
        lines.append(f"| {name} | {opened:.1f} s | {first:.1f} s | {cpu:.1f} s | {memory:.2f} GB |")
        print(lines[-1], file=sys.stderr, flush=True)
        require(first < 60 and memory < 1, f"{name}: first step after {first:.1f} s, {memory:.2f} GB")
    return "\n".join(lines)


class Fed(NamedTuple):
    """What a rank took from its loader."""

    steps: int
    waits: int  # steps that were not there when they were asked for
    longest: float  # seconds that one was waited for
    seconds: float
    cpu: float  # seconds of the processor, in this process


def take_steps(config: DataConfig, rank: int, rate: float, seconds: float, together: "Barrier") -> Fed:
    """Takes steps as a rank of a machine that trains `rate` tokens a second, or with 0 as fast as they come."""
    torch.set_num_threads(1)
    period = GLOBAL // NODES * LENGTH / rate if rate else 0.0
    dataset, schedule = Dataset(config, shared=True), BatchSchedule.constant(GLOBAL)
    with Loader(dataset.train_stream(0), schedule, GLOBAL // NODES // LOCAL, rank, NODES * LOCAL) as loader:
        next(loader)
        time.sleep(3)  # what a first step of training takes, at least
        together.wait()
        begin, cpu, steps, waits, longest = time.perf_counter(), time.process_time(), 0, 0, 0.0
        due = begin
        while (now := time.perf_counter()) < begin + seconds:
            time.sleep(max(0.0, due - now))
            asked = time.perf_counter()
            if loader.poll(0) is None:
                next(loader)
                waits, longest = waits + 1, max(longest, time.perf_counter() - asked)
            steps, due = steps + 1, max(due, asked) + period
        return Fed(steps, waits, longest, time.perf_counter() - begin, time.process_time() - cpu)


def feed_table(root: Path) -> str:
    """Whether a machine's eight processes wait for data: at 10^6 tokens a second, and what they could take at most."""
    if not (root / "corpus").exists():
        write_corpus(root / "corpus")
    lines = [
        "| `data.workers` | tokens/s asked of a machine | tokens/s | steps | not there in time | of a core |",
        "|---|---|---|---|---|---|",
    ]
    for workers, rate in ((0, 1e6), (1, 1e6), (0, 0.0)):
        with (
            get_context("spawn").Manager() as manager,
            ProcessPoolExecutor(LOCAL, mp_context=get_context("spawn")) as pool,
        ):
            barrier, config = manager.Barrier(LOCAL), settings(root, workers=workers)
            tasks = [pool.submit(take_steps, config, rank, rate, 40.0, barrier) for rank in range(LOCAL)]
            found = [task.result() for task in tasks]
        tokens = sum(fed.steps for fed in found) * GLOBAL // NODES // LOCAL * LENGTH
        speed, waits = tokens / max(fed.seconds for fed in found), sum(fed.waits for fed in found)
        cores = sum(fed.cpu for fed in found) / max(fed.seconds for fed in found)
        asked = f"{rate:,.0f}" if rate else "as many as come"
        each = f"{speed / cores / 1e6:.1f} M tokens/s" if not rate else f"{cores:.2f}"
        lines.append(f"| {workers} | {asked} | {speed:,.0f} | {sum(fed.steps for fed in found)} | {waits} | {each} |")
        print(lines[-1], max(fed.longest for fed in found), file=sys.stderr, flush=True)
        require(not rate or (waits == 0 and speed > 0.99 * rate), f"{waits} steps waited for data, {speed} tokens/s")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "open": open_table,
    "reads": reads_table,
    "mixing": mixing_table,
    "subset": subset_table,
    "memory": memory_table,
    "sources": sources_table,
    "feed": feed_table,
}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, help="keeps the corpus of the benchmark")
    parser.add_argument("--tables", default=",".join(TABLES), help="which of them, by commas")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.dir or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        for name in options.tables.split(","):
            print(f"{TABLES[name](root)}\n", flush=True)


if __name__ == "__main__":
    main()
