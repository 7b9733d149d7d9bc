"""A corpus gives back what prepare wrote, and names whatever has been damaged since."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import CorpusError
from data.prepare.shard_writer import ShardWriter
from data.read.corpus import Corpus, check_corpus
from data.read.faults import Faults
from data.read.manifest import MANIFEST_FILE, TRAIN, ShardInfo, file_info
from data.read.shards import read_shard
from data.read.units import token_dtype


def read_everything(path: Path) -> None:
    corpus = Corpus.open(path)
    for split in ("train", "heldout"):
        for _ in corpus.documents(split):
            pass


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def edit_manifest(path: Path, **fields: object) -> None:
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps(manifest | fields))


def test_totals_are_those_of_the_documents(corpus: Corpus) -> None:
    for split in ("train", "heldout"):
        documents = list(corpus.documents(split))
        totals = corpus.totals(split)
        assert totals.documents == len(documents) > 0
        assert totals.tokens == sum(map(len, documents)) == corpus.shard_tokens(split).sum()
        assert totals.bytes == sum(int(corpus.token_bytes[document].sum()) for document in documents)
        assert all(document[-1] == corpus.eod_id for document in documents)
        assert not any(corpus.eod_id in document[:-1] for document in documents)
    assert corpus.totals("train").documents + corpus.totals("heldout").documents == 120
    assert corpus.num_shards("train") > 3
    corpus.verify(progress=False)


def test_documents_are_the_texts(corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer()
    texts = [tokenizer.decode(document[:-1]) for split in ("train", "heldout") for document in corpus.documents(split)]
    numbers = sorted(int(text.split(":")[0].removeprefix("document ")) for text in texts)
    assert numbers == list(range(120))


def test_fingerprint_depends_on_the_tokens_and_not_on_the_place(make_corpus: Callable[..., Corpus]) -> None:
    one, same, other = make_corpus("one"), make_corpus("same"), make_corpus("other", num_documents=119)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    shutil.copytree(one.path, one.path.with_name("moved"))
    assert Corpus.open(one.path.with_name("moved")).fingerprint == one.fingerprint


@pytest.mark.parametrize("position", [0, 300, -1])
def test_flipped_byte_names_its_shard(corpus: Corpus, position: int) -> None:
    flip_byte(corpus.path / "train-00000-00001.parquet", position)
    with pytest.raises(CorpusError, match=r"train-00000-00001\.parquet is corrupt.*prepare --repair"):
        read_everything(corpus.path)
    with pytest.raises(CorpusError, match=r"train-00000-00001\.parquet is corrupt.*prepare --repair"):
        Corpus.open(corpus.path).verify(progress=False)


def test_truncated_shard_is_refused_at_once(corpus: Corpus) -> None:
    path = corpus.path / "train-00000-00002.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorpusError, match=r"train-00000-00002\.parquet has \d+ bytes, and the manifest says \d+"):
        Corpus.open(corpus.path)


def test_shard_truncated_after_opening_is_refused_when_read(corpus: Corpus) -> None:
    (corpus.path / "train-00000-00000.parquet").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"train-00000-00000\.parquet has 0 bytes"):
        corpus.shard(TRAIN, 0)


@pytest.mark.parametrize(
    "name", ["train-00000-00000.parquet", "heldout-00000.parquet", "tokenizer.json", "token_bytes.npy"]
)
def test_missing_file_is_named(corpus: Corpus, name: str) -> None:
    (corpus.path / name).unlink()
    with pytest.raises(CorpusError, match=f"{name} is missing.*prepare --repair"):
        Corpus.open(corpus.path)


@pytest.mark.parametrize("name", ["tokenizer.json", "token_bytes.npy"])
def test_corrupt_tokenizer_files_are_named(corpus: Corpus, name: str) -> None:
    flip_byte(corpus.path / name, 200)
    opened = Corpus.open(corpus.path)
    with pytest.raises(CorpusError, match=f"{name} is corrupt"):
        _ = opened.token_bytes if name == "token_bytes.npy" else opened.tokenizer()


def test_directory_that_is_no_corpus(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match=r"data\.corpus=.*nowhere does not exist"):
        Corpus.open(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(CorpusError, match=r"data\.corpus=.*bare is empty"):
        Corpus.open(tmp_path / "bare")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CorpusError, match=r"data\.corpus=.*file is not a directory"):
        Corpus.open(tmp_path / "file")
    (corpus.path / MANIFEST_FILE).unlink()
    with pytest.raises(CorpusError, match=r"manifest\.json is missing"):
        Corpus.open(corpus.path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": 99}, "it has version 99"),
        ({"format": "other"}, "not the manifest"),
        ({"vocab_size": 7}, "fingerprint does not fit"),
        ({"splits": {}}, "a field is missing or wrong"),
        ({"splits": None}, "a field is missing or wrong"),
    ],
)
def test_changed_manifest_is_refused(corpus: Corpus, fields: dict[str, object], reason: str) -> None:
    edit_manifest(corpus.path, **fields)
    with pytest.raises(CorpusError, match=reason):
        Corpus.open(corpus.path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_manifest_that_is_no_json_object(corpus: Corpus, content: str) -> None:
    (corpus.path / MANIFEST_FILE).write_text(content)
    with pytest.raises(CorpusError, match=r"manifest\.json cannot be used"):
        Corpus.open(corpus.path)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (pa.table({"text": ["a"]}), "is corrupt"),
        (pa.table({"tokens": pa.array([[1, 2]], pa.list_(pa.int64()))}), "has tokens of type"),
        (pa.table({"tokens": pa.array([[1, 2, 3]], pa.list_(pa.uint16()))}), "holds 1 documents"),
        (pa.table({"tokens": pa.array([[1, 999]], pa.list_(pa.uint16()))}), "holds token 999"),
    ],
)
def test_shard_of_another_making_is_refused(tmp_path: Path, table: pa.Table, reason: str) -> None:
    path = tmp_path / "train-00000-00000.parquet"
    pq.write_table(table, path)
    found = file_info(path)
    info = ShardInfo(found.file, found.size, found.sha256, documents=1, tokens=2, bytes=5)
    with pytest.raises(CorpusError, match=rf"train-00000-00000\.parquet {reason}"):
        read_shard(tmp_path, info, vocab_size=400, check_hash=True, faults=Faults())


def test_large_vocabulary_keeps_its_ids(tmp_path: Path) -> None:
    ids = [0, 65_535, 65_536, 151_935]
    writer = ShardWriter(str(tmp_path), "train-00000", shard_tokens=100)
    writer.add(np.array(ids, dtype=token_dtype(151_936)), 9, "ids")
    (info,) = writer.finish()
    shard = read_shard(tmp_path, info, 151_936, check_hash=True, faults=Faults())
    assert shard.tokens.dtype == np.int32
    assert shard.document(0).tolist() == ids


def test_checking_a_corpus_proves_it_or_names_the_file(corpus: Corpus) -> None:
    train = corpus.totals("train")
    assert f"train {train.documents} documents, {train.tokens:,} tokens" in check_corpus(str(corpus.path))
    flip_byte(corpus.path / "heldout-00000.parquet", 300)
    with pytest.raises(CorpusError, match=r"heldout-00000\.parquet is corrupt"):
        check_corpus(str(corpus.path))
