"""Steps whose loss or gradient cannot be right: they are skipped by all processes alike, and told.

A step is bad where a loss or the gradient norm is not finite, or, by optim.spike_factor, where it lies so many standard
deviations above the mean of the steps before it (as OLMo-core's SkipStepOptimizer has it). The weights stay as they
are, and so do the moments and the counts of the routers; the step's samples count as read.
"""

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from model.network import Losses
from parallel.collectives import gather_objects, sum_over_all
from parallel.engine import Engine
from train.job.build import Job
from train.job.left_out import LOG_FILE, leave_out
from train.job.shelf import Shelf
from train.settings.run import RunConfig

NAMED = 3  # parameters that a line names; the log has all


def go_back(run: RunConfig, first_bad: int, samples: range) -> int:
    """Decides where a run goes on after too many bad steps in a row, and leaves their samples out from now on.

    Checkpoints of the bad steps themselves hold the same weights further on in the data; they are removed.

    Args:
        samples: places of the bad steps' samples in the order of training.
    Returns:
        The last step before the bad ones that has a checkpoint.
    Raises:
        RuntimeError: there is none.
    """
    shelf = Shelf(run.checkpoints)
    before = [step for step in shelf.steps() if step < first_bad]
    if not before:
        raise RuntimeError(
            f"steps {first_bad} and on are bad, and there is no checkpoint before them: look at logs/{LOG_FILE}, set "
            f"run.save_every, or leave their samples out with data.skip=[[{samples[0]},{samples[-1]}]]"
        )
    # Killed in between, a run does the bad steps again; in another order it could go on among them.
    for step in reversed(shelf.steps()):
        if step >= first_bad:
            shelf.delete(step)
    leave_out(run.path, [(samples[0], samples[-1])])
    return max(before)


class History:
    """One number of each of the last steps, and what lies too far above them."""

    def __init__(self, window: int, factor: float, values: Sequence[float] = ()) -> None:
        self._factor, self._window = factor, window
        self.values = deque(values, maxlen=window)

    def spikes(self, value: float) -> bool:
        """Whether a finite value lies too far above the steps before it; there must be half a window of them."""
        if not self._factor or len(self.values) < max(2, self._window // 2):
            return False
        return value > statistics.fmean(self.values) + self._factor * statistics.pstdev(self.values)

    def add(self, value: float) -> None:
        """Takes part in judging later steps, unless it is not finite: a new level becomes the usual one."""
        if math.isfinite(value):
            self.values.append(value)


class Judge:
    """Decides of each step, before it changes anything, whether it is taken; the same on every process.

    Args:
        state: what `state` gave when the run was saved.
    Attributes:
        in_a_row: bad steps since the last good one.
        skipped: bad steps since the start of the run.
        reason: what was wrong with the last step; empty where it was good.
        lm_loss: of the last step, over the whole global batch.
        decided: when it was decided about, its gradients being there, by ``time.perf_counter``.
    """

    def __init__(self, job: Job, state: dict[str, Any] | None = None) -> None:
        self._job, state = job, state or {}
        optim = job.config.optim
        self._losses = History(optim.spike_window, optim.spike_factor, state.get("losses", ()))
        self._norms = History(optim.spike_window, optim.spike_factor, state.get("grad_norms", ()))
        self.in_a_row: int = state.get("in_a_row", 0)
        self.skipped: int = state.get("skipped", 0)
        self.reason = ""
        self.lm_loss = 0.0
        self.decided = 0.0

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide as this one would."""
        return {
            "losses": list(self._losses.values),
            "grad_norms": list(self._norms.values),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
        }

    @property
    def gives_up(self) -> bool:
        """Whether so many steps in a row were bad that skipping more does not help."""
        return 0 < self._job.config.optim.rewind_after <= self.in_a_row

    def accept(self, outputs: list[Losses], grad_norm: float) -> bool:
        """Whether the step is taken (one reduction)."""
        norm_is_bad = not math.isfinite(grad_norm) or self._norms.spikes(grad_norm)
        own = torch.zeros(3, dtype=torch.float64, device=self._job.device)
        own[2] = norm_is_bad
        if outputs and self._job.groups.tp.rank() == 0:
            by_step = torch.stack([losses.by_step for losses in outputs]).double().sum(dim=0)
            own[0], own[1] = by_step[0], by_step.sum()
        lm_loss, losses, bad_norms = sum_over_all(own).tolist()
        self.reason = ""
        if not math.isfinite(losses):
            self.reason = f"a loss is {losses}"
        elif bad_norms:
            self.reason = f"the gradient norm is {grad_norm:.4g}"
        elif self._losses.spikes(lm_loss):
            self.reason = f"lm_loss jumped to {lm_loss:.4g}"
        self.lm_loss, self.decided = lm_loss, time.perf_counter()
        self._losses.add(lm_loss)
        self._norms.add(grad_norm)
        self.in_a_row = self.in_a_row + 1 if self.reason else 0
        self.skipped += bool(self.reason)
        return not self.reason

    def report(self, engine: Engine, step: int, samples: range) -> None:
        """Tells and logs a bad step: its samples, and what was not finite, the first parameter of the model first."""
        found = gather_objects((self._job.groups.pp.rank(), engine.not_finite()))
        places = sorted({(stage, place, name) for stage, own in found for name, place in own.items()})
        names = list(dict.fromkeys(name for _, _, name in places))
        if not self._job.is_first:
            return
        ranks = [rank for rank, (_, own) in enumerate(found) if own]
        where = ""
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            where = f"; not finite on process {', '.join(map(str, ranks))}: {', '.join(names[:NAMED])}{more}"
        print(
            f"warning: step {step} was skipped: {self.reason}{where}; its samples were {samples[0]} to {samples[-1]}",
            file=sys.stderr,
            flush=True,
        )
        entry = {"step": step, "reason": self.reason, "samples": [samples[0], samples[-1]], "in_a_row": self.in_a_row}
        entry |= {"parameters": names, "processes": ranks, "time": time.time()}
        directory = self._job.config.run.path / "logs"
        with suppress(OSError):  # the line above has said the most
            directory.mkdir(exist_ok=True)
            with (directory / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
