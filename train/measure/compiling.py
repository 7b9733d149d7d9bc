"""Compiling the GPU kernels of a model in several processes at once, into the caches of the libraries that made them.

A library compiles a kernel when it is first called, one after the other: minutes on a new machine. Each process here
calls some of them, once, and a process that calls them later finds them in the cache (`run.kernel_cache`).
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from data.secrets import one_line
from model.config import ModelConfig
from model.kernels import flash_qla
from model.preflight import Case, cases, error
from train.job.starter import end_with_starter

MOST_PROCESSES = 12  # each takes half a gigabyte of the GPU
PATIENCE_S = 300.0  # for the next kernel; the slowest takes 40 s by itself
RULE = "delta rule"

type Outcome = tuple[str, float, str]  # a call, its seconds, and why it failed


def _is_split(case: Case, shape: ModelConfig) -> bool:
    """Whether the kernels of a case are compiled one by one."""
    return case.name.startswith(RULE) and flash_qla.applies(shape.linear_key_dim, shape.linear_value_dim)


def names(shape: ModelConfig) -> list[str]:
    """The names of `calls`, the slowest first; found without a GPU."""
    own = cases(shape, torch.device("cpu"))
    parts = [f"{case.name}, {part}" for part in flash_qla.PARTS for case in own if _is_split(case, shape)]
    return parts + [case.name for case in own if not _is_split(case, shape)]


def calls(shape: ModelConfig, device: torch.device) -> dict[str, Callable[[], object]]:
    """What compiles every kernel of a model, by name."""
    found: dict[str, Callable[[], object]] = {}
    for case in cases(shape, device):
        if _is_split(case, shape):
            parts: Any = case.call(flash_qla.kernels, case.leaves)  # what it was given returns, in place of tensors
            found |= {f"{case.name}, {part}": call for part, call in parts.items()}
        else:
            found[case.name] = partial(error, case)
    return found


@cache
def _calls(shape: ModelConfig, device: torch.device) -> dict[str, Callable[[], object]]:
    return calls(shape, device)


def _enter() -> None:
    """What a process does first: it ends with its starter, which alone hears Ctrl-C."""
    end_with_starter()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compile(name: str, shape: ModelConfig, device: torch.device) -> Outcome:
    """Runs one of `calls` in one of the processes. A failure is told and no more: training would meet it again."""
    begin = time.monotonic()
    try:
        _calls(shape, device)[name]()
        torch.cuda.synchronize(device)
    except Exception as failure:
        return name, time.monotonic() - begin, one_line(failure)
    return name, time.monotonic() - begin, ""


class Compiling:
    """Processes that compile the kernels of a model for this process's GPU. Close it when done."""

    def __init__(self, shape: ModelConfig, device: torch.device) -> None:
        self._began = time.monotonic()
        todo = names(shape)
        self.number, processes = len(todo), min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(todo))
        # CUDA does not survive a fork.
        self._pool = multiprocessing.get_context("spawn").Pool(processes, _enter)
        self._outcomes = self._pool.imap_unordered(partial(_compile, shape=shape, device=device), todo)

    def close(self) -> None:
        """Ends the processes."""
        self._pool.terminate()

    def lines(self) -> Iterator[str]:
        """A line for each kernel, as they become ready; ends early, with a line, where nothing comes any more."""
        for number in range(1, self.number + 1):
            try:
                name, seconds, failure = self._outcomes.next(PATIENCE_S)
            except multiprocessing.TimeoutError:
                yield f"  no kernel for {PATIENCE_S:.0f} s: the rest is compiled when it is first used"
                return
            words = f"failed: {failure}" if failure else f"{seconds:.0f} s"
            yield f"  {number} of {self.number}, {time.monotonic() - self._began:.0f} s: {name} ({words})"
