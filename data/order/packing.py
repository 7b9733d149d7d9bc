"""Packing: how documents fill samples of one length. Two ways:

split       The stream of documents is laid end to end and cut. Sample i covers the tokens [i * s, i * s + s] of the
            stream, both ends included: s + 1 tokens, the last of them again the first of the next sample, so that
            each of the s positions has its next token as target. What is left at the end of the stream and does not
            fill a sample is dropped. Every position holds a token; documents are cut wherever a sample ends.
best_fit    Whole documents are put together so that they fill samples as well as they can, unit by unit (Ding et
            al., "Fewer Truncations Improve Language Modeling", 2024: best-fit decreasing). Only a document longer
            than a sample is cut, into samples that share a token as above. What stays empty is padding.

Each token carries the number of its document within the sample, and padding the number -1; the model keeps attention,
state and targets inside a document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.read.units import Piece

PADDING = -1


class Sample(NamedTuple):
    """s + 1 tokens, and the document of each: counted from 0 within the sample, never decreasing before the padding."""

    tokens: np.ndarray  # int64 [s + 1]
    documents: np.ndarray  # int32 [s + 1]
    learned: np.ndarray | None = None  # bool [s + 1]: which count as targets; None: all


def num_samples(num_tokens: int, seq_length: int) -> int:
    """Samples of L + 1 tokens, each beginning with the last token of the one before, in a stream of tokens."""
    return max(0, (num_tokens - 1) // seq_length)


def sample_span(index: int, seq_length: int) -> tuple[int, int]:
    """First token of sample `index` in the stream, and the one after its last."""
    return index * seq_length, (index + 1) * seq_length + 1


def overlaps(ends: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The items in [start, stop) of a layout, as (item, first, after its last) counted inside the item.

    `ends` int64 [items]: where each item ends when all are laid end to end. An item may hold nothing.
    """
    first, last = ends.searchsorted((start, stop - 1), side="right").tolist()
    begin = int(ends[first - 1]) if first else 0
    for item, end in enumerate(ends[first : last + 1].tolist(), first):
        after = min(stop, end)
        if start < after:
            yield item, start - begin, after - begin
        start, begin = after, end


def pack(pieces: Sequence[Piece]) -> Sample:
    """Joins the pieces of a sample, each from a document of its own."""
    parts = [piece.tokens for piece in pieces]
    tokens = np.concatenate(parts, dtype=np.int64)  # one pass over them: a copy to widen costs more than the rest
    documents = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(part) for part in parts])
    if all(piece.learned is None for piece in pieces):
        return Sample(tokens, documents)
    masks = [np.ones(len(own.tokens), dtype=bool) if own.learned is None else own.learned for own in pieces]
    return Sample(tokens, documents, np.concatenate(masks))


def pad(sample: Sample, length: int, token: int) -> Sample:
    """The sample with padding up to `length` tokens."""
    missing = length - len(sample.tokens)
    return Sample(
        np.pad(sample.tokens, (0, missing), constant_values=token),
        np.pad(sample.documents, (0, missing), constant_values=PADDING),
        None if sample.learned is None else np.pad(sample.learned, (0, missing)),
    )


@dataclass(frozen=True)
class Bins:
    """Samples of best-fit packing: number i is made of the pieces [ends[i - 1], ends[i])."""

    documents: np.ndarray  # int64 [pieces]: which document
    starts: np.ndarray  # int64 [pieces]: its first token in the sample
    stops: np.ndarray  # int64 [pieces]: the one after its last
    ends: np.ndarray  # int64 [samples]

    def pieces(self, index: int) -> Iterator[tuple[int, int, int]]:
        """(document, first token, after its last) of each piece of a sample."""
        here = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        return zip(self.documents[here].tolist(), self.starts[here].tolist(), self.stops[here].tolist(), strict=True)


def best_fit(lengths: np.ndarray, seq_length: int) -> Bins:
    """Packs documents of `lengths` (int64 [documents]) into samples of seq_length + 1 tokens, best-fit decreasing.

    The longest piece goes first, each into the fullest sample that still has room for it, or else a new one. A pure
    function of its arguments; n pieces cost O(n (log n + seq_length / 64)) time.
    """
    capacity = seq_length + 1
    documents, starts, stops = _cut(lengths, seq_length)
    sizes = stops - starts
    order = np.argsort(-sizes, kind="stable")
    sample_of = np.empty(len(order), dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # free tokens -> samples that have so many
    free, count = 0, 0  # bit r of `free`: there is a sample with r free tokens
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = free >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            sample = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
        else:
            room, sample, count = capacity, count, count + 1
        sample_of[piece] = sample
        if room > size:
            with_room.setdefault(room - size, []).append(sample)
            free |= 1 << (room - size)
    by_sample = np.argsort(sample_of, kind="stable")
    ends = np.cumsum(np.bincount(sample_of, minlength=count))
    return Bins(documents[by_sample], starts[by_sample], stops[by_sample], ends)


def _cut(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most seq_length + 1 tokens: (document, first token, after its last), each int64 [pieces]."""
    counts = np.maximum(1, -(-(lengths - 1) // seq_length))
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * seq_length
    return documents, starts, np.minimum(starts + seq_length + 1, lengths[documents])
