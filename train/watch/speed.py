"""How fast a run is: tokens a second, and what share of this machine's matrix products that uses."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from data.order.batches import Batch
from model.batch import count_pairs
from model.cost.cost import training_flops
from parallel.collectives import gather_numbers, sum_over
from train.job.build import Job
from train.job.gpus import data_sheet
from train.watch import metrics

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices that are multiplied
PROBE_SIZE = {"cpu": 256, "cuda": 4096}  # the same where processes are compared on the way
REPEATS = 5


def matmul_rate(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int] = PRODUCT_SIZE) -> float:
    """Operations a second of a large matrix product in this process: the best of a few, on random numbers."""
    size = sizes[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        (left @ right).flatten()[0].item()  # waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def slowest_process(job: Job) -> dict[str, float]:
    """Which process multiplies matrices most slowly, and at what share of the median one's rate.

    In a step all wait for the slowest, so that the times of steps do not tell which one it is.
    """
    if job.topology.world == 1:
        return {}
    rate = matmul_rate(job.device, job.chunks[0].config.params_dtype, PROBE_SIZE)
    rates = gather_numbers(int(rate), job.device)
    slowest = min(rates)
    return {
        metrics.SLOWEST_RATE: slowest / statistics.median(rates),
        metrics.SLOWEST_PROCESS: float(rates.index(slowest)),
    }


class Speedometer:
    """Counts steps and the seconds from step to step since it was last read; evaluation and saving do not count.

    ``tflops`` are the operations that the model needs for the documents as they are (`model.cost.cost`: no padding, no
    attention from one document to another, nothing for recomputation). ``mfu`` is their share of the GPU's peak as its
    data sheet gives it, as `estimate.mfu` is; ``matmul_share`` that of what a large matrix product reaches here, in
    every process at once.

    Attributes:
        steps: counted since it was last read.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._rate = matmul_rate(job.device, job.chunks[0].config.params_dtype)
        sheet = data_sheet(torch.cuda.get_device_name(job.device)) if job.device.type == "cuda" else None
        self._peak = sheet.peak if sheet else self._rate
        self._clear()

    @contextmanager
    def step(self, batches: list[Batch], decided: Callable[[], float]) -> Iterator[None]:
        """Around a step of which this process has these batches. It ends with its new weights.

        Args:
            decided: when the step's gradients were there, by ``time.perf_counter``.
        """
        begin = time.perf_counter()
        yield
        if self._job.device.type == "cuda":  # the optimizer's kernels too; the next reduction would wait for them
            torch.cuda.synchronize(self._job.device)
        self.add(time.perf_counter() - begin, decided() - begin, batches)

    def _clear(self) -> None:
        self._seconds, self._gradient_seconds, self.steps = 0.0, 0.0, 0
        self._pairs = torch.zeros(2, dtype=torch.int64)

    def add(self, seconds: float, gradient_seconds: float, batches: list[Batch]) -> None:
        """Counts a step of which this process had these batches."""
        self._seconds, self._gradient_seconds = self._seconds + seconds, self._gradient_seconds + gradient_seconds
        self.steps += 1
        self._pairs += sum(count_pairs(batch.documents) for batch in batches)

    def take(self, waited: float) -> dict[str, float]:
        """Metrics of the steps since the last call, the same on every process (one reduction).

        Args:
            waited: seconds that this process has waited for the samples of these steps.
        """
        job, seconds, steps = self._job, self._seconds + waited, self.steps
        tokens, squares = sum_over(self._pairs.to(job.device), job.groups.dp).tolist()
        length = squares / max(1, tokens)  # of documents all alike with as many tokens and pairs
        flops = tokens * training_flops(job.config.model, job.config.mtp, job.vocab_size, length) / job.topology.world
        values = {
            metrics.TOKENS_PER_SECOND: tokens / seconds,
            metrics.TFLOPS: flops / seconds / 1e12,
            metrics.MFU: flops / seconds / self._peak,
            metrics.PEAK_TFLOPS: self._peak / 1e12,
            metrics.MATMUL_SHARE: flops / seconds / self._rate,
            metrics.STEP_SECONDS: seconds / steps,
            metrics.seconds("forward_backward"): self._gradient_seconds / steps,
            metrics.seconds("optimizer"): (self._seconds - self._gradient_seconds) / steps,
        }
        self._clear()
        return values
