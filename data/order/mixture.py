"""Mixtures: which source each sample comes from, as a pure function of (seed, sample number, weights).

Of the first n samples of a stage, source 0 has floor(p n) for its exact share p, source 1 its share of what is left,
and so on; the last has the rest. Each count grows by one or stays as n grows by one, and exactly one of them grows:
that source takes sample n. So the count of every source before any sample is a formula, shares are exact in the long
run, and nothing is replayed. Samples then change places within blocks, or else sources would follow a rhythm.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from data.config import DataConfig
from data.errors import CorpusError
from data.order.lanes import permutation
from data.order.packing import Sample
from data.order.stream import TokenStream
from data.read.unit_cache import UnitCache
from data.secrets import one_line

BLOCK_SAMPLES = 1024


class Mixture:
    """Shares of sources over a run.

    Args:
        stages: (first sample, weights of the sources), the first from 0; weights need not sum to 1.
        block: samples within which they change places.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], seed: int, block: int = BLOCK_SAMPLES) -> None:
        self._firsts = [first for first, _ in stages]
        self._ratios = [_ratios(weights) for _, weights in stages]
        self._seed, self._block = seed, block
        self._places = lru_cache(8)(self._place_block)
        # Samples of each source before each stage.
        self._before = [[0] * len(self._ratios[0])]
        for first, after, ratios in zip(self._firsts, self._firsts[1:], self._ratios, strict=False):
            self._before.append([a + b for a, b in zip(self._before[-1], _counts(after - first, ratios), strict=True)])

    def place(self, index: int) -> tuple[int, int]:
        """The source of a sample, and its number within that source."""
        stage, block, position = self._find(index)
        sources, numbers = self._places(stage, block)
        return int(sources[position]), int(numbers[position])

    def places(self, indices: range) -> tuple[np.ndarray, np.ndarray]:
        """`place` of a run of samples: int64 [samples] each."""
        sources, numbers, index = [], [], indices.start
        while index < indices.stop:
            stage, block, position = self._find(index)
            found = self._places(stage, block)
            stop = min(len(found[0]), position + indices.stop - index)
            sources.append(found[0][position:stop])
            numbers.append(found[1][position:stop])
            index += stop - position
        return np.concatenate(sources), np.concatenate(numbers)

    def counts(self, index: int) -> list[int]:
        """Samples of each source before sample `index`, up to what changed places within its block."""
        stage = self._stage(index)
        own = _counts(index - self._firsts[stage], self._ratios[stage])
        return [a + b for a, b in zip(self._before[stage], own, strict=True)]

    def behind(self, index: int) -> list[int]:
        """Samples of each source that all lie before sample `index`: those of the blocks before its own."""
        stage, block, _ = self._find(index)
        return self.counts(self._firsts[stage] + block * self._block)

    def _stage(self, index: int) -> int:
        return max(stage for stage, first in enumerate(self._firsts) if first <= index)

    def _find(self, index: int) -> tuple[int, int, int]:
        """(stage, block in it, position in that) of a sample."""
        stage = self._stage(index)
        return stage, *divmod(index - self._firsts[stage], self._block)

    def _place_block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within it) of every sample of a block: int64 [samples] each."""
        first, size = block * self._block, self._block
        if stage + 1 < len(self._firsts):
            size = min(size, self._firsts[stage + 1] - self._firsts[stage] - first)
        ratios = self._ratios[stage]
        largest = (first + size) * max(ratio.numerator for ratio in ratios)
        left = np.arange(first, first + size + 1, dtype=np.int64 if largest < 2**63 else object)
        counts = []  # of each source before each sample
        for ratio in ratios:
            counts.append(left * ratio.numerator // ratio.denominator)
            left = left - counts[-1]
        before = np.stack(counts).astype(np.int64)  # [sources, samples + 1]
        sources = np.argmax(np.diff(before, axis=1), axis=0)
        numbers = before[sources, np.arange(size)] + np.array(self._before[stage])[sources]
        order = permutation(size, self._seed, stage, block, self._block)
        return sources[order], numbers[order]


class MixedStream:
    """Samples of several streams, which share one cache."""

    def __init__(self, streams: Sequence[TokenStream], mixture: Mixture, cache: UnitCache) -> None:
        self.streams, self.mixture, self.cache = list(streams), mixture, cache
        self.seq_length = streams[0].seq_length

    def in_lanes(self, numbers: range) -> list[int]:
        """The samples of a step by source and lane: neighbours come from the same units."""
        sources, own = self.mixture.places(numbers)
        lanes = np.zeros_like(own)
        for source in np.unique(sources):
            chosen = sources == source
            lanes[chosen] = self.streams[source].lane_of(own[chosen])
        return (numbers.start + np.lexsort((lanes, sources))).tolist()

    def ask(self, index: int) -> None:
        """Begins to read what a sample needs."""
        source, own = self.mixture.place(index)
        self.streams[source].ask(own)

    def release(self, index: int) -> None:
        """Lets go of what no sample from `index` on was said to need."""
        behind = self.mixture.behind(index)
        for stream, count in zip(self.streams, behind, strict=True):
            stream.release(count)

    def sample(self, index: int) -> Sample:
        """A sample of the source whose turn it is."""
        source, own = self.mixture.place(index)
        return self.streams[source].sample(own)

    def close(self) -> None:
        """Ends the cache."""
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


def source_weights(config: DataConfig) -> tuple[tuple[str, float], ...]:
    """(path, weight) of each source.

    Raises:
        CorpusError: data.sources_file cannot be read.
    """
    if not config.sources_file:
        return config.sources or ((config.corpus, 1.0),)
    where = f"data.sources_file={config.sources_file}"
    if config.sources:
        raise CorpusError(f"{where} and data.sources are both given: leave one out")
    try:
        found = yaml.safe_load(Path(config.sources_file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CorpusError(f"{where} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict) or not found or not all(isinstance(w, int | float) for w in found.values()):
        raise CorpusError(f"{where} must hold a path and a weight a line, as in 'corpora/web: 0.7'")
    return tuple((str(path), float(weight)) for path, weight in found.items())


def check_mixture(config: DataConfig) -> None:
    """Refuses sources and stages that name no mixture.

    Raises:
        CorpusError: the setting, in one line.
    """
    sources = source_weights(config)
    paths = [path for path, _ in sources]
    if len(set(paths)) < len(paths):
        raise CorpusError(f"data.sources={[list(s) for s in sources]} names a source twice: add their weights")
    if config.stages and len(paths) < 2:
        raise CorpusError("data.stages are weights over time of several sources: name them in data.sources")
    begins = [begin for begin, _ in config.stages]
    if begins != sorted(set(begins)) or min((1, *begins)) < 1:
        raise CorpusError(f"data.stages must begin at rising numbers of tokens above 0, and begin at {begins}")
    for weights in (tuple(weight for _, weight in sources), *(weights for _, weights in config.stages)):
        if len(weights) != len(paths) or not all(0 <= w < float("inf") for w in weights) or not sum(weights):
            raise CorpusError(
                f"data.sources are {len(paths)}, and {list(weights)} cannot be their weights: give one number of 0 or "
                f"more for each, not all 0"
            )
    if config.max_repeats is not None and not config.max_repeats > 0:
        raise CorpusError(f"data.max_repeats={config.max_repeats} must be above 0, or null")
