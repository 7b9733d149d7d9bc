"""Checks of prepare's settings, before any text is read."""

from data.config import EOD_TOKEN, SAMPLE_BY, TRAIN_TOKENIZER, PrepareConfig
from data.errors import CorpusError, check_choice
from data.text.tokenizer import check_vocab_size

# Offsets of a shard's documents are 32-bit, and a shard is read whole.
MAX_SHARD_TOKENS = 2**30


def check_prepare(config: PrepareConfig) -> None:
    """Refuses settings that cannot work.

    Raises:
        CorpusError: the setting, in one line.
    """
    if not config.input:
        raise CorpusError("input= is empty: name a file, a directory, a dataset or embedded")
    if not config.output:
        raise CorpusError("output= is empty: name the corpus directory to make")
    if config.tokenizer == TRAIN_TOKENIZER:
        check_vocab_size("vocab_size", config.vocab_size)
        if config.eod_token != EOD_TOKEN:
            raise CorpusError(f"eod_token={config.eod_token} is for a given tokenizer; train has {EOD_TOKEN}")
    if config.train_bytes < 1:
        raise CorpusError(f"train_bytes={config.train_bytes} leaves no text to learn from: use 1 or more")
    check_choice("sample_by", config.sample_by, SAMPLE_BY)
    if not 1 <= config.shard_tokens <= MAX_SHARD_TOKENS:
        raise CorpusError(f"shard_tokens={config.shard_tokens} is out of range: use 1 to {MAX_SHARD_TOKENS}")
    if not 0 <= config.heldout_fraction < 1:
        raise CorpusError(f"heldout_fraction={config.heldout_fraction} is out of range: use 0 or more, below 1")
    if config.processes is not None and config.processes < 1:
        raise CorpusError(f"processes={config.processes} cannot tokenize: use 1 or more, or null for one a core")
