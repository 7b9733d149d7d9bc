"""Workers: the processes, or the thread, that read units for a training process; what every worker does first."""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data.errors import CorpusError
from data.read.faults import PATIENCE_S, BrokenUnit, Faults
from data.read.readers import Reader

MAX_RESTARTS = 5  # by default, without a unit read in between

type Key = tuple[int, int]  # source, unit


class ReaderThread(Executor):
    """One thread that nobody waits for long: it may stand before a storage that is away, and ends with the process."""

    def __init__(self, close_s: float = 5.0) -> None:
        self._close_s = close_s
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Puts a call at the end of the row."""
        future: Future[T] = Future()
        self._tasks.put((future, partial(function, *args, **kwargs)))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
            self._thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the thread after the call that it is at."""
        with suppress(queue.Empty):
            while cancel_futures and (task := self._tasks.get_nowait()) is not None:
                task[0].cancel()
        self._tasks.put(None)
        if wait and self._thread is not None:
            self._thread.join(self._close_s)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # whatever it is, it belongs to the one who waits for the result
                future.set_exception(error)


class Workers:
    """Reads units elsewhere: `count` processes, or with 0 a thread of this one.

    Processes end with the one that started them, even if that is killed.
    """

    def __init__(
        self,
        readers: Sequence[Reader | None],
        count: int,
        max_restarts: int = MAX_RESTARTS,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._readers, self._count, self._max_restarts = list(readers), count, max_restarts
        self._patience_s = patience_s
        self._restarts = 0
        self._pool = self._start()

    def submit(self, key: Key) -> Future[tuple[Any, Faults]]:
        """A unit or what is wrong with it, and the faults met on the way; no unit where it is mapped from a file."""
        try:
            if not self._count:
                return self._pool.submit(_read_unit, self._readers[key[0]], key[1], self._patience_s)
            return self._pool.submit(_read_in_worker, key, self._patience_s)
        except BrokenProcessPool as error:
            broken: Future[tuple[Any, Faults]] = Future()
            broken.set_exception(error)
            return broken

    def restart(self, label: str) -> None:
        """New processes in place of a pool that lost one.

        Raises:
            CorpusError: they keep dying.
        """
        self._restarts += 1
        if self._restarts > self._max_restarts:
            raise CorpusError(
                f"data.workers={self._count}: the workers were killed {self._restarts} times while {label} was read: "
                f"give them more memory, or choose fewer"
            )
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._start()

    def succeeded(self) -> None:
        self._restarts = 0

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> Executor:
        if not self._count:
            return ReaderThread()
        # A fork would copy threads and devices of a training process.
        return ProcessPoolExecutor(
            self._count, mp_context=get_context("spawn"), initializer=start_worker, initargs=(self._readers,)
        )


_readers: list[Reader | None] = []  # of this worker process


def start_worker(readers: Sequence[Reader | None]) -> None:
    """First call in a worker process."""
    serve_parent()
    _readers[:] = readers


def reader_of(source: int) -> Reader:
    """A source of this worker process."""
    found = _readers[source]
    assert found is not None  # one that costs nothing to read stays where it is asked for
    return found


def _read_unit(reader: Reader | None, number: int, patience_s: float) -> tuple[Any, Faults]:
    faults = Faults(patience_s=patience_s)
    assert reader is not None  # one that costs nothing to read stays where it is asked for
    try:
        return reader.read(number, faults), faults
    except BrokenUnit as error:
        return error, faults


def _read_in_worker(key: Key, patience_s: float) -> tuple[Any, Faults]:
    reader = reader_of(key[0])
    found, faults = _read_unit(reader, key[1], patience_s)
    mapped = reader.mapped and not isinstance(found, BrokenUnit)
    return None if mapped else found, faults


def usable_cores() -> int:
    """Cores that this process may use: of its affinity, and of its container's share of time."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def serve_parent() -> None:
    """Makes this process one of several workers, whose parent alone decides when they end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
