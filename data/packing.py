"""Packing: a stream of documents laid end to end, cut into samples of one length.

Sample i covers the tokens [i * s, i * s + s] of the stream, both ends included: s + 1 tokens, the last of
them again the first of the next sample, so that each of the s positions has its next token as target. What is
left at the end of the stream and does not fill a sample is dropped. Each token carries the number of its
document within the sample; the model keeps attention, state and targets inside a document.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """s + 1 tokens, and the document of each: counted from 0 within the sample, never decreasing."""

    tokens: np.ndarray  # int64 [s + 1]
    documents: np.ndarray  # int32 [s + 1]


def num_samples(num_tokens: int, seq_length: int) -> int:
    return max(0, (num_tokens - 1) // seq_length)


def sample_span(index: int, seq_length: int) -> tuple[int, int]:
    """First token of sample `index` in the stream, and the one after its last."""
    return index * seq_length, (index + 1) * seq_length + 1


def overlaps(ends: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The items in [start, stop) of a layout, as (item, first, after its last) counted inside the item.

    `ends` int64 [items]: where each item ends when all are laid end to end. Items hold at least one token.
    """
    item = int(np.searchsorted(ends, start, side="right"))
    while item < len(ends) and start < stop:
        begin = int(ends[item - 1]) if item else 0
        after = min(stop, int(ends[item]))
        yield item, start - begin, after - begin
        start = after
        item += 1


def pack(pieces: Sequence[np.ndarray]) -> Sample:
    """Joins the pieces of a sample, each from a document of its own."""
    tokens = np.concatenate(pieces).astype(np.int64)
    documents = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
    return Sample(tokens, documents)
