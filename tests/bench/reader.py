"""How fast tokens become micro-batches: our readers, plain `datasets` streaming and megatron-core's GPTDataset.

    python -m tests.bench.reader [--dir DIR] [--repeats N] [--tables speed,...]       prints the tables of RESULTS.md

The same documents as a prepared corpus, as parquet lists of tokens and as Megatron's .bin and .idx, read in the order
that training reads them in, up to the tensors of a micro-batch. Every measurement has a process of its own, with one
thread of torch, and the clock starts after the first step. The memory of a process that reads 10^8 tokens must not
grow. Beside work that holds Python's lock, reading in a thread (`data.workers=0`) is compared with reading processes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models
from torch import Tensor

from data.config import DataConfig
from data.dataset import Dataset
from data.loader import Loader
from data.order.batches import BatchSchedule
from data.prepare.shard_writer import ShardWriter
from data.read.manifest import HELDOUT, TRAIN, Manifest, file_info, write_manifest
from data.read.units import token_dtype

VOCAB, EOD = 151_936, 0
LENGTH, MICRO, GLOBAL = 4096, 4, 16
TOKENS = 120_000_000  # of the corpus: more than is read, so that nothing is found in memory
MEDIAN_TOKENS, SPREAD = 600, 1.0  # of a document: log-normal
ROWS_PER_GROUP = 1000
MEASURED = 100_000_000  # tokens of one measurement: most of the corpus, so that most units are read within it
WORK = 0.02  # seconds of a step's own work, where a loader works beside it


@dataclass(frozen=True)
class Reading:
    """One measurement: seconds of the clock and of the processor that `tokens` took."""

    tokens: int
    wall: float
    cpu: float


def write_documents(root: Path) -> None:
    """The same documents in every format."""
    generator = np.random.default_rng(0)
    count = int(TOKENS / (MEDIAN_TOKENS * np.exp(SPREAD**2 / 2)))
    lengths = np.maximum(2, generator.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count)).astype(np.int64)
    # Few ids are frequent, as in text.
    tokens = (1 + (VOCAB - 1) * generator.random(lengths.sum()) ** 4).astype(np.int32)
    tokens[np.cumsum(lengths) - 1] = EOD
    column = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), tokens)
    pq.write_table(pa.table({"tokens": column}), root / "tokens.parquet", row_group_size=ROWS_PER_GROUP)
    with (
        pa.OSFile(str(root / "tokens.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.schema([("tokens", column.type)])) as out,
    ):
        out.write_table(pa.table({"tokens": column}), max_chunksize=ROWS_PER_GROUP)
    _write_prepared(root / "prepared", tokens, lengths)
    _write_megatron(root / "megatron", tokens, lengths)


def _write_prepared(output: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    vocabulary = {"<|endoftext|>": EOD} | {f"t{number}": number for number in range(1, VOCAB)}
    output.mkdir()
    Backend(models.WordLevel(vocabulary, unk_token="t1")).save(str(output / "tokenizer.json"))
    np.save(output / "token_bytes.npy", np.ones(VOCAB, dtype=np.int32))
    writer = ShardWriter(str(output), f"{TRAIN}-00000", shard_tokens=2**22)
    for document in np.split(tokens.astype(token_dtype(VOCAB)), np.cumsum(lengths)[:-1]):
        writer.add(document, len(document), "")
    files = {name: file_info(output / f"{name}.{end}") for name, end in (("tokenizer", "json"), ("token_bytes", "npy"))}
    splits = {TRAIN: writer.finish(), HELDOUT: ()}
    write_manifest(str(output), Manifest(VOCAB, "<|endoftext|>", EOD, **files, source={}, splits=splits))


def _write_megatron(prefix: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in np.split(tokens, np.cumsum(lengths)[:-1]):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


def _config(corpus: Path, column: str, workers: int = 0) -> DataConfig:
    return DataConfig(
        corpus=str(corpus),
        column=column,
        tokenizer=str(corpus.parent / "prepared"),
        seq_length=LENGTH,
        workers=workers,
        heldout_fraction=0.0,
        shuffle_bytes=2**26,  # a small part of the corpus, so that units come and go
        cache=str(corpus.parent / "cache"),
    )


def ours(corpus: Path, column: str, workers: int = 0) -> Iterator[Tensor]:
    """The tokens of each micro-batch as training gets them, with the documents beside them."""
    stream = Dataset(_config(corpus, column, workers)).train_stream(0)
    with Loader(stream, BatchSchedule.constant(GLOBAL), MICRO, 0, 1) as loader:
        for step in loader:
            yield from (batch.tokens for batch in step)


def prepared(root: Path) -> Iterator[Tensor]:
    """Ours from a prepared corpus."""
    return ours(root / "prepared", "")


def parquet(root: Path) -> Iterator[Tensor]:
    """Ours from token lists."""
    return ours(root / "tokens.parquet", "tokens")


def arrow(root: Path) -> Iterator[Tensor]:
    """Ours from token lists as `datasets` saves them, mapped into memory."""
    return ours(root / "tokens.arrow", "tokens")


def megatron(root: Path) -> Iterator[Tensor]:
    """Ours from Megatron's files."""
    return ours(root / "megatron", "")


def streamed(root: Path) -> Iterator[Tensor]:
    """`datasets`, streamed: rows end to end, cut into samples; no shuffling, no boundaries."""
    import datasets

    rows = datasets.load_dataset(
        "parquet", data_files=str(root / "tokens.parquet"), split="train", streaming=True
    ).with_format("numpy")
    pending, held = [], 0
    while True:
        for row in rows:
            pending.append(row["tokens"])
            held += len(row["tokens"])
            if held >= MICRO * (LENGTH + 1):
                joined = np.concatenate(pending)
                whole, rest = np.split(joined, [MICRO * (LENGTH + 1)])
                yield torch.from_numpy(whole.astype(np.int64).reshape(MICRO, LENGTH + 1))
                pending, held = [rest], len(rest)


def streamed_lists(root: Path) -> Iterator[Tensor]:
    """The same through Python lists, which is what `datasets` gives unless asked."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(root / "tokens.parquet"), split="train", streaming=True)
    pending: list[int] = []
    size = MICRO * (LENGTH + 1)
    while True:
        for row in rows:
            pending += row["tokens"]
            while len(pending) >= size:
                yield torch.tensor(pending[:size]).view(MICRO, LENGTH + 1)
                del pending[:size]


def gpt_dataset(root: Path, documents: bool = False) -> Iterator[Tensor]:
    """megatron-core's GPTDataset behind a plain DataLoader, its indexes built before the clock starts."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    tokenizer = SimpleNamespace(eod=EOD, pad=-1, vocab_size=VOCAB, unique_identifiers={"name": "numbers"})
    config = GPTDatasetConfig(
        random_seed=0, sequence_length=LENGTH, blend=([str(root / "megatron")], None), split="1,0,0",
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, inter_document_masking=documents, path_to_cache=str(root / "index"),
    )  # fmt: skip
    source = IndexedDataset(str(root / "megatron"))
    samples = MEASURED // LENGTH + 2 * MICRO
    dataset = GPTDataset(
        source, str(root / "megatron"), np.arange(len(source.document_indices) - 1), samples, Split.train, config
    )
    for batch in torch.utils.data.DataLoader(dataset, batch_size=MICRO, num_workers=0):
        yield batch["tokens"]


def gpt_dataset_documents(root: Path) -> Iterator[Tensor]:
    """The same with the boundaries of documents, which ours always has."""
    return gpt_dataset(root, documents=True)


READERS: dict[str, Callable[[Path], Iterator[Tensor]]] = {
    "ours, prepared shards": prepared,
    "ours, parquet token lists": parquet,
    "ours, arrow token lists": arrow,
    "ours, `.bin` and `.idx`": megatron,
    "`datasets` streaming, parquet, NumPy": streamed,
    "`datasets` streaming, parquet, lists": streamed_lists,
    "GPTDataset": gpt_dataset,
    "GPTDataset with document boundaries": gpt_dataset_documents,
}
OURS = [name for name in READERS if name.startswith("ours")]
FILES = {prepared: "prepared/train-*.parquet", arrow: "tokens.arrow", parquet: "tokens.parquet"}
FILES |= dict.fromkeys((streamed, streamed_lists), "tokens.parquet")
FILES |= dict.fromkeys((megatron, gpt_dataset, gpt_dataset_documents), "megatron.*")


def measure(reader: Callable[[Path], Iterator[Tensor]], root: Path) -> Reading:
    """Reads MEASURED tokens, after a few others."""
    torch.set_num_threads(1)
    batches, each = reader(root), MICRO * LENGTH
    next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(1 for _ in islice(batches, MEASURED // each))
    return Reading(count * each, time.perf_counter() - wall, time.process_time() - cpu)


def in_process[T](function: Callable[..., T], *arguments: object) -> T:
    """Calls a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def speed_table(root: Path, repeats: int) -> str:
    """Medians of every reader, in Markdown."""
    lines = [
        "| reader | tokens/s a core | tokens/s | slowest and fastest, a core | bytes a token |",
        "|---|---|---|---|---|",
    ]
    for name, reader in READERS.items():
        found = [in_process(measure, reader, root) for _ in range(repeats)]
        cores = sorted(reading.tokens / reading.cpu / 1e6 for reading in found)
        wall = median(reading.tokens / reading.wall / 1e6 for reading in found)
        size = sum(path.stat().st_size for path in root.glob(FILES[reader]))
        least = f"{cores[0]:.1f} to {cores[-1]:.1f} M"
        lines.append(f"| {name} | {median(cores):.1f} M | {wall:.1f} M | {least} | {size / TOKENS:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def resident() -> int:
    """Bytes of memory that this process holds for itself; pages of mapped files, which it shares, are left out."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def memory(reader: Callable[[Path], Iterator[Tensor]], root: Path) -> list[int]:
    """Bytes of memory after each of ten times 10^7 tokens."""
    torch.set_num_threads(1)
    batches, found = reader(root), []
    for _ in range(10):
        for _ in islice(batches, 10**7 // (MICRO * LENGTH)):
            pass
        found.append(resident())
    return found


def memory_table(root: Path, repeats: int) -> str:
    """Memory of our readers, in Markdown; AssertionError if it grows by more than 64 MiB."""
    lines = ["| reader | memory after 10^7 tokens | after 10^8 | largest between |", "|---|---|---|---|"]
    for name in OURS:
        found = in_process(memory, READERS[name], root)
        assert max(found) - found[0] < 2**26, (name, found)
        first, last, most = (f"{size / 1e6:.0f} MB" for size in (found[0], found[-1], max(found)))
        lines.append(f"| {name} | {first} | {last} | {most} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def python_work(seconds: float) -> Callable[[], None]:
    """Work that holds the interpreter's lock for so long, as launching a step's kernels does."""

    def count(number: int) -> None:
        for _ in range(number):
            pass

    start = time.thread_time()
    count(10**7)
    number = int(seconds / (time.thread_time() - start) * 10**7)
    return lambda: count(number)


def step_beside(source: str, workers: int, root: Path) -> tuple[float, float]:
    """Milliseconds of a step of WORK seconds of Python beside a loader, and the processor's for this process."""
    torch.set_num_threads(1)
    column = "" if source == "prepared" else "tokens"
    batches, work, steps = ours(root / source, column, workers), python_work(WORK), MEASURED // (GLOBAL * LENGTH)
    next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        work()
        for _ in islice(batches, GLOBAL // MICRO):
            pass
    return 1e3 * (time.perf_counter() - wall) / steps, 1e3 * (time.process_time() - cpu) / steps


def alone() -> tuple[float, float]:
    """The same without a loader."""
    work, wall, cpu = python_work(WORK), time.perf_counter(), time.process_time()
    for _ in range(50):
        work()
    return 1e3 * (time.perf_counter() - wall) / 50, 1e3 * (time.process_time() - cpu) / 50


def workers_table(root: Path, repeats: int) -> str:
    """What reading in a thread and in processes takes from a step, in Markdown."""
    lines = ["| `data.workers` | source | a step | of the processor, in this process |", "|---|---|---|---|"]
    cases = [("no loader", "", alone, ())]
    cases += [(n, source, step_beside, (source, n, root)) for source in ("prepared", "tokens.parquet") for n in (0, 1)]
    for workers, source, function, arguments in cases:
        found = [in_process(function, *arguments) for _ in range(repeats)]
        wall, cpu = (median(column) for column in zip(*found, strict=True))
        lines.append(f"| {workers} | {source} | {wall:.1f} ms | {cpu:.1f} ms |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def resume(source: str, root: Path) -> float:
    """Seconds from opening the source to the step that begins with sample 10^9."""
    start = time.perf_counter()
    with Loader(
        Dataset(_config(root / source, "tokens")).train_stream(0),
        BatchSchedule.constant(GLOBAL),
        MICRO,
        0,
        1,
        10**9 // GLOBAL,
    ) as loader:
        next(loader)
    return time.perf_counter() - start


def resume_table(root: Path, repeats: int) -> str:
    """Time to a far sample, in Markdown."""
    lines = ["| source | sample 10^9 after |", "|---|---|"]
    for source in ("prepared", "tokens.parquet", "megatron"):
        found = median(in_process(resume, source, root) for _ in range(repeats))
        lines.append(f"| {source} | {found:.1f} s |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, help="keeps the data of the benchmark")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tables", default="speed,memory,workers,resume", help="which of them, by commas")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.dir or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "prepared").exists():
            in_process(write_documents, root)
        tables = {"speed": speed_table, "memory": memory_table, "workers": workers_table, "resume": resume_table}
        for name in options.tables.split(","):
            print(f"{tables[name](root, options.repeats)}\n", flush=True)


if __name__ == "__main__":
    main()
