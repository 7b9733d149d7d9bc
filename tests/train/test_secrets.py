"""Secrets in a setting or in the environment are neither written nor shown: every place is looked at."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.secrets import hidden, hide, one_line
from train import front
from train.__main__ import run
from train.arguments import CommandLine, combinations, label
from train.job.provenance import HISTORY_FILE, note_start
from train.job.shelf import read_state, write_state
from train.settings.run import Config, describe, save_config
from train.settings.run_checks import check_plan
from train.settings.tree import ConfigError, from_dict

ROOT = Path(__file__).parents[2]
SECRET = "S3cretS3cret"
LOGIN = f"s3://me:{SECRET}@bucket/corpus"
SIGNED = f"https://host/part.parquet?X-Amz-Expires=60&X-Amz-Signature={SECRET}"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (LOGIN, "s3://***@bucket/corpus"),
        (f"https://{SECRET}@host/x", "https://***@host/x"),
        (f"simplecache::https://a:{SECRET}@host/x", "simplecache::https://***@host/x"),
        (f"https://a:{SECRET}@x@host/x", "https://***@host/x"),
        (SIGNED, "https://host/part.parquet?***"),
        (f"data.corpus={SIGNED} cannot be read: 403", "data.corpus=https://host/part.parquet?*** cannot be read: 403"),
        (
            f"['{SIGNED}', 0.5], ['{LOGIN}', 0.5]",
            "['https://host/part.parquet?***', 0.5], ['s3://***@bucket/corpus', 0.5]",
        ),
    ],
)
def test_logins_and_queries_of_urls_are_hidden(text, left):
    assert hide(text) == left and SECRET not in left


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/part-?.parquet",
        "s3://bucket/part-?/lang=en/*.parquet",
        "sftp://me@host/corpus",
        "user@host: 3?x=1",
        "https://host:8080/x",
        "corpora/mine",
    ],
)
def test_what_is_no_secret_stays(text):
    assert hide(text) == text


def test_keys_and_tokens_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "short")
    assert hide(f"bad key {SECRET} of short") == "bad key *** of short"
    assert hidden({f"a{SECRET}": [1, (SECRET, None)]}) == {"a***": [1, ["***", None]]}


@pytest.fixture
def config(tmp_path):
    values = {
        "data": {"sources": [[LOGIN, 0.5], [SIGNED, 0.5]], "cache": LOGIN},
        "run": {"dir": str(tmp_path), "name": "one"},
    }
    config = from_dict(Config, values)
    config.run.path.mkdir()
    return config


def test_config_yaml_and_the_start_of_a_run_show_none(config):
    assert SECRET not in save_config(config).read_text()
    assert "s3://***@bucket/corpus" in save_config(config).read_text()
    assert SECRET not in "\n".join(describe(config, check_plan(config, 2)))
    note_start(config, replace(config, data=replace(config.data, cache=f"{LOGIN}/other")), 0, 2)
    history = (config.run.path / HISTORY_FILE).read_text()
    assert (
        SECRET not in history and '"data.cache": ["s3://***@bucket/corpus/other", "s3://***@bucket/corpus"]' in history
    )


def test_names_of_a_sweep_s_runs_and_dry_runs_show_none(monkeypatch, capsys):
    swept = [[f"data.corpus={url}" for url in (LOGIN, SIGNED)]]
    labels = [label(line, swept) for line in combinations(CommandLine(overrides=(swept[0][0],)), swept)]
    assert labels == ["data.corpus=s3-bucket-corpus", "data.corpus=https-host-part.parquet"]
    for name in ("NNODES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert front.launch("train", [f"data.corpus={LOGIN}", "--dry-run"], 1, lambda: None, None) == 0
    shown = capsys.readouterr().out
    assert SECRET not in shown and "s3://***@bucket/corpus" in shown


def test_a_checkpoint_s_state_shows_none(tmp_path):
    write_state(tmp_path, 1, {"sources": {LOGIN: {"samples": 3}}}, None)
    assert read_state(tmp_path)["data"] == {"sources": {"s3://***@bucket/corpus": {"samples": 3}}}


def test_messages_of_libraries_and_mistakes_show_none(monkeypatch, capsys):
    assert SECRET not in one_line(OSError(f"403 for {SIGNED}"))
    monkeypatch.delenv(front.ERROR_FILE, raising=False)
    front.report_mistake(ConfigError(f"data.corpus={LOGIN} is none"))
    assert capsys.readouterr().err == "error: data.corpus=s3://***@bucket/corpus is none\n"


def test_cfg_shows_none(capsys):
    assert run(["train", "--cfg", "job", f"data.corpus={LOGIN}"]) == 0
    shown = capsys.readouterr().out
    assert SECRET not in shown and "s3://***@bucket/corpus" in shown


RUN = """
import sys
from unittest.mock import patch
from train import __main__ as main
from train.settings.run import Config
from train.settings.tree import from_dict
from train.watch.trackers import WandbTracker

def track(arguments):
    url = arguments[0].partition("=")[2]
    config = from_dict(Config, {"run": {"name": "one", "dir": "runs"}, "data": {"corpus": url}})
    config.run.path.mkdir(parents=True)
    tracker = WandbTracker(config)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    raise OSError(f"{url} went away")

with patch.dict(main.COMMANDS, {"evaluate": track}):
    sys.exit(main.main())
"""


def test_wandb_and_tracebacks_show_none(tmp_path):
    """W&B notes the command line, too; its files are searched as they are."""
    process = subprocess.run(
        [sys.executable, "-c", RUN, "evaluate", f"data.corpus={SIGNED}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1
    assert "OSError: https://host/part.parquet?*** went away" in process.stderr
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(b"https://host/part.parquet?***" in content for content in files.values())
    assert [path for path, content in files.items() if SECRET.encode() in content] == []
    assert SECRET not in process.stdout + process.stderr
