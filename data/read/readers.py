"""Readers: the documents of one source, unit by unit, whatever they are stored in."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from data.config import UNIT_BYTES
from data.read.faults import Faults
from data.read.index import digest_of
from data.read.units import Sizes, Unit


class Reader(ABC):
    """Documents in units that are read whole. Picklable: worker processes get a copy.

    Attributes:
        path: what the user calls the source, for messages.
        vocab_size: every token is below it.
        in_process: reading costs next to nothing (a memory map), so no worker process is asked for it.
        left_out: what lies beside the units and is not read (another split, a cache, a broken file), for people.
        mapped: units are memory maps of files, so what a worker process has read is mapped, not sent.
    """

    path: str
    vocab_size: int
    in_process = False
    left_out: tuple[str, ...] = ()
    mapped = False

    @property
    @abstractmethod
    def num_units(self) -> int: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """What reading all units would move, roughly: decides whether measuring them is worth processes."""

    @property
    @abstractmethod
    def identity(self) -> list[Any]:
        """Of JSON: changes whenever the documents may have changed. Costs no reading."""

    @abstractmethod
    def label(self, unit: int) -> str:
        """A unit's file and place, for messages."""

    @abstractmethod
    def read(self, unit: int, faults: Faults) -> Unit:
        """A unit's documents, each with its end-of-document token last; counts what it overcame in `faults`.

        Raises:
            BrokenUnit: the unit is gone, damaged or holds what cannot be trained on.
        """

    def known(self) -> Sizes | None:
        """The units' sizes where they stand somewhere and need no reading of documents."""
        return None

    def lengths(self, unit: int, faults: Faults) -> np.ndarray:
        """int64 [documents] of a unit."""
        return self.read(unit, faults).lengths


class Wrapped(Reader):
    """A reader that passes another one's units on."""

    def __init__(self, base: Reader) -> None:
        self._base = base
        self.path, self.vocab_size, self.in_process = base.path, base.vocab_size, base.in_process
        self.left_out = base.left_out

    @property
    def num_units(self) -> int:
        return self._base.num_units

    @property
    def num_bytes(self) -> int:
        return self._base.num_bytes

    def label(self, unit: int) -> str:
        return self._base.label(unit)


class ChosenUnits(Wrapped):
    """Some units of another reader, in the given order."""

    def __init__(self, base: Reader, units: Sequence[int]) -> None:
        super().__init__(base)
        self._units = [int(unit) for unit in units]

    @property
    def num_units(self) -> int:
        return len(self._units)

    @property
    def num_bytes(self) -> int:
        return self._base.num_bytes * self.num_units // max(1, self._base.num_units)

    @property
    def identity(self) -> list[Any]:
        return [*self._base.identity, "units", digest_of(self._units)]

    def label(self, unit: int) -> str:
        return self._base.label(self._units[unit])

    def read(self, unit: int, faults: Faults) -> Unit:
        return self._base.read(self._units[unit], faults)

    def lengths(self, unit: int, faults: Faults) -> np.ndarray:
        return self._base.lengths(self._units[unit], faults)

    def known(self) -> Sizes | None:
        sizes = self._base.known()
        if sizes is None:
            return None
        documents, tokens, empty = (column[self._units] for column in (sizes.documents, sizes.tokens, sizes.empty))
        return Sizes(documents, tokens, empty, digest_of([sizes.digest, self._units]))


class CutUnits(ChosenUnits):
    """Some units of another reader, of one of them only a part of its documents.

    Args:
        cut: the unit of the base that is read in part; None: all are whole.
        limit: a document of it stays if the hash of its tokens is less, or not less with `below` false.
    """

    def __init__(
        self, base: Reader, units: Sequence[int], cut: int | None, limit: int, seed: int, below: bool = True
    ) -> None:
        super().__init__(base, units)
        self._cut = None if cut is None else self._units.index(cut)
        self._limit, self._seed, self._below = limit, seed, below

    @property
    def identity(self) -> list[Any]:
        return [*super().identity, "cut", self._cut, self._limit, self._seed, self._below]

    def read(self, unit: int, faults: Faults) -> Unit:
        documents = super().read(unit, faults)
        if unit != self._cut:
            return documents
        hashes = (document_hash(documents.document(n), self._seed) for n in range(documents.num_documents))
        kept = [(own < self._limit) == self._below for own in hashes]
        return documents.keep(np.array(kept, dtype=bool))

    def lengths(self, unit: int, faults: Faults) -> np.ndarray:
        return super().lengths(unit, faults) if unit != self._cut else self.read(unit, faults).lengths

    def known(self) -> Sizes | None:
        sizes = super().known()
        if sizes is None or self._cut is None:
            return sizes
        unit = self.read(self._cut, Faults())  # the only one that has to be read
        documents, tokens = sizes.documents.copy(), sizes.tokens.copy()
        documents[self._cut], tokens[self._cut] = unit.num_documents, unit.num_tokens
        return Sizes(documents, tokens, sizes.empty, digest_of([sizes.digest, self._limit, self._seed, self._below]))


class Subset(CutUnits):
    """A share of another reader's units, spread evenly over it: whole ones, and of one more a share of its documents.

    Units are taken in a seeded order whose every beginning is spread evenly, until they hold `fraction` of the tokens
    (or of the units, where nobody knows their tokens without reading them). So a smaller fraction is part of a larger
    one, and what is not trained on is not read.
    """

    def __init__(self, base: Reader, fraction: float, seed: int) -> None:
        order, known = spread_order(base.num_units, seed), base.known()
        weights = np.ones(base.num_units, dtype=np.int64) if known is None else known.tokens
        ends = np.cumsum(weights[order])
        wanted = fraction * int(ends[-1])
        whole = int(np.searchsorted(ends, wanted, side="right"))
        units, limit, cut = order[:whole].tolist(), 0, None
        if whole < len(order):
            begin = int(ends[whole - 1]) if whole else 0
            limit = int((wanted - begin) / int(weights[order[whole]]) * 2**64)
            cut = int(order[whole]) if limit else None
        super().__init__(base, sorted([*units, *([] if cut is None else [cut])]), cut, limit, seed)


def spread_order(count: int, seed: int) -> np.ndarray:
    """int64 [count]: numbers below `count` in a seeded order, of which the first n lie spread evenly for any n.

    The bits of 0, 1, 2, ... reversed, each flipped at random depending on the higher ones (Owen, "Randomly permuted
    (t,m,s)-nets and (t,s)-sequences", 1995), so that no rhythm in a corpus can meet one in the order.
    """
    bits = (count - 1).bit_length()
    numbers = np.arange(1 << bits)
    order = np.zeros_like(numbers)
    for bit in range(bits):
        order |= (numbers >> bit & 1) << (bits - 1 - bit)
    flipped = order.copy()
    for bit in range(bits):
        flips = np.random.PCG64(np.random.SeedSequence((seed, bit))).random_raw(1 << bit) >> np.uint64(63)
        flipped ^= flips.astype(np.int64)[order >> (bits - bit)] << (bits - 1 - bit)
    return flipped[flipped < count]


class Joined(Reader):
    """The units of several readers, one reader after the other."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = list(readers)
        self._places = [(reader, unit) for reader in readers for unit in range(reader.num_units)]
        self.path = " + ".join(reader.path for reader in readers)
        self.vocab_size = readers[0].vocab_size
        self.in_process = all(reader.in_process for reader in readers)

    @property
    def num_units(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        return sum(reader.num_bytes for reader in self._readers)

    @property
    def identity(self) -> list[Any]:
        return [reader.identity for reader in self._readers]

    def label(self, unit: int) -> str:
        reader, own = self._places[unit]
        return reader.label(own)

    def read(self, unit: int, faults: Faults) -> Unit:
        reader, own = self._places[unit]
        return reader.read(own, faults)

    def lengths(self, unit: int, faults: Faults) -> np.ndarray:
        reader, own = self._places[unit]
        return reader.lengths(own, faults)

    def known(self) -> Sizes | None:
        parts = [sizes for reader in self._readers if (sizes := reader.known()) is not None]
        if len(parts) < len(self._readers):
            return None
        columns = zip(*((part.documents, part.tokens, part.empty) for part in parts), strict=True)
        documents, tokens, empty = map(np.concatenate, columns)
        return Sizes(documents, tokens, empty, digest_of([part.digest for part in parts]))


def cut_by(unit_bytes: int) -> list[int]:
    """What a reader's identity says of data.unit_bytes, by which units are cut: nothing of the usual size."""
    return [] if unit_bytes == UNIT_BYTES else [unit_bytes]


def document_hash(tokens: np.ndarray, seed: int) -> int:
    """64 bits from a document's tokens, the same for every width that its integers are stored in."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, dtype=np.int32), seed)
