"""Checks of prepare's settings, before any text is read."""

import re

from data.config import CHAT, EMBEDDED, EOD_TOKEN, FORMATS, ON_CORRUPT, SAMPLE_BY, TRAIN_TOKENIZER, PrepareConfig
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
    check_choice("on_corrupt", config.on_corrupt, ON_CORRUPT)
    for setting, value in (("heldout_tokens", config.heldout_tokens), ("shuffle", config.shuffle or 0)):
        if value < 0:
            raise CorpusError(f"{setting}={value} is negative: use 0 or more")
    if config.piece_bytes is not None and config.piece_bytes < 1:
        raise CorpusError(f"piece_bytes={config.piece_bytes} leaves nothing to work on: use 1 or more, or null")
    check_choice("format", config.format, FORMATS)
    if config.format == CHAT and (config.tokenizer == TRAIN_TOKENIZER or config.input == EMBEDDED):
        raise CorpusError("format=chat needs conversations and the tokenizer that they are rendered for: name both")
    part_of(config.part)
    if config.part is not None and config.tokenizer == TRAIN_TOKENIZER:
        raise CorpusError(
            f"part={config.part} needs a tokenizer that all parts share: train one first (prepare a few files without "
            f"part=) and name it with tokenizer="
        )


def part_of(part: str | None) -> tuple[int, int]:
    """(0, 1) of None, (2, 64) of "3/64": the number of a part counted from 0, and how many there are.

    Raises:
        CorpusError: it is written otherwise, or there is no such part.
    """
    if part is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise CorpusError(f"part={part} is no part: write 3/64 for the third of 64, from 1/64 to 64/64")
    return int(match[1]) - 1, int(match[2])
