"""run.profile: torch's trace of some steps on every process, with a named range for each layer; on GPUs memory too."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle

from model.config import LAYER_NAMES
from train.job.build import Job


def trace_file(run: Path, steps: tuple[int, ...], rank: int) -> Path:
    """Where a process's trace of some steps lies; chrome://tracing and ui.perfetto.dev open it."""
    return run / "logs" / f"profile_{steps[0]}_{steps[1]}_process_{rank}.json.gz"


def memory_file(run: Path, steps: tuple[int, ...], rank: int) -> Path:
    """Where a GPU's memory history of the same steps lies; pytorch.org/memory_viz opens it."""
    return run / "logs" / f"memory_{steps[0]}_{steps[1]}_process_{rank}.pickle"


class Profiler:
    """Traces the steps that run.profile names, the first and the last included; does nothing at all around others."""

    def __init__(self, job: Job) -> None:
        self._job, self._steps = job, job.config.run.profile
        self._profile: profile | None = None
        self._ranges: list[RemovableHandle] = []

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step; steps count from 1."""
        if self._steps and self._profile is None and self._steps[0] <= step <= self._steps[1]:
            self._start()
        if self._profile is None:
            yield
            return
        with record_function(f"step {step}"):
            yield
        if step >= min(self._steps[1], self._job.config.run.steps):
            self._stop()

    def _start(self) -> None:
        on_gpu = self._job.device.type == "cuda"
        for chunk in self._job.chunks:
            self._ranges += [handle for layer in chunk.decoder.layers for handle in _ranges(layer, self._job)]
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self._profile.start()

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        run, rank = self._job.config.run.path, self._job.rank
        file = trace_file(run, self._steps, rank)
        file.parent.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(file))
        if self._job.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(memory_file(run, self._steps, rank)))
            torch.cuda.memory._record_memory_history(enabled=None)
        for handle in self._ranges:
            handle.remove()
        self._profile, self._ranges, self._steps = None, [], ()
        if self._job.is_first:
            print(f"profiled: {file.parent}/profile_*, one of each process, for ui.perfetto.dev", flush=True)


def _ranges(layer: Any, job: Job) -> list[RemovableHandle]:
    """Hooks that name what a layer computes forwards, as in "attention, layer 8"; backward follows by its arrows."""
    number = layer.layer_number
    name = f"{LAYER_NAMES[job.config.model.layers[number - 1]]}, layer {number}"
    open_ranges: list[record_function] = []

    def begin(*_: object) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def end(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
