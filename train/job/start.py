"""Where a run goes on: chosen by the first process, the same on all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.order.skips import Window
from parallel.collectives import from_first
from train.job import checkpoint
from train.job.build import Job
from train.job.directory import layout_change, steps_done
from train.job.heartbeat import last_beat
from train.job.left_out import leave_out, read_left_out
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
        moved, run = layout_change(config, job.topology), config.run.path
        # A fork leaves out what its origin has left out so far; from its first checkpoint on it goes its own way.
        left_out = leave_out(run, read_left_out(path.parents[1])) if path else read_left_out(run)
        return Start(step, path, state, moved, left_out, last_beat(run))

    return from_first(choose)
