"""Worker processes: those that read units for a training process, and what every worker does first."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from data.errors import CorpusError
from data.read.faults import BrokenUnit, Faults
from data.read.readers import Reader

MAX_RESTARTS = 5  # without a unit read in between

type Key = tuple[int, int]  # source, unit


class Workers:
    """Processes that read units. They end with the process that started them, even if that is killed."""

    def __init__(self, readers: Sequence[Reader | None], count: int) -> None:
        self._readers, self._count = list(readers), count
        self._restarts = 0
        self._pool = self._start()

    def submit(self, key: Key) -> Future[tuple[Any, Faults]]:
        try:
            return self._pool.submit(_read_unit, key)
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
        if self._restarts > MAX_RESTARTS:
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

    def _start(self) -> ProcessPoolExecutor:
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


def _read_unit(key: Key) -> tuple[Any, Faults]:
    """A unit or what is wrong with it, and the faults met on the way."""
    faults = Faults()
    try:
        return reader_of(key[0]).read(key[1], faults), faults
    except BrokenUnit as error:
        return error, faults


def serve_parent() -> None:
    """Makes this process one of several workers, whose parent alone decides when they end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
