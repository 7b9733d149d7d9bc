"""The directory of a run, and what may be trained into it again. Reads files only: no torch, no processes.

runs/NAME/config.yaml                     the resolved settings
runs/NAME/history.jsonl                   one line a start: what changed, where it ran, which code
runs/NAME/metrics.jsonl                   one object a logged step
runs/NAME/checkpoints/step_NNNNNNNN/      a complete checkpoint (`train.job.shelf`)
runs/NAME/wandb/                          Weights & Biases files
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.config import CONTINUE
from data.errors import changes
from parallel.topology import Topology
from train.job.shelf import VERSION, Shelf, read_state, why_broken
from train.settings.run import CONFIG_FILE, Config, RunConfig, load_origin, read_config
from train.settings.tree import ConfigError, leaves, to_dict

RESUMABLE = (2, VERSION)  # formats of a checkpoint's state; format 2 has no hashes
# In a checkpoint: what a router has counted, and learnt of it, which is no weight.
COUNTS = tuple(f"router.balance.{name}" for name in ("counts", "forecast.squares", "forecast.products"))
# Settings of a model that its weights' shapes follow from.
SHAPES = (
    "layers",
    "hidden_size",
    "vocab_size",
    "attention_heads",
    "key_value_heads",
    "head_dim",
    "attention_gate",
    "linear_key_heads",
    "linear_value_heads",
    "linear_key_dim",
    "linear_value_dim",
    "conv_kernel",
    "experts",
    "expert_size",
    "shared_expert_size",
    "dense_size",
    "tied_embeddings",
)
# What a resumed run may not change: the checkpoint or the meaning of its step depends on it.
FIXED = (
    "batch.global",
    "batch.schedule",
    "batch.length_schedule",
    "model.",
    "mtp.",
    "balance.",
)


def last_checkpoint(run: RunConfig) -> Path | None:
    """The newest checkpoint of a run that is there whole; its large files are not read for that."""
    return Shelf(run.checkpoints).newest()


def starting_checkpoint(run: RunConfig) -> Path | None:
    """What a run goes on from: its own last checkpoint, before its first one that of the run that it forks."""
    return last_checkpoint(run) or (_forked_checkpoint(run) if run.fork else None)


def _forked_checkpoint(run: RunConfig) -> Path:
    return require_checkpoint(load_origin(run).run, run.forked_step, f"run.fork={run.fork}")


def require_checkpoint(run: RunConfig, step: int | None = None, asked: str = "") -> Path:
    """A checkpoint of a run that must have one: the newest whole one, or that after ``step`` steps.

    Args:
        asked: the setting that names the step, with its value; `step`, unless said otherwise.
    Raises:
        ConfigError: there is none yet, or none of that step, or that one is damaged.
    """
    shelf = Shelf(run.checkpoints)
    steps, asked = shelf.steps(), asked or f"step={step}"
    if step is not None and step not in steps:
        known = f"choose one of {', '.join(map(str, steps))}" if steps else "it has none yet"
        raise ConfigError(f"{asked} is not among the checkpoints of run.name={run.name}: {known}")
    if step is not None and (fault := why_broken(shelf.path(step))):
        raise ConfigError(f"{asked} of run.name={run.name} is damaged: {fault}: choose another of its checkpoints")
    path = shelf.newest() if step is None else shelf.path(step)
    if path is None and steps:
        fault = why_broken(shelf.path(steps[-1]))
        raise ConfigError(f"run.name={run.name} has no checkpoint that is whole; the last one: {fault}")
    if path is None:
        raise ConfigError(f"run.name={run.name} has no checkpoint yet: let it train to its end, or set run.save_every")
    return path


def check_origin(config: Config) -> None:
    """Refuses a new run whose model cannot take the weights of the run that `run.init` names.

    Raises:
        ConfigError: no such run, no checkpoint in it, or a model of other shapes.
    """
    origin = load_origin(config.run)
    require_checkpoint(origin.run)
    for name in SHAPES:
        ours, theirs = getattr(config.model, name), getattr(origin.model, name)
        if ours != theirs and None not in (ours, theirs):
            setting = "pattern" if name == "layers" else name
            raise ConfigError(
                f"model.{setting} gives {ours}, but run.init={config.run.init} has {theirs}: leave model.{setting} out"
            )
    if config.mtp.steps and not origin.mtp.steps:
        raise ConfigError(
            f"mtp.steps={config.mtp.steps}, but run.init={config.run.init} has no multi-token-prediction layer: "
            f"set mtp.steps=0"
        )


def require_same_data(checkpoint: Path, identity: Mapping[str, Any], on_change: str) -> None:
    """Refuses to go on with data that put other tokens into the samples to come.

    Args:
        identity: what decides the tokens of each sample now (`data.dataset.Dataset.identity`).
        on_change: data.on_change.
    Raises:
        ConfigError: something differs from what the checkpoint was trained with; it is named.
    """
    before = read_state(checkpoint)["data"]["identity"]
    changed = changes(before, identity)
    if changed and on_change != CONTINUE:
        raise ConfigError(
            f"{checkpoint} was trained with other data: {changed}: set this as before, choose another run.name, or go "
            f"on from the same sample number of the new data with data.on_change={CONTINUE}"
        )


def finished_line(config: Config, done: int) -> str:
    """What is said of a run that has nothing left to do."""
    return f"{config.run.path} is finished: {done} of {config.run.steps} steps; more run.steps continue it"


def layout_change(config: Config, topology: Topology) -> str:
    """A line about the layout of the last checkpoint where it was another one; else nothing."""
    path = starting_checkpoint(config.run)
    before = read_state(path)["layout"] if path else vars(topology)
    now = vars(topology).items()
    changed = [f"{key} {size} (was {before.get(key)})" for key, size in now if size != before.get(key, size)]
    return f"going on with another layout: {', '.join(changed)}" if changed else ""


def steps_done(config: Config) -> int:
    """Steps that the run has behind it: 0 for a new one.

    Raises:
        ConfigError: the run cannot go on with these settings.
    """
    path = starting_checkpoint(config.run)
    if path is None:
        if config.run.init:
            check_origin(config)
        return 0
    state, name = read_state(path), path.parents[1].name
    if state.get("version", 1) not in RESUMABLE:
        raise ConfigError(
            f"{path} has format {state.get('version', 1)}, and this version of Tessera resumes format {VERSION}: "
            f"finish the run with the version that wrote it, or start another from its weights with run.init={name}"
        )
    if state["layout"] is None:
        raise ConfigError(
            f"run.name={name} holds imported weights, which stay as they are: train from them with run.init={name} "
            f"and another run.name"
        )
    _refuse_other_settings(config, path)
    return state["step"]


def _refuse_other_settings(config: Config, checkpoint: Path) -> None:
    """Raises ConfigError where a checkpoint, or the meaning of its step, depends on a setting that has changed."""
    run = checkpoint.parents[1]
    path = next((path for path in (checkpoint / CONFIG_FILE, run / CONFIG_FILE) if path.is_file()), None)
    if path is None:
        return
    origin = read_config(path)
    before = dict(leaves(to_dict(origin)))
    # Where a pattern is cut into pipeline stages is a matter of the layout; a backend's weights are the same numbers.
    layers = ("model.pattern", "model.repeats") if origin.model.layers == config.model.layers else ()
    same = ("model.backend", "model.fp8", *layers)
    changed = [
        f"{key}={value} (was {before.get(key)})"
        for key, value in leaves(to_dict(config))
        if key.startswith(FIXED) and key not in same and before.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"run.name={run.name} exists and cannot go on with {', '.join(changed)}: choose another run.name, or "
            f"set these as before"
        )
