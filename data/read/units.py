"""Units: the documents that lie and are read together (a shard, a row group, a piece of a file)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.read.faults import BrokenUnit


class Piece(NamedTuple):
    """Neighbouring tokens of a document, and which of them count as targets; None: all."""

    tokens: np.ndarray
    learned: np.ndarray | None = None


@dataclass(frozen=True)
class Unit:
    """The documents of one unit, each with its end-of-document token last.

    Number d is `tokens[starts[d] : starts[d] + lengths[d]]`. `learned` says which tokens count as targets; None: all.
    """

    tokens: np.ndarray  # uint16 or int32 [tokens]
    starts: np.ndarray  # int64 [documents]
    lengths: np.ndarray  # int64 [documents], each at least 1
    empty: int = 0  # documents left out because they hold nothing
    learned: np.ndarray | None = None  # bool [tokens]

    @classmethod
    def from_lengths(
        cls, tokens: np.ndarray, lengths: np.ndarray, empty: int = 0, learned: np.ndarray | None = None
    ) -> "Unit":
        """Documents that lie end to end."""
        return cls(tokens, np.cumsum(lengths) - lengths, lengths, empty, learned)

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def document(self, index: int) -> np.ndarray:
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]

    def learned_of(self, index: int) -> np.ndarray | None:
        """bool [tokens] of a document: which count as targets; None: all."""
        start = self.starts[index]
        return None if self.learned is None else self.learned[start : start + self.lengths[index]]

    def piece(self, first: int, last: int) -> Piece:
        """Tokens [first, last) of the unit, which are a document's."""
        return Piece(self.tokens[first:last], None if self.learned is None else self.learned[first:last])

    def keep(self, kept: np.ndarray) -> "Unit":
        """The documents where `kept` (bool [documents]) is true; no token is copied."""
        return Unit(self.tokens, self.starts[kept], self.lengths[kept], self.empty, self.learned)


@dataclass(frozen=True)
class Sizes:
    """How much each unit holds: all that the order of samples needs to know of a source.

    `empty` counts documents left out because they hold no token. `samples` is there for best-fit packing alone.
    `digest` is equal for equal documents in equal units; `broken` says which units hold nothing because they are.
    """

    documents: np.ndarray  # int64 [units]
    tokens: np.ndarray  # int64 [units]
    empty: np.ndarray  # int64 [units]
    digest: str
    samples: np.ndarray | None = None  # int64 [units]
    broken: tuple[str, ...] = ()

    @property
    def num_documents(self) -> int:
        return int(self.documents.sum())

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def packed(self) -> np.ndarray:
        """`samples`, for best-fit packing."""
        assert self.samples is not None
        return self.samples


def ended(
    tokens: np.ndarray, lengths: np.ndarray, appends: bool, eod_id: int, vocab_size: int, label: str, empty: int
) -> Unit:
    """Documents that lie end to end, with an end-of-document token put behind each where they have none.

    Args:
        appends: they have none; else each must have it.
        label: names the unit in errors.
    Raises:
        BrokenUnit: a token outside the vocabulary, or documents of both kinds.
    """
    dtype = token_dtype(vocab_size)
    if len(tokens) and (tokens.max() >= vocab_size or tokens.min() < 0):
        worst = tokens.max() if tokens.max() >= vocab_size else tokens.min()
        raise BrokenUnit(f"{label} holds token {worst}, outside the vocabulary of {vocab_size}")
    has_eod = tokens[np.cumsum(lengths) - 1] == eod_id
    if has_eod.any() if appends else not has_eod.all():
        raise BrokenUnit(
            f"{label} holds documents with and without the end-of-document token {eod_id} as their last: all must "
            f"have it, or none"
        )
    if not appends:
        return Unit.from_lengths(tokens.astype(dtype, copy=False), lengths, empty)
    lengths = lengths + 1
    ends = np.cumsum(lengths)
    filled = np.empty(len(tokens) + len(lengths), dtype=dtype)
    own = np.ones(len(filled), dtype=bool)
    own[ends - 1] = False
    filled[own] = tokens
    filled[ends - 1] = eod_id
    return Unit.from_lengths(filled, lengths, empty)


def token_dtype(vocab_size: int) -> np.dtype:
    """What the tokens of a vocabulary are stored as."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
