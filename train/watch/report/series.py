"""The log of a run in few numbers: each metric's mean, least and largest value over stretches of steps.

One pass over the file and a few hundred stretches, whatever its length: what a page draws is no finer.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.watch.metrics import STEP, TOKENS, last_entries

BINS = 480  # stretches of steps, at the most: about one for each two pixels of a figure
type Point = tuple[float, float, float]


@dataclass
class Series:
    """One metric over the stretches of steps.

    Attributes:
        counts, sums, least, largest: of the finite values of each stretch.
        last: the last finite value; None where there is none.
        not_finite: values that were no numbers.
    """

    counts: list[int]
    sums: list[float]
    least: list[float]
    largest: list[float]
    last: float | None = None
    not_finite: int = 0

    @classmethod
    def empty(cls, bins: int) -> "Series":
        """Nothing in any stretch yet."""
        return cls([0] * bins, [0.0] * bins, [math.inf] * bins, [-math.inf] * bins)

    def add(self, place: int, value: float | None) -> None:
        """Notes a value of a stretch; None is one that is not finite."""
        if value is None:
            self.not_finite += 1
            return
        self.counts[place] += 1
        self.sums[place] += value
        self.least[place] = min(self.least[place], value)
        self.largest[place] = max(self.largest[place], value)
        self.last = value

    def points(self, coarser: int = 1) -> dict[int, Point]:
        """(mean, least, largest) of each stretch that has values, or of every ``coarser`` of them together."""
        found = {}
        for begin in range(0, len(self.counts), coarser):
            part = slice(begin, begin + coarser)
            if count := sum(self.counts[part]):
                found[begin // coarser] = sum(self.sums[part]) / count, min(self.least[part]), max(self.largest[part])
        return found


@dataclass
class Log:
    """What a run has logged.

    Attributes:
        first, final: the first and the last step.
        width: steps of a stretch.
        series: by the names of metrics.
        columns: the last list of each metric that is one, but for those of each step.
        broken: lines that could not be read.
    """

    first: int = 1
    final: int = 0
    width: int = 1
    series: dict[str, Series] = field(default_factory=dict)
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    broken: int = 0

    @property
    def steps(self) -> list[int]:
        """The last step of each stretch."""
        return [min(begin + self.width - 1, self.final) for begin in range(self.first, self.final + 1, self.width)]

    @property
    def names(self) -> set[str]:
        """All that was logged."""
        return {*self.series, *self.columns}

    def last(self, name: str) -> float | None:
        """A metric's last finite value; None where there is none."""
        return self.series[name].last if name in self.series else None

    def tokens(self) -> dict[int, float]:
        """Tokens read at the end of each stretch that says so."""
        if TOKENS not in self.series:
            return {}
        return {place: largest for place, (_, _, largest) in self.series[TOKENS].points().items()}

    def place(self, step: int) -> int:
        """The stretch that a step lies in."""
        return (step - self.first) // self.width

    def add(self, step: int, name: str, value: float | None) -> None:
        """Notes one value of a step."""
        if name not in self.series:
            self.series[name] = Series.empty(self.place(self.final) + 1)
        self.series[name].add(self.place(step), value)


def read_log(path: Path, each_step: dict[str, str]) -> Log:
    """The log in a file; an empty one where there is none, or nothing whole in it.

    Args:
        each_step: names of lists with a number of each step since the last line, and the metric that each is of. Where
            a run has them they stand for that metric, which the lines themselves have of the last step alone.
    """
    last = next(last_entries(path), None) if path.is_file() else None
    first = next((entry for entry in _entries(path) if entry), None) if last else None
    if not last or not first:
        return Log()
    begin = max(1, int(first[STEP]) + 1 - max(1, *(len(first.get(name, ())) for name in each_step)))
    final = int(last[STEP])
    log = Log(begin, final, -(-(final - begin + 1) // BINS))
    replaced = {metric for name, metric in each_step.items() if name in first}
    for entry in _entries(path):
        if entry is None:
            log.broken += 1
        elif begin <= entry[STEP] <= final:
            _add(log, entry, each_step, replaced)
    return log


def _add(log: Log, entry: dict[str, Any], each_step: dict[str, str], replaced: set[str]) -> None:
    step = int(entry.pop(STEP))
    for name, value in entry.items():
        if name in each_step:
            for before, one in enumerate(reversed(value)):
                if step - before >= log.first:
                    log.add(step - before, each_step[name], one)
        elif isinstance(value, list):
            log.columns[name] = value
        elif name not in replaced:
            log.add(step, name, value)


def _entries(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a log in order; None for a line that is none."""
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:  # also bytes that are no UTF-8
                entry = None
            yield entry if isinstance(entry, dict) and isinstance(entry.get(STEP), int) else None
