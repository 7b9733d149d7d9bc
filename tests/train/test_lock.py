"""One writer for each run: by flock, and by a file that is kept fresh where there is no flock."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from tests.layout import ROOT
from train.job import lock
from train.job.lock import RunLock, refuse_if_held
from train.settings.run import RunConfig
from train.settings.tree import ConfigError

HOLDER = """
import sys, time
from train.job.lock import RunLock
from train.settings.run import RunConfig
RunLock(RunConfig(name="mine", dir=sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""

SHORT_S = 0.2  # of patience


@pytest.fixture
def run(tmp_path) -> RunConfig:
    config = RunConfig(name="mine", dir=str(tmp_path))
    config.path.mkdir()
    return config


@pytest.fixture
def no_flock(monkeypatch) -> None:
    def refuse(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_run_has_one_writer_that_is_named(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    held = RunLock(run, SHORT_S)
    held.take()
    for refused in (RunLock(run, SHORT_S).take, lambda: refuse_if_held(run, SHORT_S)):
        with pytest.raises(ConfigError, match=f"run.name=mine is being trained by process {os.getpid()} of job 4711"):
            refused()
    held.release()
    refuse_if_held(run, SHORT_S)
    other = RunLock(run, SHORT_S)
    other.take()
    other.release()


def test_the_lock_ends_with_its_process_whatever_ends_it(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run.dir], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"by process {holder.pid} on "):
        refuse_if_held(run, SHORT_S)
    holder.kill()
    holder.wait()
    refuse_if_held(run, SHORT_S)


def test_without_flock_a_fresh_file_refuses_and_a_stale_one_is_taken_over(run, no_flock, capsys):
    first = RunLock(run, SHORT_S)
    first.take()
    assert "without flock" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"is being trained by process {os.getpid()} "):
        RunLock(run, SHORT_S).take()
    path = run.path / lock.EXCLUSIVE_FILE
    old = time.time() - lock.STALE_S - 5
    os.utime(path, (old, old))
    second = RunLock(run, SHORT_S)
    second.take()
    second.release()
    assert not path.exists()


@pytest.mark.parametrize("who", ["nobody", "another container", "a living process"])
def test_what_a_killed_process_of_this_machine_left_behind_is_taken_over(run, no_flock, monkeypatch, who: str):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    gone = subprocess.Popen(["true"])
    path = run.path / lock.EXCLUSIVE_FILE
    gone.wait()
    pid = os.getpid() if who == "a living process" else gone.pid
    path.write_text(json.dumps(lock._owner() | {"pid": pid, "token": "its"}))
    if who == "another container":
        sleep = time.sleep
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: sleep(seconds) or path.touch())
    if who == "nobody":
        mine = RunLock(run, 0.01)
        mine.take()
        mine.release()
        assert not path.exists()
        return
    with pytest.raises(ConfigError, match=f"is being trained by process {pid} "):
        RunLock(run, SHORT_S).take()


def test_a_storage_that_is_away_for_a_moment_ends_no_holder(run, no_flock, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    touch, touched = os.utime, []

    def away(path):
        touched.append(path)
        if len(touched) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        touch(path)

    monkeypatch.setattr(lock.os, "utime", away)
    held = RunLock(run, SHORT_S)
    held.take()
    deadline = time.monotonic() + 5
    while len(touched) < 3:
        assert time.monotonic() < deadline, "it no longer keeps its file fresh"
        time.sleep(0.01)
    path = run.path / lock.EXCLUSIVE_FILE
    monkeypatch.setattr(lock._ExclusiveFile, "_is_ours", lambda self: False)  # another has taken it over
    monkeypatch.setattr(lock.os, "_exit", lambda code: None)
    held.release()
    assert path.exists()


def test_of_two_that_take_over_a_stale_file_the_last_has_it(run, no_flock, monkeypatch):
    path = run.path / lock.EXCLUSIVE_FILE
    path.write_text("{}")
    os.utime(path, (0, 0))

    def sleep(seconds):
        path.write_text(json.dumps({"token": "another's", "pid": 7, "host": "there", "job": None, "since": "now"}))

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(ConfigError, match="process 7 on there since now"):
        RunLock(run, SHORT_S).take()
