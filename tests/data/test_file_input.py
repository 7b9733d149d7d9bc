"""What prepare reads beyond what training reads, and every way in which an input can be wrong."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import PrepareConfig
from data.errors import CorpusError
from data.prepare.file_input import file_input
from data.prepare.inputs import Document
from data.read.faults import Faults

TEXTS = ["first document", "naïve second\n\nwith two paragraphs", "third 日本語"]


def documents_of(path: Path | str, **settings: str) -> list[Document | None]:
    source = file_input(PrepareConfig(input=str(path), output="unused", **settings), None)
    return [document for unit in range(len(source.sizes)) for document in source.documents(unit, Faults())]


def texts_of(path: Path | str, **settings: str) -> list[str | None]:
    return [document and document.content for document in documents_of(path, **settings)]


def write_jsonl(path: Path, texts: list[object]) -> Path:
    path.write_text("\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)))
    return path


def test_text_by_document_paragraph_and_line(tmp_path: Path) -> None:
    text = "one\ntwo\n\nthree"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "b.txt.gz"):
        assert texts_of(tmp_path / name) == [text]
        assert texts_of(tmp_path / name, sample_by="paragraph") == ["one\ntwo", "three"]
        assert texts_of(tmp_path / name, sample_by="line") == ["one", "two", None, "three"]


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
    documents = documents_of(write_jsonl(tmp_path / "a.jsonl", ["same", "other", "same"]))
    assert documents[0].key == documents[2].key != documents[1].key
    assert [document.name for document in documents] == [f"a.jsonl (row {n})" for n in range(3)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", r"input=.*a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl \(line 2\) is not JSON"),
        ("a.jsonl", b'{"other": "a"}\n', r"text_column=text is not in .*a\.jsonl: it has other"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl \(line 2\) holds int instead of text"),
        ("a.jsonl", b'{"text": 3}\n', r"text_column=text of .*a\.jsonl holds int: name a column of text"),
        ("a.jsonl", b'{"text": [3, 4]}\n', r"text_column=text holds token ids: give the tokenizer that they are of"),
        ("a.parquet", b"not parquet", r"a\.parquet is not a parquet file, or is cut off"),
        ("a.txt", b"caf\xe9", r"a\.txt holds text that is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz is corrupt"),
        ("a.csv", b"text\na\n", r"input=.*a\.csv holds no file of \.parquet, "),
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
            texts_of(name)


def test_directories_without_usable_files(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds no file of \.parquet"):
        texts_of(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    write_jsonl(tmp_path / "b.jsonl", TEXTS)
    with pytest.raises(CorpusError, match=r"mixes \.jsonl and \.txt"):
        texts_of(tmp_path)


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(CorpusError, match=r"sample_by=line is for \.txt files"):
        texts_of(path, sample_by="line")
    with pytest.raises(CorpusError, match=r"dataset_config=en is for datasets of the hub"):
        texts_of(path, dataset_config="en")
    with pytest.raises(CorpusError, match=r"a\.jsonl is no directory, so it has no split test"):
        texts_of(path, dataset_split="test")
    with pytest.raises(CorpusError, match=r"sample_by=line is for \.txt files"):
        texts_of("owner/name", sample_by="line")


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def unreachable(path: str, name: str, **_: object) -> None:
        assert (path, name) == ("owner/name", "en")
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    verbosity = datasets.logging.get_verbosity()
    with pytest.raises(CorpusError, match="input=owner/name cannot be read: cannot reach the hub"):
        texts_of("owner/name", dataset_config="en")
    assert capfd.readouterr().err == ""
    assert datasets.logging.get_verbosity() == verbosity
    assert not datasets.are_progress_bars_disabled()


def test_a_dataset_of_the_hub_is_read_by_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for split in ("train", "test"):
        files[split] = [str(tmp_path / f"{split}.parquet")]
        pq.write_table(pa.table({"text": [f"{split} {text}" for text in TEXTS]}), files[split][0])
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    assert texts_of("owner/name") == [f"train {text}" for text in TEXTS]
    assert texts_of("owner/name", dataset_split="test") == [f"test {text}" for text in TEXTS]
    with pytest.raises(CorpusError, match=r"dataset_split=dev is not in input=owner/name: it has test, train"):
        texts_of("owner/name", dataset_split="dev")
