"""What a run trains on: the sources that its settings name, opened, measured and mixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.config import BEST_FIT, ON_CHANGE, ON_CORRUPT, PACKINGS, SKIP, SPLIT, DataConfig, source_paths
from data.errors import CorpusError, check_choice
from data.order.counting import count_units
from data.order.mixture import MixedStream, Mixture, check_mixture
from data.order.packing import num_samples
from data.order.stream import ORDER_VERSION, TokenStream
from data.read.corpus import Corpus
from data.read.readers import Joined, Reader, Subset, digest_of
from data.read.unit_cache import UnitCache
from data.read.units import Sizes
from data.source import check_source, common_tokenizer, prepared_directory, splits


def check_data(config: DataConfig, mtp_steps: int) -> None:
    """Refuses what cannot be trained on. Costs a manifest and one stat per shard; no token is read.

    Args:
        mtp_steps: multi-token-prediction steps; step k of position t has token t + 1 + k as its target.
    Raises:
        CorpusError: the setting, in one line.
    """
    if config.seq_length < mtp_steps + 2:
        raise CorpusError(
            f"data.seq_length={config.seq_length} is too short for mtp.steps={mtp_steps}: "
            f"use {mtp_steps + 2} or more, so that every prediction step has a target"
        )
    check_choice("data.packing", config.packing, PACKINGS)
    check_choice("data.on_corrupt", config.on_corrupt, ON_CORRUPT)
    check_choice("data.on_change", config.on_change, ON_CHANGE)
    if not 0 < config.subset <= 1:
        raise CorpusError(f"data.subset={config.subset} is out of range: use more than 0, up to 1")
    if not 0 <= config.heldout_fraction < 1:
        raise CorpusError(f"data.heldout_fraction={config.heldout_fraction} is out of range: use 0 or more, below 1")
    for setting, value in (("data.subset_seed", config.subset_seed), ("data.workers", config.workers)):
        if value < 0:
            raise CorpusError(f"{setting}={value} is negative: use 0 or more")
    if config.unit_bytes < 1:
        raise CorpusError(f"data.unit_bytes={config.unit_bytes} leaves nothing to read: use 1 or more")
    check_mixture(config)
    for path, _ in source_paths(config):
        check_source(path, config)


@dataclass(frozen=True)
class Source:
    """One source as it is read: `whole` before a subset is taken, where that is known."""

    path: str
    train: Reader
    sizes: Sizes
    heldout: Reader
    whole: Sizes | None


class Dataset:
    """The sources of a run. Every process opens them alike; what had to be counted is found in `data.cache`.

    Raises:
        CorpusError: a source that cannot be used, in one line.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        paths = [path for path, _ in source_paths(config)]
        if "" in paths:
            raise CorpusError("data.corpus is empty: set it to a directory made by prepare, or to embedded")
        prepared = {path: prepared_directory(path, config) for path in paths}
        corpora = {path: Corpus.open(directory) for path, directory in prepared.items() if directory is not None}
        self.corpora = list(corpora.values())
        self.tokenizer = common_tokenizer(config, corpora)
        self.sources = [self._open(path, corpora.get(path)) for path in paths]

    @property
    def path(self) -> str:
        """The sources in the user's words."""
        return " + ".join(source.path for source in self.sources)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def eod_id(self) -> int:
        return self.tokenizer.eod_id

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each token stands for, 0 for special tokens."""
        return self.corpora[0].token_bytes if self.corpora else self.tokenizer.token_bytes

    def train_stream(self, seed: int) -> TokenStream | MixedStream:
        """The samples of training, with `data.workers` processes behind them. Close it when done."""
        config = self.config
        pairs = [(source.train, source.sizes) for source in self.sources]
        cache = UnitCache(pairs, config.workers, config.on_corrupt)
        streams = [
            TokenStream(reader, sizes, config.seq_length, seed, True, config.packing, cache, number)
            for number, (reader, sizes) in enumerate(pairs)
        ]
        if len(streams) == 1:
            return streams[0]
        return MixedStream(streams, Mixture(self.stages, seed), cache)

    def heldout_stream(self) -> TokenStream:
        """The held-out samples of all sources, in the order in which they lie."""
        reader = Joined([source.heldout for source in self.sources])
        sizes, length = self._measure(reader, SPLIT), self.config.seq_length
        if not num_samples(sizes.num_tokens, length):
            raise CorpusError(
                f"data.seq_length={length} is longer than all held-out text ({sizes.num_tokens} tokens, {length + 1} "
                f"needed): lower it, or hold out more (data.heldout_fraction={self.config.heldout_fraction} of files "
                f"as they are, heldout_fraction of prepare)"
            )
        return TokenStream(reader, sizes, length, seed=0, shuffle=False)

    def check(self) -> None:
        """Raises CorpusError where a source, or what is held out, does not fill one sample."""
        self.heldout_stream().close()
        for source in self.sources:
            TokenStream(source.train, source.sizes, self.config.seq_length, seed=0, packing=self.config.packing).close()

    @property
    def stages(self) -> list[tuple[int, Sequence[float]]]:
        """(first sample, weights) of each stage."""
        weights = [weight for _, weight in source_paths(self.config)]
        length = self.config.seq_length
        return [(0, weights), *((-(-begin // length), own) for begin, own in self.config.stages)]

    def identity(self, seed: int) -> dict[str, str | int | float]:
        """What decides which tokens each sample holds, by the setting that it follows from.

        Equal streams have equal ones, wherever their files lie; a run may only go on with the one it began with.
        """
        config = self.config
        corpus = [source.sizes.digest for source in self.sources]
        found: dict[str, str | int | float] = {
            "data.corpus": corpus[0] if len(corpus) == 1 else digest_of(corpus),
            "data.tokenizer": self.tokenizer.sha256,
            "data.seq_length": config.seq_length,
            "data.packing": config.packing,
            "data.subset": config.subset,
            "seed": seed,
            "order of this version": ORDER_VERSION,
        }
        if config.subset < 1:
            found["data.subset_seed"] = config.subset_seed
        if len(corpus) > 1:
            found["data.sources (weights)"] = str([list(weights) for _, weights in self.stages])
        return found

    def cursors(self, samples: int, stream: TokenStream | MixedStream) -> dict[str, dict[str, int]]:
        """How far each source has been read after so many samples of the run."""
        if isinstance(stream, MixedStream):
            counts, streams = stream.mixture.counts(samples), stream.streams
        else:
            counts, streams = [samples], [stream]
        return {
            source.path: {"samples": count, "epoch": count // own.samples_per_epoch}
            for source, count, own in zip(self.sources, counts, streams, strict=True)
        }

    def describe(self) -> list[str]:
        """Lines for the start of a run: what each source really holds."""
        lines = []
        for source in self.sources:
            sizes = source.sizes
            line = (
                f"corpus: {source.path}, {sizes.num_tokens:,} tokens to train on in {sizes.num_documents:,} documents"
            )
            if self.config.subset < 1 and source.whole is not None:
                share = sizes.num_tokens / source.whole.num_tokens
                line += f", {share:.2%} of {source.whole.num_tokens:,} (data.subset={self.config.subset})"
            if self.config.packing == BEST_FIT:
                places = int(sizes.packed.sum()) * (self.config.seq_length + 1)
                line += f"; best-fit packing fills {sizes.num_tokens / places:.2%} of all places"
            if sizes.empty.any():
                line += f"; {sizes.empty.sum():,} empty documents left out"
            lines.append(line)
            lines += [f"left out: {reason}" for reason in (*source.train.left_out, *sizes.broken)]
        return lines

    def _open(self, path: str, corpus: Corpus | None) -> Source:
        config = self.config
        train, heldout = splits(path, corpus, config, self.tokenizer)
        whole = train.known()
        if config.subset < 1:
            train = Subset(train, config.subset, config.subset_seed)
        return Source(path, train, self._measure(train, config.packing), heldout, whole)

    def _measure(self, reader: Reader, packing: str) -> Sizes:
        cache = Path(self.config.cache).expanduser()
        return count_units(reader, packing, self.config.seq_length, cache, self.config.on_corrupt == SKIP)
