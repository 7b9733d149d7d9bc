"""The order of training: samples of one source by number.

The order is a pure function of (seed, epoch, sample number). Rank and world size only choose which slice is
read, so the whole state of a run's data is its step, and a run goes on with any number of processes.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.config import BEST_FIT, SPLIT
from data.errors import CorpusError
from data.order.lanes import Lanes, permutation
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
from data.read.units import Piece, Sizes, Unit, token_dtype

KEPT_LAYOUTS = 16  # orders of documents within units, beside those that the lanes have open
# Part of what a run remembers: raise it when the order of samples changes, so that no run resumes in another one.
ORDER_VERSION = 3


class Place(NamedTuple):
    """Where a sample lies: its position in the epoch, its lane, and the spans of units that it is cut from.

    A span is (item in the epoch's order of units, first, after its last), in tokens of the unit; with best-fit
    packing it is one sample of the unit.
    """

    epoch: int
    position: int
    lane: int
    spans: list[tuple[int, int, int]]


class TokenStream:
    """The endless stream of samples of one source, epoch after epoch.

    With `shuffle_bytes` each epoch has an order of its own: of the units within stretches of the source, of the
    documents within each unit (with best-fit packing, which must not depend on the epoch: of the samples within each
    unit), and of the samples, which are dealt out from many places at once (`data.order.lanes`). Not for two threads
    at a time. CorpusError where the source does not fill a single sample.

    Args:
        shuffle_bytes: of open units; 0 leaves everything as it lies.
        cache: where units come from; `source` is this stream's number in it. By default one of its own.
    """

    def __init__(
        self,
        reader: Reader,
        sizes: Sizes,
        seq_length: int,
        seed: int,
        shuffle_bytes: int,
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
        self.seq_length, self.seed, self.packing = seq_length, seed, packing
        self.shuffle = shuffle_bytes > 0
        self.cache = cache or UnitCache([(reader, sizes)])
        self._source = source
        self._unit_sizes = sizes.packed if packing == BEST_FIT else sizes.tokens
        self.lanes = Lanes(self.samples_per_epoch)
        if self.shuffle:
            itemsize = token_dtype(reader.vocab_size).itemsize
            open_bytes = sizes.tokens * itemsize
            self.lanes = Lanes.within(shuffle_bytes, open_bytes, self.samples_per_epoch, seq_length * itemsize)
        self._places: dict[int, Place] = {}  # of samples that were asked for
        layouts = KEPT_LAYOUTS + 2 * self.lanes.count
        self._document_layout = lru_cache(layouts)(self._lay_out_documents)
        self._bins = lru_cache(layouts)(self._pack_unit)
        self._bin_order = lru_cache(layouts)(self._order_bins)
        self._unit_layout = lru_cache(2)(self._lay_out_units)
        self._window_order = lru_cache(2 * self.lanes.count)(self._order_window)

    def lane_of(self, numbers: np.ndarray) -> np.ndarray:
        """int64: which lane each sample comes from."""
        return self.lanes.lane(numbers % self.samples_per_epoch)

    def in_lanes(self, numbers: range) -> list[int]:
        """The samples of a step by lane: neighbours come from the same units."""
        own = np.arange(numbers.start, numbers.stop)
        return own[np.argsort(self.lane_of(own), kind="stable")].tolist()

    def ask(self, index: int) -> None:
        """Begins to read what sample `index` needs."""
        place = self._places[index] = self._find(index)
        units, ends = self._unit_layout(place.epoch)
        for item, _, _ in place.spans:
            # The last sample that begins in the unit; with best-fit packing, its own last sample.
            last = int(ends[item]) - 1 if self.packing == BEST_FIT else (int(ends[item]) - 1) // self.seq_length
            last_use = place.epoch * self.samples_per_epoch + self.lanes.last_place(place.lane, last)
            self.cache.ask((self._source, int(units[item])), last_use)

    def release(self, index: int) -> None:
        """Lets go of what no sample from `index` on was said to need."""
        self.cache.release(self._source, index)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0 counted over all epochs; opens at most the units that it overlaps."""
        place = self._places.pop(index, None) or self._find(index)
        units, _ = self._unit_layout(place.epoch)
        if self.packing == BEST_FIT:
            ((item, number, _),) = place.spans
            return self._packed(place.epoch, int(units[item]), number)
        pieces: list[Piece] = []
        broken = []  # pieces that stand for tokens of a broken unit
        for item, start, stop in place.spans:
            found = self._pieces(place.epoch, int(units[item]), start, stop)
            broken += [found is None] * (1 if found is None else len(found))
            pieces += [Piece(np.zeros(stop - start, dtype=np.int64))] if found is None else found
        sample = pack(pieces)
        return self._without(sample, np.flatnonzero(broken)) if any(broken) else sample

    def close(self) -> None:
        """Ends the cache."""
        self.cache.close()

    def _find(self, index: int) -> Place:
        epoch, place = divmod(index, self.samples_per_epoch)
        lane, window, number = self.lanes.find(place)
        if self.shuffle:
            number = int(self._window_order(epoch, lane, window)[number])
        position = self.lanes.start(lane) + window * self.lanes.window + number
        _, ends = self._unit_layout(epoch)
        if self.packing == BEST_FIT:
            span = position, position + 1
        else:
            span = sample_span(position, self.seq_length)
        return Place(epoch, position, lane, list(overlaps(ends, *span)))

    def _pieces(self, epoch: int, unit_index: int, start: int, stop: int) -> list[Piece] | None:
        """Tokens [start, stop) of a unit in this epoch's order, cut at the ends of documents; None if it is broken."""
        unit = self._unit(unit_index)
        if unit is None:
            return None
        starts, ends = self._document_layout(epoch, unit_index)
        found = list(overlaps(ends, start, stop))  # neighbours, since no document is empty
        begins = starts[found[0][0] : found[-1][0] + 1].tolist()
        return [unit.piece(begin + lo, begin + hi) for begin, (_, lo, hi) in zip(begins, found, strict=True)]

    def _packed(self, epoch: int, unit_index: int, number: int) -> Sample:
        """A sample of best-fit packing."""
        unit = self._unit(unit_index)
        if unit is None:
            return self._without(pack([Piece(np.zeros(self.seq_length + 1, dtype=np.int64))]), np.array([0]))
        if self.shuffle:
            number = int(self._bin_order(epoch, unit_index)[number])
        cut = [(int(unit.starts[item]), lo, hi) for item, lo, hi in self._bins(unit_index).pieces(number)]
        pieces = [unit.piece(begin + lo, begin + hi) for begin, lo, hi in cut]
        return pad(pack(pieces), self.seq_length + 1, token=int(unit.document(0)[-1]))

    def _without(self, sample: Sample, broken: np.ndarray) -> Sample:
        """The sample with the documents of broken units as padding, which are counted."""
        lost = np.isin(sample.documents, broken)
        self.cache.faults.skipped_tokens += int(lost[:-1].sum())
        return sample._replace(documents=np.where(lost, PADDING, sample.documents).astype(np.int32))

    def _unit(self, unit_index: int) -> Unit | None:
        return self.cache.get((self._source, unit_index))

    def _whole_unit(self, unit_index: int) -> Unit:
        unit = self._unit(unit_index)
        assert unit is not None  # a broken unit's documents are not laid out
        return unit

    def _order_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        return permutation(self.lanes.window_size(lane, window), self.seed, epoch, 0, 1 + lane, window)

    def _lay_out_units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Units in the order of an epoch: stretches of the source one after the other, each in a random order.

        There is a stretch for each lane. Where the first begins is random too, so that the borders move.
        """
        order = np.arange(len(self._unit_sizes))
        if self.shuffle:
            total = int(self._unit_sizes.sum())
            shift, *_ = np.random.PCG64(np.random.SeedSequence((self.seed, epoch, 0))).random_raw(1) % np.uint64(total)
            middle = np.cumsum(self._unit_sizes) - self._unit_sizes // 2
            stretch = (middle + int(shift)) % total * self.lanes.count // total
            order = permutation(len(order), self.seed, epoch, 0)
            order = order[np.argsort(stretch[order], kind="stable")]
        return order, np.cumsum(self._unit_sizes[order])

    def _lay_out_documents(self, epoch: int, unit_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins in a unit, in the order of an epoch, and where it ends when all lie end to end."""
        unit = self._whole_unit(unit_index)
        if not self.shuffle:
            return unit.starts, np.cumsum(unit.lengths)
        order = permutation(unit.num_documents, self.seed, epoch, 1 + unit_index)
        return unit.starts[order], np.cumsum(unit.lengths[order])

    def _pack_unit(self, unit_index: int) -> Bins:
        return best_fit(self._whole_unit(unit_index).lengths, self.seq_length)

    def _order_bins(self, epoch: int, unit_index: int) -> np.ndarray:
        return permutation(int(self.sizes.packed[unit_index]), self.seed, epoch, 1 + unit_index)
