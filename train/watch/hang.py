"""Signs of life of every process of a run, and what each was doing when nothing moved any more."""

import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallel.board import Board, flight_record
from parallel.groups import set_timeout

LOOK_S = 5.0  # at most, between two signs of life of a process
LATE_LOOKS = 4  # without a sign of life a process does not answer


class Watchdog:
    """Beats for this process; when it has not moved for too long, says where everyone is and ends what is stuck.

    A process group's timeout ends the same hang from inside a collective. This thread needs none: it writes the stacks
    and the flight record of its process first, kills a process of this machine that does not answer, and ends its own
    where the collective does not come back.

    SIGQUIT writes a process's stacks to its stderr, and nothing ends.

    Args:
        run: the run's directory.
        start_minutes, step_minutes: the timeouts until the first step (and in what takes as long), and after it.
        idle_minutes: after which `on_idle` hears that no step has ended.
    Attributes:
        on_idle: called from the watch's thread with the step and the seconds since its last move.
    """

    def __init__(self, run: Path, start_minutes: float, step_minutes: float, idle_minutes: float = math.inf) -> None:
        faulthandler.register(signal.SIGQUIT, all_threads=True)
        self.on_idle: Callable[[int, float], None] | None = None
        self._idle_s = 60 * idle_minutes
        self._board, self._run = Board(), run
        self._start, self._step = start_minutes, step_minutes
        self._limit = start_minutes
        self._look_s = min(LOOK_S, 60 * step_minutes / 10)
        self._where: dict[str, Any] = {"step": 0, "doing": "starting", "moves": 0}
        self._moved, self._closed = time.monotonic(), threading.Event()
        self._met = self._moved
        self._sign()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, doing: str) -> None:
        """This process has come to something: there is life in it."""
        self._where = {"step": step, "doing": doing, "moves": self._where["moves"] + 1}
        self._moved = time.monotonic()

    def met(self) -> None:
        """All processes have just asked each other whether they can go on: no step ends, and nothing hangs."""
        self._met = time.monotonic()

    def stepping(self) -> None:
        """The first step is done: from now on the short timeout holds."""
        self._allow(self._step)

    @contextmanager
    def patient(self, step: int, doing: str) -> Iterator[None]:
        """Around what may take as long as a start: saving, evaluating."""
        limit = self._limit
        self.beat(step, doing)
        self._allow(self._start)
        try:
            yield
        finally:
            self.beat(step, f"done {doing}")
            self._allow(limit)

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        self._thread.join()

    def _allow(self, minutes: float) -> None:
        self._limit = minutes
        set_timeout(minutes)

    def _sign(self) -> None:
        self._board.put({**self._where, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()})

    def _watch(self) -> None:
        while not self._closed.wait(self._look_s):
            self._sign()
            still = time.monotonic() - self._moved
            if self.on_idle and still > self._idle_s and self._limit == self._step:  # not in what takes long anyway
                self.on_idle(self._where["step"], still)
            # A little before the process groups give up, since what they raise ends the process.
            still = time.monotonic() - max(self._moved, self._met)
            if still > 60 * self._limit - 2 * self._look_s:
                self._report(still)

    def _report(self, still: float) -> None:
        """Writes down where this process is, names who is late, and ends what does not move."""
        rank, notes = self._board.rank, self._board.notes()
        directory = self._run / "logs"
        directory.mkdir(exist_ok=True)
        name = f"hang_{time.strftime('%Y%m%d_%H%M%S')}_process_{rank}"
        with (directory / f"{name}.txt").open("w", encoding="utf-8") as file:
            file.write(f"process {rank} has not moved for {still:.0f} s: {self._where}\n\n")
            faulthandler.dump_traceback(file, all_threads=True)
        (directory / f"{name}.flight").write_bytes(flight_record())
        silent = [other for other, note in enumerate(notes) if self._is_silent(note)]
        if rank == min(set(range(len(notes))) - set(silent), default=rank):
            print(f"error: {late(notes, silent)}; stacks and flight records: {directory}", file=sys.stderr, flush=True)
        for other in silent:
            note = notes[other]
            if note is not None and note["host"] == socket.gethostname():
                os.kill(note["pid"], signal.SIGKILL)
        # Time for the collectives to be given up, so that the main thread says why; then the end, if it has not moved.
        moved = self._moved, self._met
        if not self._closed.wait(60 * self._limit / 5 + 3 * self._look_s) and (self._moved, self._met) == moved:
            os._exit(1)

    def _is_silent(self, note: Mapping[str, Any] | None) -> bool:
        return note is None or time.time() - note["time"] > LATE_LOOKS * self._look_s


def late(notes: list[dict[str, Any] | None], silent: list[int]) -> str:
    """Which processes the others wait for: those that do not answer, else those that have come least far."""
    if silent:
        names = []
        for rank in silent:
            note = notes[rank]
            where = f" on {note['host']}, pid {note['pid']}, last at step {note['step']}" if note else ""
            names.append(f"process {rank}{where}")
        return f"nothing moves, and {', '.join(names)} gives no sign of life"
    moves = [note["moves"] for note in notes if note]
    behind = [f"process {rank}" for rank, note in enumerate(notes) if note and note["moves"] == min(moves)]
    if len(behind) == len(notes):
        return f"nothing moves, and all processes are equally far: {(notes[0] or {}).get('doing')}"
    return f"nothing moves, and all wait for {', '.join(behind)}"
