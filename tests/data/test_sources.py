"""Raw text in every format that is promised, and every way it can be wrong."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import PrepareConfig
from data.errors import CorpusError
from data.prepare.sources import dataset_source

TEXTS = ["first document", "naïve second\n\nwith two paragraphs", "third 日本語"]


def texts_of(path: Path, **settings: str) -> list[str]:
    source = dataset_source(PrepareConfig(input=str(path), output="unused", **settings))
    texts = [document.text for document in source.documents()]
    assert texts == [document.text for document in source.documents()]  # sources can be read twice
    return texts


def write_jsonl(path: Path, texts: list[object], column: str = "text") -> Path:
    path.write_text("\n".join(json.dumps({"id": i, column: text}) for i, text in enumerate(texts)))
    return path


@pytest.fixture(autouse=True)
def no_huggingface_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading must leave nothing in the user's cache."""
    cache = tmp_path / "huggingface"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    yield
    assert not cache.exists()


def test_jsonl(tmp_path: Path) -> None:
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", TEXTS)) == TEXTS


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)])
def test_compressed_jsonl(tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / f"b.jsonl.{ending}").write_bytes(compress(path.read_bytes()))
    assert texts_of(tmp_path / f"b.jsonl.{ending}") == TEXTS


def test_parquet_with_a_column_of_another_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": TEXTS, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", text_column="content") == TEXTS


def test_dataset_saved_to_disk(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert texts_of(tmp_path / "saved") == TEXTS


def test_text_by_document_paragraph_and_line(tmp_path: Path) -> None:
    text = "one\ntwo\n\nthree"
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt") == [text]
    assert texts_of(tmp_path / "a.txt", sample_by="paragraph") == ["one\ntwo", "three"]
    assert texts_of(tmp_path / "a.txt", sample_by="line") == ["one", "two", "", "three"]


def test_directory_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / "b" / "x.txt").write_text("second")
    (root / "a.txt").write_text("first")
    (root / "c[1].txt").write_text("third")
    (root / "empty.txt").write_text("")
    (root / ".hidden.txt").write_text("hidden")
    (root / "README.md").write_text("not text to train on")
    assert texts_of(root) == ["first", "second", "third"]


def test_equal_texts_share_their_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["same", "other", "same"])
    documents = list(dataset_source(PrepareConfig(input=str(path), output="unused")).documents())
    assert documents[0].split_key == documents[2].split_key != documents[1].split_key
    assert [document.name for document in documents] == ["row 0", "row 1", "row 2"]


def test_quiet_and_leaves_the_settings_of_datasets_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = datasets.logging.get_verbosity()
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(CorpusError, match="JSON parse error"):
        texts_of(tmp_path / "a.jsonl")
    assert capfd.readouterr().err == ""
    assert datasets.logging.get_verbosity() == verbosity
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", r"input=.*a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"input=.*a\.jsonl cannot be read: JSON"),
        ("a.jsonl", b'{"other": "a"}\n', r"text_column=text is not in .*a\.jsonl: it has other"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"text_column=text holds int instead of text in row 1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"text_column=text holds NoneType .* in row 1"),
        ("a.parquet", b"not parquet", r"input=.*a\.parquet cannot be read"),
        ("a.txt", b"caf\xe9", r"input=.*a\.txt cannot be read: 'utf-8'"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-12], r"input=.*a\.jsonl\.gz cannot be read"),
        ("a.csv", b"text\na\n", r"input=.*a\.csv has the endings \.csv: give one of \.parquet, "),
    ],
)
def test_unusable_file_is_one_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=reason) as error:
        texts_of(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_paths_are_refused_without_asking_the_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "nowhere.jsonl", "./nowhere"):
        with pytest.raises(CorpusError, match=f"input={name} does not exist"):
            dataset_source(PrepareConfig(input=name, output="unused"))


def test_directories_without_usable_files(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds no file of \.parquet"):
        texts_of(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    write_jsonl(tmp_path / "b.jsonl", TEXTS)
    with pytest.raises(CorpusError, match=r"endings \.jsonl and \.txt"):
        texts_of(tmp_path)


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(CorpusError, match=r"sample_by=line is for \.txt files"):
        texts_of(path, sample_by="line")
    with pytest.raises(CorpusError, match=r"dataset_config=en .* are for datasets of the hub"):
        texts_of(path, dataset_config="en")
    with pytest.raises(CorpusError, match=r"dataset_split=test are for datasets of the hub"):
        texts_of(path, dataset_split="test")
    with pytest.raises(CorpusError, match=r"sample_by=line is for \.txt files"):
        dataset_source(PrepareConfig(input="owner/name", output="unused", sample_by="line"))


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**arguments: object) -> None:
        assert (arguments["path"], arguments["name"]) == ("owner/name", "en")
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    config = PrepareConfig("owner/name", "unused", dataset_config="en", dataset_split="test")
    with pytest.raises(CorpusError, match=r"^input=owner/name cannot be read: cannot reach the hub$"):
        next(dataset_source(config).documents())
