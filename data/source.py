"""One source of a run: which reader its path names, what of it is held out, and the checks that cost no reading."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.config import CHAT, EMBEDDED, SKIP, DataConfig
from data.errors import CorpusError
from data.files import why_unwritable
from data.order.lanes import permutation
from data.prepare.embedded import library_root
from data.prepare.heldout import BYTES_PER_TOKEN, heldout_share
from data.prepare.prepare import embedded_corpus
from data.read.corpus import Corpus
from data.read.endings import ROW_ENDINGS
from data.read.formats import open_rows
from data.read.listing import Listing, list_files
from data.read.manifest import HELDOUT, TRAIN, is_corpus
from data.read.mapped_corpus import map_corpus
from data.read.megatron_files import MegatronReader, megatron_prefix
from data.read.prepared import PreparedReader
from data.read.readers import ChosenUnits, CutUnits, Reader
from data.read.remote import is_url
from data.read.row_reader import RowReader
from data.text.chat import chat_encoder
from data.text.tokenizer import Tokenizer, check_vocab_size

HELDOUT_SEED = 2**32 - 1  # no subset's, so that both are independent


def check_source(path: str, config: DataConfig) -> None:
    """Refuses a source that is not there; what lies on other machines is asked for when it is opened.

    Raises:
        CorpusError: the setting, in one line.
    """
    if path == EMBEDDED:
        check_vocab_size("data.vocab_size", config.vocab_size)
        library_root()
        if reason := why_unwritable(Path(config.cache).expanduser()):
            raise CorpusError(f"data.cache={config.cache} cannot be written: {reason}")
    elif is_corpus(Path(path).expanduser()):
        map_corpus(path, Path(config.cache).expanduser())
    elif not is_url(path) and megatron_prefix(path) is None:
        directory = Path(path).expanduser()
        if directory.is_dir() and not any(directory.iterdir()):
            raise CorpusError(f"data.corpus={path} is empty: set it to a corpus made by prepare, or to embedded")
        list_files(path, ROW_ENDINGS, config.split)


def prepared_directory(path: str, config: DataConfig) -> Path | str | None:
    """The directory or URL of a corpus made by prepare (the embedded one is made first); None for other sources."""
    if path == EMBEDDED:
        return embedded_corpus(config)
    place = path if is_url(path) else Path(path).expanduser()
    return place if is_corpus(place) else None


class Vocabulary(NamedTuple):
    """What training needs to know of a tokenizer, without the hundreds of megabytes that one may take."""

    sha256: str
    eod_id: int
    size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Of a tokenizer that is there."""
        return cls(tokenizer.sha256, tokenizer.eod_id, tokenizer.vocab_size)


def common_vocabulary(config: DataConfig, first_source: str, corpora: dict[str, Corpus]) -> Vocabulary:
    """The vocabulary of all sources, which must share a tokenizer. Prepared corpora know theirs."""
    given = {
        path: Vocabulary(corpus.manifest.tokenizer.sha256, corpus.eod_id, corpus.vocab_size)
        for path, corpus in corpora.items()
    }
    if config.tokenizer:
        given["data.tokenizer"] = Vocabulary.of(Tokenizer.from_path(config.tokenizer, config.eod_token))
    if not given:
        raise CorpusError(
            f"data.tokenizer must be given: {first_source} is no corpus made by prepare, so name the "
            f"tokenizer.json that its tokens are of, or that its text is to be tokenized with"
        )
    (first, vocabulary), *others = given.items()
    for path, other in others:
        if (other.sha256, other.eod_id) != (vocabulary.sha256, vocabulary.eod_id):
            raise CorpusError(f"{path} and {first} have different tokenizers: sources that are mixed must share one")
    return vocabulary


def splits(
    path: str,
    corpus: Corpus | None,
    config: DataConfig,
    tokenizer: Callable[[], Tokenizer],
    listings: dict[str, Listing],
) -> tuple[Reader, Reader]:
    """Readers of a source for training and of its held-out documents.

    Args:
        listings: of the files of each path, where they are known; what is listed here is noted there.
    """
    if corpus is not None:
        return PreparedReader(corpus, TRAIN), PreparedReader(corpus, HELDOUT)
    return _split_units(_direct(path, config, tokenizer(), listings), config.heldout_fraction, config.heldout_tokens)


def _direct(path: str, config: DataConfig, tokenizer: Tokenizer, listings: dict[str, Listing]) -> Reader:
    """The reader of files that prepare has not seen."""
    prefix = megatron_prefix(path)
    if prefix is not None and config.format == CHAT:
        raise CorpusError(f"data.format=chat reads conversations, and {path} holds token ids: leave it at text")
    if prefix is not None:
        return MegatronReader(path, prefix, tokenizer, config.unit_bytes, config.trust_index)
    cache, skips = Path(config.cache).expanduser(), config.on_corrupt == SKIP
    listing = listings[path] = listings.get(path) or list_files(path, ROW_ENDINGS, config.split)
    if config.trust_index:
        listing = replace(listing, files=[replace(file, version="") for file in listing.files])
    rows = open_rows(path, listing, config.column, skips, config.unit_bytes, cache=cache, chat=config.format == CHAT)
    chat = chat_encoder(tokenizer, config.tokenizer, config)
    return RowReader(rows, tokenizer, chat)


def _split_units(reader: Reader, fraction: float, max_tokens: int) -> tuple[Reader, Reader]:
    """Readers for training and of held-out documents, the same in every run: whole units, or of one unit a part."""
    known = reader.known()
    num_bytes = reader.num_bytes if known is None else BYTES_PER_TOKEN * known.num_tokens
    wanted = heldout_share(fraction, max_tokens, num_bytes) * reader.num_units  # in units
    order = permutation(reader.num_units, 0).tolist()
    count = round(wanted)
    if count or not wanted:
        return ChosenUnits(reader, sorted(order[count:])), ChosenUnits(reader, sorted(order[:count]))
    cut, limit = order[0], int(wanted * 2**64)
    return (
        CutUnits(reader, range(reader.num_units), cut, limit, HELDOUT_SEED, below=False),
        CutUnits(reader, [cut], cut, limit, HELDOUT_SEED),
    )
