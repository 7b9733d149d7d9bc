"""Settings of data: fields, their defaults and what they mean. The checks stand beside the parts that they are of."""

from dataclasses import dataclass, field

EMBEDDED = "embedded"  # as a corpus or an input: the standard-library sources of this Python
EOD_TOKEN = "<|endoftext|>"
TRAIN_TOKENIZER = "train"
TRAIN_SPLIT = "train"
UNIT_BYTES = 2**24
SPLIT, BEST_FIT = PACKINGS = ("split", "best_fit")
STOP, SKIP = ON_CORRUPT = ("stop", "skip")
CONTINUE = "continue"
ON_CHANGE = (STOP, CONTINUE)
SAMPLE_BY = ("document", "paragraph", "line")
HELDOUT_FRACTION, HELDOUT_TOKENS = 0.01, 10_000_000  # the smaller of them is held out


def setting[T](default: T, text: str) -> T:
    """A field of settings: its default and what it means."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DataConfig:
    """What a run trains on."""

    corpus: str = setting(
        EMBEDDED,
        "directory or URL made by prepare, or embedded: the standard-library sources of this Python; or files "
        "read as they are: .parquet, .jsonl, .json or .arrow (a directory, a pattern, a URL: s3://..., hf://..., "
        "https://...), or Megatron's .bin and .idx",
    )
    sources: tuple[tuple[str, float], ...] = setting(
        (), "[[path, weight], ...]: several sources mixed, in place of data.corpus"
    )
    sources_file: str = setting(
        "", "file of YAML or JSON, {path: weight, ...}, in place of data.sources: for mixtures that a program writes"
    )
    max_repeats: float | None = setting(
        None, "times that a run may read a source, at most; null lets it start over as often as it must"
    )
    stages: tuple[tuple[int, tuple[float, ...]], ...] = setting(
        (), "[[tokens, [weight, ...]], ...]: from so many tokens on, other weights of the sources"
    )
    subset: float = setting(1.0, "share of the tokens to train on, in whole units from all over each source")
    subset_seed: int = setting(0, "chooses what data.subset keeps")
    packing: str = setting(
        SPLIT, "documents to samples: split (end to end, then cut) or best_fit (whole where they fit)"
    )
    column: str = setting("text", "column of files read as they are: text, or lists of token ids")
    split: str = setting(
        TRAIN_SPLIT, "split of a directory of files read as they are, by the names of its files and folders"
    )
    tokenizer: str = setting("", "tokenizer.json, or its directory, of files read as they are")
    eod_token: str = setting(EOD_TOKEN, "the token of data.tokenizer that ends each document")
    heldout_fraction: float = setting(
        HELDOUT_FRACTION, "share of files read as they are that is kept for evaluation; 0: none, and no evaluation"
    )
    heldout_tokens: int = setting(HELDOUT_TOKENS, "about how many tokens of them are kept for evaluation at most")
    unit_bytes: int = setting(
        UNIT_BYTES, "how much of JSON lines, arrow and Megatron files, read as they are, is read together"
    )
    shuffle_bytes: int = setting(
        2**34, "bytes of tokens in open units, over all processes, that samples are drawn from at once"
    )
    node_cache: str = setting(
        "", "directory where the processes of a machine share units, on its own disk; empty: a temporary one"
    )
    workers: int = setting(0, "processes that read ahead, for each training process; 0 reads in a thread")
    on_corrupt: str = setting(STOP, "a damaged part of a corpus ends the run (stop), or is left out and counted (skip)")
    on_change: str = setting(
        STOP, "resuming on other data, seed or packing is refused (stop), or goes on at that sample (continue)"
    )
    skip: tuple[tuple[int, int], ...] = setting(
        (), "[[first, last], ...]: samples, counted from 0 in the order of training, that are left out"
    )
    retry_minutes: float = setting(
        30.0, "minutes for which a storage that is away is asked again, before a run saves and stops"
    )
    seq_length: int = setting(256, "tokens of a training sample")
    vocab_size: int = setting(2048, "size of the tokenizer trained for the embedded corpus; others bring theirs")
    cache: str = setting(".cache/corpus", "directory that keeps the embedded corpus once it is tokenized")


@dataclass(frozen=True)
class PrepareConfig:
    """How raw text becomes a corpus."""

    input: str = field(
        metadata={
            "help": "file, directory, pattern or URL (s3://..., hf://..., https://...) of .parquet, .jsonl, .json, "
            ".arrow or .txt (JSON and text also .gz, .bz2, .xz, .zst), the name of a dataset on the Hugging Face hub, "
            "or embedded: the standard-library sources of this Python"
        }
    )
    output: str = field(metadata={"help": "directory or URL of the corpus to make; must not exist yet, or be empty"})
    tokenizer: str = setting(
        TRAIN_TOKENIZER, "tokenizer.json of any Hugging Face model or its directory, or train: a byte-level BPE"
    )
    vocab_size: int = setting(32768, "tokens of the BPE, with tokenizer=train")
    train_bytes: int = setting(2**30, "how much text from the start the BPE learns from, with tokenizer=train")
    eod_token: str = setting(EOD_TOKEN, "the token of the given tokenizer that ends each document")
    text_column: str = setting("text", "column of text, or of lists of the given tokenizer's ids; a.b for nested ones")
    sample_by: str = setting("document", "a document of a .txt file: the whole file (document), a paragraph or a line")
    dataset_config: str | None = setting(None, "configuration (subset) of a hub dataset")
    dataset_split: str = setting(TRAIN_SPLIT, "split to read of a directory, by its names, or of a hub dataset")
    shard_tokens: int = setting(2**24, "tokens after which a new shard begins")
    heldout_fraction: float = setting(HELDOUT_FRACTION, "share of documents kept for evaluation; 0 keeps none")
    heldout_tokens: int = setting(HELDOUT_TOKENS, "about how many tokens are kept for evaluation at most")
    seed: int = setting(0, "chooses which documents are held out")
    shuffle: int | None = setting(
        None, "seed of an order that mixes documents from all over the input; null: as they lie"
    )
    on_corrupt: str = setting(STOP, "a row or file that cannot be read ends the work (stop), or is left out (skip)")
    piece_bytes: int | None = setting(
        None, "how much text one process works on at a time; null: a 1024th of the input, from 16 MiB to 1 GiB"
    )
    part: str | None = setting(None, "3/64: work on the third of 64 parts, on another machine, for prepare --join")
    processes: int | None = setting(None, "processes that tokenize; null: one a core; the corpus does not depend on it")
