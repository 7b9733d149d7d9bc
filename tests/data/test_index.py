"""What is known of a source is found once: by one process, for all."""

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.dataset import Dataset
from data.errors import CorpusError
from data.read.corpus import Corpus
from data.read.faults import Faults
from data.read.index import Index, built_once
from data.read.manifest import SPLITS, file_info
from data.read.mapped_corpus import map_corpus
from data.read.prepared import PreparedReader
from data.read.shards import read_lengths
from data.text.tokenizer import Tokenizer
from tests.data.conftest import text_of
from tests.data.kinds import WRITERS


def numbers() -> Index:
    return Index({"ones": np.ones(5), "none": np.zeros((0, 3), dtype=np.int64)}, {"name": "five"})


def test_an_index_is_built_once_and_mapped(tmp_path: Path) -> None:
    built: list[int] = []
    for _ in range(3):
        index = built_once(tmp_path / "cache" / "one", lambda: built.append(1) or numbers())
        assert index.arrays["ones"].tolist() == [1] * 5 and index.arrays["none"].shape == (0, 3)
        assert isinstance(index.arrays["ones"], np.memmap) and index.notes == {"name": "five"}
    assert built == [1]
    file = tmp_path / "cache" / "one" / "ones.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CorpusError, match=r"the index .*one is damaged .*: delete that directory"):
        built_once(tmp_path / "cache" / "one", numbers)


def test_of_several_that_ask_one_builds(tmp_path: Path) -> None:
    barrier, built = threading.Barrier(4), []

    def ask(_: int) -> str:
        barrier.wait()
        return built_once(tmp_path / "x" / "y", lambda: built.append(1) or numbers()).notes["name"]

    with ThreadPoolExecutor(4) as pool:  # each opens the lock's file for itself, as processes do
        assert list(pool.map(ask, range(4))) == ["five"] * 4
    assert built == [1]


def test_where_nothing_can_be_written_each_builds_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    index = built_once(tmp_path / "file" / "one", numbers)
    assert index.arrays["ones"].tolist() == [1] * 5 and not isinstance(index.arrays["ones"], np.memmap)


def test_a_mapped_corpus_is_the_corpus(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = map_corpus(corpus.path, tmp_path / "cache")
    assert mapped.fingerprint == corpus.fingerprint and mapped.manifest.files == corpus.manifest.files
    assert (mapped.vocab_size, mapped.eod_id) == (corpus.vocab_size, corpus.eod_id)
    assert mapped.tokenizer().sha256 == corpus.tokenizer().sha256
    for split in SPLITS:
        assert list(mapped.manifest.splits[split]) == list(corpus.manifest.splits[split])
        assert mapped.totals(split) == corpus.totals(split)
        one, other = PreparedReader(mapped, split), PreparedReader(corpus, split)
        assert one.identity == other.identity
        np.testing.assert_array_equal(one.known().tokens, other.known().tokens)
        np.testing.assert_array_equal(one.read(0, Faults()).tokens, other.read(0, Faults()).tokens)
    # From now on neither the manifest is parsed nor a shard asked for its size.
    monkeypatch.setattr(Corpus, "open", None)
    assert map_corpus(str(corpus.path), tmp_path / "cache").fingerprint == corpus.fingerprint


def test_a_corpus_that_changed_is_looked_at_again(corpus: Corpus, tmp_path: Path) -> None:
    map_corpus(corpus.path, tmp_path / "cache")
    (corpus.path / "train-00000-00001.parquet").rename(tmp_path / "elsewhere")
    os.utime(corpus.path)
    with pytest.raises(CorpusError, match=r"train-00000-00001\.parquet is missing"):
        map_corpus(corpus.path, tmp_path / "cache")
    with pytest.raises(CorpusError, match="does not exist"):
        map_corpus(tmp_path / "nowhere", tmp_path / "cache")


def test_lengths_are_read_without_tokens(corpus: Corpus, tmp_path: Path, monkeypatch) -> None:
    expected = [corpus.shard("train", n).lengths for n in range(corpus.num_shards("train"))]
    with monkeypatch.context() as patched:
        patched.setattr(Corpus, "shard", None)  # not called
        found = [corpus.lengths("train", n, Faults()) for n in range(len(expected))]
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, other)
    # A shard of an earlier version does not say them, one that says others than its manifest is broken.
    info = corpus.manifest.splits["train"][0]
    path, table = corpus.path / info.file, pq.read_table(corpus.path / info.file)
    pq.write_table(table.drop_columns(["length"]), path)
    old = replace(info, size=path.stat().st_size, sha256=file_info(path).sha256)
    assert read_lengths(corpus.path, old, Faults()) is None
    earlier = replace(corpus.manifest, splits=corpus.manifest.splits | {"train": (old,)})
    np.testing.assert_array_equal(Corpus(corpus.path, earlier).lengths("train", 0, Faults()), expected[0])
    pq.write_table(table.set_column(1, "length", pa.array(expected[0] + 1, pa.int32())), path)
    with pytest.raises(CorpusError, match=rf"{info.file} has other lengths of documents"):
        read_lengths(corpus.path, replace(info, size=path.stat().st_size), Faults())


def test_counting_asks_for_what_is_known_once(make_corpus: Callable[..., Corpus], tmp_path: Path, monkeypatch) -> None:
    corpus = make_corpus("many", num_documents=300, shard_tokens=300)
    asked: list[int] = []
    known = PreparedReader.known
    monkeypatch.setattr(PreparedReader, "known", lambda self: asked.append(1) or known(self))
    config = DataConfig(corpus=str(corpus.path), seq_length=16, packing="best_fit", cache=str(tmp_path / "cache"))
    dataset = Dataset(config)
    assert dataset.sources[0].train.num_units > 10
    assert len(asked) == 1
    Dataset(config)
    assert len(asked) == 1


@pytest.fixture
def files(tmp_path: Path, tokenizer_file: Path) -> Callable[[str], DataConfig]:
    """Settings for files of a kind, which lie in a folder of their own."""

    def write(kind: str) -> DataConfig:
        (tmp_path / "in").mkdir()
        texts = [text_of(number) for number in range(60)]
        path, column = WRITERS[kind](tmp_path / "in", Tokenizer.from_path(tokenizer_file), texts)
        return DataConfig(
            corpus=str(path),
            column=column,
            tokenizer=str(tokenizer_file),
            seq_length=16,
            unit_bytes=1500,
            cache=str(tmp_path / "cache"),
        )

    return write


@pytest.mark.parametrize("kind", ["jsonl text", "jsonl tokens", "arrow tokens", "parquet text"])
def test_one_process_looks_at_the_files_for_all(files, kind: str, monkeypatch) -> None:
    config = files(kind)
    first = Dataset(config)
    assert first.sources[0].train.num_units > 1
    said = first.describe()  # which counts the held-out text
    for opened in (
        "source.list_files",
        "read.json_files.fetch",
        "read.json_files.unpacked",
        "read.arrow_files._arrow_table",
        "read.parquet_files.fetch",
    ):
        monkeypatch.setattr(f"data.{opened}", None)  # not called
    other = Dataset(config, listings=first.listings)
    assert other.identity(0) == first.identity(0)
    assert other.describe() == said
    monkeypatch.undo()
    for one, two in zip(first.sources, other.sources, strict=True):
        found = [source.train.read(1, Faults()) for source in (one, two)]
        np.testing.assert_array_equal(found[0].tokens, found[1].tokens)


@pytest.mark.parametrize("kind", ["jsonl text", "megatron"])
def test_units_of_another_size_are_counted_again(files, kind: str) -> None:
    config, cuts, identities = files(kind), set(), set()
    for unit_bytes in (1500, 1540, 1600):
        dataset = Dataset(replace(config, unit_bytes=unit_bytes))
        (source,) = dataset.sources
        read = [source.train.read(unit, Faults()).num_tokens for unit in range(source.train.num_units)]
        assert source.sizes.tokens.tolist() == read
        cuts.add(tuple(read))
        identities.add(dataset.identity(0)["data.corpus"])
    assert len(identities) == len(cuts), "whose samples are others"
    assert len({len(cut) for cut in cuts}) < len(cuts), "as many units, cut elsewhere"


def test_another_end_of_a_document_is_counted_again(files) -> None:
    config = files("megatron")
    tokens = [Dataset(replace(config, eod_token=token)).sources[0].sizes.num_tokens for token in ("<|endoftext|>", "e")]
    assert tokens[0] < tokens[1], "documents that end with another token get one more"


@pytest.mark.parametrize("kind", ["jsonl text", "megatron"])
def test_a_copy_is_counted_again_unless_the_index_is_trusted(files, tmp_path: Path, kind: str, monkeypatch) -> None:
    config = replace(files(kind), trust_index=True)
    first = Dataset(config)
    moved = tmp_path / "elsewhere"
    shutil.copytree(Path(config.corpus).parent, moved, copy_function=shutil.copyfile)
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    copied = replace(config, corpus=str(moved / Path(config.corpus).name))
    monkeypatch.setattr("data.order.counting._count", None)  # not called
    assert Dataset(copied).identity(0) == first.identity(0)
    with pytest.raises(TypeError):
        Dataset(replace(copied, trust_index=False))
