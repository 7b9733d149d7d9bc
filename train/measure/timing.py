"""The time of steps on a device, and on the host that launches them."""

import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

WARM_UP = 2
HOST_REPEATS = 3

type Mark = float | torch.cuda.Event


class Clock:
    """Points in time on a device: events of the GPU's own clock, or the host's where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Mark:
        """Now."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Mark, last: Mark) -> float:
        """Milliseconds; waits for the device."""
        if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
            last.synchronize()
            return first.elapsed_time(last)
        assert isinstance(first, float) and isinstance(last, float)
        return 1e3 * (last - first)


def run_steps[Batch](
    step: Callable[[Batch], None], leaves: Iterable[Tensor], batches: Iterable[Batch], device: torch.device
) -> list[float]:
    """Milliseconds of each step, back to back, after a warm-up; the leaves' gradients are dropped between them."""
    clock, leaves = Clock(device), list(leaves)
    marks: list[Mark] = []
    for batch in batches:
        marks.append(clock.mark())
        step(batch)
        for leaf in leaves:
            leaf.grad = None
    marks.append(clock.mark())
    return [clock.between(first, last) for first, last in pairwise(marks)][WARM_UP:]


def host_milliseconds[Batch](
    step: Callable[[Batch], None], leaves: Iterable[Tensor], batch: Batch, device: torch.device
) -> float:
    """Milliseconds until the host has launched a step on an idle device; on a CPU, of the step itself."""
    found, leaves = [], list(leaves)
    for _ in range(HOST_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(batch)
        found.append(1e3 * (time.perf_counter() - start))
        for leaf in leaves:
            leaf.grad = None
    return statistics.median(found)
