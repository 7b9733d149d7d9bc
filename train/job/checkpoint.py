"""Checkpoints of a job: saved while it trains on, verified before they are believed, loaded on any layout."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from data.read.workers import ReaderThread
from parallel.checkpoint.digest import Digest, write_synced
from parallel.checkpoint.loading import load_state
from parallel.checkpoint.saving import BackgroundSaver, SaveError
from parallel.checkpoint.stored import StoredTensors
from parallel.collectives import from_first, gather_to_first, max_over_all
from parallel.engine import Engine
from parallel.stages import load_weights, sharded_weights
from train.job.build import Job
from train.job.directory import COUNTS, starting_checkpoint
from train.job.footprint import checkpoint_bytes
from train.job.mirror import Copier, fetch_lost
from train.job.pace import pace_warning
from train.job.provenance import sidecars
from train.job.shelf import Shelf, why_broken, write_state
from train.settings.tree import ConfigError

COPY_POLL_S = 1.0  # between two looks at a copy, to or from run.mirror, that all wait for


def require_room(job: Job) -> None:
    """Refuses to start what would not fit the disk of the run once, on every process alike.

    Raises:
        ConfigError: its disk has no room for a checkpoint, and holds none of this run.
    """
    run, needed = job.config.run, checkpoint_bytes(job.config, job.vocab_size)
    shelf = Shelf(run.checkpoints)
    free = from_first(lambda: needed if shelf.steps() else shelf.free())
    if free < needed:
        raise ConfigError(
            f"run.dir={run.dir} has {free / 1e9:,.3f} GB free, and a checkpoint takes {needed / 1e9:,.3f} GB: make "
            f"room, or choose another run.dir"
        )


class Checkpoints:
    """The saves of a job, each written while the next steps are computed.

    Every process makes the same calls. A save that fails costs the run nothing but that checkpoint: it is told, and the
    last good one stays.

    Attributes:
        blocked: seconds for which training has stood still for saves.
        waited: those of them in which a save waited for the one before.
        seconds: what the last save that came to something took, from its begin until all had finished it.
        failed: why the last save came to nothing; empty if it did not.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        self._job, self._engine, self._shelf = job, engine, Shelf(job.config.run.checkpoints)
        self._saver = BackgroundSaver(engine.groups.dp_cp)
        self._step: int | None = None  # being written
        self._copier = Copier(job.config.run)  # works on the first process
        self.blocked, self.waited, self.seconds = 0.0, 0.0, 0.0
        self.failed, self._last, self._blocked_before = "", time.monotonic(), 0.0
        self._has_told = False  # that saves wait for each other

    @property
    def busy(self) -> bool:
        """Whether a state is still being written."""
        return self._step is not None

    @property
    def writing_seconds(self) -> float:
        """What the slowest process took to write the last save, until it was on the disk; on the first process."""
        return self._saver.seconds

    def overdue(self) -> bool:
        """Whether run.save_minutes have passed since the last save, by this process's clock."""
        minutes = self._job.config.run.save_minutes
        return minutes is not None and time.monotonic() - self._last > 60 * minutes

    def save(self, step: int, data: dict[str, Any]) -> None:
        """Begins to write the state after ``step`` steps. One that is still being written is waited for first.

        What the optimizer changes must stay as it is until `settle` was called.

        Args:
            data: what was read and how far: `Dataset.identity` and its cursors.
        """
        self._wait_before(step)
        with _Clock(self):
            self._blocked_before = self.blocked
            self._last, self.failed = time.monotonic(), ""
            try:
                directory = from_first(partial(self._prepare, step))
                state = self._engine.sharded_state_dict(is_loading=False)
                self._saver.start(state, directory, self._complete(step, data, directory))
                self._step = step
            except SaveError as error:
                self._give_up(step, error)

    def settle(self) -> None:
        """Returns once the state that is to be written is copied; to be called before the optimizer changes it."""
        if self._step is not None:
            with _Clock(self):
                self._saver.settle()

    def poll(self) -> None:
        """Finishes a save that all processes have written; to be called between steps."""
        if self._step is not None:
            self._finish(self._saver.poll)

    def wait(self) -> None:
        """Returns once nothing is being written any more."""
        if self._step is not None:
            self._finish(self._saver.wait)

    def _wait_before(self, step: int) -> None:
        """Waits for a save that another one, of ``step``, finds still being written, and tells the user once."""
        if self._step is None:
            return
        blocked, steps = self.blocked, step - self._step
        trained = time.monotonic() - self._last - (blocked - self._blocked_before)
        self.wait()
        self.waited += self.blocked - blocked
        if self._job.is_first and not (self._has_told or self.failed):
            warning = pace_warning(self._job.config.run, self.seconds, trained / max(1, steps))
            self._has_told = bool(warning)
            if warning:
                print(f"WARNING: {warning}", flush=True)

    def close(self, met: Callable[[], None], patience_s: float = math.inf) -> None:
        """Returns once nothing is being written or copied any more.

        Args:
            met: called every so often while all wait for a copy, which may take hours.
            patience_s: seconds after which a copy is given up.
        """
        self.wait()
        newest, deadline = self._shelf.newest(), time.monotonic() + patience_s
        while max_over_all(torch.tensor(int(self._copying(newest, deadline)), device=self._job.device)):
            met()
            time.sleep(COPY_POLL_S)

    def _copying(self, newest: Path | None, deadline: float) -> bool:
        if self._copier.finish(newest):
            return False
        late = time.monotonic() > deadline
        if late:
            print(f"WARNING: the copy of step {self._copier.step} is given up: the next one is made later", flush=True)
        return not late

    def _finish(self, how: Callable[[], object]) -> None:
        step = self._step
        assert step is not None, "something is being written"
        with _Clock(self):
            try:
                how()
            except SaveError as error:
                self._give_up(step, error)
            if not self._saver.busy:
                self._step = None
                self.seconds = self.seconds if self.failed else time.monotonic() - self._last

    def _prepare(self, step: int) -> Path:
        """On the first process: an empty directory on a disk with room, for which old checkpoints may go."""
        needed = checkpoint_bytes(self._job.config, self._job.vocab_size)
        try:
            free = self._shelf.make_room(needed, self._job.config.run.keep_every)
            if free < needed:
                raise SaveError(f"{free / 1e9:,.3f} GB are free, and a checkpoint takes {needed / 1e9:,.3f} GB")
            return self._shelf.prepare(step)
        except OSError as error:
            raise SaveError(str(error)) from error

    def _complete(self, step: int, data: dict[str, Any], directory: Path) -> Callable[[dict[str, Digest]], None]:
        job, run = self._job, self._job.config.run

        def complete(digests: dict[str, Digest]) -> None:
            tokenizer = job.dataset.tokenizer if job.dataset else None
            for name, content in sidecars(job.config, tokenizer, job.topology.world).items():
                digests[name] = write_synced(directory / name, content)
            write_state(directory, step, data, vars(job.topology), digests)
            path = self._shelf.publish(step)
            print(f"saved {path}", flush=True)
            self._copier.start(step, path)
            self._shelf.retire(run.keep, run.keep_every, spare=self._copier.step)

        return complete

    def _give_up(self, step: int, error: SaveError) -> None:
        self.failed, self._step = str(error), None
        if self._job.is_first:
            self._shelf.give_up(step)
            last = self._shelf.newest()
            kept = f"the last good checkpoint is {last}" if last else "the run has no checkpoint yet"
            print(f"WARNING: step {step} was not saved: {error}; training goes on, {kept}", flush=True)


@dataclass
class _Clock:
    """Adds what passes inside to the seconds for which saves block."""

    checkpoints: Checkpoints
    begin: float = 0.0

    def __enter__(self) -> None:
        self.begin = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.checkpoints.blocked += time.monotonic() - self.begin


def save(job: Job, engine: Engine, step: int, data: dict[str, Any]) -> Path:
    """Saves the state after ``step`` steps, and returns when it is there.

    Raises:
        SaveError: it could not be written.
    """
    checkpoints = Checkpoints(job, engine)
    checkpoints.save(step, data)
    checkpoints.wait()
    if checkpoints.failed:
        raise SaveError(checkpoints.failed)
    return Shelf(job.config.run.checkpoints).path(step)


def require_whole(job: Job, checkpoint: Path) -> None:
    """Hashes a checkpoint's files, shared out among all processes.

    Raises:
        ConfigError: on every process, it is not as it was written.
    """
    fault = _fault_of(job, checkpoint)
    if fault:
        raise ConfigError(f"{checkpoint} is damaged: {fault}: use another of the run's checkpoints")


def _fault_of(job: Job, checkpoint: Path) -> str:
    found = gather_to_first(why_broken(checkpoint, deep=True, part=job.rank, parts=job.topology.world))
    return from_first(lambda: next((fault for fault in found if fault), ""))


def newest_whole(job: Job) -> Path | None:
    """The newest checkpoint of a run that is as it was written; newer ones that are not are set aside and named.

    The first process decides which there are. Every process calls this before training.

    Raises:
        ConfigError: on every process, there are some, and none is whole: all stay, since a run that began anew would
            cost what they hold, and what cannot be read may be a matter of the machine.
    """
    run, damaged = job.config.run, dict[int, str]()
    shelf = Shelf(run.checkpoints)
    from_first(shelf.sweep)
    for step in from_first(lambda: list(reversed(shelf.steps()))):
        fault = _fault_of(job, shelf.path(step))
        if not fault:
            from_first(partial(_set_aside, shelf, damaged))
            return shelf.path(step)
        damaged[step] = fault
    fetched = _from_patient_first(job, partial(fetch_lost, run, shelf)) if run.mirror else None
    if damaged and fetched is None:
        names = "; ".join(f"step {step}: {fault}" for step, fault in damaged.items())
        raise ConfigError(
            f"run.name={run.name} has no checkpoint that is whole ({names}): bring one back to {shelf.root}, or choose "
            f"another run.name"
        )
    from_first(partial(_set_aside, shelf, {step: x for step, x in damaged.items() if shelf.path(step) != fetched}))
    return fetched


def _from_patient_first[T](job: Job, make: Callable[[], T]) -> T:
    """`from_first` of what may take hours: all meet every so often, so that no collective is given up meanwhile."""
    made = ReaderThread().submit(make) if job.is_first else None
    while max_over_all(torch.tensor(int(made is not None and not made.done()), device=job.device)):
        time.sleep(COPY_POLL_S)
    return from_first(lambda: cast(Future[T], made).result())


def _set_aside(shelf: Shelf, damaged: Mapping[int, str]) -> None:
    for step, fault in damaged.items():
        aside = shelf.set_aside(step)
        print(f"WARNING: {shelf.path(step)} is damaged: {fault}; it is now {aside.name}", flush=True)


def starting_point(job: Job) -> Path | None:
    """The verified checkpoint that a run goes on from: its own newest, or that of the run that it forks."""
    own = newest_whole(job)
    origin = from_first(lambda: starting_checkpoint(job.config.run)) if own is None else None
    if origin is not None:
        require_whole(job, origin)
    return own or origin


def load(engine: Engine, path: Path) -> None:
    """Puts a checkpoint, of whatever layout, into the engine: weights and optimizer."""
    engine.load_state_dict(load_state(engine.sharded_state_dict(is_loading=True), path, engine.groups.dp_cp))


def load_model(job: Job, path: Path) -> None:
    """Puts only a checkpoint's weights into the model, on any layout.

    Raises:
        ConfigError: they are not those of this model.
    """
    wanted = sharded_weights(job.chunks)
    numbers = {
        part: {name: x for name, x in entries.items() if isinstance(x, ShardedTensor) and not name.endswith(COUNTS)}
        for part, entries in wanted.items()
    }
    stored = StoredTensors(path).shapes
    for entry in (x for entries in numbers.values() for x in entries.values()):
        if stored.get(entry.key) != entry.global_shape:
            raise ConfigError(
                f"{path} does not hold the weights of this model: {entry.key} is {stored.get(entry.key, 'missing')}, "
                f"not {entry.global_shape}: set model.* and mtp.steps as they were"
            )
    # What modules keep beside their weights (FP8 scales, say) is not of use to another model, and may not be there.
    beside = {
        part: {name: x.data if name.endswith(COUNTS) else None for name, x in entries.items()}
        for part, entries in wanted.items()
    }
    loaded = load_state(numbers, path, job.groups.dp_cp)
    load_weights(job.chunks, {part: beside[part] | loaded[part] for part in wanted})
