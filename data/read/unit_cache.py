"""Units in memory: read ahead of their use, kept until their last, and never more than a budget of bytes.

Whoever asks for a unit says the number of the last sample that may need it; once the samples have passed that number,
the unit is let go, read or still on its way. A worker is asked for a unit by number and remembers nothing, so one that
dies takes nothing along: its units are asked for again. The order of samples is made by those who ask, in one place,
whatever the number of workers.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data.config import SKIP, STOP
from data.read.faults import PATIENCE_S, BrokenUnit, Faults
from data.read.readers import Reader
from data.read.units import Sizes, Unit
from data.read.workers import Key, Workers

DEFAULT_BYTES = 2**28
KEPT_UNITS = 2  # of each place that is read at, however large they are: a sample may lie at the border of two


class UnitCache:
    """The units of several sources by (source, unit). For one thread at a time. Close it when done.

    Args:
        workers: processes that read ahead; 0 reads ahead in a thread.
        patience_s: seconds for which a storage that is away is asked again.
        num_bytes: of tokens that are kept at most; more is read again when it is needed.

    Attributes:
        places: how many places of the sources are read at in turn. Fewer units are never kept, or each would be read
            for each of its samples.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Reader, Sizes]],
        workers: int = 0,
        on_corrupt: str = STOP,
        num_bytes: int = DEFAULT_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.faults = Faults(patience_s=patience_s)
        self._sources = list(sources)
        self._skips = on_corrupt == SKIP
        self._num_bytes, self.places = num_bytes, 1
        self._kept: OrderedDict[Key, Unit | None] = OrderedDict()
        self._kept_bytes = 0
        self._coming: dict[Key, Future[tuple[Any, Faults]]] = {}
        self._last_use: dict[Key, int] = {}
        # Workers are spared what is read in this process: it would only be copied and imported there.
        self._readers = [None if reader.in_process else reader for reader, _ in sources]
        self._num_workers = workers
        self._workers: Workers | None = None  # started when something is asked for

    @property
    def held(self) -> int:
        """Units that are kept or on their way."""
        return len(self._kept) + len(self._coming)

    @property
    def kept_bytes(self) -> int:
        """Of the tokens that are kept."""
        return self._kept_bytes

    def ask(self, key: Key, last_use: int) -> None:
        """Begins to read a unit that will be needed, for the last time by sample `last_use` of its source."""
        self._last_use[key] = max(last_use, self._last_use.get(key, last_use))
        known = key in self._kept or key in self._coming
        if not known and self._readers[key[0]] is not None:
            if self._workers is None:
                self._workers = Workers(self._readers, self._num_workers, patience_s=self.faults.patience_s)
            self._coming[key] = self._workers.submit(key)

    def release(self, source: int, sample: int) -> None:
        """Lets go of what no sample of a source from `sample` on was said to need."""
        for key in [key for key, last in self._last_use.items() if key[0] == source and last < sample]:
            del self._last_use[key]
            if key in self._kept:
                self._drop(key)
            if (future := self._coming.pop(key, None)) is not None:
                future.cancel()

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
        """Ends the workers and lets go of everything."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        self._coming.clear()
        self._last_use.clear()
        self._kept.clear()
        self._kept_bytes = 0

    def _read(self, key: Key) -> Unit:
        source, number = key
        reader = self._sources[source][0]
        if self._workers is None or key not in self._coming:
            return reader.read(number, self.faults)
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
            return reader.read(number, self.faults) if unit is None else unit

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
        self._kept_bytes += _bytes(unit)
        while len(self._kept) > KEPT_UNITS * self.places and self._kept_bytes > self._num_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        self._kept_bytes -= _bytes(self._kept.pop(key))


def _bytes(unit: Unit | None) -> int:
    return 0 if unit is None else unit.tokens.nbytes
