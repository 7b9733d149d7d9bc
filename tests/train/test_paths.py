"""Paths of a command line that is given in another folder than the checkout."""

import os
from pathlib import Path

import pytest

from train import usage
from train.__main__ import COMMANDS, run
from train.settings import paths
from train.settings.run import Config
from train.settings.tree import from_text, settings

KNOWN = {setting.path for setting in settings(Config)}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("data.corpus=mine", "data.corpus={folder}/mine"),
        ("data.corpus=../texts/*.jsonl", "data.corpus={parent}/texts/*.jsonl"),
        ("++data.corpus='mine'", "++data.corpus={folder}/mine"),
        ("data.corpus=/there/mine", "data.corpus=/there/mine"),
        ("data.corpus=s3://bucket/mine", "data.corpus=s3://bucket/mine"),
        ("data.corpus=~/mine", "data.corpus=~/mine"),
        ("data.corpus=embedded", "data.corpus=embedded"),
        ("data.sources=[[a,0.7],[/b,0.3]]", 'data.sources=[["{folder}/a",0.7],["/b",0.3]]'),
        ("data.sources=nonsense", "data.sources=nonsense"),
        ("run.dir=out", "run.dir={folder}/out"),
        ("run.name=mine", "run.name=mine"),
        ("run.init=mine", "run.init=mine"),
        ("run.init=out/mine", "run.init={folder}/out/mine"),
        ("run=out/mine", "run={folder}/out/mine"),
        ("run=[first,out/mine]", "run=[first,{folder}/out/mine]"),
        ("run=[first,second]", "run=[first,second]"),
        ("tokenizer=train", "tokenizer=train"),
        ("tokenizer=Qwen/some", "tokenizer=Qwen/some"),
        ("tokenizer=there", "tokenizer={folder}/there"),
        ("hf=there", "hf={folder}/there"),
        ("out=model", "out={folder}/model"),
        ("prompt=a/b", "prompt=a/b"),
        ("batch.global=3", "batch.global=3"),
    ],
)
def test_a_path_is_the_callers(tmp_path: Path, given: str, meant: str) -> None:
    (tmp_path / "there").touch()
    expected = meant.format(folder=tmp_path, parent=tmp_path.parent)
    assert paths.anchored(["--from", str(tmp_path), given], KNOWN) == [expected]
    assert paths.anchored([given], KNOWN) == [given], "in the checkout nothing is to be changed"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("data.corpus=mine,/there,../b", "data.corpus={folder}/mine,/there,{parent}/b"),
        ("data.corpus=choice(mine,'b')", "data.corpus={folder}/mine,'{folder}/b'"),
        ("data.corpus='a,b',c", "data.corpus='{folder}/a,b',{folder}/c"),
        ("data.sources=[[a,1]],[[b,1]]", 'data.sources=[["{folder}/a",1]],[["{folder}/b",1]]'),
        ("run.init=out/a,b", "run.init={folder}/out/a,b"),
        ("seed=1,2", "seed=1,2"),
    ],
)
def test_each_value_of_a_sweep_is_the_callers(tmp_path: Path, given: str, meant: str) -> None:
    expected = meant.format(folder=tmp_path, parent=tmp_path.parent)
    assert paths.anchored(["--from", str(tmp_path), "-m", given], KNOWN) == ["-m", expected]


def test_options_that_take_a_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    found = paths.anchored(["--from", str(tmp_path), "-cn", "mine.yaml", "--config-dir=.", "-cn", "tiny"], KNOWN)
    assert found == ["-cn", f"{tmp_path}/mine.yaml", f"--config-dir={tmp_path}", "-cn", "tiny"]


def test_sources_are_read_as_they_were_meant(tmp_path: Path) -> None:
    (text,) = paths.anchored(["--from", str(tmp_path), "data.sources=[[a b,0.7],[c,0.3]]"], KNOWN)
    assert from_text(Config, [text]).data.sources == ((f"{tmp_path}/a b", 0.7), (f"{tmp_path}/c", 0.3))


def test_a_checkout_that_cannot_be_written_writes_where_the_caller_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != paths.ROOT)
    arguments = ["--from", str(tmp_path), "run.dir=out"]
    caches = [f"run.kernel_cache={tmp_path}/.cache/kernels", f"data.cache={tmp_path}/.cache/corpus"]
    assert paths.anchored(arguments, KNOWN) == [f"run.dir={tmp_path}/out", *caches]
    assert paths.anchored(["--from", str(tmp_path)], {"run.dir"}) == [f"run.dir={tmp_path}/runs"]
    assert paths.anchored(["--from", str(tmp_path)], {"input"}) == []


def test_every_name_is_a_setting_of_some_command() -> None:
    known = {setting.path for command in usage.CONFIGS for setting in settings(usage.CONFIGS[command])}
    assert set(paths.PATHS) | set(paths.WRITTEN) <= known


def test_a_command_takes_its_callers_folder(tmp_path: Path, monkeypatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setitem(COMMANDS, "prepare", lambda arguments: given.append(arguments) or 0)
    assert run(["prepare", "--from", str(tmp_path), "input=/texts", "output=mine"]) == 0
    assert given == [["input=/texts", f"output={tmp_path}/mine"]]


def test_a_run_is_the_callers_where_the_checkout_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setitem(COMMANDS, "train", lambda arguments: given.append(arguments) or 0)
    monkeypatch.setattr(os, "access", lambda path, mode: path != paths.ROOT)
    assert run(["train", "--from", str(tmp_path), "seed=1"]) == 0
    caches = [f"run.kernel_cache={tmp_path}/.cache/kernels", f"data.cache={tmp_path}/.cache/corpus"]
    assert given == [["seed=1", f"run.dir={tmp_path}/runs", *caches]]
