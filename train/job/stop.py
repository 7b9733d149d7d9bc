"""Why a run ends before its last step, agreed on by all processes between two steps, and the exit codes."""

import signal
import time
from dataclasses import dataclass

import torch

from parallel.collectives import max_over_all
from train.job.starter import RESUMABLE, SAVING

# Reasons beside the numbers of signals; of several the largest counts.
TIME_IS_UP, STORAGE_AWAY, DATA_BROKEN = 1, 100, 101
REWIND = -1  # no end: the run goes back to an earlier checkpoint
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Agreement:
    """What all processes do next.

    Attributes:
        waiting: a process has not read its samples yet: ask again.
        save: save, and go on.
        reason: why to save and stop; 0 to go on.
    """

    waiting: bool
    save: bool
    reason: int


def exit_code(reason: int) -> int:
    """The exit code of a worker that has stopped for a reason."""
    if not reason:
        return 0
    return 128 + signal.SIGINT if reason == signal.SIGINT else RESUMABLE


class StopRequest:
    """SIGINT, SIGTERM, SIGUSR1 and the end of run.max_time save and stop; SIGUSR2 saves and goes on.

    Args:
        began: when the job began, in seconds since 1970: run.max_time counts from then.
    """

    def __init__(self, device: torch.device, max_minutes: float | None, began: float) -> None:
        self._device, self._signal, self._save = device, 0, False
        # By a clock that nobody sets.
        passed = time.time() - began
        self._deadline = None if max_minutes is None else time.monotonic() - passed + 60 * max_minutes
        for number in (*STOPPING, SAVING):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if number == SAVING:
            self._save = True
        else:
            self._signal = number

    def agreed(
        self,
        waiting: bool = False,
        fault: int = 0,
        in_time: bool = False,
        save: bool = False,
        save_seconds: float = 0.0,
    ) -> Agreement:
        """The same on every process (one reduction).

        Args:
            save: whether this process asks to save, and go on.
            save_seconds: what the last save took: the time is up so much earlier.
            waiting: this process is still reading.
            fault: STORAGE_AWAY or DATA_BROKEN, if this process cannot read on.
            in_time: whether to go on even if the time is up.
        """
        late = not in_time and self._deadline is not None and time.monotonic() > self._deadline - save_seconds
        own = torch.tensor(
            [waiting, self._save or save, max(self._signal, TIME_IS_UP * late, fault)], device=self._device
        )
        any_waiting, any_save, reason = max_over_all(own).tolist()
        if not any_waiting:
            self._save = False
        return Agreement(bool(any_waiting) and not reason, bool(any_save), reason)
