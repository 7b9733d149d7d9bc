"""What a run trains on: the sources that its settings name, opened, measured and mixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.config import BEST_FIT, FORMATS, ON_CHANGE, ON_CORRUPT, PACKINGS, SKIP, SPLIT, DataConfig
from data.errors import CorpusError, check_choice
from data.order.counting import count_units
from data.order.mixture import MixedStream, Mixture, check_mixture, source_weights
from data.order.packing import num_samples
from data.order.stream import ORDER_VERSION, TokenStream
from data.read.corpus import Corpus
from data.read.index import digest_of
from data.read.listing import Listing
from data.read.mapped_corpus import map_corpus
from data.read.node_cache import Shared, node_directory
from data.read.readers import Joined, Reader, Subset
from data.read.unit_cache import UnitCache
from data.read.units import Sizes
from data.source import Vocabulary, check_source, common_vocabulary, prepared_directory, splits
from data.text.tokenizer import Tokenizer


def check_data(config: DataConfig, mtp_steps: int) -> None:
    """Refuses what cannot be trained on. Costs a manifest and one stat per shard; no token is read.

    Args:
        mtp_steps: multi-token-prediction steps; step k of position t has token t + 1 + k as its target.
    Raises:
        CorpusError: the setting, in one line.
    """
    check_seq_length(config.seq_length, mtp_steps)
    check_choice("data.format", config.format, FORMATS)
    check_choice("data.packing", config.packing, PACKINGS)
    check_choice("data.on_corrupt", config.on_corrupt, ON_CORRUPT)
    check_choice("data.on_change", config.on_change, ON_CHANGE)
    if not 0 < config.subset <= 1:
        raise CorpusError(f"data.subset={config.subset} is out of range: use more than 0, up to 1")
    if not 0 <= config.heldout_fraction < 1:
        raise CorpusError(f"data.heldout_fraction={config.heldout_fraction} is out of range: use 0 or more, below 1")
    for setting, value, least in (
        ("data.subset_seed", config.subset_seed, 0),
        ("data.workers", config.workers, 0),
        ("data.heldout_tokens", config.heldout_tokens, 0),
        ("data.shuffle_bytes", config.shuffle_bytes, 1),
        ("data.unit_bytes", config.unit_bytes, 1),
        ("data.retry_minutes", config.retry_minutes, 0),
    ):
        if not value >= least:
            raise CorpusError(f"{setting}={value} is too low: use {least} or more")
    if any(first < 0 or last < first for first, last in config.skip):
        raise CorpusError(f"data.skip={[list(pair) for pair in config.skip]} must be pairs [first, last] from 0 on")
    check_mixture(config)
    for path, _ in source_weights(config):
        check_source(path, config)


def check_seq_length(seq_length: int, mtp_steps: int) -> None:
    """Raises CorpusError where a sample leaves a step of multi-token prediction without a target."""
    if seq_length < mtp_steps + 2:
        raise CorpusError(
            f"data.seq_length={seq_length} is too short for mtp.steps={mtp_steps}: "
            f"use {mtp_steps + 2} or more, so that every prediction step has a target"
        )


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

    Args:
        tokenizer: opens no source: there are only this tokenizer, its tokens and what ends a document.
        shared: other processes of this machine read the same samples, or samples of the same units.
        listings: files of each path, as another process has listed them.
    Raises:
        CorpusError: a source that cannot be used, in one line.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer | None = None,
        shared: bool = False,
        listings: dict[str, Listing] | None = None,
    ) -> None:
        self.config, self._shared = config, shared
        self.listings = dict(listings or {})
        self._files: dict[str, Shared] = {}
        if tokenizer is not None:
            self.corpora, self.sources, self.tokenizer = [], [], tokenizer
            self.vocabulary = Vocabulary.of(tokenizer)
            return
        paths = [path for path, _ in source_weights(config)]
        if "" in paths:
            raise CorpusError("data.corpus is empty: set it to a directory made by prepare, or to embedded")
        prepared = {path: prepared_directory(path, config) for path in paths}
        cache = Path(config.cache).expanduser()
        corpora = {path: map_corpus(directory, cache) for path, directory in prepared.items() if directory is not None}
        self.corpora = list(corpora.values())
        self.vocabulary = common_vocabulary(config, paths[0], corpora)
        self.sources = [self._open(path, corpora.get(path)) for path in paths]

    def close(self) -> None:
        """Deletes the files that this machine's processes shared."""
        for shared in self._files.values():
            shared.forget()

    @property
    def path(self) -> str:
        """The sources in the user's words."""
        return " + ".join(source.path for source in self.sources)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def eod_id(self) -> int:
        return self.vocabulary.eod_id

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one tokenizer of all sources, loaded when it is asked for."""
        if self.corpora:
            return self.corpora[0].tokenizer()
        return Tokenizer.from_path(self.config.tokenizer, self.config.eod_token)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each token stands for, 0 for special tokens."""
        return self.corpora[0].token_bytes if self.corpora else self.tokenizer.token_bytes

    def train_stream(self, seed: int) -> TokenStream | MixedStream:
        """The samples of training, with `data.workers` processes behind them. Close it when done."""
        config = self.config
        pairs = [(self._of_machine(source.train), source.sizes) for source in self.sources]
        cache = UnitCache(pairs, config.workers, config.on_corrupt, config.shuffle_bytes, 60 * config.retry_minutes)
        streams = [
            TokenStream(reader, sizes, config.seq_length, seed, num_bytes, config.packing, cache, number)
            for number, ((reader, sizes), num_bytes) in enumerate(zip(pairs, self._shuffle_bytes(), strict=True))
        ]
        cache.places = sum(stream.lanes.count for stream in streams)
        if len(streams) == 1:
            return streams[0]
        return MixedStream(streams, Mixture(self.stages, seed), cache)

    @cached_property
    def has_heldout(self) -> bool:
        """Whether held-out text fills a sample; else there is no evaluation."""
        return self.fills_heldout(self.sources)

    def fills_heldout(self, sources: Sequence[Source]) -> bool:
        """Whether held-out text of some sources fills a sample."""
        reader = Joined([source.heldout for source in sources])
        return num_samples(self._measure(reader, SPLIT).num_tokens, self.config.seq_length) > 0

    def heldout_stream(self, only: Source | None = None) -> TokenStream:
        """The held-out samples of all sources, or of one, in the order in which they lie.

        Raises:
            CorpusError: they fill no sample.
        """
        reader: Reader = Joined([source.heldout for source in ([only] if only else self.sources)])
        sizes, length = self._measure(reader, SPLIT), self.config.seq_length
        if not num_samples(sizes.num_tokens, length):
            raise CorpusError(
                f"data.seq_length={length} is longer than all held-out text ({sizes.num_tokens} tokens, {length + 1} "
                f"needed): lower it, or hold out more (data.heldout_fraction={self.config.heldout_fraction} of files "
                f"as they are, heldout_fraction of prepare)"
            )
        reader = self._of_machine(reader)
        cache = UnitCache([(reader, sizes)], on_corrupt=self.config.on_corrupt)
        return TokenStream(reader, sizes, length, seed=0, shuffle_bytes=0, cache=cache)

    def check(self) -> None:
        """Raises CorpusError where a source does not fill one sample."""
        for source in self.sources:
            TokenStream(source.train, source.sizes, self.config.seq_length, 0, 0, self.config.packing).close()

    @property
    def stages(self) -> list[tuple[int, Sequence[float]]]:
        """(first sample, weights) of each stage."""
        weights = [weight for _, weight in source_weights(self.config)]
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
            "data.tokenizer": self.vocabulary.sha256,
            "data.seq_length": config.seq_length,
            "data.packing": config.packing,
            "data.subset": config.subset,
            "data.eod_token": self.eod_id,
            "data.shuffle_bytes": config.shuffle_bytes,
            "seed": seed,
            "order of this version": ORDER_VERSION,
        }
        if len(self.corpora) < len(corpus):
            found["data.column"] = config.column
        if config.subset < 1:
            found["data.subset_seed"] = config.subset_seed
        if len(corpus) > 1:
            found["data.sources (weights)"] = str([list(weights) for _, weights in self.stages])
        return found

    def _counts(self, samples: int) -> list[int]:
        """Of so many samples of a run, how many come from each source."""
        return Mixture(self.stages, seed=0).counts(samples)

    def cursors(self, samples: int) -> dict[str, dict[str, int]]:
        """How far each source has been read after so many samples of the run."""
        return {
            source.path: {"samples": count, "epoch": count // self._samples_per_epoch(source)}
            for source, count in zip(self.sources, self._counts(samples), strict=True)
        }

    def progress(self, samples: int) -> dict[str, float]:
        """Metrics of each source after so many samples of the run: times read, and tokens."""
        found: dict[str, float] = {}
        for source, count in zip(self.sources, self._counts(samples), strict=True):
            found[f"epoch/{source.path}"] = count / self._samples_per_epoch(source)
            found[f"tokens/{source.path}"] = count * self.config.seq_length
        return found

    def check_repeats(self, samples: int) -> None:
        """Refuses a run of so many samples that reads a source more often than data.max_repeats.

        Raises:
            CorpusError: the source, and how often it would be read.
        """
        limit = self.config.max_repeats
        for source, count in zip(self.sources, self._counts(samples), strict=True):
            times = count / self._samples_per_epoch(source)
            if limit is not None and times > limit:
                raise CorpusError(
                    f"data.max_repeats={limit:g}, but {source.path} would be read {times:.2f} times in "
                    f"{samples * self.config.seq_length:,} tokens: lower run.steps or its weight, or raise the limit"
                )

    def _samples_per_epoch(self, source: Source) -> int:
        if self.config.packing == BEST_FIT:
            return int(source.sizes.packed.sum())
        return num_samples(source.sizes.num_tokens, self.config.seq_length)

    def describe(self, samples: int = 0) -> list[str]:
        """Lines for the start of a run of so many samples: what each source holds, and how much of it is read."""
        lines = []
        for source, count in zip(self.sources, self._counts(samples), strict=True):
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
            if samples:
                times, tokens = count / self._samples_per_epoch(source), count * self.config.seq_length
                lines.append(f"of the run: {count / samples:.2%}, {tokens:,} tokens, read {times:.2f} times")
            lines += [f"left out: {reason}" for reason in (*source.train.left_out, *sizes.broken)]
        if not self.has_heldout:
            lines.append("no evaluation: the held-out text fills no sample")
        return lines

    def _of_machine(self, reader: Reader) -> Reader:
        """The reader, with units that the processes of this machine share."""
        if not self._shared or reader.in_process:
            return reader
        shared = Shared(reader, node_directory(self.config.node_cache), self.config.shuffle_bytes)
        self._files[shared.key] = shared
        return shared

    def _shuffle_bytes(self) -> list[int]:
        """Of each source, its share of data.shuffle_bytes: that of its samples, where it is largest."""
        shares = np.array([np.array(weights) / sum(weights) for _, weights in self.stages]).max(axis=0)
        return [max(1, int(share * self.config.shuffle_bytes)) for share in shares]

    def _open(self, path: str, corpus: Corpus | None) -> Source:
        config = self.config
        train, heldout = splits(path, corpus, config, lambda: self.tokenizer, self.listings)
        whole = None
        if config.subset < 1:
            whole = train.known()
            train = Subset(train, config.subset, config.subset_seed)
        return Source(path, train, self._measure(train, config.packing), heldout, whole)

    def _measure(self, reader: Reader, packing: str) -> Sizes:
        cache = Path(self.config.cache).expanduser()
        return count_units(reader, packing, self.config.seq_length, cache, self.config.on_corrupt == SKIP)
