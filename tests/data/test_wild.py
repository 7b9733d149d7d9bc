"""Input as people have it: what can be read is, and what cannot is named by file and place, or skipped and listed."""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig, PrepareConfig
from data.dataset import Dataset, check_data
from data.errors import CorpusError
from data.prepare.prepare import prepare
from data.read.corpus import Corpus
from data.read.faults import BrokenUnit, Faults
from data.text.tokenizer import Tokenizer
from tests.data.conftest import text_of

TEXTS = [text_of(number) for number in range(60)]


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parquet(path: Path, column: Any, name: str = "text", **others: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column} | others), path, row_group_size=25)
    return path


def rows_of(texts: list[Any]) -> list[dict]:
    return [{"text": text} for text in texts]


def many(write: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write(root)
        return root

    return make


def packed(ending: str, compress: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        plain = lines(root / "a.jsonl", rows_of(TEXTS))
        path = root / f"a.jsonl{ending}"
        # Two streams one after the other, as `cat a.gz b.gz` makes them.
        half = len(plain.read_bytes()) // 2
        path.write_bytes(compress(plain.read_bytes()[:half]) + compress(plain.read_bytes()[half:]))
        return path

    return make


def with_metadata(root: Path) -> Path:
    """Another column changes its type, within a file and between two."""
    lines(root / "a.jsonl", [{"text": t, "id": i if i < 9 else f"d{i}"} for i, t in enumerate(TEXTS[:30])])
    lines(root / "b.jsonl", [{"meta": {"n": 1} if i < 9 else [1], "text": t} for i, t in enumerate(TEXTS[30:])])
    return root


# What it is -> writes TEXTS into a directory and returns the path.
READABLE: dict[str, Callable[[Path], Path]] = {
    "another column changes its type": with_metadata,
    "files with other columns": many(
        lambda d: (parquet(d / "en.parquet", TEXTS[:30], score=[1.0] * 30), parquet(d / "zh.parquet", TEXTS[30:]))
    ),
    "a column of maps": lambda d: parquet(
        d / "a.parquet", TEXTS, headers=pa.array([[("status", "200")]] * 60, pa.map_(pa.string(), pa.string()))
    ),
    "a dictionary": lambda d: parquet(d / "a.parquet", pa.array(TEXTS).dictionary_encode()),
    "bytes": lambda d: parquet(d / "a.parquet", pa.array([text.encode() for text in TEXTS])),
    "large strings": lambda d: parquet(d / "a.parquet", pa.array(TEXTS, pa.large_string())),
    "string views": lambda d: parquet(d / "a.parquet", pa.array(TEXTS, pa.string_view())),
    "nulls": lambda d: lines(d / "a.jsonl", rows_of([*TEXTS[:7], None, *TEXTS[7:]])),
    "a missing column in a row": lambda d: lines(d / "a.jsonl", [*rows_of(TEXTS[:7]), {"id": 7}, *rows_of(TEXTS[7:])]),
    "nulls in parquet": lambda d: parquet(d / "a.parquet", [*TEXTS[:7], None, *TEXTS[7:]]),
    "lines that are blank or end in CR": lambda d: lines(
        d / "a.jsonl", ["", *(json.dumps(row) + "\r" for row in rows_of(TEXTS)), ""]
    ),
    "half a surrogate pair in another column": lambda d: lines(
        d / "a.jsonl", ['{"url": "cut \\ud83d", "text": ""}', *rows_of(TEXTS)]
    ),
    "gzip": packed(".gz", gzip.compress),
    "bzip2": packed(".bz2", bz2.compress),
    "xz": packed(".xz", lzma.compress),
    "zstd": packed(".zst", lambda content: pa.compress(content, codec="zstd", asbytes=True)),
    "json lines by the name of json": lambda d: lines(d / "a.json", rows_of(TEXTS)),
    "a json list": lambda d: lines(d / "a.json", [json.dumps(rows_of(TEXTS), indent=1)]),
    "side files of the hub": many(
        lambda d: (parquet(d / "a.parquet", TEXTS), (d / "dataset_infos.json").write_text("{}"))
    ),
    "a test split beside": many(
        lambda d: (
            parquet(d / "data/train-00000-of-00001.parquet", TEXTS),
            parquet(d / "data/test-00000-of-00001.parquet", ["SECRET"] * 9),
        )
    ),
    "a pattern": lambda d: lines(d / "a.jsonl", rows_of(TEXTS)).parent / "*.jsonl",
}
COLUMNS: dict[str, Callable[[Path], Path]] = {
    "a name with a dot": lambda d: parquet(d / "a.parquet", TEXTS, name="content.text"),
    "a field of a struct": lambda d: parquet(d / "a.parquet", [{"n": 1, "text": text} for text in TEXTS], "content"),
    "a field of an object": lambda d: lines(d / "a.jsonl", [{"content": {"n": 1, "text": text}} for text in TEXTS]),
    "a key with a dot": lambda d: lines(d / "a.jsonl", [{"content.text": text} for text in TEXTS]),
    "a field that is sometimes absent": lambda d: lines(
        d / "a.jsonl", [{"content": None}, {}, *({"content": {"text": text}} for text in TEXTS)]
    ),
}


@pytest.fixture
def config(tmp_path: Path, tokenizer_file: Path) -> DataConfig:
    return DataConfig(
        tokenizer=str(tokenizer_file),
        seq_length=16,
        heldout_fraction=0.0,
        unit_bytes=1500,
        cache=str(tmp_path / "cache"),
    )


def trained_on(config: DataConfig) -> tuple[list[str], list[str]]:
    """Every document that training reads, as text, and what was skipped."""
    check_data(config, 0)
    dataset, faults = Dataset(config), Faults()
    (source,) = dataset.sources
    texts = []
    for unit in range(source.train.num_units):
        read = source.train.read(unit, faults)
        texts += [dataset.tokenizer.decode(read.document(n)[:-1]) for n in range(read.num_documents)]
    assert len(texts) == source.sizes.num_documents
    return texts, faults.skipped


def prepared_from(config: DataConfig, output: Path) -> tuple[list[str], list[str]]:
    """Every document that prepare takes from the same input, as text, and what was skipped."""
    settings = PrepareConfig(
        input=config.corpus,
        output=str(output),
        tokenizer=config.tokenizer,
        text_column=config.column,
        on_corrupt=config.on_corrupt,
        heldout_fraction=0.0,
        piece_bytes=1500,
        processes=1,
    )
    corpus = Corpus.open(prepare(settings))
    texts = [corpus.tokenizer().decode(document[:-1]) for document in corpus.documents("train")]
    skipped = output / "skipped.txt"
    return texts, skipped.read_text().splitlines() if skipped.exists() else []


@pytest.mark.parametrize("kind", READABLE)
def test_it_is_read(config: DataConfig, tmp_path: Path, kind: str) -> None:
    own = replace(config, corpus=str(READABLE[kind](tmp_path / "in")))
    assert trained_on(own) == prepared_from(own, tmp_path / "out") == (TEXTS, [])


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_nested_column_is_found(config: DataConfig, tmp_path: Path, kind: str) -> None:
    own = replace(config, corpus=str(COLUMNS[kind](tmp_path / "in")), column="content.text")
    assert trained_on(own) == prepared_from(own, tmp_path / "out") == (TEXTS, [])


def test_texts_that_look_like_dates(config: DataConfig, tmp_path: Path) -> None:
    dates = [f"2024-0{1 + i % 9}-1{i % 10}" for i in range(40)]
    own = replace(config, corpus=str(lines(tmp_path / "dates.jsonl", rows_of(dates))))
    assert trained_on(own) == prepared_from(own, tmp_path / "out") == (dates, [])


def test_a_token_list_longer_than_many_pieces(config: DataConfig, tmp_path: Path) -> None:
    short, book = [[5, 6, 0]] * 50, [[7] * 20_000 + [0]]
    path = lines(tmp_path / "books.jsonl", [{"ids": ids} for ids in short + book + short])
    dataset = Dataset(replace(config, corpus=str(path), column="ids"))
    assert dataset.sources[0].sizes.num_documents == 101
    assert dataset.sources[0].sizes.num_tokens == 300 + 20_001
    prepared_from(dataset.config, tmp_path / "out")
    assert Corpus.open(tmp_path / "out").totals("train").tokens == 300 + 20_001


# What it is -> (writes it between TEXTS, the place and the reason that are named).
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "half a surrogate pair": (
        lambda d: lines(d / "a.jsonl", [*rows_of(TEXTS[:9]), '{"text": "cut \\ud83d"}', *rows_of(TEXTS[9:])]),
        r"a\.jsonl \(line 10\) holds text that is not UTF-8",
    ),
    "a torn line": (
        lambda d: lines(d / "a.jsonl", [*rows_of(TEXTS), '{"text": "cut o']),
        r"a\.jsonl \(line 61\) is not JSON: Unterminated string",
    ),
    "a number": (
        lambda d: lines(d / "a.jsonl", [*rows_of(TEXTS[:50]), {"text": 3}, *rows_of(TEXTS[50:])]),
        r"a\.jsonl \(line 51\) holds int instead of text",
    ),
    "a list": (
        lambda d: lines(d / "a.jsonl", [*rows_of(TEXTS[:50]), [1, 2], *rows_of(TEXTS[50:])]),
        r"a\.jsonl \(line 51\) is not an object but list",
    ),
    "bytes that are no text": (
        lambda d: parquet(d / "a.parquet", pa.array([t.encode() for t in TEXTS[:30]] + [b"caf\xe9"] +
                                                    [t.encode() for t in TEXTS[30:]])),
        r"a\.parquet \(row group 1, row 5\) holds text that is not UTF-8",
    ),
    "a file that is none": (
        many(lambda d: (parquet(d / "a.parquet", TEXTS), (d / "b.parquet").write_bytes(b"not parquet"))),
        r"b\.parquet is not a parquet file, or is cut off",
    ),
    "a compressed file that is cut off": (
        many(lambda d: (
            packed(".gz", gzip.compress)(d).rename(d / "b.jsonl.gz"),
            (d / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12]),
            (d / "a.jsonl").unlink(),
        )),
        r"c\.jsonl\.gz is corrupt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_named_or_skipped(config: DataConfig, tmp_path: Path, kind: str, capsys) -> None:
    write, reason = BAD[kind]
    own = replace(config, corpus=str(write(tmp_path / "in")))
    with pytest.raises(CorpusError, match=reason):
        trained_on(own)
    with pytest.raises(CorpusError, match=reason):
        prepared_from(own, tmp_path / "stopped")
    texts, skipped = prepared_from(replace(own, on_corrupt="skip"), tmp_path / "out")
    assert texts == TEXTS
    dataset = Dataset(replace(own, on_corrupt="skip"))
    faults, (source,) = Faults(), dataset.sources
    number = 0
    for unit in range(source.train.num_units):
        try:
            number += source.train.read(unit, faults).num_documents
        except BrokenUnit as error:
            faults.skip(str(error))
    said = [*faults.skipped, *dataset.describe()]
    assert number == len(TEXTS)
    assert any(re.search(reason, line) for line in said)
    assert any(re.search(reason, line) for line in [*skipped, *capsys.readouterr().out.splitlines()])


def test_a_column_that_is_nowhere_is_named(config: DataConfig, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"body": "a", "id": 3}] * 9)
    with pytest.raises(CorpusError, match=r"data\.column=text is not in .*a\.jsonl: it has body, id"):
        Dataset(replace(config, corpus=str(path)))
    nothing = lines(tmp_path / "b.jsonl", [{"text": None}] * 9)
    with pytest.raises(CorpusError, match=r"data\.column=text of .*b\.jsonl holds nothing"):
        Dataset(replace(config, corpus=str(nothing)))


@pytest.fixture
def uploaded(make_corpus: Callable[..., Corpus]) -> str:
    """URL of a prepared corpus on a file system of objects."""
    corpus, store = make_corpus(), fsspec.filesystem("memory")
    for file in corpus.path.iterdir():
        store.pipe_file(f"/bucket/mine/{file.name}", file.read_bytes())
    yield "memory://bucket/mine"
    store.rm("/bucket", recursive=True)


def test_a_prepared_corpus_by_url_is_read_through_its_manifest(
    config: DataConfig, uploaded: str, make_corpus: Callable[..., Corpus]
) -> None:
    local = make_corpus("local")
    config = replace(config, tokenizer="", corpus=uploaded)
    dataset = Dataset(config)
    assert dataset.sources[0].sizes.num_documents == local.totals("train").documents
    assert dataset.identity(0) == Dataset(replace(config, corpus=str(local.path))).identity(0)
    found = [document.tolist() for document in dataset.corpora[0].documents("heldout")]
    assert found == [document.tolist() for document in local.documents("heldout")]
    dataset.corpora[0].verify(progress=False)
    assert dataset.tokenizer.sha256 == Tokenizer.from_path(local.path).sha256
    for wrong in ("memory://bucket", f"{uploaded}/*.parquet"):
        with pytest.raises(CorpusError, match=r"holds (corpora|shards of a corpus) made by prepare"):
            Dataset(replace(config, corpus=wrong, tokenizer=str(local.path)))
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/mine/train-00000-00001.parquet", b"short")
    with pytest.raises(
        CorpusError, match=r"memory://bucket/mine: train-00000-00001\.parquet has 5 bytes, and the manifest"
    ):
        Corpus.open(uploaded)


def test_secrets_of_a_url_stay_out_of_messages(config: DataConfig) -> None:
    url = "memory://user:password@bucket/none?signature=secret"
    with pytest.raises(CorpusError) as error:
        Dataset(replace(config, corpus=url))
    assert "memory://bucket/none" in str(error.value)
    assert "password" not in str(error.value) and "secret" not in str(error.value)
