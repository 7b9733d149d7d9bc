"""Settings of data, and the checks that come before any work."""

from dataclasses import dataclass, field
from pathlib import Path

from data.errors import CorpusError
from data.files import why_unwritable
from data.order.packing import PACKINGS, SPLIT
from data.prepare.embedded import EMBEDDED, HELDOUT_FRACTION, library_root
from data.read.corpus import Corpus
from data.read.manifest import is_corpus
from data.read.megatron_files import megatron_prefix
from data.read.pool import ON_CORRUPT, STOP
from data.read.remote import is_url, list_files
from data.text.tokenizer import EOD_TOKEN, MIN_VOCAB_SIZE

TRAIN_TOKENIZER = "train"
DIRECT_ENDINGS = (".parquet", ".jsonl", ".arrow")  # of files that are read as they are
CONTINUE = "continue"
ON_CHANGE = (STOP, CONTINUE)
SAMPLE_BY = ("document", "paragraph", "line")
# Offsets of a shard's documents are 32-bit, and a shard is read whole.
MAX_SHARD_TOKENS = 2**30


@dataclass(frozen=True)
class DataConfig:
    """What a run trains on."""

    corpus: str = field(
        default=EMBEDDED,
        metadata={
            "help": "directory made by prepare, or embedded: the standard-library sources of this Python; or files "
            "read as they are: .parquet, .jsonl or .arrow (a directory, a pattern, a URL: s3://..., hf://..., "
            "https://...), or Megatron's .bin and .idx"
        },
    )
    sources: tuple[tuple[str, float], ...] = field(
        default=(), metadata={"help": "[[path, weight], ...]: several sources mixed, in place of data.corpus"}
    )
    stages: tuple[tuple[int, tuple[float, ...]], ...] = field(
        default=(),
        metadata={"help": "[[tokens, [weight, ...]], ...]: from so many tokens on, other weights of the sources"},
    )
    subset: float = field(
        default=1.0, metadata={"help": "share of the documents to train on, chosen by a seeded hash of each"}
    )
    subset_seed: int = field(default=0, metadata={"help": "chooses which documents data.subset keeps"})
    packing: str = field(
        default=SPLIT,
        metadata={"help": "documents to samples: split (end to end, then cut) or best_fit (whole where they fit)"},
    )
    column: str = field(
        default="text", metadata={"help": "column of files read as they are: text, or lists of token ids"}
    )
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json, or its directory, of files read as they are"})
    eod_token: str = field(default=EOD_TOKEN, metadata={"help": "the token of data.tokenizer that ends each document"})
    heldout_fraction: float = field(
        default=0.01, metadata={"help": "share of files read as they are (by row groups) kept for evaluation"}
    )
    workers: int = field(
        default=0, metadata={"help": "processes that read ahead, for each training process; 0 reads in a thread"}
    )
    on_corrupt: str = field(
        default=STOP,
        metadata={"help": "a damaged part of a corpus ends the run (stop), or is left out and counted (skip)"},
    )
    on_change: str = field(
        default=STOP,
        metadata={
            "help": "resuming on other data, seed or packing is refused (stop), or goes on at that sample (continue)"
        },
    )
    seq_length: int = field(default=256, metadata={"help": "tokens of a training sample"})
    vocab_size: int = field(
        default=2048,
        metadata={"help": "size of the tokenizer trained for the embedded corpus; others bring theirs"},
    )
    cache: str = field(
        default=".cache/corpus",
        metadata={"help": "directory that keeps the embedded corpus once it is tokenized"},
    )


@dataclass(frozen=True)
class PrepareConfig:
    """How raw text becomes a corpus."""

    input: str = field(
        metadata={
            "help": "file or directory of .parquet, .jsonl, .json, .txt or .arrow (text also .gz, .xz, .bz2), "
            "a URL of such files (s3://..., hf://..., https://...), the name of a dataset on the "
            "Hugging Face hub, or embedded: the standard-library sources of this Python"
        }
    )
    output: str = field(metadata={"help": "corpus directory to make; must not exist yet, or be empty"})
    tokenizer: str = field(
        default=TRAIN_TOKENIZER,
        metadata={"help": "tokenizer.json of any Hugging Face model or its directory, or train: a byte-level BPE"},
    )
    vocab_size: int = field(default=32768, metadata={"help": "tokens of the BPE, with tokenizer=train"})
    train_bytes: int = field(
        default=2**30,
        metadata={"help": "how much text from the start the BPE learns from, with tokenizer=train"},
    )
    eod_token: str = field(
        default=EOD_TOKEN, metadata={"help": "the token of the given tokenizer that ends each document"}
    )
    text_column: str = field(default="text", metadata={"help": "column that holds a document's text"})
    sample_by: str = field(
        default="document",
        metadata={"help": "a document of a .txt file: the whole file (document), a paragraph or a line"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration (subset) of a hub dataset"})
    dataset_split: str = field(default="train", metadata={"help": "split of a hub dataset to read"})
    shard_tokens: int = field(default=2**24, metadata={"help": "tokens after which a new shard begins"})
    heldout_fraction: float = field(
        default=HELDOUT_FRACTION, metadata={"help": "share of documents kept for evaluation; 0 keeps none"}
    )
    seed: int = field(default=0, metadata={"help": "chooses which documents are held out"})
    processes: int | None = field(
        default=None, metadata={"help": "processes that tokenize; null: one a core; the corpus does not depend on it"}
    )


def check_data(config: DataConfig, mtp_steps: int) -> None:
    """Refuses what cannot be trained on. Costs a manifest and one stat per shard; no token is read.

    Args:
        mtp_steps: multi-token-prediction steps; step k of position t has token t + 1 + k as its target.
    """
    if config.seq_length < mtp_steps + 2:
        raise CorpusError(
            f"data.seq_length={config.seq_length} is too short for mtp.steps={mtp_steps}: "
            f"use {mtp_steps + 2} or more, so that every prediction step has a target"
        )
    _check_choice("data.packing", config.packing, PACKINGS)
    _check_choice("data.on_corrupt", config.on_corrupt, ON_CORRUPT)
    _check_choice("data.on_change", config.on_change, ON_CHANGE)
    if not 0 < config.subset <= 1:
        raise CorpusError(f"data.subset={config.subset} is out of range: use more than 0, up to 1")
    if not 0 <= config.heldout_fraction < 1:
        raise CorpusError(f"data.heldout_fraction={config.heldout_fraction} is out of range: use 0 or more, below 1")
    for setting, value in (("data.subset_seed", config.subset_seed), ("data.workers", config.workers)):
        if value < 0:
            raise CorpusError(f"{setting}={value} is negative: use 0 or more")
    _check_sources(config)
    for path, _ in source_paths(config):
        _check_source(path, config)


def source_paths(config: DataConfig) -> tuple[tuple[str, float], ...]:
    """(path, weight) of each source."""
    return config.sources or ((config.corpus, 1.0),)


def _check_sources(config: DataConfig) -> None:
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


def _check_source(path: str, config: DataConfig) -> None:
    """Refuses a source that is not there; what lies on other machines is asked for when it is opened."""
    if path == EMBEDDED:
        _check_vocab_size("data.vocab_size", config.vocab_size)
        library_root()
        if reason := why_unwritable(Path(config.cache).expanduser()):
            raise CorpusError(f"data.cache={config.cache} cannot be written: {reason}")
    elif is_corpus(Path(path).expanduser()):
        Corpus.open(path)
    elif not is_url(path) and megatron_prefix(path) is None:
        directory = Path(path).expanduser()
        if directory.is_dir() and not any(directory.iterdir()):
            raise CorpusError(f"data.corpus={path} is empty: set it to a corpus made by prepare, or to embedded")
        list_files(path, DIRECT_ENDINGS)


def check_prepare(config: PrepareConfig) -> None:
    """Refuses settings that cannot work, before any text is read."""
    if not config.input:
        raise CorpusError("input= is empty: name a file, a directory, a dataset or embedded")
    if not config.output:
        raise CorpusError("output= is empty: name the corpus directory to make")
    if config.tokenizer == TRAIN_TOKENIZER:
        _check_vocab_size("vocab_size", config.vocab_size)
        if config.eod_token != EOD_TOKEN:
            raise CorpusError(f"eod_token={config.eod_token} is for a given tokenizer; train has {EOD_TOKEN}")
    if config.train_bytes < 1:
        raise CorpusError(f"train_bytes={config.train_bytes} leaves no text to learn from: use 1 or more")
    if config.sample_by not in SAMPLE_BY:
        raise CorpusError(f"sample_by={config.sample_by} is unknown: use one of {', '.join(SAMPLE_BY)}")
    if not 1 <= config.shard_tokens <= MAX_SHARD_TOKENS:
        raise CorpusError(f"shard_tokens={config.shard_tokens} is out of range: use 1 to {MAX_SHARD_TOKENS}")
    if not 0 <= config.heldout_fraction < 1:
        raise CorpusError(f"heldout_fraction={config.heldout_fraction} is out of range: use 0 or more, below 1")
    if config.processes is not None and config.processes < 1:
        raise CorpusError(f"processes={config.processes} cannot tokenize: use 1 or more, or null for one a core")


def _check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CorpusError(f"{setting}={value} is unknown: use {' or '.join(choices)}")


def _check_vocab_size(setting: str, vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise CorpusError(f"{setting}={vocab_size} cannot hold 256 bytes and {EOD_TOKEN}: use {MIN_VOCAB_SIZE} or more")
