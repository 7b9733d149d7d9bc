"""What is known of a source is found once: by one process, for all."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import Dataset
from data.errors import CorpusError
from data.read.corpus import Corpus
from data.read.faults import Faults
from data.read.index import Index, built_once
from data.read.manifest import SPLITS
from data.read.mapped_corpus import map_corpus
from data.read.prepared import PreparedReader


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
