"""The head of a page: how a run stands, in a few numbers and words."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from model.config import ModelConfig
from model.cost.cost import active_parameters, total_parameters
from train.job.heartbeat import last_beat
from train.job.shelf import Shelf
from train.settings.run import Config, batch_schedule
from train.watch import goodput, metrics
from train.watch.metrics import STEP_SECONDS, duration
from train.watch.report.events import ALERT, BAD_STEP, DAMAGE, HANG, START, Event
from train.watch.report.series import Log
from train.watch.status import complaints, last_logged, life

LAST = 20  # stretches of steps whose mean stands for the present


@dataclass(frozen=True)
class Number:
    """One number of the head: its name, what it is now, and a word about it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """How a run stands.

    Attributes:
        state: in a few words.
        life: the sentence of `status` about it.
        complaints: what a person should look at.
        numbers: the most important first; a number that the run does not have is missing.
    """

    state: str
    life: str
    complaints: list[str]
    numbers: list[Number]


def summarise(config: Config, log: Log, events: list[Event], now: float | None = None) -> Summary:
    """How a run stands at ``now`` (seconds since 1970)."""
    now = time.time() if now is None else now
    entry, beat = last_logged(config.run.path), last_beat(config.run.path)
    step = max(int(beat.get("step", 0)), log.final)
    seconds = entry.get(STEP_SECONDS) or math.nan
    finished = step >= config.run.steps
    words = life(config.run.path, beat, finished, seconds, now)
    states = {finished: "finished", step == 0: "not begun"}
    state = states.get(True) or ("stopped" if "does not seem to run" in words else "running")
    numbers = [*_progress(config, log, step), *_quality(log), *_speed(log), *_faults(events)]
    return Summary(state, words, complaints(entry, config.model.experts), numbers)


def _progress(config: Config, log: Log, step: int) -> list[Number]:
    newest = Shelf(config.run.checkpoints).newest()
    saved = f"last checkpoint {newest.name}" if newest else "no checkpoint yet"
    found = [Number("step", f"{step:,}", f"of {config.run.steps:,} ({step / config.run.steps:.1%}); {saved}")]
    if tokens := log.last(metrics.TOKENS):
        whole = batch_schedule(config).samples(config.run.steps).start * config.data.seq_length
        found.append(Number("tokens", short(tokens), f"of {short(whole)}"))
    model = config.model
    if model.vocab_size:
        found.append(Number("parameters", short(total_parameters(model, model.vocab_size)), _active(model)))
    return found


def _active(model: ModelConfig) -> str:
    return f"{short(active_parameters(model))} active, without embeddings" if "E" in model.layers else "dense"


def _quality(log: Log) -> list[Number]:
    """Losses and drafts."""
    found = []
    if metrics.LM_LOSS in log.series:
        points = list(log.series[metrics.LM_LOSS].points().values())[-LAST:]
        if points:
            mean = sum(point[0] for point in points) / len(points)
            note = f"nats a token; mean of the last {min(len(points) * log.width, log.final):,} steps"
            found.append(Number(metrics.LM_LOSS, f"{mean:.4f}", note))
    heldout, bits = log.last(metrics.HELDOUT_LM_LOSS), log.last(metrics.HELDOUT_BITS_PER_BYTE)
    if heldout is not None:
        note = "nats a token" + (f"; {bits:.4f} bits a byte" if bits is not None else "")
        found.append(Number("held-out loss", f"{heldout:.4f}", note))
    length = log.last(metrics.HELDOUT_ACCEPTED_LENGTH)
    if length is not None:
        found.append(Number("tokens a pass", f"{length:.2f}", "with MTP drafts, held-out text"))
    return found


def _speed(log: Log) -> list[Number]:
    found = []
    speed = typical(log, metrics.TOKENS_PER_SECOND)
    if speed is not None:
        seconds = typical(log, STEP_SECONDS)
        note = f"median; {seconds:.3g} s a step" if seconds is not None else "median"
        found.append(Number("tokens/s", short(speed), note))
    share, peak = typical(log, metrics.MFU), log.last(metrics.PEAK_TFLOPS)
    if share is not None and peak is not None:
        found.append(Number("MFU", f"{share:.1%}", f"median; of {peak:,.4g} TFLOP/s a process"))
    good = log.last(goodput.GOODPUT)
    if good is not None:
        wall = sum(log.last(goodput.seconds(kind)) or 0.0 for kind in goodput.KINDS)
        found.append(Number("goodput", f"{good:.1%}", f"of {duration(wall)} on the clock"))
    return found


def _faults(events: list[Event]) -> list[Number]:
    count: Callable[[str], int] = [event.kind for event in events].count
    wrong = {ALERT: count(ALERT), BAD_STEP: count(BAD_STEP), HANG: count(HANG), DAMAGE: count(DAMAGE)}
    note = ", ".join(f"{number} {kind}{'s' * (number > 1)}" for kind, number in wrong.items() if number)
    return [Number("starts", str(count(START)), note or "nothing went wrong that left a trace")]


def typical(log: Log, name: str) -> float | None:
    """The median over the stretches of steps."""
    if name not in log.series:
        return None
    means = sorted(point[0] for point in log.series[name].points().values())
    return means[len(means) // 2] if means else None


def short(number: float) -> str:
    """A number in three or four digits: ``327.7k``, ``79.7B``."""
    if abs(number) < 1e4:
        return f"{number:,.0f}" if number >= 1e3 else f"{number:.4g}"
    size, letter = next(pair for pair in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(number) >= pair[0])
    return f"{number / size:.4g}{letter}"
