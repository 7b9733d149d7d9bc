"""Runs as the lab keeps them: settings, machine and metrics of each in one compressed file, small enough for git."""

import json
import lzma
import math
import os
from pathlib import Path
from typing import Any

import yaml

from train.settings.run import CONFIG_FILE
from train.watch import metrics

KEPT = Path(__file__).parent / "records"
ENDING = ".json.xz"
DIGITS = 6
EVERY_LINE_UNTIL, THEN_EVERY = 200, 50  # steps whose lines are kept
# What says nothing of the training itself, or much for what it says, by the name before the first slash.
LEFT_OUT = (
    *("seconds", "wall_seconds", "every_step", metrics.EXPERT_LOAD, metrics.GROUP_GRAD_NORM, metrics.UPDATE_TO_WEIGHT),
    *("data_retries", "data_restarts", "data_skipped_tokens", "disk_free_gb", "disk_gb", "memory_retries", "goodput"),
    *("tflops", "mfu", "peak_tflops", "matmul_share", "epoch", "memory_reserved_gb"),
)
BY_LAYER = (metrics.ATTENTION_SINK, metrics.ACTIVATION_MAX, metrics.GATE_MEAN)  # kept of each layer too


def is_kept(name: str) -> bool:
    """Whether a metric is kept."""
    first, _, rest = name.partition("/")
    layer = rest.rpartition("/")[2]
    of_layer = layer.isdecimal() or layer == "mtp"
    steps = first in (metrics.HELDOUT_ACCEPTANCE, metrics.HELDOUT_MTP_LOSS, "mtp_loss")
    return first not in LEFT_OUT and (not of_layer or steps or first in BY_LAYER)


def _short(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value:
        return float(f"{value:.{DIGITS}g}")
    return value


def trimmed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines and metrics of a run's log that are kept."""
    last = lines[-1][metrics.STEP]
    wanted = [
        line
        for line in lines
        if line[metrics.STEP] <= EVERY_LINE_UNTIL or line[metrics.STEP] % THEN_EVERY == 0 or line[metrics.STEP] == last
    ]
    return [{name: _short(value) for name, value in line.items() if is_kept(name)} for line in wanted]


def keep(folder: Path, name: str, run: dict[str, Any]) -> Path:
    """Writes a run's file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path, draft = folder / f"{name}{ENDING}", folder / f".{name}.draft"
    draft.write_bytes(lzma.compress(json.dumps(run, sort_keys=True).encode(), preset=9))
    os.replace(draft, path)
    return path


def read(path: Path) -> dict[str, Any]:
    """A kept run: arm, seed, seams, overrides, config, machine, metrics."""
    return json.loads(lzma.decompress(path.read_bytes()))


def read_all(folder: Path = KEPT) -> dict[tuple[str, int], dict[str, Any]]:
    """All kept runs by arm and seed."""
    found = [read(path) for path in sorted(folder.glob(f"*{ENDING}"))]
    return {(run["arm"], run["seed"]): run for run in found}


def unpack(folder: Path, output: Path) -> list[Path]:
    """Run directories, as far as they are kept, for ``./launch.sh report``."""
    made = []
    for path in sorted(folder.glob(f"*{ENDING}")):
        run, directory = read(path), output / path.name.removesuffix(ENDING)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(yaml.safe_dump(run["config"], sort_keys=False), encoding="utf-8")
        lines = "".join(json.dumps(line) + "\n" for line in run["metrics"])
        (directory / metrics.METRICS_FILE).write_text(lines, encoding="utf-8")
        made.append(directory)
    return made
