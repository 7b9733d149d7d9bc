"""prepare makes whole corpora or nothing, and the same one from the same text."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.config import PrepareConfig
from data.errors import CorpusError
from data.prepare.inputs import Document, Input
from data.prepare.prepare import prepare, write_corpus
from data.read.corpus import Corpus
from data.read.faults import Faults
from data.read.manifest import MANIFEST_FILE
from data.text.tokenizer import Tokenizer, train_bpe


def write_jsonl(path: Path, num_documents: int = 60) -> Path:
    rows = [{"text": f"document {i} " + "naïve words 日本語 " * (i % 9)} for i in range(num_documents)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(
        input=str(write_jsonl(tmp_path / "text.jsonl")),
        output=str(tmp_path / "out"),
        vocab_size=300,
        heldout_fraction=0.2,
        shard_tokens=400,
    )


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_corpus_holds_the_text(config: PrepareConfig) -> None:
    corpus = Corpus.open(prepare(config))
    tokenizer = corpus.tokenizer()
    texts = [json.loads(line)["text"] for line in Path(config.input).read_text().splitlines()]
    found = [tokenizer.decode(document[:-1]) for split in ("train", "heldout") for document in corpus.documents(split)]
    assert sorted(found) == sorted(texts)
    assert corpus.totals("train").bytes + corpus.totals("heldout").bytes == sum(len(t.encode()) for t in texts)
    assert corpus.vocab_size == 300
    np.testing.assert_array_equal(corpus.token_bytes, tokenizer.token_bytes)


def test_shards_have_the_documented_columns(config: PrepareConfig) -> None:
    output = Path(prepare(config))
    table = pq.read_table(output / "train-00000-00000.parquet")
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "tokens": "list<element: uint16 not null>",
        "length": "int32",
        "bytes": "int32",
        "name": "string",
    }
    tokenizer = Corpus.open(output).tokenizer()
    for row in table.to_pylist():
        assert row["length"] == len(row["tokens"])
        assert row["bytes"] == len(tokenizer.decode(row["tokens"][:-1]).encode())
        assert row["name"].startswith("text.jsonl (row ")


def test_manifest_lists_every_file_and_its_counts(config: PrepareConfig) -> None:
    output = Path(prepare(config))
    manifest = json.loads((output / MANIFEST_FILE).read_text())
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    listed = {shard["file"] for shard in shards} | {"tokenizer.json", "token_bytes.npy"}
    assert names_in(output) == listed | {MANIFEST_FILE}
    for split in manifest["splits"].values():
        for count in ("documents", "tokens", "bytes"):
            assert split[count] == sum(shard[count] for shard in split["shards"])
    # A shard ends with the document that fills it; only a split's last one may hold fewer.
    for split in manifest["splits"].values():
        assert all(shard["tokens"] >= config.shard_tokens for shard in split["shards"][:-1])
    assert len(manifest["splits"]["train"]["shards"]) > 1


def test_same_input_gives_the_same_bytes(config: PrepareConfig, tmp_path: Path) -> None:
    first = Path(prepare(config))
    second = Path(prepare(dataclasses.replace(config, output=str(tmp_path / "again"))))
    assert contents(first) == contents(second)


def test_seed_moves_documents_between_the_splits(config: PrepareConfig, tmp_path: Path) -> None:
    one = Corpus.open(prepare(config))
    two = Corpus.open(prepare(dataclasses.replace(config, output=str(tmp_path / "two"), seed=1)))
    assert one.fingerprint != two.fingerprint
    total = [sum(corpus.totals(split).bytes for split in ("train", "heldout")) for corpus in (one, two)]
    assert total[0] == total[1]


def test_given_tokenizer_is_kept_byte_for_byte(config: PrepareConfig, tokenizer_file: Path) -> None:
    output = Path(prepare(dataclasses.replace(config, tokenizer=str(tokenizer_file))))
    assert (output / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()


def test_tokenizer_learns_from_the_first_training_bytes_only(config: PrepareConfig) -> None:
    texts = [json.loads(line)["text"] for line in Path(config.input).read_text().splitlines()]
    output = Path(prepare(dataclasses.replace(config, heldout_fraction=0, train_bytes=len(texts[0].encode()) + 1)))
    expected = train_bpe(texts[:2], config.vocab_size, progress=False)
    assert Corpus.open(output).tokenizer().sha256 == expected.sha256


def test_blank_documents_are_left_out_and_counted(config: PrepareConfig, tmp_path: Path) -> None:
    path = tmp_path / "blank.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["a", "", " \n", "b"]))
    output = Path(prepare(dataclasses.replace(config, input=str(path), heldout_fraction=0)))
    manifest = json.loads((output / MANIFEST_FILE).read_text())
    assert manifest["splits"]["train"]["documents"] == 2
    assert manifest["source"]["blank_documents"] == 2


@pytest.mark.parametrize(
    ("texts", "fraction", "reason"),
    [
        (["", "  "], 0.0, r"input=.* is empty"),
        (["a", "b"], 1 - 1e-9, "held out all 2 documents"),
    ],
)
def test_splits_that_come_out_empty(
    config: PrepareConfig, tmp_path: Path, texts: list[str], fraction: float, reason: str
) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with pytest.raises(CorpusError, match=reason):
        prepare(dataclasses.replace(config, input=str(path), heldout_fraction=fraction))
    assert names_in(tmp_path) == {"text.jsonl", "few.jsonl"}


def test_existing_output_is_refused_and_kept(config: PrepareConfig, tmp_path: Path) -> None:
    output = Path(config.output)
    output.mkdir()
    (output / "precious").write_text("data")
    with pytest.raises(CorpusError, match=r"output=.*out exists already"):
        prepare(config)
    assert (output / "precious").read_text() == "data"
    assert names_in(tmp_path) == {"text.jsonl", "out"}


def test_empty_output_directory_is_used(config: PrepareConfig) -> None:
    Path(config.output).mkdir()
    assert Corpus.open(prepare(config)).totals("train").documents > 0


def test_output_below_a_file_is_refused(config: PrepareConfig) -> None:
    with pytest.raises(CorpusError, match=r"output=.* cannot be written"):
        prepare(dataclasses.replace(config, output=f"{config.input}/out"))


class MadeUp(Input):
    """Units of a hundred documents each; something happens before the last of them."""

    description: ClassVar = {}
    identity: ClassVar = []
    sizes = np.full(20, 2000)

    def __init__(self, happens: Callable[[], None] = lambda: None) -> None:
        self._happens = happens

    def documents(self, unit: int, faults: Faults) -> Iterator[Document]:
        if unit == 19:
            self._happens()
        for number in range(100 * unit, 100 * unit + 100):
            yield Document(f"document {number}", "made up", str(number).encode())


def write_made_up(config: PrepareConfig, tokenizer_file: Path, output: Path, source: Input) -> Path:
    given = dataclasses.replace(config, tokenizer=str(tokenizer_file), piece_bytes=6000, processes=1)
    return Path(write_corpus(given, source, str(output), Tokenizer.from_path(tokenizer_file)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, CorpusError, MemoryError])
def test_interruption_leaves_what_is_finished_and_no_corpus(
    config: PrepareConfig, tmp_path: Path, error: type[BaseException], tokenizer_file: Path
) -> None:
    def fail() -> None:
        # By now pieces have been finished.
        assert any(path.name.endswith("00000.json") for path in tmp_path.rglob("*"))
        raise error

    with pytest.raises(error):
        write_made_up(config, tokenizer_file, Path(config.output), MadeUp(fail))
    assert names_in(tmp_path) == {"text.jsonl", "out.partial"}
    resumed, fresh = (write_made_up(config, tokenizer_file, tmp_path / name, MadeUp()) for name in ("out", "fresh"))
    assert contents(resumed) == contents(fresh)
    assert names_in(tmp_path) == {"text.jsonl", "out", "fresh"}


def test_a_mistake_before_the_first_shard_leaves_nothing(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="text_column=words is not in"):
        prepare(dataclasses.replace(config, text_column="words"))
    assert names_in(tmp_path) == {"text.jsonl"}


def test_output_that_appears_meanwhile_is_not_overwritten(
    config: PrepareConfig, tmp_path: Path, tokenizer_file: Path
) -> None:
    output = Path(config.output)

    def appear() -> None:
        output.mkdir()
        (output / "other").write_text("faster")

    with pytest.raises(CorpusError, match="exists already"):
        write_made_up(config, tokenizer_file, output, MadeUp(appear))
    assert names_in(output) == {"other"}


def test_a_corpus_may_hold_nothing_out(config: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = Corpus.open(prepare(dataclasses.replace(config, heldout_fraction=1e-9)))
    assert (corpus.totals("heldout").documents, corpus.totals("train").documents) == (0, 60)
    assert "no document of 60 is held out" in capsys.readouterr().out


def test_held_out_text_is_bounded_in_tokens(config: PrepareConfig) -> None:
    wide = dataclasses.replace(config, input=str(write_jsonl(Path(config.input), 3000)), heldout_tokens=2000)
    corpus = Corpus.open(prepare(wide))
    # 0.2 would be 100,000 tokens or so. Bytes of JSON tell tokens to a factor of two with this small vocabulary.
    assert 500 < corpus.totals("heldout").tokens < 2000


def test_corpus_is_readable_by_everybody_the_umask_allows(config: PrepareConfig) -> None:
    umask = os.umask(0o022)
    try:
        output = Path(prepare(config))
    finally:
        os.umask(umask)
    assert output.stat().st_mode & 0o777 == 0o755
