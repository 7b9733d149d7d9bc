"""Checkpoints: megatron-core's sharded format in a directory that takes its name only once it is whole."""

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from parallel.collectives import sum_over_all, wait_for_all
from parallel.engine import Engine
from parallel.stages import load_weights, sharded_weights
from parallel.stored import StoredTensors
from train.job.build import Job
from train.job.directory import COUNTS, checkpoint_path, write_state
from train.job.footprint import checkpoint_bytes
from train.settings.tree import ConfigError


def require_room(job: Job) -> None:
    """Refuses, on every process alike, what would not fit the disk of the run.

    Raises:
        ConfigError: its disk has no room for a checkpoint.
    """
    run, needed = job.config.run, checkpoint_bytes(job.config, job.vocab_size)
    # The run's folder may be still to come.
    there = next(path for path in (run.path, *run.path.parents) if path.exists())
    free = shutil.disk_usage(there).free if job.is_first else 0
    free = int(sum_over_all(torch.tensor(free, device=job.device)))
    if free < needed:
        raise ConfigError(
            f"run.dir={run.dir} has {free / 1e9:,.3f} GB free, and a checkpoint takes {needed / 1e9:,.3f} GB: make "
            f"room, or choose another run.dir"
        )


def save(job: Job, engine: Engine, step: int, data: dict[str, Any]) -> Path:
    """Writes the state after ``step`` steps; every rank takes part. The step's old checkpoint, if any, is replaced.

    ``data`` says what was read and how far: `Dataset.identity` and its cursors.

    Raises:
        ConfigError: the disk has no room for it.
    """
    path = checkpoint_path(job.config.run.path, step)
    partial = path.with_name(path.name + ".partial")
    if job.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    require_room(job)
    if job.is_first:
        partial.mkdir(parents=True)
    wait_for_all()
    dist_checkpointing.save(engine.sharded_state_dict(is_loading=False), str(partial))
    wait_for_all()
    if job.is_first:
        write_state(partial, step, data, vars(job.topology))
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    wait_for_all()
    return path


def load(engine: Engine, path: Path) -> None:
    """Puts a checkpoint, of whatever layout, into the engine: weights and optimizer."""
    engine.load_state_dict(dist_checkpointing.load(engine.sharded_state_dict(is_loading=True), str(path)))


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
    loaded = dist_checkpointing.load(numbers, str(path))
    load_weights(job.chunks, {part: beside[part] | loaded[part] for part in wanted})
