"""The embedded corpus is there on every machine, and is prepared once however many ask for it."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from data.config import DataConfig
from data.dataset import check_data
from data.errors import CorpusError
from data.prepare.embedded import embedded_input
from data.prepare.prepare import embedded_corpus
from data.read.corpus import Corpus
from data.read.faults import Faults

ROOT = Path(__file__).parents[2]


def test_source_is_the_standard_library_without_tests_and_packages() -> None:
    source = embedded_input()
    documents = [document for document in source.documents(0, Faults()) if document]
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    text = dict(zip(names, documents, strict=True))["os.py"].content
    assert text == (Path(sysconfig.get_path("stdlib")) / "os.py").read_text(encoding="utf-8")
    # About 12 MB: enough that a small model does not see a page twice in minutes of training.
    assert source.sizes.sum() == sum(len(document.content) for document in documents) > 5_000_000
    assert list(filter(None, source.documents(0, Faults()))) == documents


def test_undecodable_and_generated_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "os.py").write_text("import this")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    (tmp_path / "_sysconfigdata__linux.py").write_text("build = 'here'")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "mine.py").write_text("mine = 1")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    source = embedded_input()
    assert [document.name for document in source.documents(0, Faults())] == ["os.py"]
    assert source.description == {"input": "embedded", "files": 1, "undecodable_files": 1}


def test_python_without_sources_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CorpusError, match=r"data\.corpus=embedded needs the standard-library sources"):
        check_data(DataConfig(), 0)


def test_prepared_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(vocab_size=300, cache=str(tmp_path / "cache"))
    path = embedded_corpus(config, max_files=80)
    assert path.parent == tmp_path / "cache"
    corpus = Corpus.open(path)
    assert corpus.totals("train").documents > corpus.totals("heldout").documents > 0
    assert corpus.vocab_size == 300
    monkeypatch.setattr("data.prepare.prepare.write_corpus", None)  # a second preparation would call it
    assert embedded_corpus(config, max_files=80) == path


def test_corpora_of_other_settings_lie_beside_each_other(tmp_path: Path) -> None:
    paths = [
        embedded_corpus(DataConfig(vocab_size=vocab_size, cache=str(tmp_path)), max_files)
        for vocab_size, max_files in ((300, 30), (310, 30), (300, 40))
    ]
    assert len(set(paths)) == 3
    assert [Corpus.open(path).vocab_size for path in paths] == [300, 310, 300]


def test_racing_processes_share_one_corpus(tmp_path: Path) -> None:
    program = (
        "import sys, data.prepare.prepare as p\n"
        "write_corpus = p.write_corpus\n"
        "p.write_corpus = lambda *arguments: print('made') or write_corpus(*arguments)\n"
        "print(p.embedded_corpus(p.DataConfig(vocab_size=300, cache=sys.argv[1]), max_files=60))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [racer.communicate()[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert sum("made" in answer for answer in answers) == 1
    (path,) = {answer[-1] for answer in answers}
    Corpus.open(path).verify(progress=False)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == [Path(path).name]


def test_loser_of_a_race_without_locks_takes_the_winners_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.prepare import prepare as module

    config = DataConfig(vocab_size=300, cache=str(tmp_path))
    write_corpus = module.write_corpus

    def beaten(*arguments: object) -> Path:
        write_corpus(*arguments)  # another machine, at the same time
        return write_corpus(*arguments)

    monkeypatch.setattr(module, "write_corpus", beaten)
    Corpus.open(embedded_corpus(config, max_files=60)).verify(progress=False)


def test_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CorpusError, match=r"data\.cache=.*file.* cannot be written"):
        embedded_corpus(DataConfig(cache=str(tmp_path / "file")), max_files=10)
