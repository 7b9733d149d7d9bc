"""The order of training: samples by number, and batches of them by step.

The order is a pure function of (seed, epoch, sample number). Rank and world size only choose which slice is
read, so the whole state of a run's data is its step, and a run goes on with any number of processes.
"""

import hashlib
import queue
import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from data.batches import Batch, BatchSchedule
from data.corpus import Corpus
from data.errors import CorpusError
from data.packing import Sample, num_samples, overlaps, pack, sample_span
from data.shards import Shard

# A sample rarely spans more than two shards; the others serve the next samples of the other microbatches.
OPEN_SHARDS = 4
PREFETCH_STEPS = 2
# Samples are dealt out at random within windows of this many, so that a batch is not a few long documents in a
# row; a window spans few shards, so that reading stays local.
WINDOW_SAMPLES = 4096
# Part of the fingerprint: raise it when the order of samples changes, so that no run resumes in another one.
ORDER_VERSION = 2


class TokenStream:
    """The endless stream of samples of one split, epoch after epoch.

    With `shuffle` each epoch has an order of its own: of the shards, of the documents within each shard, and of
    the samples within each window of WINDOW_SAMPLES.
    Not for two threads at a time. CorpusError where the split does not fill a single sample.
    """

    def __init__(self, corpus: Corpus, split: str, seq_length: int, seed: int, shuffle: bool = True) -> None:
        num_tokens = corpus.totals(split).tokens
        self.samples_per_epoch = num_samples(num_tokens, seq_length)
        if self.samples_per_epoch == 0:
            raise CorpusError(
                f"data.seq_length={seq_length} is longer than the whole {split} split of {corpus.path} "
                f"({num_tokens} tokens, {seq_length + 1} needed): lower it or prepare more text"
            )
        if seed < 0:
            raise CorpusError(f"seed={seed} is negative: use 0 or more")
        self.corpus = corpus
        self.split = split
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle = shuffle
        self._shard_tokens = corpus.shard_tokens(split)
        self._open_shard = lru_cache(OPEN_SHARDS)(self._read_shard)
        self._document_layout = lru_cache(OPEN_SHARDS)(self._lay_out_documents)
        self._shard_layout = lru_cache(2)(self._lay_out_shards)
        self._window_order = lru_cache(2)(self._order_window)

    @property
    def fingerprint(self) -> str:
        """Equal streams have equal fingerprints; a run may only resume with the one it began with."""
        parts = (self.corpus.fingerprint, self.split, self.seq_length, self.seed, self.shuffle, ORDER_VERSION)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0 counted over all epochs; opens at most the shards that it overlaps."""
        epoch, position = divmod(index, self.samples_per_epoch)
        if self.shuffle:
            window, place = divmod(position, WINDOW_SAMPLES)
            position = window * WINDOW_SAMPLES + int(self._window_order(epoch, window)[place])
        shards, ends = self._shard_layout(epoch)
        pieces: list[np.ndarray] = []
        for item, start, stop in overlaps(ends, *sample_span(position, self.seq_length)):
            pieces += self._pieces(epoch, int(shards[item]), start, stop)
        return pack(pieces)

    def _pieces(self, epoch: int, shard_index: int, start: int, stop: int) -> list[np.ndarray]:
        """Tokens [start, stop) of a shard in this epoch's order, cut at the ends of documents."""
        shard = self._open_shard(shard_index)
        documents, ends = self._document_layout(epoch, shard_index)
        return [shard.document(documents[item])[lo:hi] for item, lo, hi in overlaps(ends, start, stop)]

    def _read_shard(self, shard_index: int) -> Shard:
        return self.corpus.shard(self.split, shard_index)

    def _order_window(self, epoch: int, window: int) -> np.ndarray:
        size = min(WINDOW_SAMPLES, self.samples_per_epoch - window * WINDOW_SAMPLES)
        return permutation(size, self.seed, epoch, 0, 1 + window)

    def _lay_out_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return self._lay_out(self._shard_tokens, epoch, 0)

    def _lay_out_documents(self, epoch: int, shard_index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._lay_out(self._open_shard(shard_index).lengths, epoch, 1 + shard_index)

    def _lay_out(self, lengths: np.ndarray, *key: int) -> tuple[np.ndarray, np.ndarray]:
        """Items in the order of this `key`, and where each ends when they are laid end to end."""
        order = permutation(len(lengths), self.seed, *key) if self.shuffle else np.arange(len(lengths))
        return order, np.cumsum(lengths[order])


def permutation(length: int, *key: int) -> np.ndarray:
    """int64 [length]: a random order for this `key` of numbers >= 0.

    From the raw words of PCG64, which NumPy promises to keep; it makes no such promise for `permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(words, kind="stable")


def collate(samples: list[Sample]) -> Batch:
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        documents=torch.from_numpy(np.stack([sample.documents for sample in samples])),
    )


class Loader:
    """Steps of training: each a list of this rank's microbatches, read ahead by one thread.

    Step n holds the samples `schedule.samples(n)` in every layout; microbatch m of a rank has `micro_batch` of
    them, from the first + (m * world + rank) * micro_batch on. `rank` and `world` count
    data-parallel ranks. The state is `step`, the number of the next step. Close it when done (it is a context
    manager); the stream belongs to it until then. A reading error is raised where its step is asked for.
    """

    def __init__(
        self,
        stream: TokenStream,
        schedule: BatchSchedule,
        micro_batch: int,
        rank: int,
        world: int,
        start_step: int = 0,
    ) -> None:
        for _, size in schedule.sizes:
            if size <= 0 or micro_batch <= 0 or size % (micro_batch * world):
                raise CorpusError(
                    f"batch.global={size} must be a multiple of batch.micro={micro_batch} times "
                    f"{world} data-parallel ranks"
                )
        self.step = start_step
        self._stream = stream
        self._schedule = schedule
        self._micro_batch = micro_batch
        self._rank = rank
        self._world = world
        self._queue: queue.Queue[list[Batch] | Exception] = queue.Queue(maxsize=PREFETCH_STEPS)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Batch]:
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, args=(self.step,), name="loader", daemon=True)
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        self.step += 1
        return item

    def close(self) -> None:
        """Ends the thread. Steps read ahead are dropped; iteration is over."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read_ahead(self, step: int) -> None:
        try:
            while not self._stop.is_set():
                self._put(self._read(step))
                step += 1
        except Exception as error:  # whatever it is, it belongs to the thread that waits for the step
            self._put(error)

    def _put(self, item: list[Batch] | Exception) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _read(self, step: int) -> list[Batch]:
        microbatches, numbers = [], self._schedule.samples(step)
        length = self._schedule.length(step)
        for first in numbers[self._rank * self._micro_batch :: self._world * self._micro_batch]:
            batch = collate([self._stream.sample(index) for index in range(first, first + self._micro_batch)])
            microbatches.append(batch if length is None else batch.cut(length))
        return microbatches


def heldout_batches(
    stream: TokenStream, micro: int, rank: int, world: int, max_samples: int | None = None
) -> Iterator[Batch]:
    """This rank's share of one pass over an unshuffled stream, or of `max_samples` spread evenly through it.

    Every rank gets the same number of microbatches; `Batch.num_samples` tells how many rows of each are real.
    """
    if stream.shuffle:
        raise ValueError("held-out samples come from a stream with shuffle=False")
    total = stream.samples_per_epoch
    count = total if max_samples is None else min(total, max_samples)
    padding = Sample(
        tokens=np.zeros(stream.seq_length + 1, dtype=np.int64),
        documents=np.full(stream.seq_length + 1, -1, dtype=np.int32),
    )
    for first in range(rank * micro, -(-count // (micro * world)) * micro * world, micro * world):
        numbers = range(first, first + micro)
        yield collate([stream.sample(n * total // count) if n < count else padding for n in numbers])
