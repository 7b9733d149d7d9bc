"""torchrun's agent for the workers of one node, with the signals that stop them and words for their failures.

It runs in the front itself (``elastic_launch``), so that the workers' exit codes and error files are at hand and no
second interpreter starts. The workers live in sessions of their own: a terminal's Ctrl-C reaches only the front,
which passes exactly one signal on and waits until they have saved.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from train.job.starter import RESUMABLE
from train.nodes.logs import RankLogs
from train.nodes.place import WORKER_VARIABLES, Nodes, host_name
from train.nodes.roster import Attempt

GRACE_S = 600  # saving the largest models takes minutes; only then are stopping workers killed
REPEAT_S = 2.0  # `timeout` and terminals may deliver one Ctrl-C twice; a second one of the user comes later
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HELD = {signal.SIGUSR1, signal.SIGUSR2}  # until whoever is to act on them is there to do so


def run(command: list[str], processes: int, logs: RankLogs, stop: "Stop") -> tuple[int, str]:
    """Runs ``python COMMAND`` in workers on this machine alone; their exit code and what to say of it."""
    config = _config(processes, logs, rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost")
    return _run(config, command, logs, stop)


def run_attempt(
    command: list[str], processes: int, logs: RankLogs, stop: "Stop", nodes: Nodes, address: str, attempt: Attempt
) -> tuple[int, str]:
    """Runs this node's part of an attempt on several nodes; its exit code and what to say of it.

    Args:
        address: this machine's, as the others reach it.
    """
    members = len(attempt.members)
    # A port of its own for each attempt, whose store must not know anything of the last one.
    config = _config(
        processes,
        logs,
        min_nodes=members,
        max_nodes=members,
        run_id=f"attempt {attempt.number}",  # the same on all
        rdzv_backend="static",
        rdzv_endpoint=f"{nodes.address}:{nodes.port + 1 + attempt.number % 100}",
        rdzv_configs={"rank": attempt.members.index(nodes.rank), "timeout": 600},
        local_addr=address,
    )
    return _run(config, command, logs, stop)


def _config(processes: int, logs: RankLogs, **how: Any) -> LaunchConfig:
    # torch 2.11 has no such setting: there it is torchrun's own 30 s.
    known = {item.name for item in dataclasses.fields(LaunchConfig)}
    grace = {"shutdown_timeout": GRACE_S} if "shutdown_timeout" in known else {}
    return LaunchConfig(
        **{
            "min_nodes": 1,
            "max_nodes": 1,
            "nproc_per_node": processes,
            "run_id": "alone",
            "max_restarts": 0,
            "logs_specs": logs,
            "role": "",
            "log_line_prefix_template": "${role_name}",  # which is empty: lines as they are
            "signals_to_handle": "SIGQUIT",  # the others are handled here
            **grace,
            **how,
        }
    )


def _run(config: LaunchConfig, command: list[str], logs: RankLogs, stop: "Stop") -> tuple[int, str]:
    with _quiet():
        try:
            elastic_launch(config, sys.executable)("-u", *command)
        except SignalException:
            return (1, "a process failed while it stopped") if logs.has_errors() else (stop.code, "")
        except ChildFailedError as error:
            return failure(error, logs)
    return 0, ""


class Stop:
    """Handler of the signals that stop workers: the first one asks those of a run to save, while an agent runs.

    Args:
        saves: whether the workers are a run's.
    """

    def __init__(self, saves: bool) -> None:
        self._saves = saves
        self.signal: int | None = None
        self.time = 0.0

    @property
    def code(self) -> int:
        """The exit code of workers that were stopped and have saved."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else RESUMABLE

    def __call__(self, signum: int, frame: object) -> None:
        if self.signal is None:
            self.signal, self.time = signum, time.monotonic()
            when, without = (" after this step", ", without saving") if self._saves else ("", "")
            print(f"stopping{when} (Ctrl-C again stops at once{without})", file=sys.stderr)
            # Not SIGINT: a worker that is still importing would print its KeyboardInterrupt.
            raise SignalException(f"stopped by signal {signum}", signal.SIGTERM)
        if signum == signal.SIGINT and time.monotonic() - self.time > REPEAT_S:
            kill_workers()


def workers() -> list[psutil.Process]:
    """The processes of this front that have a rank."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.environ().keys() >= WORKER_VARIABLES:
                found.append(child)
    return found


def kill_workers() -> None:
    """Ends this front's workers, and what they have started, at once."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


@contextmanager
def stopping(saves: bool) -> Iterator[Stop]:
    """Handles the signals that stop workers (`Stop`); one that is ignored (nohup) stays ignored.

    SIGUSR1 and SIGUSR2 are held back in this thread, and so in workers until they take them: a warning of Slurm's
    reaches every process of a step, and ends one that has no handler yet. Here a thread waits for them.
    """
    stop = Stop(saves)
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    threading.Thread(target=_take_held, name="signals", daemon=True).start()
    try:
        yield stop
    finally:
        for number in STOPPING:
            signal.signal(number, before[number])


def _take_held() -> None:
    """A thread: SIGUSR1 stops like SIGTERM, SIGUSR2 is the workers'."""
    while True:
        if signal.sigwait(HELD) == signal.SIGUSR1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            for worker in workers():
                with contextlib.suppress(psutil.Error):
                    worker.send_signal(signal.SIGUSR2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the agent's log: what the user needs to know of a failure is said in `failure`."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def failure(error: ChildFailedError, logs: RankLogs) -> tuple[int, str]:
    """The exit code of workers that have failed, and what to say of the one that failed first.

    A mistake that a worker has recorded goes before all: the others are ended for it, and may be seen to end first.
    """
    mistakes = [(rank, one) for rank, one in error.failures.items() if one.exitcode == 2]
    rank, first = mistakes[0] if mistakes else error.get_first_failure()
    if first.exitcode in (RESUMABLE, 128 + signal.SIGTERM):
        return RESUMABLE, ""
    if first.exitcode == 128 + signal.SIGINT:
        return first.exitcode, ""
    message: Any = first.message  # declared as text; a dict where the worker left its exception
    if first.exitcode == 2 and isinstance(message, dict):
        return 2, message["message"].partition(": ")[2]
    if first.exitcode < 0:
        cause = "was killed by " + first.signal_name()
        cause += ": out of memory?" if first.exitcode == -signal.SIGKILL else ""
    else:
        cause = f"failed with exit code {first.exitcode}"
    tail = logs.tail(rank) if rank else []  # what the first one says is on the console
    words = [f"process {rank} of the run, on {host_name()}, {cause}: {logs.file(rank, 'err')}"]
    return (2 if first.exitcode == 2 else 1), "\n".join([*tail, *words])
