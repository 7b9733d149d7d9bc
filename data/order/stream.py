"""The order of training: samples of one source by number.

The order is a pure function of (seed, epoch, sample number). Rank and world size only choose which slice is
read, so the whole state of a run's data is its step, and a run goes on with any number of processes.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import numpy as np

from data.config import BEST_FIT, SPLIT
from data.errors import CorpusError
from data.order.packing import (
    PADDING,
    Bins,
    Sample,
    best_fit,
    num_samples,
    overlaps,
    pack,
    pad,
    sample_span,
)
from data.read.readers import Reader
from data.read.unit_cache import UnitCache
from data.read.units import Sizes, Unit

# Samples are dealt out at random within windows of this many samples, or of fewer that hold so many tokens, so that a
# batch is not a few long documents in a row; a window spans few units, so that reading stays local and memory bounded.
WINDOW_SAMPLES = 4096
WINDOW_TOKENS = 2**24
# How many units' orders of documents are kept, for windows over many small units.
KEPT_LAYOUTS = 128
# Part of what a run remembers: raise it when the order of samples changes, so that no run resumes in another one.
ORDER_VERSION = 2


class TokenStream:
    """The endless stream of samples of one source, epoch after epoch.

    With `shuffle` each epoch has an order of its own: of the units, of the documents within each unit (with best-fit
    packing, which must not depend on the epoch: of the samples within each unit), and of the samples within each
    window. Not for two threads at a time. CorpusError where the source does not fill a single sample.

    Args:
        cache: where units come from; `source` is this stream's number in it. By default one of its own.
    """

    def __init__(
        self,
        reader: Reader,
        sizes: Sizes,
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        packing: str = SPLIT,
        cache: UnitCache | None = None,
        source: int = 0,
    ) -> None:
        if packing == BEST_FIT:
            self.samples_per_epoch = int(sizes.packed.sum())
        else:
            self.samples_per_epoch = num_samples(sizes.num_tokens, seq_length)
        if self.samples_per_epoch == 0:
            raise CorpusError(
                f"data.seq_length={seq_length} is longer than {reader.path} "
                f"({sizes.num_tokens} tokens, {seq_length + 1} needed): lower it or take more text"
            )
        if seed < 0:
            raise CorpusError(f"seed={seed} is negative: use 0 or more")
        self.reader, self.sizes = reader, sizes
        self.seq_length, self.seed = seq_length, seed
        self.shuffle, self.packing = shuffle, packing
        self.cache = cache or UnitCache([(reader, sizes)])
        self._source = source
        self._unit_sizes = sizes.packed if packing == BEST_FIT else sizes.tokens
        self._window: tuple[int, int] | None = None  # the epoch and window that the last sample was taken from
        self._document_layout = lru_cache(KEPT_LAYOUTS)(self._lay_out_documents)
        self._bins = lru_cache(KEPT_LAYOUTS)(self._pack_unit)
        self._bin_order = lru_cache(KEPT_LAYOUTS)(self._order_bins)
        self._unit_layout = lru_cache(2)(self._lay_out_units)
        self._window_order = lru_cache(2)(self._order_window)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0 counted over all epochs; opens at most the units that it overlaps."""
        epoch, position = divmod(index, self.samples_per_epoch)
        if self.shuffle:
            window, place = divmod(position, self._window_size)
            self._read_ahead(epoch, window)
            position = window * self._window_size + int(self._window_order(epoch, window)[place])
        units, ends = self._unit_layout(epoch)
        if self.packing == BEST_FIT:
            item = int(np.searchsorted(ends, position, side="right"))
            number = position - (int(ends[item - 1]) if item else 0)
            return self._packed(epoch, int(units[item]), number)
        pieces: list[np.ndarray] = []
        broken = []  # pieces that stand for tokens of a broken unit
        for item, start, stop in overlaps(ends, *sample_span(position, self.seq_length)):
            found = self._pieces(epoch, int(units[item]), start, stop)
            broken += [found is None] * (1 if found is None else len(found))
            pieces += [np.zeros(stop - start, dtype=np.int64)] if found is None else found
        sample = pack(pieces)
        return self._without(sample, np.flatnonzero(broken)) if any(broken) else sample

    def close(self) -> None:
        self.cache.close()

    @property
    def _window_size(self) -> int:
        return max(1, min(WINDOW_SAMPLES, WINDOW_TOKENS // self.seq_length))

    def _pieces(self, epoch: int, unit_index: int, start: int, stop: int) -> list[np.ndarray] | None:
        """Tokens [start, stop) of a unit in this epoch's order, cut at the ends of documents; None if it is broken."""
        unit = self._unit(unit_index)
        if unit is None:
            return None
        documents, ends = self._document_layout(epoch, unit_index)
        return [unit.document(documents[item])[lo:hi] for item, lo, hi in overlaps(ends, start, stop)]

    def _packed(self, epoch: int, unit_index: int, number: int) -> Sample:
        """A sample of best-fit packing."""
        unit = self._unit(unit_index)
        if unit is None:
            return self._without(pack([np.zeros(self.seq_length + 1, dtype=np.int64)]), np.array([0]))
        if self.shuffle:
            number = int(self._bin_order(epoch, unit_index)[number])
        pieces = [unit.document(item)[lo:hi] for item, lo, hi in self._bins(unit_index).pieces(number)]
        return pad(pack(pieces), self.seq_length + 1, token=int(unit.document(0)[-1]))

    def _without(self, sample: Sample, broken: np.ndarray) -> Sample:
        """The sample with the documents of broken units as padding, which are counted."""
        lost = np.isin(sample.documents, broken)
        self.cache.faults.skipped_tokens += int(lost[:-1].sum())
        return Sample(sample.tokens, np.where(lost, PADDING, sample.documents).astype(np.int32))

    def _unit(self, unit_index: int) -> Unit | None:
        return self.cache.get((self._source, unit_index))

    def _whole_unit(self, unit_index: int) -> Unit:
        unit = self._unit(unit_index)
        assert unit is not None  # a broken unit's documents are not laid out
        return unit

    def _read_ahead(self, epoch: int, window: int) -> None:
        """Tells the cache what this window needs, and the next."""
        if self._window == (epoch, window):
            return
        self._window = epoch, window
        following = window + 1
        is_last = following * self._window_size >= self.samples_per_epoch
        places = ((epoch, window), (epoch + 1, 0) if is_last else (epoch, following))
        self.cache.expect(self._source, chain.from_iterable(self._units_of_window(*place) for place in places))

    def _units_of_window(self, epoch: int, window: int) -> Iterator[int]:
        first = window * self._window_size
        last = min(first + self._window_size, self.samples_per_epoch)
        units, ends = self._unit_layout(epoch)
        if self.packing != BEST_FIT:
            first, last = sample_span(first, self.seq_length)[0], sample_span(last - 1, self.seq_length)[1]
        return (int(units[item]) for item, _, _ in overlaps(ends, first, last))

    def _order_window(self, epoch: int, window: int) -> np.ndarray:
        size = min(self._window_size, self.samples_per_epoch - window * self._window_size)
        return permutation(size, self.seed, epoch, 0, 1 + window)

    def _lay_out_units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return self._lay_out(self._unit_sizes, epoch, 0)

    def _lay_out_documents(self, epoch: int, unit_index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._lay_out(self._whole_unit(unit_index).lengths, epoch, 1 + unit_index)

    def _pack_unit(self, unit_index: int) -> Bins:
        return best_fit(self._whole_unit(unit_index).lengths, self.seq_length)

    def _order_bins(self, epoch: int, unit_index: int) -> np.ndarray:
        return permutation(int(self.sizes.packed[unit_index]), self.seed, epoch, 1 + unit_index)

    def _lay_out(self, lengths: np.ndarray, *key: int) -> tuple[np.ndarray, np.ndarray]:
        """Items in the order of this `key`, and where each ends when they are laid end to end."""
        order = permutation(len(lengths), self.seed, *key) if self.shuffle else np.arange(len(lengths))
        return order, np.cumsum(lengths[order])


def permutation(length: int, *key: int) -> np.ndarray:
    """int64 [length]: a random order for this `key` of numbers >= 0.

    From the raw words of PCG64, which NumPy promises to keep; it makes no such promise for `permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(words, kind="stable")
