"""Storage that fails: what passes is tried again, what stays is named, and no token is lost or read twice."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.dataset import Dataset
from data.errors import CorpusError, StorageError
from data.loader import Loader
from data.order.batches import BatchSchedule
from data.order.counting import _scan, count_units
from data.order.stream import TokenStream
from data.read.corpus import Corpus
from data.read.faults import BrokenUnit, Faults, retrying
from data.read.readers import Reader
from data.read.remote import fetch
from data.read.unit_cache import UnitCache
from data.read.workers import Workers
from data.text.tokenizer import Tokenizer
from tests.data.conftest import text_of
from tests.data.kinds import encoded, write_jsonl, write_parquet_text, write_parquet_tokens
from tests.data.server import serving

SEQ, STEPS, SHUFFLE_BYTES = 16, 24, 4096
TEXTS = [text_of(number) for number in range(90)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = time.sleep
    monkeypatch.setattr(
        "data.read.faults.time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: sleep(s / 100))
    )


@pytest.fixture
def config(tmp_path: Path, tokenizer_file: Path) -> DataConfig:
    """Token lists in row groups of 7 documents."""
    documents = encoded(Tokenizer.from_path(tokenizer_file), TEXTS)
    return DataConfig(
        corpus=str(write_parquet_tokens(tmp_path / "tokens.parquet", documents)),
        column="tokens",
        tokenizer=str(tokenizer_file),
        seq_length=SEQ,
        cache=str(tmp_path / "cache"),
        shuffle_bytes=SHUFFLE_BYTES,
    )


def tokens_of(config: DataConfig, between: Callable[[int, TokenStream], None] = lambda step, stream: None, ahead=2):
    """Tokens and documents of each step, and the faults; `between` is called before each step."""
    stream = Dataset(config).train_stream(seed=3)
    with Loader(stream, BatchSchedule.constant(4), 4, 0, 1, ahead=ahead) as loader:
        steps = []
        for step in range(STEPS):
            between(step, stream)
            (batch,) = next(loader)
            steps.append((batch.tokens.numpy(), batch.documents.numpy()))
        return steps, loader.faults


def assert_equal_steps(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_killed_worker_loses_nothing(config: DataConfig) -> None:
    expected, _ = tokens_of(config)

    def kill(step: int, stream: TokenStream) -> None:
        if step in (3, 15):
            for process in list(stream.cache._workers._pool._processes.values()):
                os.kill(process.pid, signal.SIGKILL)

    # Nothing is asked for long before, so that there is something to read after each kill.
    found, faults = tokens_of(replace(config, workers=1), kill, ahead=0)
    assert_equal_steps(found, expected)
    assert faults.restarts >= 1
    assert faults.skipped_tokens == 0


def test_workers_that_keep_dying_end_the_run(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = UnitCache([(s.train, s.sizes) for s in Dataset(config).sources], workers=1)
    cache._workers = Workers(cache._readers, 1, max_restarts=1)
    monkeypatch.setattr(cache._workers, "_start", lambda: DyingPool())
    cache._workers._pool = DyingPool()
    cache.ask((0, 0), 0)
    with pytest.raises(CorpusError, match=r"data\.workers=1: .* killed 2 times while .*tokens\.parquet \(row group"):
        cache.get((0, 0))


class DyingPool:
    """Stands for a pool whose processes are killed while they read."""

    def submit(self, *_: object):
        from concurrent.futures.process import BrokenProcessPool

        raise BrokenProcessPool("killed")

    def shutdown(self, **_: object) -> None:
        pass


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_server_that_fails_every_fifth_read(config: DataConfig, tmp_path: Path, packing: str, monkeypatch) -> None:
    local = replace(config, packing=packing, subset=0.7)
    expected, _ = tokens_of(local)
    with serving(tmp_path) as server:
        server.fails_every = 5
        remote = replace(local, corpus=server.url(Path(config.corpus)), cache=str(tmp_path / "other"))
        found, faults = tokens_of(remote)
        assert_equal_steps(found, expected)
        assert Dataset(remote).identity(3) == Dataset(local).identity(3)
    assert server.failures > 2
    assert 0 < faults.retries <= server.failures
    assert faults.skipped_tokens == 0


def test_a_server_that_is_gone_is_named(config: DataConfig, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        url = server.url(Path(config.corpus))
        with pytest.raises(BrokenUnit, match=r"http://.*/nothing cannot be read: the server answered 404"):
            fetch(url.replace("tokens.parquet", "nothing"), 0, 4, Faults())
        server.fails_every = 1
        with pytest.raises(StorageError, match=rf"{url} cannot be read for 1 s"):
            fetch(url, 0, 4, Faults(patience_s=0.6))


def test_retries_are_counted_and_end() -> None:
    answers = iter([OSError("busy"), TimeoutError("late"), 7])

    def read() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    faults = Faults()
    assert retrying("file", read, faults) == 7
    assert faults.retries == 2
    with pytest.raises(BrokenUnit, match="file cannot be read: gone"):
        retrying("file", lambda: (_ for _ in ()).throw(FileNotFoundError("gone")), faults)
    assert faults.retries == 2
    faults.patience_s, before = 0.25, faults.retries
    with pytest.raises(StorageError, match="file cannot be read for 0 s: busy"):
        retrying("file", lambda: (_ for _ in ()).throw(OSError("busy")), faults)
    assert faults.retries > before
    # A token that has expired is asked for anew, where that is possible.
    renewed: list[int] = []
    answers = iter([PermissionError("expired"), 7])
    assert retrying("s3://file", read, faults, lambda: renewed.append(1)) == 7 and renewed == [1]
    answers = iter([PermissionError("no")])
    with pytest.raises(BrokenUnit, match="file cannot be read: no"):
        retrying("file", read, faults)


@pytest.fixture
def prepared(make_corpus: Callable[..., Corpus], tmp_path: Path) -> tuple[DataConfig, Corpus]:
    corpus = make_corpus()
    return DataConfig(
        corpus=str(corpus.path), seq_length=SEQ, cache=str(tmp_path / "cache"), shuffle_bytes=SHUFFLE_BYTES
    ), corpus


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_shard_deleted_in_mid_run(prepared, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One lane, so that the second shard is read after the first steps.
    config, corpus = replace(prepared[0], packing=packing, shuffle_bytes=1), prepared[1]
    expected, _ = tokens_of(config)
    stream = Dataset(config).train_stream(seed=3)
    victim = int(stream._unit_layout(0)[0][1])
    stream.close()
    shard = corpus.path / corpus.manifest.splits["train"][victim].file
    content = shard.read_bytes()

    def delete(step: int, stream: TokenStream) -> None:
        if step == 2:
            shard.unlink()

    with pytest.raises(BrokenUnit, match=rf"{shard.name} cannot be read"):
        tokens_of(config, delete)
    shard.write_bytes(content)
    found, faults = tokens_of(replace(config, on_corrupt="skip"), delete)
    lost = 0
    for (tokens, documents), (right_tokens, right_documents) in zip(found, expected, strict=True):
        kept = documents >= 0
        # Everything else is where it was; what is lost has no document, so no loss.
        np.testing.assert_array_equal(tokens[kept], right_tokens[kept])
        if packing == "best_fit":  # else the pieces of a sample that are left keep numbers of their own
            np.testing.assert_array_equal(documents[kept], right_documents[kept])
        lost += int((~kept[:, :-1] & (right_documents[:, :-1] >= 0)).sum())
    assert lost > 0
    assert shard.name in faults.skipped[0]
    # The loader has read ahead of the steps that were asked for.
    assert faults.skipped_tokens >= lost
    assert len([message for message in faults.skipped if shard.name not in message]) == 0


def test_a_shard_that_was_damaged_is_left_out_before_the_run(prepared) -> None:
    config, corpus = prepared
    packed = replace(config, packing="best_fit")  # is counted by reading
    shard = corpus.path / corpus.manifest.splits["train"][1].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BrokenUnit, match=rf"{shard.name} is corrupt"):
        Dataset(packed)
    dataset = Dataset(replace(packed, on_corrupt="skip"))
    assert dataset.sources[0].sizes.tokens[1] == 0
    assert any(line.startswith("left out: ") and shard.name in line for line in dataset.describe())
    with Loader(dataset.train_stream(3), BatchSchedule.constant(4), 4, 0, 1) as loader:
        for _ in range(STEPS):
            next(loader)
        assert loader.faults.skipped == []


@pytest.mark.parametrize(
    ("documents", "reason"),
    [
        ([[5, 9999]], "holds token 9999, outside the vocabulary of"),
        ([[5, -1]], "holds token -1, outside the vocabulary"),
        ([[5, None]], "holds lists with missing token ids"),
        ([[5, 0], [5, 6]], "with and without the end-of-document token 0"),
        ([[5, 6], [5, 0]], "with and without the end-of-document token 0"),
    ],
)
def test_tokens_that_cannot_be_trained_on(config, tmp_path: Path, documents: list, reason: str) -> None:
    first = [[5, 0]] * 7 if documents[0][-1] == 0 else [[5, 6]] * 7
    path = write_parquet_tokens(tmp_path / "bad.parquet", first * 3 + documents)
    reader = Dataset(replace(config, corpus=str(path), heldout_fraction=0.0)).sources[0].train
    with pytest.raises(BrokenUnit, match=rf"bad\.parquet \(row group 3\) {reason}|{reason}"):
        reader.read(3, Faults())


def test_empty_documents_are_counted_and_giant_ones_cut(config: DataConfig, tmp_path: Path) -> None:
    documents = [[5], [], None, [6] * 10_000, [7, 8]]
    path = write_parquet_tokens(tmp_path / "odd.parquet", documents, rows_per_group=2)
    dataset = Dataset(replace(config, corpus=str(path), heldout_fraction=0.0))
    sizes = dataset.sources[0].sizes
    assert (sizes.num_documents, sizes.num_tokens, sizes.empty.sum()) == (3, 10_003 + 3, 2)
    assert "2 empty documents left out" in dataset.describe()[0]
    with_text = write_parquet_text(tmp_path / "blank.parquet", ["words", " ", "", "more words"], rows_per_group=2)
    text = Dataset(replace(config, corpus=str(with_text), column="text", heldout_fraction=0.0))
    assert (text.sources[0].sizes.num_documents, text.sources[0].sizes.empty.sum()) == (2, 2)


@pytest.mark.parametrize("damage", ["cut", "footer", "page"])
def test_a_damaged_parquet_file_is_named(config: DataConfig, damage: str) -> None:
    path = Path(config.corpus)
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=7, write_page_checksum=True)
    whole = Dataset(config)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-5])
    else:
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        content[footer if damage == "footer" else len(content) // 4] ^= 0xFF
        path.write_bytes(content)
    if damage == "page":  # the footer is as it was: it is found when it is read
        with pytest.raises(BrokenUnit, match=r"tokens\.parquet \(row group \d\) is corrupt"):
            for unit in range(whole.sources[0].train.num_units):
                whole.sources[0].train.read(unit, Faults())
    else:
        with pytest.raises(BrokenUnit, match=r"tokens\.parquet (is not a parquet file|has a corrupt footer)"):
            Dataset(config)


def test_text_that_is_not_utf8_is_named(config: DataConfig, tmp_path: Path) -> None:
    # Arrow trusts whoever says that bytes are text.
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": bad}), tmp_path / "bytes.parquet")
    with pytest.raises(BrokenUnit, match=r"bytes\.parquet \(row group 0, row 1\) holds text that is not UTF-8"):
        Dataset(replace(config, corpus=str(tmp_path / "bytes.parquet"), column="text", heldout_fraction=0.0))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(BrokenUnit, match=r"bytes\.jsonl \(line 1\)"):
        Dataset(replace(config, corpus=str(tmp_path / "bytes.jsonl"), column="text", heldout_fraction=0.0))


def test_columns_that_cannot_be_used(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"data\.column=words is not in .*tokens\.parquet: it has tokens"):
        Dataset(replace(config, column="words"))
    path = write_jsonl(tmp_path / "numbers.jsonl", "text", [1.5, 2.5])
    with pytest.raises(CorpusError, match=r"data\.column=text of .* holds float: name a column of text"):
        Dataset(replace(config, corpus=str(path), column="text", heldout_fraction=0.0))


def test_a_changed_file_is_counted_again(config: DataConfig, tokenizer_file: Path) -> None:
    best_fit = replace(config, packing="best_fit")
    before = Dataset(best_fit).identity(0)
    documents = encoded(Tokenizer.from_path(tokenizer_file), TEXTS[::-1])
    write_parquet_tokens(Path(config.corpus), documents)
    after = Dataset(best_fit).identity(0)
    assert [name for name in before if before[name] != after[name]] == ["data.corpus"]


def test_a_killed_count_goes_on_where_it_was(config: DataConfig, tmp_path: Path, monkeypatch) -> None:
    reader = Dataset(config).sources[0].train
    whole = count_units(reader, "best_fit", SEQ, tmp_path / "whole")
    counted: list[int] = []

    def scan(reader: Reader, unit: int, *arguments: object) -> list:
        if len(counted) == 6:
            raise KeyboardInterrupt
        counted.append(unit)
        return _scan(reader, unit, *arguments)

    monkeypatch.setattr("data.order.counting._scan", scan)
    with pytest.raises(KeyboardInterrupt):
        count_units(reader, "best_fit", SEQ, Path(config.cache))
    (journal,) = Path(config.cache, "sizes").iterdir()
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:5]) + lines[5][:-3])  # torn off within a line
    counted = [*range(100)]
    again = count_units(reader, "best_fit", SEQ, Path(config.cache))
    assert counted[100:] == list(range(5, reader.num_units))
    assert again.samples.tolist() == whole.samples.tolist() and again.digest == whole.digest
    assert not journal.exists()
    # Mapped from now on: nothing is counted, whoever asks.
    counted.clear()
    assert count_units(reader, "best_fit", SEQ, Path(config.cache)).digest == whole.digest
    assert isinstance(again.tokens, np.memmap) and not counted
