"""The learning rate as a pure function of the step.

Steps count updates from 1: step s of T, warm-up W, peak ``lr``, end ``min_lr``.

    warm-up    s <= W        lr * s / W
    cosine     W < s <= T    min_lr + (lr - min_lr) * (1 + cos(pi p)) / 2,  p = (s - W) / (T - W)
    wsd        W < s <= D    lr
               D < s <= T    min_lr + (lr - min_lr) * f(p),  p = (s - D) / (T - D)
                             f(p) = 1 - p (linear) or 1 - sqrt(p) (sqrt)

D = T - round(decay_fraction * T), but never before W. After T the rate stays at ``min_lr``. A run shorter
than its warm-up ends on the ramp.
"""

import math

from train.settings.optim import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of update ``step`` (from 1) in a run of ``steps`` updates."""
    if step <= min(optim.warmup_steps, steps):
        return optim.lr * step / optim.warmup_steps
    span = optim.lr - optim.min_lr
    if optim.schedule == "cosine":
        return optim.min_lr + span * (1 + math.cos(math.pi * _progress(step, optim.warmup_steps, steps))) / 2
    decay_start = max(optim.warmup_steps, steps - round(optim.decay_fraction * steps))
    if step <= decay_start:
        return optim.lr
    progress = _progress(step, decay_start, steps)
    return optim.min_lr + span * (1 - (math.sqrt(progress) if optim.decay_shape == "sqrt" else progress))


def _progress(step: int, start: int, end: int) -> float:
    """Share of start..end that lies behind ``step``, from 0 to 1."""
    return 1.0 if step >= end else (step - start) / (end - start)
