"""Units in memory: read ahead by worker processes, kept while they are needed, and never more than a budget of them.

A worker is asked for a unit by number and remembers nothing, so one that dies takes nothing along: its units are asked
for again. The order of samples is made by those who ask, in one place, whatever the number of workers.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data.config import SKIP, STOP
from data.read.faults import BrokenUnit, Faults
from data.read.readers import Reader
from data.read.units import Sizes, Unit
from data.read.workers import Key, Workers

# Where nobody says what will be asked for: three windows of samples (stream.WINDOW_TOKENS).
KEPT_TOKENS = 3 * 2**24
KEPT_UNITS = 4  # at least, however large they are


class UnitCache:
    """The units of several sources by (source, unit). For one thread at a time. Close it when done."""

    def __init__(self, sources: Sequence[tuple[Reader, Sizes]], workers: int = 0, on_corrupt: str = STOP) -> None:
        self.faults = Faults()
        self._sources = list(sources)
        self._skips = on_corrupt == SKIP
        self._kept: OrderedDict[Key, Unit | None] = OrderedDict()
        self._kept_tokens = 0
        self._coming: dict[Key, Future[tuple[Any, Faults]]] = {}
        # Workers are spared what is read in this process: it would only be copied and imported there.
        readers = [None if reader.in_process else reader for reader, _ in sources]
        self._workers = Workers(readers, workers) if workers and any(readers) else None

    def expect(self, source: int, units: Iterable[int]) -> None:
        """The units of a source that will be asked for soon: workers begin to read them, and others are let go."""
        keys = dict.fromkeys((source, unit) for unit in units)
        for key in [key for key in self._kept if key[0] == source and key not in keys]:
            self._drop(key)
        for key in keys:
            self._ask(key)

    def get(self, key: Key) -> Unit | None:
        """A unit, or None for a broken one that is skipped.

        Raises:
            BrokenUnit: it is broken, and data.on_corrupt=stop.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        try:
            unit = self._checked(key, self._read(key))
        except BrokenUnit as error:
            if not self._skips:
                raise
            unit = None
            self.faults.skipped.append(str(error))
        self._keep(key, unit)
        return unit

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
        self._coming.clear()
        self._kept.clear()
        self._kept_tokens = 0

    def _ask(self, key: Key) -> None:
        """Lets a worker read a unit, unless it is there, on its way, or read in this process."""
        known = key in self._kept or key in self._coming
        if self._workers is not None and not known and not self._sources[key[0]][0].in_process:
            self._coming[key] = self._workers.submit(key)

    def _read(self, key: Key) -> Unit:
        source, number = key
        reader = self._sources[source][0]
        if self._workers is None or reader.in_process:
            return reader.read(number, self.faults)
        self._ask(key)
        while True:
            try:
                unit, faults = self._coming[key].result()
            except BrokenProcessPool:
                self.faults.restarts += 1
                self._workers.restart(reader.label(number))
                self._coming = {other: self._workers.submit(other) for other in self._coming}
                continue
            del self._coming[key]
            self._workers.succeeded()
            self.faults.add(faults)
            if isinstance(unit, BrokenUnit):
                raise unit
            return unit

    def _checked(self, key: Key, unit: Unit) -> Unit:
        reader, sizes = self._sources[key[0]]
        found, expected = (unit.num_documents, unit.num_tokens), (sizes.documents[key[1]], sizes.tokens[key[1]])
        if found != expected:
            raise BrokenUnit(
                f"{reader.label(key[1])} holds {found[0]} documents of {found[1]} tokens, and {expected[0]} of "
                f"{expected[1]} were counted: it has changed"
            )
        return unit

    def _keep(self, key: Key, unit: Unit | None) -> None:
        self._kept[key] = unit
        self._kept_tokens += _tokens(unit)
        while len(self._kept) > KEPT_UNITS and self._kept_tokens > KEPT_TOKENS * len(self._sources):
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        self._kept_tokens -= _tokens(self._kept.pop(key))


def _tokens(unit: Unit | None) -> int:
    return 0 if unit is None else len(unit.tokens)
