"""Who hears of a run's metrics: metrics.jsonl, the console, W&B and TensorBoard, all behind one protocol."""

import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from data.secrets import hidden, one_line
from train.settings.run import Config, WandbConfig
from train.settings.tree import ConfigError, to_dict
from train.watch.heatmap import heatmaps
from train.watch.metrics import METRICS_FILE, STEP, MetricsLog, Value, console_line

RETRY_S = 300.0  # before W&B is started again where it has failed
FLUSH_S = 10  # between two writes of what TensorBoard shows


class Tracker(Protocol):
    """Takes the metrics of one logged step after the other."""

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Notes the values of ``step``, once a step."""

    def alert(self, title: str, text: str) -> None:
        """Tells a person who is not at the console; from any thread."""

    def close(self) -> None:
        """Ends the notes; nothing is logged after it."""


class NullTracker:
    """Forgets everything: for all ranks but the first."""

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        pass

    def alert(self, title: str, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class CompositeTracker:
    """Tells several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def alert(self, title: str, text: str) -> None:
        for tracker in self._trackers:
            tracker.alert(title, text)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class ConsoleTracker:
    """Prints one line a logged step, with the time that is left at the mean speed so far."""

    def __init__(self, start_step: int, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._start_step, self._steps = start_step, steps
        self._clock, self._start = clock, clock()

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        seconds_per_step = (self._clock() - self._start) / max(1, step - self._start_step)
        print(console_line(step, self._steps, values, seconds_per_step * (self._steps - step)), flush=True)

    def alert(self, title: str, text: str) -> None:
        print(f"alert: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class WandbTracker:
    """Weights & Biases without prompts or output. Once under way, its failures cost only what is logged meanwhile.

    Values are logged over ``step``, not over W&B's own count, which drops what is logged a second time: steps that are
    done again after a crash draw their new values.

    Raises:
        ConfigError: wandb.mode=online cannot start; offline says so on stderr, and tries again later.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        import wandb

        check_login(config.wandb)
        self._failures = (wandb.Error, OSError)  # OSError: its background process is gone
        self._config, self._clock, self._failed = config, clock, clock()
        self._run: Any = None
        try:
            self._start()
        except self._failures as error:
            if config.wandb.mode == "online":
                raise _cannot_start(error) from error
            self._give_up(error)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        if self._run is None and self._clock() - self._failed >= RETRY_S:
            self._try(self._start_again)
        if self._run is not None:
            self._try(lambda: self._run.log({STEP: step, **_for_wandb(values)}))

    def alert(self, title: str, text: str) -> None:
        if self._run is not None:
            self._try(lambda: self._run.alert(title, text))

    def close(self) -> None:
        if self._run is not None:
            self._try(lambda: self._run.finish())

    def _start_again(self) -> None:
        import wandb

        with contextlib.suppress(*self._failures):
            wandb.teardown()  # forgets the background process that is gone
        self._start()

    def _start(self) -> None:
        import wandb

        config = self._config
        mode: Any = config.wandb.mode  # one of the names that wandb knows: `train.settings.run` has checked it
        self._run = wandb.init(
            mode=mode,
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=config.run.name,
            id=_run_id(config.run.path / "wandb" / "run_id.txt", config.run.name),
            resume="allow",
            dir=str(config.run.path),
            config=hidden(to_dict(config)),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except self._failures as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run, self._failed = None, self._clock()
        print(
            f"warning: no W&B for {RETRY_S / 60:.0f} minutes ({one_line(error)}); {METRICS_FILE} goes on",
            file=sys.stderr,
        )


class TensorBoardTracker:
    """TensorBoard's event files in the run's directory: curves while it runs, without an account.

    What was logged of steps after ``start_step`` is taken back, since they are done again. A disk that takes no more
    costs the rest of these files, not the run.
    """

    def __init__(self, config: Config, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = config.run.path / "tensorboard"
        self._writer: Any = SummaryWriter(str(path), purge_step=start_step + 1, flush_secs=FLUSH_S)
        self._step = start_step

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self._step = step
        self._try(lambda writer: self._write(writer, step, values))

    def alert(self, title: str, text: str) -> None:
        self._try(lambda writer: writer.add_text(f"alerts/{title}", text, self._step))

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _write(self, writer: Any, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if not isinstance(value, list):
                writer.add_scalar(name, value, step)
        for name, pixels in heatmaps(values).items():
            writer.add_image(name, pixels, step, dataformats="HWC")

    def _try(self, action: Callable[[Any], object]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            self._writer = None
            print(f"warning: no more for TensorBoard ({one_line(error)}); {METRICS_FILE} goes on", file=sys.stderr)


def _for_wandb(values: Mapping[str, Value]) -> dict[str, Any]:
    """What W&B shows of a logged step: its numbers, and images of its heatmaps where Pillow is there to make them."""
    import wandb

    images = heatmaps(values) if find_spec("PIL") else {}
    single = {name: value for name, value in values.items() if not isinstance(value, list)}
    return single | {name: wandb.Image(pixels) for name, pixels in images.items()}


def check_login(wandb_config: WandbConfig) -> None:
    """Raises ConfigError where wandb.mode=online finds no API key; sends nothing."""
    if wandb_config.mode != "online":
        return
    if not has_login():
        raise _cannot_start("no API key is known")


def has_login() -> bool:
    """Whether W&B finds an API key; sends nothing."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    return bool(wandb.login(prompt=False, verify=False))


def build_trackers(config: Config, rank: int, start_step: int) -> Tracker:
    """Every tracker of a run that goes on after ``start_step`` (0: a new one); only rank 0 says anything."""
    if rank != 0:
        return NullTracker()
    # W&B first: it is the one that may refuse.
    wandb_tracker = [WandbTracker(config)] if config.wandb.mode != "disabled" else []
    log = MetricsLog(config.run.path / METRICS_FILE, start_step)
    board = [TensorBoardTracker(config, start_step)] if config.run.tensorboard else []
    return CompositeTracker([log, ConsoleTracker(start_step, config.run.steps), *wandb_tracker, *board])


def _run_id(path: Path, name: str) -> str:
    """The run's id at W&B, the same whenever the run is resumed; a copy under another name gets one of its own."""
    found = path.read_text(encoding="utf-8").split(maxsplit=1) if path.exists() else []
    if found[1:] != [name]:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [uuid.uuid4().hex[:12], name]
        path.write_text(" ".join(found), encoding="utf-8")
    return found[0]


def _cannot_start(reason: object) -> ConfigError:
    return ConfigError(
        f"wandb.mode=online cannot start ({one_line(reason)}): `wandb login`, or choose wandb.mode=offline"
    )
