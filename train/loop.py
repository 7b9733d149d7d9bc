"""The training loop."""

import math
import signal
import time
from collections.abc import Callable

import torch

from data.loader import Loader
from data.order.batches import Batch
from data.secrets import hide
from model.batch import MicroBatch, count_targets
from model.network import Losses
from parallel.checkpoint.saving import SaveError
from parallel.collectives import max_over_all, sum_over, sum_over_all
from parallel.engine import Engine
from train import routing
from train.job import checkpoint
from train.job.build import Job, build_engine, build_job, draw_weights
from train.job.checkpoint import Checkpoints
from train.job.directory import layout_change, require_checkpoint, require_same_data, steps_done
from train.job.provenance import note_start
from train.job.schedule import learning_rate
from train.measure.doctor import refuse_wrong_kernels
from train.settings.run import CONFIG_FILE, Config, RunReference, batch_schedule, describe, load_config, save_config
from train.settings.tree import ConfigError
from train.use.evaluate import draft_metrics, heldout_line, heldout_metrics, microbatch
from train.watch import metrics
from train.watch.resources import resource_metrics
from train.watch.speed import Speedometer
from train.watch.trackers import Tracker, build_trackers

TIME_IS_UP = 1  # a reason to stop, beside the numbers of signals (2 and up)


class StopRequest:
    """Ctrl-C, SIGTERM or the end of run.max_time, agreed on by all processes between two steps."""

    def __init__(self, device: torch.device, max_minutes: float | None) -> None:
        self._device, self._signal, self.save = device, 0, False
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self._signal = number

    def agreed(self, save: bool = False) -> int:
        """0 to go on, else the reason, the same on every process; ``self.save`` then says whether any asks to save."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        own = torch.tensor([max(self._signal, TIME_IS_UP * late), save], device=self._device)
        reason, self.save = max_over_all(own).tolist()
        return int(reason)


def micro_batches(job: Job, batches: list[Batch], tokens_before: int = 0) -> list[MicroBatch]:
    """This rank's micro-batches of a step as the network takes them, with counts over the whole global batch."""
    counts = torch.stack([count_targets(batch.documents, job.config.mtp.steps) for batch in batches]).sum(dim=0)
    counts = sum_over(counts.to(job.device), job.groups.dp).cpu()
    return [microbatch(job, batch, counts, tokens_before) for batch in batches]


def train_step(
    job: Job, engine: Engine, batches: list[Batch], lr: float, tokens_before: int = 0, recording: bool = True
) -> tuple[list[Losses], float]:
    """One optimizer step over this rank's micro-batches; losses and gradient norm.

    Every loss is divided by its number of targets in the whole global batch, which is known before the step, so
    that unequal documents on ranks and micro-batches weigh each token alike.

    Args:
        recording: whether the routers note what a logged step reports.
    """
    ready = micro_batches(job, batches, tokens_before)
    routing.begin_step(job, ready, recording)
    outcome = engine.train_step(ready, job.microbatch_tokens, lr)
    routing.end_step(job)
    return outcome


def step_metrics(job: Job, outputs: list[Losses], tokens_before: int = 0) -> dict[str, float]:
    """The losses of a step over the whole global batch, the same on every process (two reductions)."""
    config, steps = job.config, job.config.mtp.steps
    addends = torch.zeros(1 + steps, dtype=torch.float64, device=job.device)
    if outputs and job.groups.tp.rank() == 0:
        addends += sum(losses.by_step.double() for losses in outputs)
    lm_loss, *mtp_losses = sum_over_all(addends).tolist()
    of_routers = routing.routing_metrics(job)
    loss = lm_loss + routing.router_loss(job, of_routers)
    loss += sum(math.prod(pair) for pair in zip(config.mtp.loss_weights(tokens_before), mtp_losses, strict=True))
    values = {metrics.LOSS: loss, metrics.LM_LOSS: lm_loss}
    values |= {metrics.mtp_loss(step): value for step, value in enumerate(mtp_losses, start=1)}
    return values | of_routers


def data_metrics(job: Job, loader: Loader) -> dict[str, float]:
    """What the ranks' reading has met and overcome since the run was started, the same on every process."""
    faults = loader.faults
    counts = torch.tensor([faults.retries, faults.restarts, faults.skipped_tokens], device=job.device)
    names = (metrics.DATA_RETRIES, metrics.DATA_RESTARTS, metrics.DATA_SKIPPED_TOKENS)
    return dict(zip(names, sum_over(counts, job.groups.dp).tolist(), strict=True))


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and at the end, is done after this one."""
    return step == last or (every > 0 and step % every == 0)


def fit(
    job: Job,
    engine: Engine,
    loader: Loader,
    tracker: Tracker,
    stop: StopRequest,
    save: Callable[[int], None],
    checkpoints: Checkpoints,
) -> tuple[int, int]:
    """Trains to the end of the run or to a request to stop; returns the steps done and the reason (0: the end)."""
    run, reason = job.config.run, 0
    values: dict[str, float] = {}
    schedule, seq_length = batch_schedule(job.config), job.config.data.seq_length
    speed = Speedometer(job)
    for step in range(loader.step + 1, run.steps + 1):
        start = time.perf_counter()
        lr = learning_rate(job.config.optim, step, run.steps)
        logged = due(step, run.log_every, run.steps) or step == 1
        behind = schedule.samples(step - 1).start * seq_length
        batches = next(loader)
        if step == 1:
            routers_start = routing.spread_as_drawn(job, micro_batches(job, batches))
            start = time.perf_counter()  # that was no part of the step
        outputs, grad_norm = train_step(job, engine, batches, lr, behind, recording=logged)
        speed.add(time.perf_counter() - start, step - 1)

        values = {}
        if logged:
            values = {metrics.TOKENS: schedule.samples(step).start * seq_length}
            values |= step_metrics(job, outputs, behind)
            values |= {metrics.GRAD_NORM: grad_norm, metrics.LR: lr, **speed.take(), **data_metrics(job, loader)}
            values |= resource_metrics(job)
            progress = job.dataset.progress(schedule.samples(step).start)
            values |= {hide(name): value for name, value in progress.items()}
        if due(step, run.eval_every, run.steps):
            engine.gather_weights()
            values |= heldout_metrics(job, run.eval_samples) | draft_metrics(job, run.eval_prompts)
        if step == 1 and routers_start:
            values |= routers_start
            if job.is_first:
                print(routing.spread_line(values), flush=True)
        if values:
            tracker.log(step, values)

        reason = stop.agreed(save=checkpoints.overdue())
        checkpoints.poll()
        if reason or stop.save or due(step, run.save_every, run.steps):
            save(step)
        if reason:
            break
    if job.is_first and metrics.HELDOUT_LM_LOSS in values:
        print(heldout_line(values), flush=True)
    return step, reason


def run_training(config: Config) -> int:
    """The train command, in each of its processes; returns the exit code."""
    job = build_job(config)
    refuse_wrong_kernels(config.model, job.device, job.is_first)
    checkpoint.require_room(job)
    before = checkpoint.starting_point(job)
    start, moved = steps_done(config), layout_change(config, job.topology)
    if config.run.init and not start:
        origin = require_checkpoint(load_config(config.run.origin).run)
        checkpoint.require_whole(job, origin)
        checkpoint.load_model(job, origin)
    else:
        draw_weights(job)
    engine = build_engine(job)
    stream = job.dataset.train_stream(config.seed, shared=torch.distributed.get_world_size() > 1)
    identity = job.dataset.identity(config.seed)
    if start >= config.run.steps:
        name, steps = config.run.name, config.run.steps
        raise ConfigError(f"run.steps={steps} but run.name={name} has done {start}: raise run.steps")
    if before:
        require_same_data(before, identity, config.data.on_change)
        checkpoint.load(engine, before)
    if job.is_first:
        known = (config.run.path / CONFIG_FILE).is_file()
        last = load_config(RunReference(config.run.name, config.run.dir)) if known else None
        note_start(config, last, start, job.topology.world)
        save_config(config)
        lines = [*describe(config, job.topology), *job.describe(), moved, f"starting after step {start}"]
        print("\n".join(line for line in lines if line), flush=True)

    def save(step: int) -> None:
        samples = batch_schedule(config).samples(step).start
        data = {"identity": identity, "samples": samples, "sources": job.dataset.cursors(samples)}
        checkpoints.save(step, data)

    checkpoints = Checkpoints(job, engine)
    stop = StopRequest(job.device, config.run.max_time)
    tracker = build_trackers(config, job.rank, start)
    data = job.groups.dp
    try:
        with Loader(stream, batch_schedule(config), config.batch.micro, data.rank(), data.size(), start) as loader:
            step, reason = fit(job, engine, loader, tracker, stop, save, checkpoints)
        checkpoints.wait()
    finally:
        tracker.close()
    if checkpoints.failed:
        raise SaveError(f"step {step}, the last one, is not saved: {checkpoints.failed}")
    if reason and job.is_first:
        print(f"stopped after step {step} of {config.run.steps}: the same command goes on from here", flush=True)
    job.close()
    return 128 + reason if reason > TIME_IS_UP else 0
