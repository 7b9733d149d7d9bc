"""A checkpoint stands alone, a run remembers its starts, and another one goes on from any step of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.text.tokenizer import train_bpe
from tests.parallel.tiny import MODEL, tiny_config
from train.arguments import run_by_name
from train.job.directory import require_checkpoint, starting_checkpoint, steps_done
from train.job.provenance import HISTORY_FILE, kept_tokenizer, note_start, sidecars
from train.job.shelf import Shelf, write_state
from train.settings.run import Config, RunConfig, RunReference, load_config, read_config, save_config
from train.settings.run_checks import check_plan
from train.settings.tree import ConfigError

STEPS = (3, 6)


@pytest.fixture
def first(tmp_path) -> Config:
    """Settings of a run with two checkpoints, each with what stands beside its numbers."""
    config = tiny_config(MODEL, run=RunConfig(name="first", dir=str(tmp_path)))
    config.run.path.mkdir()
    save_config(config)
    shelf, tokenizer = Shelf(config.run.checkpoints), train_bpe(["some text to spell"], 300, progress=False)
    for step in STEPS:
        partial = shelf.prepare(step)
        for name, content in sidecars(config, tokenizer, world=2).items():
            (partial / name).write_bytes(content)
        write_state(partial, step, {"identity": {}}, {"world": 2})
        shelf.publish(step)
    return config


def test_a_checkpoint_has_its_settings_tokenizer_and_origin(first):
    path = Shelf(first.run.checkpoints).path(STEPS[0])
    assert read_config(path / "config.yaml") == first
    origin = json.loads((path / "provenance.json").read_text())
    assert origin["processes"] == 2 and origin["packages"]["megatron-core"] == "0.19.2"
    assert origin["command"] and origin["host"] and origin["python"]
    tokenizer = kept_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode_batch(["some text"])[0]) == "some text"
    assert tokenizer.eod_id == 0
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json names no eos_token that can be read"):
        kept_tokenizer(path)
    (path / "tokenizer_config.json").unlink()
    assert kept_tokenizer(path) is None


def test_secrets_stay_out(first):
    secret = replace(first, data=replace(first.data, corpus="s3://key:word@bucket/corpus"))
    for content in sidecars(secret, None, 1).values():
        assert b"word@" not in content


@pytest.mark.parametrize("torn", ["", "run: {na", None])
def test_torn_settings_of_a_run_are_made_good_by_those_of_its_checkpoints(first, torn: str | None):
    path = first.run.path / "config.yaml"
    path.unlink() if torn is None else path.write_text(torn)
    assert load_config(RunReference("first", first.run.dir)) == first


def test_a_line_a_start_says_what_changed(first):
    note_start(first, None, 0, world=2)
    note_start(replace(first, seed=7), first, 3, world=4)
    one, other = map(json.loads, (first.run.path / HISTORY_FILE).read_text().splitlines())
    assert one["changed"] == {} and one["step"] == 0 and one["processes"] == 2
    assert other["changed"] == {"seed": [first.seed, 7]} and other["step"] == 3
    assert {"time", "host", "commit", "command"} <= other.keys()


def test_a_fork_goes_on_from_any_step_of_another_run(first):
    fork = replace(first, run=replace(first.run, name="decay", fork="first@3"), optim=replace(first.optim, lr=1e-4))
    assert steps_done(fork) == 3
    assert starting_checkpoint(fork.run) == Shelf(first.run.checkpoints).path(3)
    by_path = replace(fork, run=replace(fork.run, fork=f"{first.run.path}@6"))
    assert steps_done(by_path) == 6
    with pytest.raises(ConfigError, match=r"run.fork=first@4 is not among .* of run\.name=first: choose one of 3, 6"):
        steps_done(replace(fork, run=replace(fork.run, fork="first@4")))
    with pytest.raises(ConfigError, match=r"batch\.global=16 \(was 8\)"):
        steps_done(replace(fork, batch=replace(fork.batch, global_=16)))
    # Once it has a checkpoint of its own, it goes on from there.
    own = Shelf(fork.run.checkpoints)
    write_state(own.prepare(5), 5, {"identity": {}}, {"world": 2})
    path = own.publish(5)
    assert starting_checkpoint(fork.run) == path


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"fork": "first"}, r"run\.fork=first names no checkpoint: write NAME@STEP"),
        ({"fork": "@3"}, r"run\.fork=@3 names no checkpoint"),
        ({"fork": "first@3", "init": "first"}, r"run\.fork=first@3 and run\.init=first both say"),
        ({"keep": -1}, r"run\.keep=-1 must be at least 0"),
        ({"save_minutes": 0.0}, r"run\.save_minutes=0\.0 must be above 0"),
    ],
)
def test_mistakes_are_named(first, setting: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        check_plan(replace(first, run=replace(first.run, **setting)), 1)


def test_a_run_is_named_or_its_directory_is():
    assert run_by_name(["run=mine", "step=3"]) == ["run.name=mine", "step=3"]
    assert run_by_name(["run=runs/mine"]) == ["run.name=mine", "run.dir=runs"]
    assert run_by_name(["run=/far/away/mine/"]) == ["run.name=mine", "run.dir=/far/away"]


def test_a_damaged_step_that_is_asked_for_is_refused_and_else_the_one_before_is_used(first):
    shelf = Shelf(first.run.checkpoints)
    path: Path = shelf.path(6) / "config.yaml"
    path.write_text(path.read_text().replace("seed", "sead"))
    with pytest.raises(ConfigError, match=r"step=6 of run\.name=first is damaged: config\.yaml is not as it"):
        require_checkpoint(first.run, 6)
    assert require_checkpoint(first.run) == shelf.path(3)
    (shelf.path(3) / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no checkpoint that is whole; the last one: config"):
        require_checkpoint(first.run)
