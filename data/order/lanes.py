"""Lanes: an epoch is read at many places at once, so that a batch holds samples from all over a corpus.

The samples of an epoch lie in the order of its units. That row is cut into lanes of equal length, and samples are
dealt out from all lanes in turn: of any `count` samples in a row, each comes from another lane. What lies near each
other in a corpus is mostly of one kind (a dump, a domain, a language), and a lane passes through one stretch of the
corpus, so that a batch holds the kinds as the corpus does: stratified sampling. Lanes take turns in an order in which
any few in a row are spread evenly (van der Corput's: the bits of their numbers reversed). Within a lane, samples change
places inside windows, so that the parts of a long document do not follow each other.

Memory bounds the number of lanes, since each has a unit or two open. Everything is a function of the sample's number.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

FEW_LANES, MOST_LANES = 32, 1024
WINDOW_SAMPLES = 4096  # at most
OPEN_UNITS = 2  # of a lane, at most for most of the time


@dataclass(frozen=True)
class Lanes:
    """How the samples of an epoch are dealt out; places count samples as dealt out, positions as they lie."""

    samples: int
    count: int = 1
    window: int = 1

    @classmethod
    def within(cls, num_bytes: int, unit_bytes: np.ndarray, samples: int, sample_bytes: int) -> "Lanes":
        """As many lanes as `num_bytes` of open units allow, a power of two so that batches divide evenly by it.

        Args:
            unit_bytes: int64 [units], of their tokens in memory.
        """
        filled = unit_bytes[unit_bytes > 0]
        # A unit at the border of two lanes is read twice, so a lane has several, unless there are few.
        several = min(len(filled), max(FEW_LANES, len(filled) // 4))
        count = min(MOST_LANES, several, samples, int(num_bytes / (OPEN_UNITS * filled.mean())))
        count = 1 << max(1, count).bit_length() - 1
        # Half of what a lane has beside one unit: windows that lie at the border of two need both.
        window = int((num_bytes / count - filled.mean()) / 2 / sample_bytes)
        return cls(samples, count, min(WINDOW_SAMPLES, max(1, window)))

    @cached_property
    def _turns(self) -> np.ndarray:
        """int64 [count]: the lane of each turn."""
        bits = (self.count - 1).bit_length()
        numbers = np.arange(1 << bits)
        reversed_ = sum((numbers >> bit & 1) << (bits - 1 - bit) for bit in range(bits)) + np.zeros_like(numbers)
        return reversed_[reversed_ < self.count]

    @cached_property
    def _turn_of(self) -> np.ndarray:
        """int64 [count]: the turn of each lane."""
        return np.argsort(self._turns)

    def lane(self, places: np.ndarray) -> np.ndarray:
        """int64: the lane of each place in an epoch."""
        rounds = self.samples // self.count * self.count
        # The last round is not full: what is left belongs to the first lanes, which are longer by one.
        return np.where(places < rounds, self._turns[places % self.count], places - rounds)

    def start(self, lane: int) -> int:
        """Position of a lane's first sample."""
        each, longer = divmod(self.samples, self.count)
        return lane * each + min(lane, longer)

    def length(self, lane: int) -> int:
        """Samples of a lane."""
        return self.samples // self.count + (lane < self.samples % self.count)

    def find(self, place: int) -> tuple[int, int, int]:
        """(lane, window of that lane, number in that window) of a place."""
        rounds, turn = divmod(place, self.count)
        each = self.samples // self.count
        lane = int(self._turns[turn]) if rounds < each else place - each * self.count
        return lane, *divmod(rounds, self.window)

    def window_size(self, lane: int, window: int) -> int:
        """Samples of a window: the last of a lane may be shorter."""
        return min(self.window, self.length(lane) - window * self.window)

    def last_place(self, lane: int, position: int) -> int:
        """The last place at which a sample of the window may come that holds this position, or the lane's end."""
        offset = min(position - self.start(lane), self.length(lane) - 1)
        window = offset // self.window
        last = window * self.window + self.window_size(lane, window) - 1
        each = self.samples // self.count
        return last * self.count + (int(self._turn_of[lane]) if last < each else lane)


def permutation(length: int, *key: int) -> np.ndarray:
    """int64 [length]: a random order for this `key` of numbers >= 0.

    From the raw words of PCG64, which NumPy promises to keep; it makes no such promise for `permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(words, kind="stable")
