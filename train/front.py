"""The process that a user starts: it checks everything first, then starts the workers and waits for them.

It is torchrun's agent itself (``elastic_launch``, one node), so that the workers' exit codes and error files
are at hand and no second interpreter starts. The workers live in sessions of their own: a terminal's Ctrl-C
reaches only this process, which passes exactly one signal on and waits until they have saved.
"""

import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.config import STOP, DataConfig
from data.dataset import Dataset
from data.secrets import hide
from parallel.topology import ParallelConfig
from train.job.starter import RESUMABLE, SAVING
from train.settings.tree import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, which a mistake in the settings should not wait for
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

CPU_PROCESSES = 2
GRACE_S = 600  # saving the largest models takes minutes; only then are stopping workers killed
VERIFIED_BYTES = 2**31  # seconds of hashing; a larger corpus proves each shard when it is first opened
REPEAT_S = 2.0  # `timeout` and terminals may deliver one Ctrl-C twice; a second one of the user comes later
WORKER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}  # what torchrun gives to each process that it starts
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun wants a worker to leave its exception


def world_size() -> int | None:
    """Processes of the whole job in a worker (of this front, or of the user's own torchrun); None in the front."""
    return int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= WORKER_VARIABLES else None


def num_processes(needed: int | None = None) -> int:
    """Processes to start on this machine: NPROC, or else ``needed``, or else one a GPU, or else 2 on CPU.

    Raises:
        ConfigError: NPROC is not a positive number.
    """
    asked = os.environ.get("NPROC")
    if asked is not None:
        if not asked.isdecimal() or int(asked) < 1:
            raise ConfigError(f"NPROC={asked} is not a number of processes: use 1 or more, or unset it")
        return int(asked)
    if needed is not None:
        return needed
    import torch

    return torch.cuda.device_count() or CPU_PROCESSES


def layout_size(parallel: ParallelConfig) -> int:
    """The fewest processes that a layout can run on."""
    expert = parallel.expert if isinstance(parallel.expert, int) else 1
    return parallel.pipeline * math.lcm(parallel.tensor * parallel.context, expert * parallel.expert_tensor)


def ensure_corpus(data: DataConfig) -> Dataset:
    """Makes the embedded corpus unless it is cached, counts what must be, and proves corpora before the workers start.

    Where damaged parts are to be left out they are found when they are opened.

    Raises:
        CorpusError: a file that is not as prepare left it, or a source that does not fill one sample.
    """
    dataset = Dataset(data)
    for corpus in dataset.corpora:
        if corpus.num_bytes <= VERIFIED_BYTES and data.on_corrupt == STOP:
            corpus.verify()
    dataset.check()
    return dataset


def report_mistake(error: Exception) -> None:
    """Tells the user of a mistake in one line; a worker leaves that to the process that started it."""
    if ERROR_FILE in os.environ:
        record_failure(error)
    else:
        print(f"error: {hide(str(error))}", file=sys.stderr)


def record_failure(error: Exception) -> None:
    """Leaves a worker's exception where its starter looks for it."""
    if ERROR_FILE in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def launch(command: list[str], processes: int) -> int:
    """Runs ``python COMMAND`` in ``processes`` workers on this machine; returns their exit code.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop the workers in order: they get one SIGTERM and up to GRACE_S seconds; a
    second Ctrl-C kills them at once. The code is then 130 after Ctrl-C, else 75, or 1 if a worker failed. SIGUSR2 is
    passed on to them.

    Raises:
        ConfigError: more processes than GPUs.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ConfigError(
            f"{processes} processes are asked for, one a GPU, but this machine has {gpus}: set NPROC={gpus} or less, "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on its CPU"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    print(f"starting {processes} process{'es' * (processes > 1)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="train_") as logs, _quiet(), _stopping() as stop:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",  # one machine: no need for its name to resolve
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle="SIGQUIT",  # the others are handled here
            **_grace(LaunchConfig),
        )
        try:
            elastic_launch(config, sys.executable)("-u", *command)
        except SignalException:
            failed = any(Path(logs).rglob("error.json"))
            stopped = 128 + signal.SIGINT if stop.signal == signal.SIGINT else RESUMABLE
            return 1 if failed else stopped
        except ChildFailedError as error:
            return _failure(error)
    return 0


def _grace(launch_config: "type[LaunchConfig]") -> dict[str, Any]:
    """The time that stopping workers get. torch 2.11 has no such setting: there it is torchrun's own 30 s."""
    known = {item.name for item in dataclasses.fields(launch_config)}
    return {"shutdown_timeout": GRACE_S} if "shutdown_timeout" in known else {}


class _Stop:
    """Handler of the signals that stop a run."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.time = 0.0

    def __call__(self, signum: int, frame: object) -> None:
        from torch.distributed.elastic.multiprocessing import SignalException

        if self.signal is None:
            self.signal, self.time = signum, time.monotonic()
            print("stopping after this step (Ctrl-C again stops at once, without saving)", file=sys.stderr)
            # Not SIGINT: a worker that is still importing would print its KeyboardInterrupt.
            raise SignalException(f"stopped by signal {signum}", signal.SIGTERM)
        if signum == signal.SIGINT and time.monotonic() - self.time > REPEAT_S:
            _kill_workers()


def _pass_on(number: int) -> None:
    """Sends a signal to the workers, not to what else was started here."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.environ().keys() >= WORKER_VARIABLES:
                child.send_signal(number)


def _kill_workers() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """Handles the signals that stop a run; one that is ignored (nohup) stays ignored."""
    stop = _Stop()
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in (*stopping, SAVING)}
    for number in stopping:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, stop)
    signal.signal(SAVING, lambda *_: _pass_on(SAVING))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the agent's log: what the user needs to know of a failure is said in `_failure`."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _failure(error: "ChildFailedError") -> int:
    """Says in one line which worker failed first and how; returns the exit code.

    A mistake that a worker has recorded goes before all: the others are ended for it, and may be seen to end first.
    """
    mistakes = [(rank, one) for rank, one in error.failures.items() if one.exitcode == 2]
    rank, failure = mistakes[0] if mistakes else error.get_first_failure()
    if failure.exitcode in (RESUMABLE, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        return failure.exitcode
    message: Any = failure.message  # declared as text; a dict where the worker left its exception
    if failure.exitcode == 2 and isinstance(message, dict):
        print(f"error: {hide(message['message'].partition(': ')[2])}", file=sys.stderr)
        return 2
    if failure.exitcode < 0:
        cause = "was killed by " + failure.signal_name()
        cause += ": out of memory?" if failure.exitcode == -signal.SIGKILL else ""
    else:
        cause = f"failed with exit code {failure.exitcode}: its messages stand above"
    print(f"error: process {rank} of the run {cause}", file=sys.stderr)
    return 2 if failure.exitcode == 2 else 1
