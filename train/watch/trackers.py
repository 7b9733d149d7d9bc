"""Who hears of a run's metrics: metrics.jsonl, the console and Weights & Biases, all behind one protocol."""

import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from data.errors import one_line
from data.secrets import hidden
from train.settings.run import Config, WandbConfig
from train.settings.tree import ConfigError, to_dict
from train.watch.metrics import METRICS_FILE, MetricsLog, console_line


class Tracker(Protocol):
    """Takes the metrics of one logged step after the other."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Notes the values of ``step``, once a step."""

    def close(self) -> None:
        """Ends the notes; nothing is logged after it."""


class NullTracker:
    """Forgets everything: for all ranks but the first."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class CompositeTracker:
    """Tells several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class ConsoleTracker:
    """Prints one line a logged step, with the time that is left at the mean speed so far."""

    def __init__(self, start_step: int, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._start_step, self._steps = start_step, steps
        self._clock, self._start = clock, clock()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        seconds_per_step = (self._clock() - self._start) / max(1, step - self._start_step)
        print(console_line(step, self._steps, values, seconds_per_step * (self._steps - step)), flush=True)

    def close(self) -> None:
        pass


class WandbTracker:
    """Weights & Biases without prompts or output. Once under way, its failures end only the tracking.

    Raises:
        ConfigError: wandb.mode=online cannot start; offline says so on stderr and goes on without.
    """

    def __init__(self, config: Config) -> None:
        import wandb

        check_login(config.wandb)
        mode: Any = config.wandb.mode  # one of the names that wandb knows: `train.settings.run` has checked it
        self._failures = (wandb.Error, OSError)  # OSError: its background process is gone
        self._run = None
        try:
            self._run = wandb.init(
                mode=mode,
                project=config.wandb.project,
                entity=config.wandb.entity,
                name=config.run.name,
                id=_run_id(config.run.path / "wandb" / "run_id.txt"),
                resume="allow",
                dir=str(config.run.path),
                config=hidden(to_dict(config)),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except self._failures as error:
            if config.wandb.mode == "online":
                raise _cannot_start(error) from error
            self._give_up(error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda run: run.log(dict(values), step=step))

    def close(self) -> None:
        self._try(lambda run: run.finish())

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except self._failures as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"warning: no W&B from here on ({one_line(error)}); {METRICS_FILE} goes on", file=sys.stderr)


def check_login(wandb_config: WandbConfig) -> None:
    """Raises ConfigError where wandb.mode=online finds no API key; sends nothing."""
    if wandb_config.mode != "online":
        return
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        raise _cannot_start("no API key is known")


def build_trackers(config: Config, rank: int, start_step: int) -> Tracker:
    """Every tracker of a run that goes on after ``start_step`` (0: a new one); only rank 0 says anything."""
    if rank != 0:
        return NullTracker()
    # W&B first: it is the one that may refuse.
    wandb_tracker = [WandbTracker(config)] if config.wandb.mode != "disabled" else []
    log = MetricsLog(config.run.path / METRICS_FILE, start_step)
    return CompositeTracker([log, ConsoleTracker(start_step, config.run.steps), *wandb_tracker])


def _run_id(path: Path) -> str:
    """The run's id at W&B, the same whenever the run is resumed."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _cannot_start(reason: object) -> ConfigError:
    return ConfigError(
        f"wandb.mode=online cannot start ({one_line(reason)}): `wandb login`, or choose wandb.mode=offline"
    )
