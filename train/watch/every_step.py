"""Loss, gradient norm and clipping of every step, also of those between two logged ones: a spike leaves its trace."""

import math
from statistics import fmean

from train.watch import metrics


class EveryStep:
    """Notes each step, and gives what the steps since the last logged one were.

    Args:
        clip: the largest norm of the gradient that is not clipped; 0: none is.
        unlogged: where numbers wait for a logged step, which checkpoints keep: a run that is stopped between two logged
            steps tells of its steps when it goes on.
    """

    def __init__(self, clip: float, unlogged: dict[str, list[float]]) -> None:
        self._clip = clip
        self._losses, self._norms = (unlogged.setdefault(name, []) for name in (metrics.LM_LOSS, metrics.GRAD_NORM))

    def add(self, lm_loss: float, grad_norm: float) -> None:
        """Notes a step."""
        self._losses.append(lm_loss)
        self._norms.append(grad_norm)

    def take(self) -> dict[str, metrics.Value]:
        """Metrics of the steps since the last call: each one's numbers, their extremes, and how many were clipped."""
        values: dict[str, metrics.Value] = {
            metrics.EVERY_LM_LOSS: list(self._losses),
            metrics.EVERY_GRAD_NORM: list(self._norms),
            metrics.CLIPPED_STEPS: sum(norm > self._clip > 0 for norm in self._norms),
        }
        for name, every in ((metrics.LM_LOSS, self._losses), (metrics.GRAD_NORM, self._norms)):
            finite = [value for value in every if math.isfinite(value)] or [math.nan]
            found = (min(finite), fmean(finite), max(finite))
            values |= dict(zip(metrics.extremes(name), found, strict=True))
        self._losses.clear()
        self._norms.clear()
        return values
