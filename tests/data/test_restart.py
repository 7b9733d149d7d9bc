"""prepare goes on where it was killed: the same bytes from any number of processes, no finished shard made again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import PrepareConfig
from data.errors import CorpusError
from data.files import locked
from data.prepare import encoding
from data.prepare.prepare import prepare
from data.prepare.staging import Staging
from data.read.corpus import Corpus, check_corpus
from tests.data.conftest import text_of

ROOT = Path(__file__).parents[2]
# The real command, but for a pause after each shard, so that there is time to kill it.
SLOW_PREPARE = """
import sys, time
from data.prepare.staging import Staging
from train.settings.tree import from_text
from data.prepare.prepare import PrepareConfig, prepare
note = Staging.note
Staging.note = lambda *arguments: (note(*arguments), time.sleep(0.03))
if __name__ == "__main__":
    prepare(from_text(PrepareConfig, sys.argv[1:]))
"""


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


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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
        processes=1,
    )


def finished(config: PrepareConfig) -> list[dict]:
    journal = Path(f"{config.output}.partial") / "finished.jsonl"
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.is_file() else []


def kill_after(config: PrepareConfig, shards: int) -> dict[str, tuple[int, int]]:
    """Runs prepare in a process of its own, kills it after so many finished shards; the stamps of those."""
    fields = [f"{k}={v}" for k, v in vars(config).items() if v is not None]
    process = subprocess.Popen([sys.executable, "-c", SLOW_PREPARE, *fields], cwd=ROOT)
    while len(finished(config)) < shards:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path(config.output).exists()
    files = {entry["shard"]["file"] for entry in finished(config)}
    found = stamps(Path(f"{config.output}.partial") / "corpus")
    return {name: found[name] for name in files}


def test_killed_twice_it_goes_on_to_the_bytes_of_one_process(tmp_path: Path, tokenizer_file: Path) -> None:
    # More documents than this process encodes before it starts others.
    source = write_input(tmp_path / "input", "jsonl", files=2, documents=5500)
    straight = settings_for(tmp_path, source, tokenizer_file, 11_000, "straight")
    expected = contents(prepare(straight))
    killed = replace(straight, output=str(tmp_path / "killed"), processes=2)
    total = len([name for name in expected if name.endswith(".parquet")])
    assert total > 20
    early = kill_after(killed, 2)
    late = kill_after(killed, total - 3)
    output = prepare(killed)
    assert contents(output) == expected
    after = stamps(output)
    assert {name: after[name] for name in early} == early
    assert {name: after[name] for name in late} == late and len(late) >= total - 3
    assert "is whole" in check_corpus(str(output))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_it_goes_on_after_any_shard(tmp_path: Path, tokenizer_file: Path, kind: str, monkeypatch) -> None:
    monkeypatch.setattr("data.prepare.documents.BATCH_DOCUMENTS", 5)
    source = write_input(tmp_path / "input", kind, files=3, documents=30)
    straight = replace(
        settings_for(tmp_path, source, tokenizer_file, 200, "straight"),
        sample_by="line" if kind == "txt" else "document",
    )
    expected = contents(prepare(straight))
    config = replace(straight, output=str(tmp_path / "again"))
    note, begins, runs = Staging.note, [], 0

    def interrupted(staging: Staging, shard) -> None:
        note(staging, shard)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "note", interrupted)
    monkeypatch.setattr("data.prepare.prepare.encode_all", lambda e, b, p: encoding.encode_all(e, noted(b, begins), p))
    while not Path(config.output).exists():
        runs += 1
        try:
            prepare(config)
        except KeyboardInterrupt:
            assert len(finished(config)) == runs
    assert runs == len([name for name in expected if name.endswith(".parquet")]) + 1 > 6
    assert contents(Path(config.output)) == expected
    assert json.loads(expected["manifest.json"])["source"]["blank_documents"] > 3
    # Reading goes on near the last shard of the split that is behind, not from the start.
    assert begins == sorted(begins) and begins[0] == 0 and begins[-1] > 60


def noted(batches, begins: list[int]):
    """The batches; notes the number of the first document."""
    for index, batch in enumerate(batches):
        if not index:
            begins.append(batch.begin.number)
        yield batch


@pytest.fixture
def half_made(tmp_path: Path, tokenizer_file: Path, monkeypatch, capsys) -> PrepareConfig:
    """Settings of a corpus of which two shards are finished."""
    source = write_input(tmp_path / "input", "jsonl", files=1, documents=90)
    config = settings_for(tmp_path, source, tokenizer_file, 900, "corpus")
    note = Staging.note

    def interrupted(staging: Staging, shard) -> None:
        note(staging, shard)
        if staging.count == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Staging, "note", interrupted)
        prepare(config)
    assert "2 finished shards stay in" in capsys.readouterr().err
    return config


def test_another_plan_is_refused_and_named(half_made: PrepareConfig, tmp_path: Path) -> None:
    partial = Path(f"{half_made.output}.partial")
    before = stamps(partial / "corpus")
    with pytest.raises(
        CorpusError, match=r"holds 2 .* seed \(was 0, is 1\): set this as before .* or delete .*partial"
    ):
        prepare(replace(half_made, seed=1))
    text = Path(half_made.input) / "part0.jsonl"
    content = text.read_bytes()
    os.utime(text, ns=(0, 0))
    with pytest.raises(CorpusError, match=r"the input's files \(was .*, is .*"):
        prepare(half_made)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(Path(half_made.tokenizer).read_text() + " ")
    with pytest.raises(CorpusError, match=r"the tokenizer's content \(was "):
        prepare(replace(half_made, tokenizer=str(tokenizer)))
    assert stamps(partial / "corpus") == before and text.read_bytes() == content
    # Other numbers of processes are no other plan; but the input's time is still not what it was.
    with pytest.raises(CorpusError, match="made otherwise: the input's files"):
        prepare(replace(half_made, processes=2))


def test_a_finished_shard_that_is_gone_is_made_again(half_made: PrepareConfig, tmp_path: Path, capsys) -> None:
    fresh = prepare(replace(half_made, output=str(tmp_path / "fresh")))
    first, *_ = finished(half_made)
    (Path(f"{half_made.output}.partial") / "corpus" / first["shard"]["file"]).write_bytes(b"torn")
    assert contents(prepare(half_made)) == contents(fresh)
    assert "going on after" not in capsys.readouterr().out


def test_going_on_says_so(half_made: PrepareConfig, capsys) -> None:
    prepare(half_made)
    assert "going on after 2 finished shards" in capsys.readouterr().out
    assert Corpus.open(half_made.output).totals("train").documents > 0


def test_two_processes_do_not_make_the_same_corpus(half_made: PrepareConfig) -> None:
    with (
        locked(Path(f"{half_made.output}.partial") / "lock", wait=False),
        pytest.raises(CorpusError, match="is being made by another process"),
    ):
        prepare(half_made)


def test_processes_are_checked(half_made: PrepareConfig) -> None:
    with pytest.raises(CorpusError, match="processes=0 cannot tokenize"):
        prepare(replace(half_made, processes=0))
