"""The time of steps on a device, and on the host that launches them."""

import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

WARM_UP = 2
HOST_REPEATS = 3


class Clock:
    """Points in time on a device: events of the GPU's own clock, or the host's where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first, last) -> float:
        """Milliseconds; waits for the device."""
        if not self.on_gpu:
            return 1e3 * (last - first)
        last.synchronize()
        return first.elapsed_time(last)


def run_steps(
    step: Callable[[Tensor], None], parameters: list[nn.Parameter], batches: Iterable[Tensor], device: torch.device
) -> list[float]:
    """Milliseconds of each step, back to back, after a warm-up; gradients are dropped between them."""
    clock, marks = Clock(device), []
    for tokens_RS in batches:
        marks.append(clock.mark())
        step(tokens_RS)
        for parameter in parameters:
            parameter.grad = None
    marks.append(clock.mark())
    return [clock.between(first, last) for first, last in pairwise(marks)][WARM_UP:]


def host_milliseconds(step: Callable, parameters: list[nn.Parameter], tokens_RS: Tensor, device: torch.device) -> float:
    """Milliseconds until the host has launched a step on an idle device; on a CPU, of the step itself."""
    found = []
    for _ in range(HOST_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(tokens_RS)
        found.append(1e3 * (time.perf_counter() - start))
        for parameter in parameters:
            parameter.grad = None
    return statistics.median(found)
