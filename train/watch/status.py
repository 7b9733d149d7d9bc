"""How a run is, from another terminal: read from its files alone, whether it runs or not."""

import math
import time
from pathlib import Path

from train.job.heartbeat import last_beat
from train.job.lock import is_held
from train.job.shelf import Shelf
from train.settings.run import Config
from train.watch import metrics
from train.watch.alerts import collapsed
from train.watch.metrics import METRICS_FILE, STEP, duration, last_entries

SILENT_STEPS, SILENT_S = 5, 60.0  # steps, and seconds, without a sign of life after which a run does not seem to run


def last_logged(run: Path) -> dict[str, float]:
    """The last logged step that has a loss; empty where there is none yet."""
    file = run / METRICS_FILE
    return next((entry for entry in last_entries(file) if metrics.LOSS in entry), {}) if file.exists() else {}


def status_lines(config: Config, now: float) -> list[str]:
    """Step, speed, last save, health and the time that is left, at ``now`` (seconds since 1970)."""
    run, steps = config.run.path, config.run.steps
    entry, beat, newest = last_logged(run), last_beat(run), Shelf(config.run.checkpoints).newest()
    step = int(beat.get("step", entry.get(STEP, 0)))
    seconds = entry.get(metrics.STEP_SECONDS, math.nan)
    lines = [f"{run}: step {step:,} of {steps:,} ({step / steps:.1%})"]
    if entry:
        shown = (metrics.LOSS, metrics.LM_LOSS, metrics.GRAD_NORM, metrics.TOKENS_PER_SECOND, metrics.MFU)
        values = "  ".join(f"{name} {entry[name]:.5g}" for name in shown if entry.get(name) is not None)
        lines.append(f"logged at step {entry[STEP]:,.0f}: {values}")
    lines.append(f"life: {life(run, beat, step >= steps, seconds, now)}")
    saved = f"{newest.name}, {duration(now - newest.stat().st_mtime)} ago" if newest else "none yet"
    lines.append(f"last checkpoint: {saved}")
    if step < steps:
        left = duration((steps - step) * seconds) if math.isfinite(seconds) else "unknown: no step is logged yet"
        lines.append(f"left: {left} of training at this speed")
    return [*lines, f"health: {'; '.join(complaints(entry, config.model.experts)) or 'nothing to complain of'}"]


def life(run: Path, beat: dict[str, float], finished: bool, seconds: float, now: float) -> str:
    """When a run has last done a step, and whether it seems to go on."""
    if finished:
        return "the run is finished"
    if not beat:
        return "no step has been done yet"
    silence, seems = now - beat["time"], ""
    if silence >= max(SILENT_S, SILENT_STEPS * seconds if math.isfinite(seconds) else 0.0):
        seems = ": it does not seem to run; the same command goes on from its last checkpoint"
        if is_held(run):
            seems = ": a process has the run, so it starts, evaluates or saves, or is stuck"
    return f"{duration(silence)} since the last step, on {beat['host']} (process {beat['pid']}){seems}"


def complaints(entry: dict[str, float], experts: int) -> list[str]:
    """What a person should look at.

    Args:
        entry: the last logged step. experts: of a layer.
    """
    found = [f"{name} is not finite" for name in (metrics.LOSS, metrics.GRAD_NORM) if entry.get(name, 0.0) is None]
    if collapsed(dead := entry.get(metrics.DEAD_EXPERTS) or 0.0, experts):
        found.append(f"{dead:.0f} of a layer's {experts} experts took no token, a mean over layers")
    for name in (metrics.SKIPPED_STEPS, metrics.DATA_RETRIES, metrics.DATA_SKIPPED_TOKENS):
        if entry.get(name):
            found.append(f"{name} {entry[name]:g}")
    return found


def print_status(config: Config) -> None:
    """Says how the run is now."""
    print("\n".join(status_lines(config, time.time())))
