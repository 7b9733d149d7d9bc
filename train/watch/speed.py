"""How fast a run is: tokens a second, and what share of this machine's matrix products that uses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model.cost.cost import training_flops
from train.job.build import Job
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

    ``mfu`` divides the operations that the model needs (`model.cost.cost`; nothing for recomputation) by the rate of a
    large matrix product measured here at the start, in every process at once.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._schedule = job, batch_schedule(job.config)
        self._rate = matmul_rate(job.device, job.chunks[0].config.params_dtype)
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step; steps count from 0."""
        begin = time.perf_counter()
        yield
        self.add(time.perf_counter() - begin, step)

    def add(self, seconds: float, step: int) -> None:
        """Counts a step; steps count from 0."""
        config, whole = self._job.config, self._job.config.data.seq_length
        tokens = len(self._schedule.samples(step)) * whole
        length = self._schedule.length(step) or whole
        self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        self._flops += tokens * training_flops(config.model, config.mtp, self._job.vocab_size, length)

    def take(self) -> dict[str, float]:
        """Metrics of the steps since the last call."""
        rate, flops = (total / self._seconds for total in (self._tokens, self._flops / self._job.topology.world))
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0
        return {metrics.TOKENS_PER_SECOND: rate, metrics.TFLOPS: flops / 1e12, metrics.MFU: flops / self._rate}
