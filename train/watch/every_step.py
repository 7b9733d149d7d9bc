"""Loss, gradient norm and clipping of every step, also of those between two logged ones: a spike leaves its trace."""

import math
from statistics import fmean

from train.watch import metrics


class EveryStep:
    """Notes each step, and gives what the steps since the last logged one were.

    Args:
        clip: the largest norm of the gradient that is not clipped; 0: none is.
    """

    def __init__(self, clip: float) -> None:
        self._clip = clip
        self._losses: list[float] = []
        self._norms: list[float] = []

    def add(self, lm_loss: float, grad_norm: float) -> None:
        """Notes a step."""
        self._losses.append(lm_loss)
        self._norms.append(grad_norm)

    def __len__(self) -> int:
        """Steps since the last call of `take`."""
        return len(self._losses)

    def take(self) -> dict[str, metrics.Value]:
        """Metrics of the steps since the last call: each one's numbers, their extremes, and how many were clipped."""
        values: dict[str, metrics.Value] = {
            metrics.EVERY_LM_LOSS: self._losses,
            metrics.EVERY_GRAD_NORM: self._norms,
            metrics.CLIPPED_STEPS: sum(norm > self._clip > 0 for norm in self._norms),
        }
        for name, every in ((metrics.LM_LOSS, self._losses), (metrics.GRAD_NORM, self._norms)):
            finite = [value for value in every if math.isfinite(value)] or [math.nan]
            found = (min(finite), fmean(finite), max(finite))
            values |= dict(zip(metrics.extremes(name), found, strict=True))
        self._losses, self._norms = [], []
        return values
