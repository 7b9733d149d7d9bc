"""What all processes of a job must have alike: chosen by the first one, and proved before it is relied on."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.order.skips import Window
from parallel.collectives import from_first, gather_numbers
from train.job import checkpoint
from train.job.bad_steps import read_left_out
from train.job.build import Job
from train.job.directory import layout_change, steps_done
from train.job.heartbeat import last_beat
from train.job.shelf import read_state


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        step: steps that are done.
        checkpoint: where they are kept; None for a new run.
        state: what the checkpoint says of itself.
        moved: a line about another layout than before, if it is one.
        left_out: windows of samples that the run has left out after bad steps.
        beat: what the run's heartbeat file says.
    """

    step: int
    checkpoint: Path | None
    state: dict[str, Any]
    moved: str
    left_out: list[Window]
    beat: dict[str, Any]


def agreed_start(job: Job) -> Start:
    """The checkpoint to go on from, as the first process sees the run's directory; it is whole.

    Others may see an older one for a while (NFS), and would start from another step.

    Raises:
        ConfigError: on every process, the run cannot go on with these settings.
    """
    config, path = job.config, checkpoint.starting_point(job)

    def choose() -> Start:
        step, state = steps_done(config), read_state(path) if path else {}
        moved = layout_change(config, job.topology)
        return Start(step, path, state, moved, read_left_out(config.run.path), last_beat(config.run.path))

    return from_first(choose)


def require_alike(what: str, value: object, device: torch.device) -> None:
    """Compares something on all processes by its hash (one small gather).

    Raises:
        RuntimeError: on every process, it is not the same everywhere; the processes are named.
    """
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    numbers = gather_numbers(int.from_bytes(digest[:8], "big", signed=True), device)
    apart = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
    if apart:
        names = ", ".join(map(str, apart[:8])) + ("..." if len(apart) > 8 else "")
        raise RuntimeError(f"process {names} has other {what} than process 0: nothing is trained or saved like this")


def require_repeated(same: bool, device: torch.device) -> None:
    """Raises RuntimeError, on every process, where one did not get the same gradients twice; it is named."""
    apart = [rank for rank, equal in enumerate(gather_numbers(int(same), device)) if not equal]
    if apart:
        raise RuntimeError(
            f"process {', '.join(map(str, apart))} computed a step twice and got other gradients: its hardware is "
            f"damaged, or a kernel adds in no fixed order (run.verify_every=0 does not look)"
        )
