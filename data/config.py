"""Settings of data: fields, their defaults and what they mean. The checks stand beside the parts that they are of."""

from dataclasses import dataclass
from typing import Annotated

EMBEDDED = "embedded"  # as a corpus or an input: the standard-library sources of this Python
EOD_TOKEN = "<|endoftext|>"
TRAIN_TOKENIZER = "train"
TRAIN_SPLIT = "train"
UNIT_BYTES = 2**24
SPLIT, BEST_FIT = PACKINGS = ("split", "best_fit")
STOP, SKIP = ON_CORRUPT = ("stop", "skip")
CONTINUE = "continue"
ON_CHANGE = (STOP, CONTINUE)
TEXT, CHAT = FORMATS = ("text", "chat")
FORMAT_HELP = "what a row is: text (or token ids), or chat: a list of messages that a chat template renders"
TEMPLATE_HELP = "file of the template of format=chat; empty: the one beside the tokenizer"
ROLES_HELP = "whose messages are targets of the loss, with format=chat; others are only read"
SAMPLE_BY = ("document", "paragraph", "line")
HELDOUT_FRACTION, HELDOUT_TOKENS = 0.01, 10_000_000  # the smaller of them is held out


@dataclass(frozen=True)
class DataConfig:
    """What a run trains on."""

    corpus: Annotated[
        str,
        "directory or URL made by prepare, or embedded: the standard-library sources of this Python; or files read as "
        "they are: .parquet, .jsonl, .json or .arrow (a directory, a pattern, a URL: s3://..., hf://..., https://...), "
        "or Megatron's .bin and .idx",
    ] = EMBEDDED
    sources: Annotated[
        tuple[tuple[str, float], ...],
        "[[path, weight], ...]: several sources mixed, in place of data.corpus",
    ] = ()
    sources_file: Annotated[
        str,
        "file of YAML or JSON, {path: weight, ...}, in place of data.sources: for mixtures that a program writes",
    ] = ""
    max_repeats: Annotated[
        float | None,
        "times that a run may read a source, at most; null lets it start over as often as it must",
    ] = None
    stages: Annotated[
        tuple[tuple[int, tuple[float, ...]], ...],
        "[[tokens, [weight, ...]], ...]: from so many tokens on, other weights of the sources",
    ] = ()
    subset: Annotated[float, "share of the tokens to train on, in whole units from all over each source"] = 1.0
    subset_seed: Annotated[int, "chooses what data.subset keeps"] = 0
    packing: Annotated[
        str,
        "documents to samples: split (end to end, then cut) or best_fit (whole where they fit)",
    ] = SPLIT
    column: Annotated[str, "column of files read as they are: text, lists of token ids, or conversations"] = "text"
    format: Annotated[str, FORMAT_HELP] = TEXT
    chat_template: Annotated[str, TEMPLATE_HELP] = ""
    chat_roles: Annotated[tuple[str, ...], ROLES_HELP] = ("assistant",)
    split: Annotated[
        str,
        "split of a directory of files read as they are, by the names of its files and folders",
    ] = TRAIN_SPLIT
    tokenizer: Annotated[str, "tokenizer.json, or its directory, of files read as they are"] = ""
    eod_token: Annotated[str, "the token of data.tokenizer that ends each document"] = EOD_TOKEN
    heldout_fraction: Annotated[
        float,
        "share of files read as they are that is kept for evaluation; 0: none, and no evaluation",
    ] = HELDOUT_FRACTION
    heldout_tokens: Annotated[int, "about how many tokens of them are kept for evaluation at most"] = HELDOUT_TOKENS
    unit_bytes: Annotated[
        int,
        "how much of JSON lines, arrow and Megatron files, read as they are, is read together",
    ] = UNIT_BYTES
    shuffle_bytes: Annotated[
        int,
        "bytes of tokens in open units, over all processes, that samples are drawn from at once",
    ] = 2**34
    node_cache: Annotated[
        str,
        "directory where the processes of a machine share units, on its own disk; empty: a temporary one",
    ] = ""
    workers: Annotated[int, "processes that read ahead, for each training process; 0 reads in a thread"] = 0
    on_corrupt: Annotated[
        str,
        "a damaged part of a corpus ends the run (stop), or is left out and counted (skip)",
    ] = STOP
    on_change: Annotated[
        str,
        "resuming on other data, seed or packing is refused (stop), or goes on at that sample (continue)",
    ] = STOP
    skip: Annotated[
        tuple[tuple[int, int], ...],
        "[[first, last], ...]: samples, counted from 0 in the order of training, that are left out",
    ] = ()
    retry_minutes: Annotated[
        float,
        "minutes for which a storage that is away is asked again, before a run saves and stops",
    ] = 30.0
    seq_length: Annotated[int, "tokens of a training sample"] = 256
    vocab_size: Annotated[int, "size of the tokenizer trained for the embedded corpus; others bring theirs"] = 2048
    cache: Annotated[
        str,
        "directory that keeps what was counted of each source, and the embedded corpus once tokenized",
    ] = ".cache/corpus"
    trust_index: Annotated[
        bool,
        "files of the same names and sizes are those that were counted, whatever their times, as after a copy",
    ] = False


@dataclass(frozen=True)
class PrepareConfig:
    """How raw text becomes a corpus."""

    input: Annotated[
        str,
        "file, directory, pattern or URL (s3://..., hf://..., https://...) of .parquet, .jsonl, .json, .arrow or .txt "
        "(JSON and text also .gz, .bz2, .xz, .zst), the name of a dataset on the Hugging Face hub, or embedded: the "
        "standard-library sources of this Python",
    ]
    output: Annotated[str, "directory or URL of the corpus to make; must not exist yet, or be empty"]
    tokenizer: Annotated[
        str,
        "tokenizer.json of any Hugging Face model or its directory, or train: a byte-level BPE",
    ] = TRAIN_TOKENIZER
    vocab_size: Annotated[int, "tokens of the BPE, with tokenizer=train"] = 32768
    train_bytes: Annotated[int, "how much text from the start the BPE learns from, with tokenizer=train"] = 2**30
    eod_token: Annotated[str, "the token of the given tokenizer that ends each document"] = EOD_TOKEN
    text_column: Annotated[
        str,
        "column of text, or of lists of the given tokenizer's ids; a.b for nested ones",
    ] = "text"
    format: Annotated[str, FORMAT_HELP] = TEXT
    chat_template: Annotated[str, TEMPLATE_HELP] = ""
    chat_roles: Annotated[tuple[str, ...], ROLES_HELP] = ("assistant",)
    sample_by: Annotated[
        str,
        "a document of a .txt file: the whole file (document), a paragraph or a line",
    ] = "document"
    dataset_config: Annotated[str | None, "configuration (subset) of a hub dataset"] = None
    dataset_split: Annotated[str, "split to read of a directory, by its names, or of a hub dataset"] = TRAIN_SPLIT
    shard_tokens: Annotated[
        int,
        "tokens after which a new shard begins; small ones mix more widely in training",
    ] = 2**23
    heldout_fraction: Annotated[float, "share of documents kept for evaluation; 0 keeps none"] = HELDOUT_FRACTION
    heldout_tokens: Annotated[int, "about how many tokens are kept for evaluation at most"] = HELDOUT_TOKENS
    seed: Annotated[int, "chooses which documents are held out"] = 0
    shuffle: Annotated[
        int | None,
        "seed of an order that mixes documents from all over the input; null: as they lie",
    ] = None
    on_corrupt: Annotated[str, "a row or file that cannot be read ends the work (stop), or is left out (skip)"] = STOP
    piece_bytes: Annotated[
        int | None,
        "how much text one process works on at a time; null: a 1024th of the input, from 16 MiB to 1 GiB",
    ] = None
    part: Annotated[str | None, "3/64: work on the third of 64 parts, on another machine, for prepare --join"] = None
    processes: Annotated[
        int | None,
        "processes that tokenize; null: one a core; the corpus does not depend on it",
    ] = None
