"""What a person should hear of at once: seen in the metrics of logged steps, told on the console, by W&B and a webhook.

A rule is told of when it begins to hold, and again once it has not held in between; one that goes on for hours is told
of every hour.
"""

import json
import math
import os
import statistics
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from train.settings.run import Config
from train.watch import metrics
from train.watch.trackers import Tracker

AGAIN_S = 3600.0
USUAL = 20  # logged steps whose median is what is usual
SINK = 0.3  # share of a layer's attention that the first tokens get
GAIN = 10.0  # of a norm
DROP = 0.7  # of the usual speed
DRIFT = 2.0  # times the usual violation of balance
ROOM, LEAST_GB = 2, 1.0  # checkpoints that a disk should have room for, and GB
IN_A_ROW = 3  # logged steps that are slow, or without tokens for many experts; sampled ones without tokens for one
COLLAPSED = 1 / 8  # of a layer's experts
NAMED = 3  # layers that an alert names


@dataclass(frozen=True)
class Alert:
    """Something to hear of.

    Attributes:
        rule: its kind. text: what is so. mend: what to do.
    """

    rule: str
    text: str
    mend: str

    def __str__(self) -> str:
        return f"{self.text}: {self.mend}"


class Rules:
    """Finds alerts in the metrics of one logged step after the other.

    Args:
        log: where bad steps are told of. experts: of a layer.
        skipped: bad steps so far; those of earlier starts were told of then.
    """

    def __init__(self, log: str, experts: int, skipped: float = 0.0) -> None:
        self._log, self._experts, self._skipped = log, experts, skipped
        self._usual: dict[str, deque[float]] = {}
        self._in_a_row: dict[str, int] = {}
        self._idle: deque[dict[str, set[int]]] = deque(maxlen=IN_A_ROW)  # by layer, experts without tokens

    def look(self, values: Mapping[str, Any]) -> Iterator[Alert]:
        """What holds now."""
        for name in (metrics.LOSS, metrics.GRAD_NORM):
            if name in values and not math.isfinite(values[name]):
                yield Alert(
                    "non-finite", f"{name} is not finite", f"the step was skipped; {self._log} names parameters"
                )
        skipped = values.get(metrics.SKIPPED_STEPS, 0.0)
        if skipped > self._skipped:
            yield Alert("skipped", f"{skipped:.0f} bad steps were skipped so far", f"{self._log} has their samples")
        self._skipped = skipped
        if metrics.LOSS not in values:
            return
        yield from self._of_loss(values)
        yield from self._of_routers(values)
        yield from self._of_layers(values)
        # In operations: longer sequences have fewer tokens a second. One slow step may be a sampled or verified one.
        speed, usual = values[metrics.TFLOPS], self._median(metrics.TFLOPS, values)
        if self._goes_on("throughput", bool(usual) and speed < DROP * usual):
            slow = values.get(metrics.SLOWEST_PROCESS)
            where = f"process {slow:.0f} multiplies matrices most slowly; " if slow is not None else ""
            mend = f"{where}compare seconds/* with earlier steps; a trace: run.profile=[first,last]"
            tokens = values[metrics.TOKENS_PER_SECOND]
            text = f"{tokens:,.0f} tokens/s; {speed / usual:.0%} of the usual operations a second"
            yield Alert("throughput", f"{text}, {IN_A_ROW} logged steps on", mend)

    def _of_loss(self, values: Mapping[str, Any]) -> Iterator[Alert]:
        usual = self._median(metrics.LM_LOSS, values)
        largest = values.get(metrics.extremes(metrics.LM_LOSS)[2], values[metrics.LM_LOSS])
        # More than half a nat above the usual is far outside of what batches differ by.
        if usual and largest > usual + max(0.5, 0.1 * usual):
            mend = "if it stays, resume before it (run.fork) with a lower optim.lr; optim.spike_factor skips such steps"
            yield Alert("spike", f"lm_loss reached {largest:.3f}, usually {usual:.3f}", mend)

    def _of_routers(self, values: Mapping[str, Any]) -> Iterator[Alert]:
        mend = "raise balance.weight, or steer with balance.bias_rate"
        dead = values.get(metrics.DEAD_EXPERTS, 0.0)
        if self._goes_on("collapse", collapsed(dead, self._experts)):
            text = f"{dead:.0f} of a layer's {self._experts} experts took no token, a mean over layers"
            yield Alert("collapse", f"{text}, {IN_A_ROW} logged steps on", mend)
        if still := self._still_idle(values):
            shown = [f"layer {layer}: {', '.join(map(str, sorted(own)[:8]))}" for layer, own in still.items()]
            more = f" and in {len(shown) - NAMED} more layers" if len(shown) > NAMED else ""
            text = f"experts that took no token on {IN_A_ROW} sampled steps in a row: {'; '.join(shown[:NAMED])}{more}"
            yield Alert("dead experts", text, mend)
        drifted, usual = values.get(metrics.MAX_VIOLATION, 0.0), self._median(metrics.MAX_VIOLATION, values)
        if usual and drifted > max(1.0, DRIFT * usual):
            mend = "the fullest expert slows all down: raise balance.weight, and look at max_violation by layer"
            yield Alert("balance", f"max_violation rose to {drifted:.2f}, usually {usual:.2f}", mend)

    def _of_layers(self, values: Mapping[str, Any]) -> Iterator[Alert]:
        worst, sink = _largest(values, metrics.ATTENTION_SINK)
        if sink > SINK:
            mend = "keep model.attention_gate on, and look at gate_mean of that layer"
            yield Alert("sink", f"{worst}: {sink:.0%} of attention goes to first tokens", mend)
        worst, massive = _largest(values, metrics.MASSIVE_ACTIVATIONS)
        if massive:
            mend = "they spoil low precision: lower optim.lr or raise optim.weight_decay, and look at activation_max"
            yield Alert("massive activations", f"{worst}: {massive:.0f} massive activations", mend)
        worst, gain = _largest(values, metrics.NORM_GAIN_MAX)
        if gain > GAIN:
            yield Alert(
                "norm gain", f"{worst} has grown to {gain:.1f}", "raise optim.weight_decay, which norms take part in"
            )

    def _still_idle(self, values: Mapping[str, Any]) -> dict[str, set[int]]:
        """By layer, the numbers of experts that took no token on this sampled step, nor on those before it.

        Experts that a batch leaves out now and then are none of them: while routers learn they are many.
        """
        prefix = f"{metrics.EXPERT_LOAD}/"
        loads = {name.removeprefix(prefix): load for name, load in values.items() if name.startswith(prefix)}
        if not loads:
            return {}
        idle = {layer: {place for place, one in enumerate(load) if not one} for layer, load in loads.items()}
        self._idle.append(idle)
        if len(self._idle) < IN_A_ROW:
            return {}
        always = {layer: set.intersection(*(own.get(layer, set()) for own in self._idle)) for layer in loads}
        return {layer: found for layer, found in always.items() if found}

    def _goes_on(self, rule: str, holds: bool) -> bool:
        """Whether something has held on so many logged steps in a row."""
        self._in_a_row[rule] = self._in_a_row.get(rule, 0) + 1 if holds else 0
        return self._in_a_row[rule] >= IN_A_ROW

    def _median(self, name: str, values: Mapping[str, Any]) -> float:
        """The median of a metric's last values before this one, which is noted; 0 without half of them."""
        past = self._usual.setdefault(name, deque(maxlen=USUAL))
        found = statistics.median(past) if len(past) >= USUAL // 2 else 0.0
        if name in values and math.isfinite(values[name]):
            past.append(values[name])
        return found


def _largest(values: Mapping[str, Any], name: str) -> tuple[str, float]:
    """The largest of a metric's values by layer or part, and its name."""
    found = {key: value for key, value in values.items() if key.startswith(f"{name}/")}
    worst = max(found, key=lambda key: found[key], default=name)
    return worst, found.get(worst, 0.0)


def collapsed(dead: float, experts: int) -> bool:
    """Whether so many of a layer's experts without tokens are a router's collapse, not chance."""
    return dead > COLLAPSED * experts


class Alerts:
    """Tells of alerts; from any thread of the first process.

    Args:
        checkpoint_gb: size of a checkpoint. skipped: bad steps that earlier starts told of.
    """

    def __init__(
        self,
        config: Config,
        tracker: Tracker,
        checkpoint_gb: float = 0.0,
        skipped: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._tracker, self._now = config.run, tracker, now
        self._rules = Rules(str(config.run.path / "logs" / "bad_steps.jsonl"), config.model.experts, skipped)
        self._room = max(LEAST_GB, ROOM * checkpoint_gb)
        self._told: dict[str, float] = {}

    def look(self, step: int, values: Mapping[str, Any]) -> None:
        """Tells of what begins to hold at a logged step."""
        found = [*self._rules.look(values), *self._of_disk(values)]
        judged = {alert.rule for alert in found}
        if metrics.LOSS in values:
            self._told = {rule: when for rule, when in self._told.items() if rule in judged}
        for alert in found:
            self.tell(step, alert)

    def idle(self, step: int, seconds: float) -> None:
        """Tells that no step has ended for a while."""
        text = f"no step has ended for {seconds / 60:.1f} minutes"
        mend = "kill -QUIT a process for its stacks; after run.step_timeout all write theirs into logs and end"
        self.tell(step, Alert("idle", text, mend))

    def tell(self, step: int, alert: Alert) -> None:
        """Tells of an alert, unless it was told of within the hour."""
        if self._now() - self._told.get(alert.rule, -math.inf) < AGAIN_S:
            return
        self._told[alert.rule] = self._now()
        self._tracker.alert(alert.rule, f"step {step}: {alert}")
        if self._run.alert_webhook:
            content = {"text": f"{self._run.name}, step {step}: {alert}", "run": self._run.name, "step": step}
            content |= {"alert": alert.rule}
            # No daemon: a process that ends waits for it.
            threading.Thread(target=_send, args=(self._run.alert_webhook, content)).start()

    def _of_disk(self, values: Mapping[str, Any]) -> Iterator[Alert]:
        free = values.get(metrics.DISK_FREE)
        if free is not None and free < self._room:
            mend = "make room, lower run.keep, or set run.mirror; saves without room are left out"
            yield Alert("disk", f"{free:.1f} GB are left on the disk of {self._run.path}", mend)


def _send(variable: str, content: dict[str, Any]) -> None:
    """Posts an alert; a webhook that does not answer stops nothing, and its URL, a secret, is not shown."""
    body = json.dumps(content).encode()
    try:
        request = urllib.request.Request(os.environ[variable], body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=10).close()
    except (OSError, ValueError, KeyError) as error:
        print(
            f"warning: the webhook of run.alert_webhook={variable} took no alert: {type(error).__name__}",
            file=sys.stderr,
        )
