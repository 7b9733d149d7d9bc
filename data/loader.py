"""Batches of samples by step, read ahead; each rank takes its slice."""

import queue
import threading
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from data.errors import CorpusError
from data.order.batches import Batch, BatchSchedule
from data.order.mixture import MixedStream
from data.order.packing import PADDING, Sample
from data.order.skips import Skips
from data.order.stream import TokenStream
from data.read.faults import Faults

PREFETCH_STEPS = 2  # whole steps that wait to be trained on
AHEAD_STEPS = 32
POLL_S, CLOSE_S = 60.0, 10.0

type Stream = TokenStream | MixedStream


def collate(samples: list[Sample]) -> Batch:
    """Samples of L + 1 tokens as tensors [samples, L + 1]."""
    masks = [sample.learned for sample in samples]
    learned = None
    if any(mask is not None for mask in masks):
        whole = np.ones(len(samples[0].tokens), dtype=bool)
        learned = torch.from_numpy(np.stack([whole if mask is None else mask for mask in masks]))
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        documents=torch.from_numpy(np.stack([sample.documents for sample in samples])),
        learned=learned,
    )


class Loader:
    """Steps of training: each a list of this rank's microbatches, read ahead by one thread.

    Step n holds the samples `schedule.samples(n)` in every layout, put in the order of their lanes, and each rank has
    an equal run of these: so a unit is read by the one or two ranks whose samples it holds. `rank` and `world` count
    data-parallel ranks. The state is `step`, the number of the next step. Close it when done (it is a context
    manager); the stream belongs to it until then. A reading error is raised where its step is asked for.

    Args:
        ahead: steps whose units are asked for before they are needed.
        skips: where in the order of the stream each sample of the run lies.
    """

    def __init__(
        self,
        stream: Stream,
        schedule: BatchSchedule,
        micro_batch: int,
        rank: int,
        world: int,
        start_step: int = 0,
        ahead: int = AHEAD_STEPS,
        skips: Skips | None = None,
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
        self._ahead = ahead
        self._skips = skips or Skips()
        self._queue: queue.Queue[list[Batch] | Exception] = queue.Queue(maxsize=PREFETCH_STEPS)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Batch]:
        while (batches := self.poll(POLL_S)) is None:
            continue
        return batches

    def poll(self, seconds: float) -> list[Batch] | None:
        """The next step, or None if it has not been read within so many seconds."""
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, args=(self.step,), name="loader", daemon=True)
            self._thread.start()
        try:
            item = self._queue.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            self.close()
            raise item
        self.step += 1
        return item

    @property
    def faults(self) -> Faults:
        """What this process's reading has met and overcome so far."""
        return self._stream.cache.faults

    def close(self) -> None:
        """Ends the thread and the stream. Steps read ahead are dropped; iteration is over."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)  # it may be waiting for a storage that is away; it ends with the process
        self._stream.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read_ahead(self, step: int) -> None:
        asked: deque[list[int]] = deque()  # this rank's samples of the steps from `step` on
        try:
            while not self._stop.is_set():
                while len(asked) <= self._ahead:
                    asked.append(self._ask(step + len(asked)))
                self._put(self._read(step, asked.popleft()))
                step += 1
                self._stream.release(self._skips.place(self._schedule.samples(step).start))
        except Exception as error:  # whatever it is, it belongs to the thread that waits for the step
            self._put(error)

    def _put(self, item: list[Batch] | Exception) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _ask(self, step: int) -> list[int]:
        """This rank's samples of a step, whose units begin to be read."""
        runs = self._skips.runs(self._schedule.samples(step))
        ordered = [place for run in runs for place in self._stream.in_lanes(run)]
        each = len(ordered) // self._world
        own = ordered[self._rank * each : (self._rank + 1) * each]
        for index in own:
            self._stream.ask(index)
        return own

    def _read(self, step: int, numbers: list[int]) -> list[Batch]:
        length, microbatches = self._schedule.length(step), []
        for first in range(0, len(numbers), self._micro_batch):
            batch = collate([self._stream.sample(index) for index in numbers[first : first + self._micro_batch]])
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
        documents=np.full(stream.seq_length + 1, PADDING, dtype=np.int32),
    )
    for first in range(rank * micro, -(-count // (micro * world)) * micro * world, micro * world):
        numbers = range(first, first + micro)
        yield collate([stream.sample(n * total // count) if n < count else padding for n in numbers])
