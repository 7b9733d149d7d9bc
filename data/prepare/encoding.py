"""Documents to tokens, batch by batch, by several processes; what comes out does not depend on how many."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

from data.errors import CorpusError
from data.prepare.documents import Batch, Place, is_held_out
from data.read.manifest import HELDOUT, TRAIN
from data.read.units import token_dtype
from data.read.workers import serve_parent
from data.text.tokenizer import Tokenizer

# Encoded in this process before others are started, which takes longer than a small input does.
FIRST_BATCHES = 8
AHEAD = 3  # batches for each process that are read and not yet written


class Encoded(NamedTuple):
    """The documents of one split in a batch, blank ones with no token."""

    numbers: list[int]  # of each document in its source
    tokens: np.ndarray  # uint16 or int32 [tokens]: documents end to end, each with its end-of-document token last
    lengths: list[int]  # tokens of each
    num_bytes: list[int]  # of the UTF-8 text of each
    names: list[str]


class EncodedBatch(NamedTuple):
    """A batch of documents as tokens, by split, and the place that it begins at."""

    begin: Place
    splits: dict[str, Encoded]


@dataclass(frozen=True)
class Encoder:
    """Encodes batches; picklable, so that every process has one.

    Attributes:
        cursors: for each split the number of its first document that is wanted; those before are left out.
    """

    tokenizer: Tokenizer
    heldout_fraction: float
    seed: int
    cursors: dict[str, int]

    def encode(self, batch: Batch) -> EncodedBatch:
        """A batch's documents by split."""
        chosen: dict[str, list[int]] = {split: [] for split in self.cursors}
        for number, document in enumerate(batch.documents, batch.begin.number):
            split = HELDOUT if is_held_out(document, self.heldout_fraction, self.seed) else TRAIN
            if number >= self.cursors[split]:
                chosen[split].append(number)
        return EncodedBatch(batch.begin, {split: self._encode(batch, numbers) for split, numbers in chosen.items()})

    def _encode(self, batch: Batch, numbers: list[int]) -> Encoded:
        documents = [batch.documents[number - batch.begin.number] for number in numbers]
        texts = [document.text for document in documents if document.text.strip()]
        filled = iter(self.tokenizer.encode_batch(texts))
        ids = [[*next(filled), self.tokenizer.eod_id] if document.text.strip() else [] for document in documents]
        lengths = [len(own) for own in ids]
        dtype = token_dtype(self.tokenizer.vocab_size)
        tokens = np.fromiter(chain.from_iterable(ids), dtype=dtype, count=sum(lengths))
        num_bytes = [len(document.text.encode()) for document in documents]
        return Encoded(numbers, tokens, lengths, num_bytes, [document.name for document in documents])


def encode_all(encoder: Encoder, batches: Iterable[Batch], processes: int) -> Iterator[EncodedBatch]:
    """Every batch encoded, in the order in which they come; memory holds AHEAD of them for each process.

    Raises:
        CorpusError: a process was killed.
    """
    batches = iter(batches)
    first = batches if processes == 1 else islice(batches, FIRST_BATCHES)
    yield from map(encoder.encode, first)
    following = next(batches, None)
    if following is None:
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_start, initargs=(encoder,)
    ) as workers:
        try:
            yield from _in_order(workers, chain([following], batches), AHEAD * processes)
        except BrokenProcessPool as error:
            raise CorpusError(
                f"processes={processes}: one of them was killed, which mostly means that memory ran out: choose fewer; "
                f"the same command goes on from what is finished"
            ) from error
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _in_order(workers: ProcessPoolExecutor, batches: Iterator[Batch], ahead: int) -> Iterator[EncodedBatch]:
    waiting: deque[Future[EncodedBatch]] = deque()
    for batch in batches:
        waiting.append(workers.submit(_encode_here, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_encoders: list[Encoder] = []  # of this worker process


def _start(encoder: Encoder) -> None:
    """First call in a worker process."""
    serve_parent()
    _encoders[:] = [encoder]


def _encode_here(batch: Batch) -> EncodedBatch:
    return _encoders[0].encode(batch)
