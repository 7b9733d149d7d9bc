"""What a run trains on: the sources that its settings name, opened, measured and mixed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.config import DIRECT_ENDINGS, DataConfig, source_paths
from data.errors import CorpusError
from data.order.index import measure
from data.order.mixture import MixedStream, Mixture
from data.order.packing import BEST_FIT, SPLIT, num_samples
from data.order.stream import ORDER_VERSION, TokenStream, permutation
from data.prepare.embedded import EMBEDDED
from data.prepare.prepare import embedded_corpus
from data.read.corpus import Corpus
from data.read.manifest import HELDOUT, TRAIN, is_corpus
from data.read.megatron_files import MegatronReader, megatron_prefix
from data.read.pool import SKIP, UnitCache
from data.read.readers import ChosenUnits, Joined, PreparedReader, Reader, Subset, digest_of
from data.read.remote import list_files
from data.read.row_files import ArrowReader, JsonlReader, ParquetReader
from data.read.units import Sizes
from data.text.tokenizer import Tokenizer

KINDS: tuple[Callable[..., Reader], ...] = (ParquetReader, JsonlReader, ArrowReader)
READERS = dict(zip(DIRECT_ENDINGS, KINDS, strict=True))


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
        prepared = {path: _prepared(path, config) for path in paths}
        corpora = {path: Corpus.open(directory) for path, directory in prepared.items() if directory is not None}
        self.corpora = list(corpora.values())
        self.tokenizer = _tokenizer(config, corpora)
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
            lines += [f"left out: {reason}" for reason in sizes.broken]
        return lines

    def _open(self, path: str, corpus: Corpus | None) -> Source:
        config = self.config
        train, heldout = self._splits(path, corpus)
        whole = train.known()
        if config.subset < 1:
            train = Subset(train, config.subset, config.subset_seed)
        return Source(path, train, self._measure(train, config.packing), heldout, whole)

    def _splits(self, path: str, corpus: Corpus | None) -> tuple[Reader, Reader]:
        """Readers for training and of held-out documents."""
        if corpus is not None:
            return PreparedReader(corpus, TRAIN), PreparedReader(corpus, HELDOUT)
        return _split_units(_direct(path, self.config, self.tokenizer), self.config.heldout_fraction)

    def _measure(self, reader: Reader, packing: str) -> Sizes:
        cache = Path(self.config.cache).expanduser()
        return measure(reader, packing, self.config.seq_length, cache, self.config.on_corrupt == SKIP)


def _prepared(path: str, config: DataConfig) -> Path | None:
    """The directory of a corpus made by prepare (the embedded one is made first); None for other sources."""
    if path == EMBEDDED:
        return embedded_corpus(config)
    directory = Path(path).expanduser()
    return directory if is_corpus(directory) else None


def _tokenizer(config: DataConfig, corpora: dict[str, Corpus]) -> Tokenizer:
    """The one tokenizer of all sources."""
    given = {path: corpus.tokenizer() for path, corpus in corpora.items()}
    if config.tokenizer:
        given["data.tokenizer"] = Tokenizer.from_path(config.tokenizer, config.eod_token)
    if not given:
        raise CorpusError(
            f"data.tokenizer must be given: {source_paths(config)[0][0]} is no corpus made by prepare, so name the "
            f"tokenizer.json that its tokens are of, or that its text is to be tokenized with"
        )
    (first, tokenizer), *others = given.items()
    for path, other in others:
        if (other.sha256, other.eod_id) != (tokenizer.sha256, tokenizer.eod_id):
            raise CorpusError(f"{path} and {first} have different tokenizers: sources that are mixed must share one")
    return tokenizer


def _direct(path: str, config: DataConfig, tokenizer: Tokenizer) -> Reader:
    """The reader of files that prepare has not seen."""
    prefix = megatron_prefix(path)
    if prefix is not None:
        return MegatronReader(path, prefix, tokenizer)
    files = list_files(path, DIRECT_ENDINGS)
    endings = {Path(file.path).suffix for file in files}
    if len(endings) > 1:
        raise CorpusError(f"data.corpus={path} mixes {' and '.join(sorted(endings))}: give files of one kind")
    return READERS[endings.pop()](path, files, config.column, tokenizer)


def _split_units(reader: Reader, heldout_fraction: float) -> tuple[Reader, Reader]:
    """Readers for training and of held-out units, the same in every run."""
    count = max(1, round(heldout_fraction * reader.num_units)) if heldout_fraction else 0
    if count >= reader.num_units:
        raise CorpusError(
            f"data.corpus={reader.path} has {reader.num_units} unit (row group, or piece of a file), and {count} would "
            f"be held out for evaluation: write it in smaller row groups, or prepare it"
        )
    order = permutation(reader.num_units, 0)
    return ChosenUnits(reader, sorted(order[count:])), ChosenUnits(reader, sorted(order[:count]))
