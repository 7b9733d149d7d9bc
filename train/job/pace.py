"""Whether a run asks for saves faster than they can be written. No torch."""

import math

from train.settings.run import RunConfig


def pace_warning(run: RunConfig, save_seconds: float, step_seconds: float) -> str:
    """What to choose so that no save waits for the one before it; empty if the settings leave it the time.

    Args:
        save_seconds: what a save took while training went on.
        step_seconds: from one step to the next meanwhile.
    """
    steps, minutes = math.ceil(save_seconds / max(step_seconds, 1e-6)), math.ceil(save_seconds / 6) / 10
    choices = []
    if 0 < run.save_every < steps:
        choices.append(f"run.save_every={steps} or more (it is {run.save_every})")
    if run.save_minutes is not None and 60 * run.save_minutes < save_seconds:
        choices.append(f"run.save_minutes={minutes} or more (it is {run.save_minutes})")
    if not choices:
        return ""
    return (
        f"training waits for saves: one takes {save_seconds:.1f} s, as long as {steps} steps, and the next is due "
        f"before it is written: choose {' and '.join(choices)}; metrics count what it costs as seconds/save"
    )
