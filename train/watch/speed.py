"""How fast a run is: tokens a second, and what share of this machine's matrix products that uses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.order.batches import Batch
from model.batch import count_pairs
from model.cost.cost import training_flops
from parallel.collectives import sum_over
from train.job.build import Job
from train.job.gpus import data_sheet
from train.settings.run import batch_schedule
from train.watch import metrics

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices that are multiplied
REPEATS = 5


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product in this process: the best of a few, on random numbers."""
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        (left @ right).flatten()[0].item()  # waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Speedometer:
    """Counts steps and the seconds spent in them since it was last read; evaluation and saving do not count.

    ``tflops`` are the operations that the model needs for the documents as they are (`model.cost.cost`: no padding, no
    attention from one document to another, nothing for recomputation). ``mfu`` is their share of the GPU's peak as its
    data sheet gives it, as `estimate.mfu` is; ``matmul_share`` that of what a large matrix product reaches here, in
    every process at once.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._schedule = job, batch_schedule(job.config)
        self._rate = matmul_rate(job.device, job.chunks[0].config.params_dtype)
        sheet = data_sheet(torch.cuda.get_device_name(job.device)) if job.device.type == "cuda" else None
        self._peak = sheet.peak if sheet else self._rate
        self._clear()

    @contextmanager
    def step(self, step: int, batches: list[Batch]) -> Iterator[None]:
        """Around a step of which this process has these batches; steps count from 0. It ends with its new weights."""
        begin = time.perf_counter()
        yield
        if self._job.device.type == "cuda":  # the optimizer's kernels too; the next reduction would wait for them
            torch.cuda.synchronize(self._job.device)
        self.add(time.perf_counter() - begin, step, batches)

    def _clear(self) -> None:
        self._seconds, self._steps, self._places = 0.0, 0, 0
        self._pairs = torch.zeros(2, dtype=torch.int64)

    def add(self, seconds: float, step: int, batches: list[Batch]) -> None:
        """Counts a step of which this process had these batches; steps count from 0."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        self._places += len(self._schedule.samples(step)) * self._job.config.data.seq_length
        self._pairs += sum(count_pairs(batch.documents) for batch in batches)

    def take(self) -> dict[str, float]:
        """Metrics of the steps since the last call, the same on every process (one reduction)."""
        job, seconds = self._job, self._seconds
        tokens, squares = sum_over(self._pairs.to(job.device), job.groups.dp).tolist()
        length = squares / max(1, tokens)  # of documents all alike with as many tokens and pairs
        flops = tokens * training_flops(job.config.model, job.config.mtp, job.vocab_size, length) / job.topology.world
        values = {
            metrics.TOKENS_PER_SECOND: self._places / seconds,
            metrics.TFLOPS: flops / seconds / 1e12,
            metrics.MFU: flops / seconds / self._peak,
            metrics.PEAK_TFLOPS: self._peak / 1e12,
            metrics.MATMUL_SHARE: flops / seconds / self._rate,
            metrics.STEP_SECONDS: seconds / self._steps,
        }
        self._clear()
        return values
