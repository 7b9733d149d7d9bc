"""Mixtures: which source each sample comes from, as a pure function of (seed, sample number, weights).

Of the first n samples of a stage, source 0 has floor(p n) for its exact share p, source 1 its share of what is left,
and so on; the last has the rest. Each count grows by one or stays as n grows by one, and exactly one of them grows:
that source takes sample n. So the count of every source before any sample is a formula, shares are exact in the long
run, and nothing is replayed. Samples then change places within blocks, or else sources would follow a rhythm.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from data.config import DataConfig
from data.errors import CorpusError
from data.order.packing import Sample
from data.order.stream import TokenStream, permutation
from data.read.unit_cache import UnitCache

BLOCK_SAMPLES = 1024


class Mixture:
    """Shares of sources over a run.

    Args:
        stages: (first sample, weights of the sources), the first from 0; weights need not sum to 1.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], seed: int) -> None:
        self._firsts = [first for first, _ in stages]
        self._ratios = [_ratios(weights) for _, weights in stages]
        self._seed = seed
        self._order = lru_cache(4)(self._order_block)
        # Samples of each source before each stage.
        self._before = [[0] * len(self._ratios[0])]
        for first, after, ratios in zip(self._firsts, self._firsts[1:], self._ratios, strict=False):
            self._before.append([a + b for a, b in zip(self._before[-1], _counts(after - first, ratios), strict=True)])

    def place(self, index: int) -> tuple[int, int]:
        """The source of a sample, and its number within that source."""
        stage = self._stage(index)
        block, position = divmod(index - self._firsts[stage], BLOCK_SAMPLES)
        number = block * BLOCK_SAMPLES + int(self._order(stage, block)[position])
        now, then = _counts(number, self._ratios[stage]), _counts(number + 1, self._ratios[stage])
        source = next(source for source, count in enumerate(now) if then[source] > count)
        return source, self._before[stage][source] + now[source]

    def counts(self, index: int) -> list[int]:
        """Samples of each source before sample `index`, up to what changed places within its block."""
        stage = self._stage(index)
        own = _counts(index - self._firsts[stage], self._ratios[stage])
        return [a + b for a, b in zip(self._before[stage], own, strict=True)]

    def _stage(self, index: int) -> int:
        return max(stage for stage, first in enumerate(self._firsts) if first <= index)

    def _order_block(self, stage: int, block: int) -> np.ndarray:
        size = BLOCK_SAMPLES
        if stage + 1 < len(self._firsts):
            size = min(size, self._firsts[stage + 1] - self._firsts[stage] - block * BLOCK_SAMPLES)
        return permutation(size, self._seed, stage, block, BLOCK_SAMPLES)


class MixedStream:
    """Samples of several streams, which share one cache."""

    def __init__(self, streams: Sequence[TokenStream], mixture: Mixture, cache: UnitCache) -> None:
        self.streams, self.mixture, self.cache = list(streams), mixture, cache
        self.seq_length = streams[0].seq_length

    def sample(self, index: int) -> Sample:
        source, own = self.mixture.place(index)
        return self.streams[source].sample(own)

    def close(self) -> None:
        self.cache.close()


def _ratios(weights: Sequence[float]) -> list[Fraction]:
    """Of each source, its share of what the sources before it leave. Exact for the decimals that the user wrote."""
    exact = [Fraction(repr(weight)) for weight in weights]
    left = [sum(exact[source:]) for source in range(len(exact))]
    return [weight / rest if rest else Fraction(0) for weight, rest in zip(exact, left, strict=True)]


def _counts(number: int, ratios: Sequence[Fraction]) -> list[int]:
    """Of the first `number` samples of a stage, how many each source has."""
    counts, left = [], number
    for ratio in ratios:
        counts.append(left * ratio.numerator // ratio.denominator)
        left -= counts[-1]
    return counts


def check_mixture(config: DataConfig) -> None:
    """Refuses sources and stages that name no mixture.

    Raises:
        CorpusError: the setting, in one line.
    """
    paths = [path for path, _ in config.sources]
    if len(set(paths)) < len(paths):
        raise CorpusError(f"data.sources={[list(s) for s in config.sources]} names a source twice: add their weights")
    if config.stages and len(paths) < 2:
        raise CorpusError("data.stages are weights over time of several sources: name them in data.sources")
    begins = [begin for begin, _ in config.stages]
    if begins != sorted(set(begins)) or min((1, *begins)) < 1:
        raise CorpusError(f"data.stages must begin at rising numbers of tokens above 0, and begin at {begins}")
    for weights in (tuple(weight for _, weight in config.sources), *(weights for _, weights in config.stages)):
        if paths and (
            len(weights) != len(paths) or not all(0 <= w < float("inf") for w in weights) or not sum(weights)
        ):
            raise CorpusError(
                f"data.sources are {len(paths)}, and {list(weights)} cannot be their weights: give one number of 0 or "
                f"more for each, not all 0"
            )
