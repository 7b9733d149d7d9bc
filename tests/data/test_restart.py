"""prepare goes on where it was killed: the same bytes from any number of processes and parts, nothing made twice."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import PrepareConfig
from data.errors import CorpusError
from data.files import locked
from data.prepare.join import join_parts
from data.prepare.prepare import prepare
from data.prepare.repair import repair
from data.prepare.shard_writer import PLAIN, SHARD_LAYOUT
from data.prepare.staging import Staging
from data.read.corpus import Corpus, check_corpus
from tests.data.conftest import text_of

ROOT = Path(__file__).parents[2]
PREPARE = (
    "import sys; from train.settings.tree import from_text; from data.prepare.prepare import PrepareConfig, prepare\n"
)
PREPARE += "prepare(from_text(PrepareConfig, sys.argv[1:]))"


def write_input(directory: Path, kind: str, files: int, documents: int) -> Path:
    """Documents, blank ones among them, in several files."""
    directory.mkdir()
    for number in range(files):
        texts = [text_of(number * documents + i) * (i % 11 != 3) for i in range(documents)]
        path = directory / f"part{number}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), path, row_group_size=13)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            path.write_text("\n".join(texts))
    return directory


def contents(directory: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def stamps(directory: Path) -> dict[str, tuple[int, int]]:
    """File and time of writing of every shard."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.glob("*.parquet")}


def settings_for(tmp_path: Path, source: Path, tokenizer: Path, shard_tokens: int, name: str) -> PrepareConfig:
    return PrepareConfig(
        input=str(source),
        output=str(tmp_path / name),
        tokenizer=str(tokenizer),
        heldout_fraction=0.2,
        shard_tokens=shard_tokens,
        piece_bytes=2000,
        processes=1,
    )


def finished(config: PrepareConfig) -> list[str]:
    return [path.stem for path in Path(f"{config.output}.partial/pieces").glob("[0-9]*.json")]


def kill_after(config: PrepareConfig, pieces: int) -> dict[str, tuple[int, int]]:
    """Runs prepare in a process of its own, kills it after so many finished pieces; the stamps of their shards."""
    values = {k: json.dumps(v) if isinstance(v, tuple) else v for k, v in vars(config).items() if v is not None}
    fields = [f"{k}={v}" for k, v in values.items()]
    process = subprocess.Popen([sys.executable, "-c", PREPARE, *fields], cwd=ROOT)
    while len(finished(config)) < pieces:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(1.5)  # its workers see within a second that it is gone
    assert not Path(config.output).exists()
    done = set(finished(config))
    found = stamps(Path(f"{config.output}.partial/corpus"))
    return {name: stamp for name, stamp in found.items() if name.split("-")[1] in done}


def test_killed_twice_it_goes_on_to_the_bytes_of_one_process(tmp_path: Path, tokenizer_file: Path) -> None:
    source = write_input(tmp_path / "input", "parquet", files=4, documents=2000)
    straight = replace(settings_for(tmp_path, source, tokenizer_file, 3000, "straight"), piece_bytes=3000)
    expected = contents(prepare(straight))
    killed = replace(straight, output=str(tmp_path / "killed"), processes=2)
    total = json.loads(expected["manifest.json"])["plan"]["pieces of the input"]
    assert total > 100
    early = kill_after(killed, 2)
    late = kill_after(killed, len(finished(killed)) + 20)
    output = Path(prepare(killed))
    assert contents(output) == expected
    after = stamps(output)
    assert {name: after[name] for name in early} == early != {}
    assert {name: after[name] for name in late} == late
    assert "is whole" in check_corpus(str(output))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_it_goes_on_after_any_piece(tmp_path: Path, tokenizer_file: Path, kind: str, monkeypatch) -> None:
    source = write_input(tmp_path / "input", kind, files=3, documents=30)
    straight = replace(
        settings_for(tmp_path, source, tokenizer_file, 200, "straight"),
        sample_by="line" if kind == "txt" else "document",
    )
    expected = contents(prepare(straight))
    config = replace(straight, output=str(tmp_path / "again"))
    note, runs = Staging.note, 0

    def interrupted(staging: Staging, piece: int, record) -> None:
        note(staging, piece, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "note", interrupted)
    while not Path(config.output).exists():
        runs += 1
        try:
            prepare(config)
        except KeyboardInterrupt:
            assert len(finished(config)) == runs
    manifest = json.loads(expected["manifest.json"])
    assert runs == manifest["plan"]["pieces of the input"] + 1 > 3
    assert contents(config.output) == expected
    assert manifest["source"]["blank_documents"] > 3


def test_parts_on_several_machines_are_joined(tmp_path: Path, tokenizer_file: Path) -> None:
    source = write_input(tmp_path / "input", "parquet", files=3, documents=90)
    whole = settings_for(tmp_path, source, tokenizer_file, 900, "whole")
    expected = contents(prepare(whole))
    parts = replace(whole, output=str(tmp_path / "parts"))
    for part in ("2/3", "1/3"):
        prepare(replace(parts, part=part))
        assert not Path(parts.output).exists()
    with pytest.raises(CorpusError, match=r"parts\.partial lacks \d+ of \d+ pieces \(2, 5, .*give the commands of the"):
        join_parts(parts.output)
    prepare(replace(parts, part="3/3"))
    assert "documents" in join_parts(parts.output)
    assert contents(parts.output) == expected
    assert not Path(f"{parts.output}.partial").exists()


def test_what_was_begun_in_an_older_layout_is_finished_and_repaired_in_it(
    tmp_path: Path, tokenizer_file: Path, monkeypatch
) -> None:
    source = write_input(tmp_path / "input", "parquet", files=3, documents=90)
    new = settings_for(tmp_path, source, tokenizer_file, 900, "new")
    prepare(new)
    old, begun = replace(new, output=str(tmp_path / "old")), replace(new, output=str(tmp_path / "begun"), part="1/2")
    with monkeypatch.context() as before:
        before.setattr("data.prepare.prepare.layout_of", lambda plan: PLAIN)
        before.setattr("data.prepare.join.layout_of", lambda plan: PLAIN)
        prepare(old)
        prepare(begun)
    expected = contents(old.output)
    shard = "train-00000-00000.parquet"
    assert expected[shard] != contents(new.output)[shard]
    assert SHARD_LAYOUT not in json.loads(expected["manifest.json"])["plan"]
    prepare(replace(begun, part="2/2"))
    join_parts(begun.output)
    assert contents(begun.output) == expected
    for name in (shard, "heldout-00000.parquet"):
        (Path(old.output) / name).unlink()
    assert "made again" in repair(old.output)
    assert contents(old.output) == expected


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b"])
def test_parts_that_are_none(tmp_path: Path, tokenizer_file: Path, part: str) -> None:
    config = settings_for(tmp_path, tmp_path, tokenizer_file, 900, "corpus")
    with pytest.raises(CorpusError, match=f"part={part} is no part: write 3/64"):
        prepare(replace(config, part=part))
    with pytest.raises(CorpusError, match="part=1/2 needs a tokenizer that all parts share"):
        prepare(replace(config, part="1/2", tokenizer="train"))
    with pytest.raises(CorpusError, match="holds no parts"):
        join_parts(config.output)


def test_from_and_to_a_file_system_of_objects(tmp_path: Path, tokenizer_file: Path) -> None:
    source = write_input(tmp_path / "input", "jsonl", files=3, documents=90)
    local = settings_for(tmp_path, source, tokenizer_file, 900, "local")
    expected, store = contents(prepare(local)), fsspec.filesystem("memory")
    for file in source.iterdir():
        store.pipe_file(f"/raw/{file.name}", file.read_bytes())
    remote = replace(local, input="memory://raw", output="memory://made/corpus")
    try:
        prepare(replace(remote, part="1/2"))
        with pytest.raises(CorpusError, match=r"no corpus|not exist"):
            Corpus.open(remote.output)
        prepare(replace(remote, part="2/2"))
        join_parts(remote.output)
        found = {name.rpartition("/")[2]: store.cat_file(name) for name in store.find("/made")}
        assert {n: c for n, c in found.items() if n != "manifest.json"} == {
            n: c for n, c in expected.items() if n != "manifest.json"
        }
        assert Corpus.open(remote.output).fingerprint == Corpus.open(local.output).fingerprint
        with pytest.raises(CorpusError, match=r"output=memory://made/corpus exists already"):
            prepare(remote)
    finally:
        store.store.clear()


@pytest.mark.parametrize("shuffle", [None, 7])
def test_lost_and_damaged_files_are_made_again(tmp_path: Path, tokenizer_file: Path, shuffle: int | None) -> None:
    source = write_input(tmp_path / "input", "parquet", files=2, documents=90)
    config = replace(settings_for(tmp_path, source, tokenizer_file, 300, "corpus"), shuffle=shuffle)
    output = Path(prepare(config))
    expected = contents(output)
    assert "nothing to repair" in repair(str(output))
    (output / "train-00002-00000.parquet").unlink()
    (output / "heldout-00001.parquet").write_bytes(b"torn")
    (output / "token_bytes.npy").unlink()
    (output / "tokenizer.json").write_text("{}")
    assert "made again: tokenizer.json, token_bytes.npy, train-00002-00000.parquet, heldout-0" in repair(str(output))
    assert contents(output) == expected
    (output / "train-00001-00000.parquet").unlink()
    assert repair(str(output), ["train-00001-00000.parquet"]).endswith("made again: train-00001-00000.parquet")
    assert contents(output) == expected
    with pytest.raises(CorpusError, match=r"other\.parquet is no file of"):
        repair(str(output), ["other.parquet"])
    (output / "train-00001-00000.parquet").unlink()
    os.utime(source / "part0.parquet", ns=(0, 0))
    with pytest.raises(CorpusError, match=r"cannot be repaired, since it was prepared otherwise: the input's files"):
        repair(str(output))
    assert not (tmp_path / "corpus.repair.partial").exists()


def test_shuffled_documents_are_the_same_in_another_order(tmp_path: Path, tokenizer_file: Path) -> None:
    source = write_input(tmp_path / "input", "parquet", files=4, documents=130)
    straight = replace(settings_for(tmp_path, source, tokenizer_file, 2000, "straight"), piece_bytes=20_000)
    made = {
        name: Corpus.open(prepare(replace(straight, output=str(tmp_path / name), shuffle=seed)))
        for name, seed in (("straight", None), ("one", 1), ("again", 1), ("two", 2))
    }
    assert made["one"].fingerprint == made["again"].fingerprint != made["two"].fingerprint
    documents = {name: [bytes(d) for d in corpus.documents("train")] for name, corpus in made.items()}
    assert sorted(documents["one"]) == sorted(documents["two"]) == sorted(documents["straight"])
    # Neighbours of the input are far from each other: of n documents at random, two stay neighbours.
    places = {document: place for place, document in enumerate(documents["straight"])}
    moves = [places[document] for document in documents["one"]]
    assert sum(abs(a - b) == 1 for a, b in pairwise(moves)) < 20 < len(moves) / 10
    # A shard's documents come from all files.
    first = made["one"].shard("train", 0)
    parts = {places[bytes(first.document(n))] * 4 // len(places) for n in range(first.num_documents)}
    assert parts == {0, 1, 2, 3}


@pytest.fixture
def half_made(tmp_path: Path, tokenizer_file: Path, monkeypatch, capsys) -> PrepareConfig:
    """Settings of a corpus of which two pieces are finished."""
    source = write_input(tmp_path / "input", "parquet", files=1, documents=90)
    config = settings_for(tmp_path, source, tokenizer_file, 900, "corpus")
    note = Staging.note

    def interrupted(staging: Staging, piece: int, record) -> None:
        note(staging, piece, record)
        if piece == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Staging, "note", interrupted)
        prepare(config)
    assert "2 finished pieces stay in" in capsys.readouterr().err
    return config


def test_another_plan_is_refused_and_named(half_made: PrepareConfig, tmp_path: Path) -> None:
    partial = Path(f"{half_made.output}.partial")
    before = stamps(partial / "corpus")
    with pytest.raises(
        CorpusError, match=r"holds 2 .* seed \(was 0, is 1\): set this as before .* or delete .*partial"
    ):
        prepare(replace(half_made, seed=1))
    text = Path(half_made.input) / "part0.parquet"
    os.utime(text, ns=(0, 0))
    with pytest.raises(CorpusError, match=r"the input's files \(was .*, is .*"):
        prepare(half_made)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(Path(half_made.tokenizer).read_text() + " ")
    with pytest.raises(CorpusError, match=r"the tokenizer's content \(was "):
        prepare(replace(half_made, tokenizer=str(tokenizer)))
    assert stamps(partial / "corpus") == before
    # Other numbers of processes are no other plan; but the input's time is still not what it was.
    with pytest.raises(CorpusError, match="made otherwise: the input's files"):
        prepare(replace(half_made, processes=2))


def test_a_finished_shard_that_is_gone_is_made_again(half_made: PrepareConfig, tmp_path: Path, capsys) -> None:
    fresh = prepare(replace(half_made, output=str(tmp_path / "fresh")))
    for shard in Path(f"{half_made.output}.partial/corpus").glob("*.parquet"):
        shard.write_bytes(b"torn")
    assert contents(prepare(half_made)) == contents(fresh)
    assert "going on after" not in capsys.readouterr().out


def test_going_on_says_so(half_made: PrepareConfig, capsys) -> None:
    prepare(half_made)
    assert "going on after 2 finished pieces" in capsys.readouterr().out
    assert Corpus.open(half_made.output).totals("train").documents > 0


def test_a_damaged_plan_is_named(half_made: PrepareConfig) -> None:
    Path(f"{half_made.output}.partial/plan.json").write_text('{"seed": ')
    with pytest.raises(CorpusError, match=r"plan\.json is damaged .*: delete .*\.partial"):
        prepare(half_made)


def test_two_processes_do_not_make_the_same_corpus(half_made: PrepareConfig) -> None:
    with (
        locked(Path(f"{half_made.output}.partial") / "lock", wait=False),
        pytest.raises(CorpusError, match="is being made by another process"),
    ):
        prepare(half_made)


def test_processes_are_checked(half_made: PrepareConfig) -> None:
    with pytest.raises(CorpusError, match="processes=0 cannot tokenize"):
        prepare(replace(half_made, processes=0))
