"""Starting and stopping workers, with real processes and real signals; the workers are stubs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from parallel.topology import ParallelConfig
from train import front
from train.nodes import agent, place
from train.nodes.logs import RankLogs
from train.settings.tree import ConfigError

ROOT = Path(__file__).parents[2]
STARTER = """
import sys
from pathlib import Path
from train.front import start
from train.nodes.place import Nodes
sys.exit(start(sys.argv[2:], 2, Nodes(), lambda: None, Path(sys.argv[1])))
"""
WORKER = """
import os, signal, sys, time
from pathlib import Path
from train.front import record_failure, report_mistake
from train.settings.tree import ConfigError

mode, rank = sys.argv[2], int(os.environ["RANK"])
signals = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(number))
signal.signal(signal.SIGUSR2, lambda *_: os.write(1, f"noted {rank}\\n".encode()))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
os.write(1, f"up {rank} {os.getpid()} {os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}\\n".encode())
if mode == "done":
    sys.exit(0)
# Rank 1 fails only after rank 0 is up: an agent stops the others at once.
ready = Path(__file__).with_name("ready")
if rank == 0:
    ready.touch()
while not ready.exists():
    time.sleep(0.02)
if mode == "crash" and rank == 1:
    sys.exit(print("going wrong", file=sys.stderr) or 3)
if mode == "later" and rank == 1:
    sys.exit(75)
if mode == "mistake" and rank == 1:
    report_mistake(ConfigError("data.corpus=x has a bad shard: prepare it again"))
    sys.exit(2)
if mode == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
while not signals:
    time.sleep(0.02)
time.sleep(60 if mode == "hang" else 0.5 + rank)  # saving, and not all are done at once
if mode == "full" and rank == 1:
    record_failure(OSError("disk full"))
    sys.exit(1)
os.write(1, f"saved {rank} {len(signals)}\\n".encode())
sys.exit(128 + signals[0])
"""


class Front:
    """A front with two workers, in a session of its own, as a terminal would start it."""

    def __init__(self, tmp_path: Path, mode: str, **variables: str) -> None:
        (tmp_path / "worker.py").write_text(WORKER)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")} | variables
        (tmp_path / "tmp").mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(tmp_path / "run"), str(tmp_path / "worker.py"), front.WORKER, mode],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.run = tmp_path / "run"
        self.workers = [self.process.stdout.readline().split()]
        deadline = time.monotonic() + 60
        while not self.written(1) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.workers.append(self.written(1)[0].split())

    def written(self, rank: int) -> list[str]:
        """What a worker has written so far, from its log."""
        files = list(self.run.glob(f"logs/*/rank_{rank:05d}.out"))
        return files[0].read_text().splitlines() if files else []

    def signal_group(self, number: int) -> None:
        """As a terminal does: to the whole foreground process group."""
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, list[str], str]:
        """Exit code, further lines on stdout, what stderr says after its greeting; no worker may be left."""
        out, err = self.process.communicate(timeout=60)
        greeting, _, err = err.partition("\n")
        assert greeting == "starting 2 processes"
        assert not any(psutil.pid_exists(int(worker[2])) for worker in self.workers)
        shown = [line for line in self.written(0)[1:] if "noted" not in line]
        assert shown == out.splitlines(), "the console shows the first process, and its log the same"
        return self.process.returncode, [*out.splitlines(), *self.written(1)[1:]], err


def test_workers_that_succeed(tmp_path):
    started = Front(tmp_path, "done", OMP_NUM_THREADS="7")
    assert [(up, rank, world, threads) for up, rank, _, world, threads in started.workers] == [
        ("up", "0", "2", "7"),  # the user's own OMP_NUM_THREADS is left alone
        ("up", "1", "2", "7"),
    ]
    assert started.end() == (0, [], "")
    assert not list((tmp_path / "tmp").iterdir())


def test_the_cores_are_shared_out(tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    threads = subprocess.check_output(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"], env=variables, text=True
    )
    before = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        started = Front(tmp_path, "done")
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    assert {worker[4] for worker in started.workers} == {str(max(1, int(threads) // 2))}
    assert started.end()[0] == 0


@pytest.mark.parametrize(
    ("mode", "code", "says"),
    [
        ("crash", 1, r"going wrong\nerror: process 1 of the run, on \S+, failed with exit code 3: .*/rank_00001.err\n"),
        ("killed", 1, r"error: process 1 of the run, on \S+, was killed by SIGKILL: out of memory\?: .*\n"),
        ("later", 75, ""),
        ("mistake", 2, "error: data.corpus=x has a bad shard: prepare it again\n"),
    ],
)
def test_the_first_failure_comes_last_with_its_process_and_host(tmp_path, mode, code, says):
    found, out, err = Front(tmp_path, mode).end()
    assert (found, out) == (code, ["saved 0 1"])
    assert re.fullmatch(says, err), err


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGUSR1, 75)],
)
def test_a_signal_reaches_each_worker_once_and_is_waited_for(tmp_path, number, expected):
    started = Front(tmp_path, "train")
    started.process.send_signal(signal.SIGUSR2)  # is passed on to the workers, and ends nothing
    assert started.process.stdout.readline() == "noted 0\n"
    started.signal_group(number)
    code, out, err = started.end()
    assert code == expected
    assert [line for line in out if "noted" not in line] == ["saved 0 1", "saved 1 1"]
    assert err.startswith("stopping after this step") and err.count("\n") == 1


def test_what_is_no_run_stops_without_a_word_about_saving(capsys):
    with pytest.raises(SignalException):
        agent.Stop(saves=False)(signal.SIGINT, None)
    assert capsys.readouterr().err == "stopping (Ctrl-C again stops at once)\n"


def test_one_ctrl_c_that_arrives_twice_still_saves(tmp_path):
    started = Front(tmp_path, "train")
    started.signal_group(signal.SIGINT)
    time.sleep(0.1)
    started.signal_group(signal.SIGINT)
    assert started.end()[:2] == (130, ["saved 0 1", "saved 1 1"])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    started = Front(tmp_path, "hang")
    started.signal_group(signal.SIGINT)
    time.sleep(agent.REPEAT_S + 0.5)
    started.signal_group(signal.SIGINT)
    begin = time.monotonic()
    assert started.end()[:2] == (130, [])
    assert time.monotonic() - begin < 10  # the workers would sleep for 60 s


def test_a_worker_that_fails_to_save_is_no_clean_stop(tmp_path):
    started = Front(tmp_path, "full")
    started.signal_group(signal.SIGINT)
    assert started.end()[:2] == (1, ["saved 0 1"])


def test_num_processes(monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    assert front.num_processes() == front.num_processes(needed=1) == 3
    monkeypatch.delenv("NPROC")
    assert front.num_processes(needed=4) == 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert front.num_processes() == front.CPU_PROCESSES == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert front.num_processes() == 8


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "1.5"])
def test_nproc_must_be_a_number_of_processes(monkeypatch, text):
    monkeypatch.setenv("NPROC", text)
    with pytest.raises(ConfigError, match=f"NPROC={text} is not a number of processes"):
        front.num_processes()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"3 processes are asked for, one a GPU, but this machine has 2: set NPROC=2"):
        front.start(["-c", "raise SystemExit(3)"], 3, place.Nodes(), lambda: None, None)


def test_more_processes_than_a_cpu_can_hold_are_refused(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"64 processes are asked for, but this machine has no GPU and 2 cores: set"):
        front.start(["-c", "raise SystemExit(3)"], 64, place.Nodes(), lambda: None, None)


def test_layout_size():
    assert front.layout_size(ParallelConfig()) == 1
    assert front.layout_size(ParallelConfig(tensor=2, pipeline=3, expert=4)) == 12
    assert front.layout_size(ParallelConfig(tensor=2, context=3, expert=2, expert_tensor=2)) == 12


def test_only_a_worker_has_a_world(monkeypatch):
    for name in front.WORKER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # as clusters set it for whole nodes
    assert front.world_size() is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert front.world_size() == 8


def test_a_recorded_mistake_goes_before_the_end_of_the_others(tmp_path) -> None:
    file = tmp_path / "error.json"
    message = {"message": "ConfigError: the mistake", "extraInfo": {"timestamp": "99999999999"}}
    file.write_text(json.dumps({"message": message}), encoding="utf-8")
    mistake = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    ended = ProcessFailure(local_rank=1, pid=2, exitcode=-signal.SIGTERM, error_file=str(tmp_path / "none"))
    error = ChildFailedError("train", {0: mistake, 1: ended})
    assert error.get_first_failure()[0] == 1, "the other would be taken for the first"
    assert agent.failure(error, RankLogs(tmp_path, tmp_path)) == (2, "the mistake")
