"""What `status` says of a run."""

import json

import pytest

from train.__main__ import run
from train.job.heartbeat import write_beat
from train.job.lock import RunLock, is_held
from train.settings.run import Config, save_config
from train.settings.tree import from_dict
from train.watch.status import status_lines


@pytest.fixture
def config(tmp_path):
    config = from_dict(Config, {"run": {"name": "one", "dir": str(tmp_path), "steps": 1000}})
    config.run.path.mkdir()
    save_config(config)
    return config


def log(config, **values) -> None:
    with (config.run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def test_a_run_that_has_done_nothing_says_so(config, capsys):
    assert run(["status", f"run={config.run.path}"]) == 0
    text = capsys.readouterr().out
    assert "step 0 of 1,000 (0.0%)" in text and "no step has been done yet" in text
    assert "last checkpoint: none yet" in text and "left: unknown" in text


def test_a_run_that_runs_shows_its_speed_and_what_is_left(config):
    log(config, step=90, loss=9.0)
    log(config, step=100, loss=2.5, grad_norm=0.5, tokens_per_second=8192.0, mfu=0.41, **{"seconds/step": 2.0})
    log(config, step=105, heldout_lm_loss=3.0)
    write_beat(config.run.path, 107, {})
    beat = json.loads((config.run.path / "heartbeat.json").read_text())
    text = "\n".join(status_lines(config, beat["time"] + 3))
    assert "step 107 of 1,000 (10.7%)" in text
    assert "logged at step 100: loss 2.5  grad_norm 0.5  tokens_per_second 8192  mfu 0.41" in text
    assert f"life: 3s since the last step, on {beat['host']} (process {beat['pid']})\n" in text
    assert "left: 29m46s of training at this speed" in text
    assert "health: nothing to complain of" in text
    late = "\n".join(status_lines(config, beat["time"] + 61))
    assert "it does not seem to run; the same command goes on" in late
    lock = RunLock(config.run)
    lock.take()
    late = "\n".join(status_lines(config, beat["time"] + 61))
    lock.release()
    assert "a process has the run, so it starts, evaluates or saves, or is stuck" in late
    assert not is_held(config.run.path)


def test_what_is_wrong_is_named(config):
    for dead, says in ((3.4, "3 of a layer's 16 experts took no token, a mean over layers; "), (0.4, "")):
        log(config, step=100, loss=None, grad_norm=0.5, skipped_steps=3, dead_experts=dead, data_retries=0)
        (line,) = [line for line in status_lines(config, 0.0) if line.startswith("health")]
        assert line == f"health: loss is not finite; {says}skipped_steps 3"


def test_a_finished_run_says_so(config):
    write_beat(config.run.path, 1000, {})
    assert "life: the run is finished" in status_lines(config, 0.0)
