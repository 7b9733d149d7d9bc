"""What the loop measures of its steps: noted around each, put together for those that are logged."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.loader import Loader
from data.order.batches import Batch
from model.network import Losses
from parallel.collectives import sum_over, sum_over_all
from parallel.engine import Engine
from train import routing
from train.job.build import Job
from train.job.footprint import checkpoint_bytes
from train.job.progress import Progress
from train.watch import metrics
from train.watch.alerts import Alerts
from train.watch.every_step import EveryStep
from train.watch.gauges import Gauges
from train.watch.goodput import DATA, EVALUATING, SAVING, Clock
from train.watch.hang import Watchdog
from train.watch.profile import Profiler
from train.watch.resources import GB, resource_metrics
from train.watch.speed import Speedometer, slowest_process
from train.watch.trackers import Tracker


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and at the end, is done after this one."""
    return step == last or (every > 0 and step % every == 0)


def step_metrics(
    job: Job, outputs: list[Losses], tokens_before: int = 0, detailed: bool = True
) -> dict[str, metrics.Value]:
    """The losses of a step over the whole global batch, the same on every process (two reductions).

    Args:
        detailed: whether routers are also told of one by one.
    """
    config, steps = job.config, job.config.mtp.steps
    addends = torch.zeros(1 + steps, dtype=torch.float64, device=job.device)
    if outputs and job.groups.tp.rank() == 0:
        addends += sum(losses.by_step.double() for losses in outputs)
    lm_loss, *mtp_losses = sum_over_all(addends).tolist()
    loads = routing.layer_loads(job)
    of_routers = routing.routing_metrics(job, loads)
    loss = lm_loss + routing.router_loss(job, of_routers)
    loss += sum(math.prod(pair) for pair in zip(config.mtp.loss_weights(tokens_before), mtp_losses, strict=True))
    values: dict[str, metrics.Value] = {metrics.LOSS: loss, metrics.LM_LOSS: lm_loss}
    values |= {metrics.mtp_loss(step): value for step, value in enumerate(mtp_losses, start=1)}
    return values | of_routers | (routing.detailed_metrics(job, loads) if detailed else {})


def data_metrics(job: Job, loader: Loader) -> dict[str, metrics.Value]:
    """What the ranks' reading has met and overcome since the run was started, the same on every process."""
    faults = loader.faults
    counts = torch.tensor([faults.retries, faults.restarts, faults.skipped_tokens], device=job.device)
    names = (metrics.DATA_RETRIES, metrics.DATA_RESTARTS, metrics.DATA_SKIPPED_TOKENS)
    return dict(zip(names, sum_over(counts, job.groups.dp).tolist(), strict=True))


class Observer:
    """Measures the steps of a run from where it goes on.

    Attributes:
        alerts: tells of what is wrong with them.
        logged, sampled: whether the step under way is logged (run.log_every), and in detail (run.detail_every).
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        progress: Progress,
        clock: Clock,
        watchdog: Watchdog,
        loader: Loader,
        tracker: Tracker,
    ) -> None:
        self._job, self._progress, self._clock, self._loader = job, progress, clock, loader
        self._speed, self._every = Speedometer(job), EveryStep(job.config.optim.clip, progress.unlogged)
        engine.gather_weights()  # ZeRO 3 has only parts of them, which say nothing of their places
        self._gauges = Gauges(job, engine)
        self._profiler = Profiler(job)
        size = checkpoint_bytes(job.config, job.vocab_size) / GB
        self.alerts = Alerts(job.config, tracker, size, progress.judge.skipped)
        if job.is_first:
            watchdog.on_idle = self.alerts.idle
        self.logged = self.sampled = False

    @contextmanager
    def step(self, step: int, batches: list[Batch]) -> Iterator[None]:
        """Around a step; steps count from 1."""
        run = self._job.config.run
        self.sampled = step == 1 or due(step, run.detail_every, run.steps)
        self.logged = self.sampled or due(step, run.log_every, run.steps)
        self._gauges.begin_step(self.sampled)
        judge = self._progress.judge
        with self._profiler.step(step), self._speed.step(batches, lambda: judge.decided):
            yield
        self._progress.read(batches)

    def values(
        self, step: int, outputs: list[Losses], lr: float, grad_norm: float, tokens_before: int
    ) -> dict[str, metrics.Value]:
        """What is logged of a step that `step` was around; empty for most."""
        job, progress, clock = self._job, self._progress, self._clock
        judge = progress.judge
        self._every.add(judge.lm_loss, grad_norm)
        if not self.logged and not judge.reason:
            return {}
        values: dict[str, metrics.Value] = {metrics.TOKENS: progress.tokens()}
        values |= {metrics.GRAD_NORM: grad_norm, metrics.LR: lr, metrics.SKIPPED_STEPS: judge.skipped}
        if not self.logged:
            return values
        values |= step_metrics(job, outputs, tokens_before, self.sampled)
        spent, steps = clock.take(), self._speed.steps
        values |= self._speed.take(spent[DATA]) | data_metrics(job, self._loader) | clock.metrics()
        waited = {metrics.seconds("data"): spent[DATA] / steps}
        values |= resource_metrics(job, waited) | self._every.take() | progress.source_metrics(step)
        for name, kind in (("save", SAVING), ("eval", EVALUATING)):
            values |= {metrics.seconds(name): spent[kind]} if spent[kind] else {}
        if self.sampled and not judge.reason:
            values |= self._gauges.values(lr, grad_norm) | slowest_process(job)
        return values
