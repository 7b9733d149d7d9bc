"""What ends a run early, and what all processes agree on: signals, the clock, where to start."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch

from data.errors import CorpusError
from data.order.batches import Batch
from parallel import groups as process_groups
from parallel.checkpoint.saving import SaveError
from parallel.collectives import from_first
from parallel.topology import Topology
from tests.dist import run_ranks
from tests.layout import ROOT
from train import loop
from train.job import checkpoint
from train.job.agree import require_alike
from train.job.build import Job
from train.job.left_out import leave_out, read_left_out
from train.job.shelf import Shelf, write_state
from train.job.start import agreed_start
from train.job.stop import DATA_BROKEN, STORAGE_AWAY, TIME_IS_UP, Agreement, StopRequest, exit_code
from train.settings.run import Config, RunConfig, save_config
from train.settings.tree import ConfigError
from train.training import Training
from train.use import evaluate, generate

CPU = torch.device("cpu")
STARTER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(worker.pid, flush=True)
time.sleep(60)
"""
WORKER = """
import os, time
from train.job.starter import end_with_starter, starter_began
end_with_starter()
print("tied", starter_began(), flush=True)
time.sleep(60)
"""


def _stops() -> list[Agreement]:
    process_groups.start(CPU)
    rank, found = torch.distributed.get_rank(), []
    stop = StopRequest(CPU, None, 0.0)
    found.append(stop.agreed())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    found.append(stop.agreed(waiting=rank == 0))
    found += [stop.agreed(), stop.agreed()]
    found.append(stop.agreed(fault=STORAGE_AWAY * rank, waiting=rank == 0))
    late = StopRequest(CPU, 1.0, time.time() - 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: 2e9)  # somebody sets the clock
        found.append(late.agreed())
    save_seconds = 15.0 * rank  # a save would no longer fit
    found += [late.agreed(save_seconds=save_seconds), late.agreed(save_seconds=save_seconds, in_time=True)]
    if rank == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
    return [*found, late.agreed()]


def test_all_processes_agree_on_what_comes_next() -> None:
    first, second = run_ranks(_stops, 2)
    assert first == second
    assert first == [
        Agreement(waiting=False, save=False, reason=0),
        Agreement(waiting=True, save=True, reason=0),
        Agreement(waiting=False, save=True, reason=0),  # still to be done, now that all have read
        Agreement(waiting=False, save=False, reason=0),
        Agreement(waiting=False, save=False, reason=STORAGE_AWAY),  # nobody waits for a storage that is away
        Agreement(waiting=False, save=False, reason=0),
        Agreement(waiting=False, save=False, reason=TIME_IS_UP),
        Agreement(waiting=False, save=False, reason=0),
        Agreement(waiting=False, save=False, reason=signal.SIGUSR1),
    ]


def test_exit_codes() -> None:
    reasons = (0, TIME_IS_UP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, STORAGE_AWAY, DATA_BROKEN)
    assert [exit_code(reason) for reason in reasons] == [0, 75, 130, 75, 75, 75, 75]


def test_data_that_one_process_cannot_read_ends_it_after_all_have_finished_their_save(monkeypatch):
    error, did = CorpusError("a shard is corrupt"), []
    training = Mock(job=Mock(config=Config(run=RunConfig(steps=9))))
    training.clock.spent = lambda what: contextlib.nullcontext()
    training.save = lambda step: did.append(f"save {step}")
    training.finish_saving = lambda stopping: did.append("finish")
    for name in ("Observer", "batch_schedule"):
        monkeypatch.setattr(loop, name, Mock())
    monkeypatch.setattr(loop, "next_batches", lambda *_: ([], Agreement(False, False, DATA_BROKEN), error))
    with pytest.raises(CorpusError, match="a shard is corrupt"):
        loop.fit(training, Mock(step=4), Mock(), Mock())
    assert did == ["save 4", "finish"]


def test_a_run_that_is_stopped_and_cannot_save_can_go_on_and_one_that_ends_has_failed(monkeypatch):
    monkeypatch.setattr("train.training.require_alike", Mock())
    monkeypatch.setattr("train.training.to_dict", Mock())
    training = Mock(saved=4)
    training.clock.spent = training.watchdog.patient = lambda *_: contextlib.nullcontext()
    training.checkpoints.failed = "No space left on device"
    Training.finish_saving(training, stopping=True)
    with pytest.raises(SaveError, match="step 4, the last one, is not saved: No space left on device"):
        Training.finish_saving(training)
    Training.save(training, 4)
    assert training.checkpoints.save.call_count == 1, "it is tried again"
    training.checkpoints.failed = ""
    Training.save(training, 4)
    assert training.checkpoints.save.call_count == 1


def test_a_step_of_nothing_but_padding_is_refused(monkeypatch):
    monkeypatch.setattr(loop, "sum_over", lambda x, group: x)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    job = Mock(config=Config(), device=CPU, sequence_part=(0, 1))
    documents = torch.full((2, 5), -1, dtype=torch.int32)
    with pytest.raises(CorpusError, match="a step has no token to train on"):
        loop.micro_batches(job, [Batch(tokens, documents)])
    documents[0, :3] = 0
    assert len(loop.micro_batches(job, [Batch(tokens, documents)])) == 1


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_weights_come_from_the_checkpoint_that_the_first_process_chose(monkeypatch, command: str):
    place, read = {"train": loop, "evaluate": evaluate, "generate": generate}[command], []

    def read_first(job: Job, path: Path) -> None:
        read.append(path)
        raise InterruptedError

    for name in ("load_config", "build_job", "kept_tokenizer"):
        monkeypatch.setattr(place, name, Mock(), raising=False)
    monkeypatch.setattr(place, "require_checkpoint", lambda *_: Path("own"))
    monkeypatch.setattr(place, "from_first", lambda make: Path("the first's"))
    for where, name in ((place, "require_whole"), (checkpoint, "require_whole"), (checkpoint, "require_room")):
        monkeypatch.setattr(where, name, read_first if name == "require_whole" else Mock(), raising=False)
    job, config = Mock(config=Config(run=RunConfig(init="other"))), Config()
    job.dataset.tokenizer.encode_batch = lambda texts: [[1]]
    calls = {
        "train": lambda: loop.train_from(job, Mock(checkpoint=None), Mock()),
        "evaluate": lambda: evaluate.run_evaluation(Mock(), config),
        "generate": lambda: generate.run_generation(Mock(), config),
    }
    monkeypatch.setattr(place, "build_job", lambda *_: job, raising=False)
    with pytest.raises(InterruptedError):
        calls[command]()
    assert read == [Path("the first's")]


def test_a_worker_ends_with_its_starter_even_if_that_is_killed() -> None:
    before = time.time()
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, WORKER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    pid = int(starter.stdout.readline())
    word, began = starter.stdout.readline().split()
    assert word == "tied" and before - 1 < float(began) < before + 1  # the kernel counts in hundredths of a second
    starter.kill()
    starter.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        worker, deadline = psutil.Process(pid), time.monotonic() + 5
        while worker.status() != psutil.STATUS_ZOMBIE:  # dead, and nobody here waits for it
            assert time.monotonic() < deadline
            time.sleep(0.02)


class Held(Exception):
    """An error that cannot be sent to another process, as some storages raise them."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.lock = threading.Lock()


def _starts(runs: str) -> tuple[int, str, str, str, str, str]:
    process_groups.start(CPU)
    rank = torch.distributed.get_rank()
    if rank == 1:  # as a stale cache of its directory would show it
        Shelf.steps = lambda self: [2]
    topology = Topology(2, 1, 1, 1, 1, 2)
    job = SimpleNamespace(
        config=Config(run=RunConfig(name="run", dir=runs)), topology=topology, rank=rank, is_first=rank == 0, device=CPU
    )
    start = agreed_start(job)
    branch = Config(run=RunConfig(name="branch", dir=runs, fork="run@4"))
    forked = agreed_start(SimpleNamespace(**{**vars(job), "config": branch}))
    messages = [f"{forked.step}: {forked.left_out}"]
    for call in (
        lambda: require_alike("settings", {"seed": rank}, CPU),
        lambda: from_first(lambda: (_ for _ in ()).throw(ConfigError("no such thing")) if rank == 0 else rank),
        lambda: from_first(lambda: (_ for _ in ()).throw(Held("no such bucket")) if rank == 0 else rank),
    ):
        try:
            call()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    require_alike("settings", {"seed": 1}, CPU)
    return start.step, start.checkpoint.name, *messages


def test_the_first_process_decides_where_all_start(tmp_path) -> None:
    for step in (2, 4):
        path = Shelf(tmp_path / "run" / "checkpoints").path(step)
        path.mkdir(parents=True)
        write_state(path, step, {"identity": {}}, {"world": 2})
    save_config(Config(run=RunConfig(name="run", dir=str(tmp_path))))
    (tmp_path / "branch").mkdir()
    leave_out(tmp_path / "run", [(70, 79)])
    first, second = run_ranks(_starts, 2, str(tmp_path))
    assert first == second
    assert first[:2] == (4, "step_00000004")
    assert first[2] == "4: [(70, 79)]" and read_left_out(tmp_path / "branch") == [(70, 79)]
    assert (
        first[3] == "RuntimeError: process 1 has other settings than process 0: nothing is trained or saved like this"
    )
    assert first[4:] == ("ConfigError: no such thing", "RuntimeError: Held: no such bucket")
