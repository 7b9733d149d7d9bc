"""The work of prepare: pieces of the input, each read, tokenized and written by one process.

Which units make a piece follows from the input alone, and what a piece gives from its units alone. So a corpus has the
same bytes for any number of processes and machines, and after any kill: a piece is finished, or is made again.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

import numpy as np

from data.errors import CorpusError
from data.prepare.heldout import is_held_out
from data.prepare.inputs import Document, Input
from data.prepare.shard_writer import ShardWriter
from data.prepare.staging import PieceRecord, Staging
from data.read.faults import BrokenUnit, Faults
from data.read.manifest import HELDOUT, SPLITS, TRAIN
from data.read.units import token_dtype
from data.read.workers import serve_parent
from data.text.tokenizer import Tokenizer

# Documents are tokenized together until they hold this many characters.
BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 1024
# A piece is a 1024th of the input within these bounds, where no size is given.
PIECES, MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1024, 2**24, 2**30
AHEAD = 2  # pieces for each process that are handed out and not yet finished


@dataclass(frozen=True)
class Job:
    """Everything that making a piece needs. Picklable.

    Attributes:
        share: of the documents that are held out.
        shuffle: seed of the order of documents; None keeps the input's.
        layout: of shards (`data.prepare.shard_writer`).
        splits: which of them are written.
    """

    input: Input
    pieces: tuple[tuple[int, ...], ...]
    tokenizer: Tokenizer
    staging: Staging
    shard_tokens: int
    share: float
    seed: int
    shuffle: int | None
    skips: bool
    layout: int
    splits: tuple[str, ...] = SPLITS


def cut_into_pieces(sizes: np.ndarray, piece_bytes: int | None, shuffle: int | None) -> tuple[tuple[int, ...], ...]:
    """The units of each piece: neighbours, or with `shuffle` some from everywhere, of about `piece_bytes` together."""
    order = np.arange(len(sizes))
    if shuffle is not None:
        words = np.random.PCG64(np.random.SeedSequence([shuffle, 0])).random_raw(len(sizes))
        order = np.argsort(words, kind="stable")
    wanted = piece_bytes or min(max(int(sizes.sum()) // PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    ends = np.cumsum(sizes[order])
    numbers = (ends - sizes[order]) // wanted
    return tuple(tuple(order[numbers == number].tolist()) for number in np.unique(numbers))


def make_pieces(job: Job, numbers: Sequence[int], processes: int) -> Iterator[PieceRecord]:
    """Makes pieces, by several processes where there is work for them; yields each as it is finished.

    Raises:
        CorpusError: something cannot be read and is not skipped, or a process was killed.
    """
    if processes == 1 or len(numbers) == 1:
        yield from (make_piece(job, number) for number in numbers)
        return
    with ProcessPoolExecutor(
        min(processes, len(numbers)), mp_context=get_context("spawn"), initializer=_start, initargs=(job,)
    ) as workers:
        waiting: set[Future[PieceRecord]] = set()
        following = iter(numbers)
        try:
            while waiting or (waiting := {workers.submit(_make_here, n) for n in islice(following, AHEAD * processes)}):
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {workers.submit(_make_here, number) for number in islice(following, len(done))}
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise CorpusError(
                f"processes={processes}: one of them was killed, which mostly means that memory ran out: choose fewer; "
                f"the same command goes on from what is finished"
            ) from error
        finally:
            workers.shutdown(wait=True, cancel_futures=True)


def make_piece(job: Job, number: int) -> PieceRecord:
    """Writes the shards of a piece, and its record after them."""
    faults = Faults()
    writers = {
        split: ShardWriter(
            job.staging.folder(split),
            f"{split}-{number:05d}",
            job.shard_tokens,
            None if job.shuffle is None else [job.shuffle, 1 + number, SPLITS.index(split)],
            job.layout,
        )
        for split in job.splits
    }
    blank = 0
    batch: list[Document] = []
    characters = 0
    for document in _documents(job, number, faults):
        if document is None:
            blank += 1
            continue
        batch.append(document)
        characters += len(document.content)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            _write(job, batch, writers)
            batch, characters = [], 0
    _write(job, batch, writers)
    shards = {split: writers[split].finish() if split in writers else () for split in SPLITS}
    record = PieceRecord(shards, blank, tuple(faults.skipped))
    job.staging.note(number, record)
    return record


def _documents(job: Job, number: int, faults: Faults) -> Iterator[Document | None]:
    for unit in job.pieces[number]:
        try:
            yield from job.input.documents(unit, faults)
        except BrokenUnit as error:
            if not job.skips:
                raise
            faults.skip(str(error))


def _write(job: Job, batch: list[Document], writers: dict[str, ShardWriter]) -> None:
    """Tokenizes documents and hands each to the writer of its split."""
    splits = [HELDOUT if is_held_out(document.key, job.share, job.seed) else TRAIN for document in batch]
    kept = [(document, split) for document, split in zip(batch, splits, strict=True) if split in writers]
    texts = [document.content for document, _ in kept if isinstance(document.content, str)]
    encoded, dtype = iter(job.tokenizer.encode_batch(texts)), token_dtype(job.tokenizer.vocab_size)
    for document, split in kept:
        if isinstance(document.content, str):
            tokens = np.array([*next(encoded), job.tokenizer.eod_id], dtype=dtype)
            num_bytes = len(document.content.encode())
        else:
            tokens = document.content.astype(dtype)
            num_bytes = int(job.tokenizer.token_bytes[tokens].sum())
        writers[split].add(tokens, num_bytes, document.name, document.learned)


_jobs: list[Job] = []  # of this worker process


def _start(job: Job) -> None:
    """First call in a worker process."""
    serve_parent()
    _jobs[:] = [job]


def _make_here(number: int) -> PieceRecord:
    return make_piece(_jobs[0], number)
