"""What goes wrong inside a worker: each wraps functions of that worker alone, before it trains.

Injections are frozen dataclasses, so that they travel to the workers, and are called with the worker's rank.
"""

import errno
import importlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data.errors import CorpusError, StorageError
from data.loader import Loader
from train import loop
from train.job.shelf import Shelf
from train.use import in_training


def hit() -> None:
    """The end of a process that nothing in it can notice."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class InStep:
    """Something happens to a rank when its n-th step of this start begins.

    Attributes:
        what: killed, stopped (SIGSTOP), oom (exit code 137 as a container's end), stuck (a loop without end).
    """

    rank: int
    step: int
    what: str

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        real, count = loop.train_step, iter(range(1, 10**6))

        def broken(*args: Any, **kwargs: Any) -> Any:
            if next(count) == self.step:
                act(self.what)
            return real(*args, **kwargs)

        loop.train_step = broken


def act(what: str) -> None:
    """Does what its name says to this process."""
    if what == "killed":
        hit()
    elif what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "oom":
        os._exit(137)
    elif what == "stuck":
        time.sleep(3600)


@dataclass(frozen=True)
class Poison:
    """NaN in some steps, on one rank: in a weight's use (forward pass) or in a gradient (backward pass).

    Attributes:
        tokens_before: the steps, by the tokens read before each.
        passes: forward or backward. times: how often each step is poisoned, over rewinds.
    """

    rank: int
    tokens_before: tuple[int, ...]
    passes: str
    times: int = 1

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        real, left = loop.train_step, dict.fromkeys(self.tokens_before, self.times)

        def broken(job: Any, engine: Any, batches: Any, lr: float, tokens_before: int, *rest: Any) -> Any:
            if left.get(tokens_before, 0) <= 0:
                return real(job, engine, batches, lr, tokens_before, *rest)
            left[tokens_before] -= 1
            handle = poisoned(job, self.passes)
            try:
                return real(job, engine, batches, lr, tokens_before, *rest)
            finally:
                handle.remove()

        loop.train_step = broken


def poisoned(job: Any, passes: str) -> Any:
    """Puts NaN into the output of a norm or into its gradient, until the handle is removed."""
    module = next(module for name, module in job.chunks[-1].named_modules() if name.endswith("final_norm"))

    def forward(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if passes == "forward":
            return output * float("nan")
        if output.requires_grad:
            output.register_hook(lambda grad: grad * float("nan"))
        return output

    return module.register_forward_hook(forward)


@dataclass(frozen=True)
class Several:
    """Several injections in one start."""

    injections: tuple[Callable[[int], None], ...]

    def __call__(self, rank: int) -> None:
        for injection in self.injections:
            injection(rank)


@dataclass(frozen=True)
class InSave:
    """A rank is killed in the n-th call of a function while it saves.

    Attributes:
        where: dotted name of the function, as ``pathlib.Path.rename``.
    """

    rank: int
    where: str
    call: int = 1
    after: bool = False

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        owner, name = owner_of(self.where)
        real, count = getattr(owner, name), iter(range(1, 10**6))

        def broken(*args: Any, **kwargs: Any) -> Any:
            if next(count) == self.call:
                if self.after:
                    real(*args, **kwargs)
                hit()
            return real(*args, **kwargs)

        setattr(owner, name, broken)


@dataclass(frozen=True)
class StaleDirectory:
    """A rank sees the run's directory as it was before its last save."""

    rank: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        real = Shelf.steps
        Shelf.steps = lambda self: real(self)[:-1] or real(self)


@dataclass(frozen=True)
class Fails:
    """A function fails on one rank, each time, as the operating system fails.

    Attributes:
        where: dotted name of the function. error: name of the error number, as ENOSPC.
    """

    rank: int
    where: str
    error: str

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        owner, name = owner_of(self.where)
        number = getattr(errno, self.error)

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise OSError(number, os.strerror(number))

        setattr(owner, name, broken)


def owner_of(where: str) -> tuple[Any, str]:
    """The module or class that a dotted name's last part is an attribute of, and that part."""
    path, name = where.rsplit(".", 1)
    try:
        return importlib.import_module(path), name
    except ImportError:
        module, kind = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), kind), name


@dataclass(frozen=True)
class HeldoutAway:
    """A rank cannot read held-out text."""

    rank: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return

        def broken(*args: Any) -> Any:
            raise CorpusError("a shard is gone")

        in_training.read_heldout = broken


@dataclass(frozen=True)
class NoStorage:
    """The storage of a rank stays away from a step on, while the others wait for it."""

    rank: int
    step: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        real = Loader.poll

        def poll(loader: Loader, seconds: float) -> Any:
            if loader.step < self.step:
                return real(loader, seconds)
            time.sleep(1)
            raise StorageError("s3://corpus cannot be read for 1800 s: token expired")

        Loader.poll = poll
