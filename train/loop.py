"""The training loop."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from data.errors import CorpusError, StorageError
from data.loader import Loader
from data.order.batches import Batch
from model.batch import MicroBatch, count_targets
from model.network import Losses
from parallel.collectives import from_first, sum_over
from parallel.engine import Engine
from train import routing
from train.job import checkpoint
from train.job.agree import require_repeated
from train.job.bad_steps import Judge
from train.job.build import Job, build_engine, build_job, draw_weights, gpu_or_cpu
from train.job.directory import finished_line, require_checkpoint
from train.job.heartbeat import write_beat
from train.job.lock import RunLock
from train.job.provenance import note_start
from train.job.schedule import learning_rate
from train.job.start import Start, agreed_start
from train.job.starter import starter_began
from train.job.stop import DATA_BROKEN, REWIND, STORAGE_AWAY, Agreement, StopRequest, exit_code
from train.measure.determinism import determinism_cost, make_deterministic
from train.measure.verdict import Kernels
from train.observe import Observer, due
from train.settings.run import (
    CONFIG_FILE,
    Config,
    RunReference,
    batch_schedule,
    describe,
    load_config,
    load_origin,
    save_config,
)
from train.training import Training
from train.use.heldout import heldout_line
from train.watch import metrics
from train.watch.goodput import DATA, REDONE, TRAINING
from train.watch.trackers import Tracker, build_trackers

POLL_S = 2.0  # between two looks at whether every process has its samples


def micro_batches(job: Job, batches: list[Batch], tokens_before: int = 0) -> list[MicroBatch]:
    """This rank's micro-batches of a step as the network takes them, with counts over the whole global batch.

    Raises:
        CorpusError: on every process, there is nothing in the batch but padding.
    """
    steps = job.config.mtp.steps
    counts = torch.stack([count_targets(batch.documents, steps, batch.learned) for batch in batches]).sum(dim=0)
    counts = sum_over(counts.to(job.device), job.groups.dp).cpu()
    if not counts[0]:  # such steps would go on to the end, moved by the optimizer's memory and decay alone
        raise CorpusError(
            "a step has no token to train on: all of its samples lie in parts of the corpus that data.on_corrupt=skip "
            "leaves out; look whether its storage is there"
        )
    cut = job.sequence_part
    return [
        MicroBatch.build(batch.tokens, batch.documents, counts, cut, tokens_before, batch.learned).to(job.device)
        for batch in batches
    ]


def train_step(
    job: Job,
    engine: Engine,
    batches: list[Batch],
    lr: float,
    tokens_before: int = 0,
    recording: bool = True,
    judge: Judge | None = None,
    verify: bool = False,
    settle: Callable[[], None] | None = None,
) -> tuple[list[Losses], float]:
    """One optimizer step over this rank's micro-batches; losses and gradient norm.

    Every loss is divided by its number of targets in the whole global batch, which is known before the step, so
    that unequal documents on ranks and micro-batches weigh each token alike.

    Args:
        recording: whether the routers note what a logged step reports.
        judge: decides whether the step is taken; without one, what is not finite raises.
        verify: computes the gradients twice and compares them, bit for bit.
        settle: called once the gradients are there, before anything that the optimizer changes does change.
    """
    ready = micro_batches(job, batches, tokens_before)
    bits = gradient_bits(job, engine, ready) if verify else None
    routing.begin_step(job, ready, recording)

    def accept(outputs: list[Losses], grad_norm: float) -> bool:
        if bits is not None:
            require_repeated(bits == engine.gradient_bits(), job.device)
        if settle is not None:
            settle()
        return judge is None or judge.accept(outputs, grad_norm)

    outcome = engine.train_step(ready, job.microbatch_tokens, lr, accept if judge or verify or settle else None)
    if judge is None or not judge.reason:
        routing.end_step(job)
    return outcome


def gradient_bits(job: Job, engine: Engine, ready: list[MicroBatch]) -> int:
    """The bits of the gradients of a step that is to be computed once more; nothing else is left of it."""
    routing.begin_step(job, ready, recording=False)
    engine.compute_gradients(ready, job.microbatch_tokens)
    for gauge in (gauge for chunk in job.chunks for gauge in chunk.gauges().values()):
        gauge.begin(gauge.sampled)
    return engine.gradient_bits()


def next_batches(
    loader: Loader, stop: StopRequest, in_time: bool, training: Training
) -> tuple[list[Batch], Agreement, Exception | None]:
    """This process's batches of the next step, once all have theirs or one cannot go on; and what all do next."""
    batches: list[Batch] | None = None
    fault, error = 0, None
    while True:
        try:
            batches = batches or (None if error else loader.poll(POLL_S))
        except Exception as raised:  # whatever it is, the weights are whole: all save them before they leave
            fault, error = STORAGE_AWAY if isinstance(raised, StorageError) else DATA_BROKEN, raised
            print(f"error: all processes save and stop: {raised}", file=sys.stderr, flush=True)
        waiting, save = not batches and not error, training.checkpoints.overdue()
        agreement = stop.agreed(waiting, fault, in_time, save, training.checkpoints.seconds)
        training.watchdog.met()  # a storage may be away for longer than a step may take
        if not agreement.waiting:
            return batches or [], agreement, error


def fit(training: Training, loader: Loader, tracker: Tracker, stop: StopRequest) -> tuple[int, int]:
    """Trains to the end of the run or to a reason to stop; returns the steps done and the reason (0: the end)."""
    job, engine, progress, judge = training.job, training.engine, training.progress, training.progress.judge
    clock, watchdog, run, start = training.clock, training.watchdog, job.config.run, loader.step
    values: dict[str, Any] = {}
    schedule, seq_length = batch_schedule(job.config), job.config.data.seq_length
    observer = Observer(job, engine, progress, clock, watchdog, loader, tracker)
    clock.started()
    for step in range(start + 1, run.steps + 1):
        watchdog.beat(step, "reading")
        with clock.spent(DATA):
            batches, asked, error = next_batches(loader, stop, step == start + 1, training)
        if asked.save or asked.reason:
            training.save(step - 1)
        training.poll()
        if error and not isinstance(error, StorageError):
            training.finish_saving(stopping=True)  # as all do: a save is complete once every process has finished it
            raise error
        if asked.reason:
            return step - 1, asked.reason

        watchdog.beat(step, "training")
        lr, behind = learning_rate(job.config.optim, step, run.steps), schedule.samples(step - 1).start * seq_length
        if step == 1:
            routers_start = routing.spread_as_drawn(job, micro_batches(job, batches))
        with clock.spent(REDONE if step <= training.reached else TRAINING), observer.step(step, batches):
            verify = run.verify_every > 0 and step % run.verify_every == 0
            outputs, grad_norm = train_step(
                job, engine, batches, lr, behind, observer.logged, judge, verify, training.settle
            )
        if step == start + 1:
            watchdog.stepping()
        if run.replicas_every and step % run.replicas_every == 0:
            training.require_sound_replicas()
        if judge.reason:
            judge.report(engine, step, progress.places(step, step))
            if judge.gives_up:
                return step, REWIND

        values = observer.values(step, outputs, lr, grad_norm, behind)
        if due(step, run.save_every, run.steps):  # before anything that may fail
            training.save(step)
        if due(step, run.eval_every, run.steps) and job.dataset.has_heldout:
            values |= training.evaluate(step)
        if step == 1 and routers_start:
            values |= routers_start
            if job.is_first:
                print(routing.spread_line(values), flush=True)
        if values:
            tracker.log(step, values)
        if job.is_first:
            observer.alerts.look(step, values)
            write_beat(run.path, step, clock.totals())
    if job.is_first and metrics.HELDOUT_LM_LOSS in values:
        print(heldout_line(values), flush=True)
    return run.steps, 0


def run_training(config: Config) -> int:
    """The train command, in each of its processes; returns the exit code."""
    with Kernels(config, gpu_or_cpu(config)) as kernels:
        return _run(build_job(config), kernels)


def _run(job: Job, kernels: Kernels) -> int:
    config = job.config
    lock = RunLock(config.run)
    from_first(lock.take)
    try:
        start = agreed_start(job)
        if start.step < config.run.steps:
            return exit_code(train_from(job, start, kernels))
        if job.is_first:
            print(finished_line(config, start.step), flush=True)
        return 0
    finally:
        lock.release()
        job.close()


def train_from(job: Job, start: Start, kernels: Kernels) -> int:
    """Trains a run from where it stands; returns why it has stopped (0: it is finished)."""
    config, began = job.config, starter_began()
    kernels.require_right(job.is_first)
    if config.run.deterministic:
        make_deterministic(config, job.device)
    checkpoint.require_room(job)
    if config.run.init and not start.checkpoint:
        # That of the first process: in a run that still trains, others may find a newer one already.
        origin = from_first(lambda: require_checkpoint(load_origin(config.run).run))
        checkpoint.require_whole(job, origin)
        checkpoint.load_model(job, origin)
    else:
        draw_weights(job)
    with Training(job, build_engine(job), start, began) as training:
        if job.is_first:
            known = (config.run.path / CONFIG_FILE).is_file()
            last = load_config(RunReference(config.run.name, config.run.dir)) if known else None
            note_start(config, last, start.step, job.topology.world)
            save_config(config)
            lines = [*describe(config, job.topology), *job.describe(), start.moved]
            if config.run.deterministic:
                lines.append(determinism_cost(config, job.topology, job.device))
            print("\n".join(line for line in lines if line), flush=True)
        stop, reason = StopRequest(job.device, config.run.max_time, began), REWIND
        while reason == REWIND:
            if job.is_first:
                print(f"starting after step {training.progress.start}", flush=True)
            tracker = build_trackers(config, job.rank, training.progress.start)
            try:
                with training.progress.loader() as loader:
                    step, reason = fit(training, loader, tracker, stop)
            finally:
                tracker.close()
            if reason == REWIND:
                training.rewind(step)
        training.finish_saving(stopping=bool(reason))
    if reason and job.is_first:
        where = "its last checkpoint" if training.checkpoints.failed else "here"
        print(f"stopped after step {step} of {config.run.steps}: the same command goes on from {where}", flush=True)
    return reason
