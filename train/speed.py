"""How fast a run is: tokens a second, and what share of this machine's matrix products that uses."""

import time

import torch

from model.cost import training_flops
from train import metrics
from train.build import Job

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

    ``mfu`` divides the operations that the model needs (`model.cost`; nothing for recomputation) by the rate of a
    large matrix product measured here at the start, in every process at once.
    """

    def __init__(self, job: Job) -> None:
        config = job.config
        self._step_tokens = config.batch.global_ * config.data.seq_length
        flops = training_flops(config.model, config.mtp, job.vocab_size, config.data.seq_length)
        self._flops_per_process = flops / job.topology.world
        self._rate = matmul_rate(job.device, job.chunks[0].config.params_dtype)
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float) -> None:
        """Counts a step."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1

    def take(self) -> dict[str, float]:
        """Metrics of the steps since the last call."""
        rate = self._steps * self._step_tokens / self._seconds
        self._seconds, self._steps = 0.0, 0
        flops = rate * self._flops_per_process
        return {metrics.TOKENS_PER_SECOND: rate, metrics.TFLOPS: flops / 1e12, metrics.MFU: flops / self._rate}
