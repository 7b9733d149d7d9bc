"""The directory of a run, and what may be trained into it again. Reads files only: no torch, no processes.

runs/NAME/config.yaml                     the resolved settings
runs/NAME/metrics.jsonl                   one object a logged step
runs/NAME/checkpoints/step_NNNNNNNN/      a complete checkpoint; *.partial is one being written
runs/NAME/wandb/                          Weights & Biases files
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.config import CONTINUE
from data.errors import changes
from data.secrets import hidden
from parallel.topology import Topology
from train.settings.run import CONFIG_FILE, Config, RunReference, load_config
from train.settings.tree import ConfigError, leaves, to_dict

STATE_FILE = "state.json"
STATE_VERSION = 2  # of a checkpoint's state: raised when older ones cannot be resumed
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


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return max((path.parent for path in run.glob(f"checkpoints/step_*[0-9]/{STATE_FILE}")), default=None)


def write_state(checkpoint: Path, step: int, data: dict[str, Any] | None, layout: dict[str, Any] | None) -> None:
    """Writes what a checkpoint says of itself.

    Args:
        data: what was read and how far; None for imported weights, as is ``layout``.
    """
    state = {"version": STATE_VERSION, "step": step, "data": hidden(data), "layout": layout}
    (checkpoint / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: its step, the identity of its data and its layout.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint / STATE_FILE} cannot be read ({error}): delete that checkpoint") from error


def require_checkpoint(run: RunReference) -> Path:
    """The newest checkpoint of a run that must have one.

    Raises:
        ConfigError: there is none yet.
    """
    path = last_checkpoint(run.path)
    if path is None:
        raise ConfigError(f"run.name={run.name} has no checkpoint yet: let it train to its end, or set run.save_every")
    return path


def check_origin(config: Config) -> None:
    """Refuses a new run whose model cannot take the weights of the run that `run.init` names.

    Raises:
        ConfigError: no such run, no checkpoint in it, or a model of other shapes.
    """
    origin = load_config(config.run.origin)
    require_checkpoint(config.run.origin)
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


def layout_change(config: Config, topology: Topology) -> str:
    """A line about the layout of the last checkpoint where it was another one; else nothing."""
    path = last_checkpoint(config.run.path)
    before = read_state(path)["layout"] if path else vars(topology)
    now = vars(topology).items()
    changed = [f"{key} {size} (was {before.get(key)})" for key, size in now if size != before.get(key)]
    return f"going on with another layout: {', '.join(changed)}" if changed else ""


def steps_done(config: Config) -> int:
    """Steps that the run has behind it: 0 for a new one.

    Raises:
        ConfigError: the run cannot go on with these settings.
    """
    path = last_checkpoint(config.run.path)
    if path is None:
        if config.run.init:
            check_origin(config)
        return 0
    state = read_state(path)
    name = config.run.name
    if state.get("version", 1) != STATE_VERSION:
        raise ConfigError(
            f"{path} has format {state.get('version', 1)}, and this version of Tessera resumes format {STATE_VERSION}: "
            f"finish the run with the version that wrote it, or start another from its weights with run.init={name}"
        )
    if state["layout"] is None:
        raise ConfigError(
            f"run.name={name} holds imported weights, which stay as they are: train from them with run.init={name} "
            f"and another run.name"
        )
    if (config.run.path / CONFIG_FILE).is_file():
        origin = load_config(RunReference(name, config.run.dir))
        before = dict(leaves(to_dict(origin)))
        # Where a pattern is cut into pipeline stages is a matter of the layout.
        same = ("model.pattern", "model.repeats") if origin.model.layers == config.model.layers else ()
        changed = [
            f"{key}={value} (was {before.get(key)})"
            for key, value in leaves(to_dict(config))
            if key.startswith(FIXED) and key not in same and before.get(key) != value
        ]
        if changed:
            raise ConfigError(
                f"run.name={name} exists and cannot go on with {', '.join(changed)}: choose another run.name, or "
                f"set these as before"
            )
    return state["step"]
