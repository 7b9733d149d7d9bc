"""Where the wall time of a run goes: what trained it, and what it waited for instead."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

TRAINING, DATA, SAVING, EVALUATING, STARTING, REDONE, OTHER = KINDS = (
    "training",  # steps that were taken for the first time
    "data",  # waiting for samples
    "saving",  # blocked by checkpoints
    "evaluating",
    "starting",  # from the start of the command to the first step
    "redone",  # steps that an earlier start had taken and not saved
    "other",  # between steps: measuring and telling of them, comparing replicas, going back to a checkpoint
)
WALL = "wall"  # of all starts of the run, without the time between them
GOODPUT = "goodput"  # share of the wall time that was training
WALL_SECONDS = "wall_seconds"


def seconds(kind: str) -> str:
    """Name of the metric of the seconds spent on something since the start of the run."""
    return f"{WALL_SECONDS}/{kind}"


class Clock:
    """Adds up seconds by what they were spent on.

    Args:
        began: when this start of the run began, by ``now``.
        before: totals of earlier starts.
    """

    def __init__(
        self, began: float, before: Mapping[str, float] | None = None, now: Callable[[], float] = time.time
    ) -> None:
        self._now, self._began = now, began
        self._before = {kind: (before or {}).get(kind, 0.0) for kind in (*KINDS, WALL)}
        self._own = dict.fromkeys(KINDS, 0.0)
        self._taken = dict(self._own)
        self._within = 0.0  # counted inside of what is being counted now

    def started(self) -> None:
        """The first step comes next; later calls change nothing."""
        self._own[STARTING] = self._own[STARTING] or self._now() - self._began

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts what is done inside, without what is counted as something else there."""
        begin, (outside, self._within) = self._now(), (self._within, 0.0)
        try:
            yield
        finally:
            passed = self._now() - begin
            self._own[kind] += passed - self._within
            self._within = outside + passed

    def take(self) -> dict[str, float]:
        """Seconds by kind since the last call."""
        spent = {kind: self._own[kind] - self._taken[kind] for kind in KINDS}
        self._taken = dict(self._own)
        return spent

    def totals(self) -> dict[str, float]:
        """Seconds by kind, which add up to those of the wall clock, over all starts of the run."""
        own = self._own | {WALL: self._now() - self._began}
        totals = {kind: self._before[kind] + own[kind] for kind in (*KINDS, WALL)}
        totals[OTHER] = max(0.0, totals[WALL] - sum(totals[kind] for kind in KINDS if kind != OTHER))
        return totals

    def metrics(self) -> dict[str, float]:
        """Metrics of the run so far."""
        totals = self.totals()
        share = totals[TRAINING] / max(totals[WALL], 1e-9)
        return {seconds(kind): totals[kind] for kind in KINDS} | {GOODPUT: share}
