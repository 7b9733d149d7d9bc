"""Processes of a machine read a unit once, and map what one of them has decoded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import Dataset
from data.loader import Loader
from data.order.batches import BatchSchedule
from data.read.corpus import Corpus
from data.read.faults import Faults
from data.read.node_cache import ENDING, Shared
from data.read.prepared import PreparedReader
from data.read.readers import Subset

SEQ, WORLD = 16, 4


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are read from storage, by file and in order."""
    found: list[str] = []
    shard = Corpus.shard
    monkeypatch.setattr(
        Corpus, "shard", lambda self, split, unit, *a: found.append(f"{split}{unit}") or shard(self, split, unit, *a)
    )
    return found


def steps(config: DataConfig, rank: int, shared: bool) -> list[list[np.ndarray]]:
    stream = Dataset(config, shared=shared).train_stream(3)
    with Loader(stream, BatchSchedule.constant(8), 2, rank, WORLD) as loader:
        return [[batch.tokens.numpy() for batch in next(loader)] for _ in range(30)]


def test_ranks_of_a_machine_read_each_shard_once(make_corpus, tmp_path: Path, reads: list[str]) -> None:
    corpus = make_corpus("many", num_documents=300, shard_tokens=300)
    cache = tmp_path / "units"
    config = DataConfig(
        corpus=str(corpus.path), seq_length=SEQ, cache=str(tmp_path / "cache"), node_cache=str(cache), workers=0
    )
    alone = [steps(config, rank, shared=False) for rank in range(WORLD)]
    without = len(reads)
    reads.clear()
    together = [steps(config, rank, shared=True) for rank in (*range(WORLD), 0)]  # and a tensor peer of rank 0
    assert len(reads) == len(set(reads)) < without
    # Worker processes read into the same files, and send nothing.
    together.append(steps(replace(config, workers=1), 1, shared=True))
    for one, other in zip([*alone, alone[0], alone[1]], together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not list(cache.glob("*.lock")) and list(cache.glob("*"))
    dataset = Dataset(config, shared=True)
    dataset.train_stream(3).close()
    dataset.close()
    assert not list(cache.glob("*"))


@pytest.fixture
def shared(corpus: Corpus, tmp_path: Path) -> Callable[[int], Shared]:
    return lambda num_bytes: Shared(PreparedReader(corpus, "train"), tmp_path / "units", num_bytes)


def test_a_mapped_unit_is_the_unit(shared, corpus: Corpus, reads: list[str], tmp_path: Path) -> None:
    base = Subset(PreparedReader(corpus, "train"), 0.5, seed=0)
    cut = Shared(base, tmp_path / "units", 2**20)
    for reader, bare in ((shared(2**20), PreparedReader(corpus, "train")), (cut, base)):
        for unit in range(bare.num_units):
            expected = bare.read(unit, Faults())
            for found in (reader.read(unit, Faults()), reader.read(unit, Faults())):
                assert found.tokens.dtype == expected.tokens.dtype and found.empty == expected.empty
                assert found.num_documents == expected.num_documents
                for number in range(expected.num_documents):
                    np.testing.assert_array_equal(found.document(number), expected.document(number))


def test_old_files_make_room_and_what_is_mapped_stays(shared, tmp_path: Path) -> None:
    reader = shared(5000)
    first = reader.read(0, Faults())
    tokens = first.tokens.copy()
    for unit in range(1, reader.num_units):
        reader.read(unit, Faults())
    files = list((tmp_path / "units").glob(f"*{ENDING}"))
    assert 1 < len(files) < reader.num_units
    assert sum(file.stat().st_size for file in files) <= 5000
    assert not any(file.name.endswith(f"-0{ENDING}") for file in files)
    np.testing.assert_array_equal(first.tokens, tokens)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_read_again(shared, reads: list[str], tmp_path: Path, damage: str) -> None:
    expected = shared(2**20).read(0, Faults()).tokens.copy()
    (file,) = (tmp_path / "units").glob(f"*{ENDING}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:-8], "flipped": content, "empty": b""}[damage])
    np.testing.assert_array_equal(shared(2**20).read(0, Faults()).tokens, expected)
    assert reads == ["train0", "train0"]


def test_without_a_place_each_process_reads_for_itself(corpus: Corpus, reads: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    reader = Shared(PreparedReader(corpus, "train"), tmp_path / "file" / "units", 2**20)
    assert reader.read(0, Faults()).num_documents > 0
    assert reads == ["train0"]


def test_a_full_disk_costs_no_second_reading(shared, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.read.node_cache._write", full)
    assert shared(2**20).read(0, Faults()).num_documents > 0
    assert reads == ["train0"]
