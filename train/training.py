"""A run in this process: its engine, how far it is, and the clock and the watch beside it."""

import math
from types import TracebackType

from parallel.checkpoint.saving import SaveError
from parallel.collectives import from_first
from parallel.engine import Engine
from train.job import checkpoint
from train.job.agree import require_alike
from train.job.bad_steps import go_back
from train.job.build import Job
from train.job.checkpoint import Checkpoints
from train.job.directory import require_same_data
from train.job.progress import Progress
from train.job.start import Start, agreed_start
from train.settings.tree import to_dict
from train.use.in_training import evaluation
from train.watch.goodput import EVALUATING, SAVING, Clock
from train.watch.hang import Watchdog

STOPPED_COPY_S = 120.0  # for the copy of a checkpoint: Slurm's warning comes 300 s before the end of a job


class Training:
    """What the loop works with beside the batches. Close it when done (it is a context manager).

    Attributes:
        reached: the last step that was taken before; up to it steps are redone.
        saved: the last step that a checkpoint holds.
    """

    def __init__(self, job: Job, engine: Engine, start: Start, began: float) -> None:
        self.job, self.engine = job, engine
        run = job.config.run
        self.watchdog = Watchdog(run.path, run.start_timeout, run.step_timeout, run.alert_minutes)
        self.clock = Clock(began, start.beat.get("seconds"))
        self.reached: int = start.beat.get("step", 0)
        self.saved = start.step
        self.checkpoints = Checkpoints(job, engine)
        self._load(start)

    def __enter__(self) -> "Training":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.close()

    def save(self, step: int) -> None:
        """Begins to write a checkpoint, unless there is one of this step, or will be.

        Raises:
            RuntimeError: on every process, they would not save the same run.
        """
        if step == self.saved and not self.checkpoints.failed:
            return
        state = self.progress.state(step)
        with self.clock.spent(SAVING), self.watchdog.patient(step, "saving"):
            require_alike("settings or state", [to_dict(self.job.config), step, state], self.job.device)
            self.checkpoints.save(step, state)
        self.saved = step

    def settle(self) -> None:
        """Makes sure of the copy that is to be saved, once gradients are there and before they change anything."""
        if self.checkpoints.busy:
            with self.clock.spent(SAVING):
                self.checkpoints.settle()

    def poll(self) -> None:
        """Finishes a save that all processes have written; to be called between steps."""
        if not self.checkpoints.busy:
            return
        with self.clock.spent(SAVING), self.watchdog.patient(self.saved, "finishing a save"):
            self.checkpoints.poll()

    def finish_saving(self, stopping: bool = False) -> None:
        """Returns once nothing is being written or copied any more.

        Args:
            stopping: the run is to go on later, and who stops it does not wait for hours: its copy may be given up, and
                a save that came to nothing is told, since the run then goes on from the one before.
        Raises:
            SaveError: on every process, the last save came to nothing.
        """
        with self.clock.spent(SAVING), self.watchdog.patient(self.saved, "finishing a save"):
            self.checkpoints.close(self.watchdog.met, STOPPED_COPY_S if stopping else math.inf)
        if self.checkpoints.failed and not stopping:
            raise SaveError(f"step {self.saved}, the last one, is not saved: {self.checkpoints.failed}")

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics on held-out text; empty, with a warning, where it cannot be read."""
        with self.clock.spent(EVALUATING), self.watchdog.patient(step, "evaluating"):
            self.engine.gather_weights()
            return evaluation(self.job)

    def require_sound_replicas(self) -> None:
        """Compares the weights that several processes hold.

        Raises:
            RuntimeError: on every process, some are damaged; they are named.
        """
        damaged = self.engine.damaged_replicas()
        if damaged:
            raise RuntimeError(
                f"weights differ between processes that hold the same ones: {', '.join(damaged[:6])}: some memory or "
                f"link is damaged; the run goes on from its last checkpoint, on other machines"
            )

    def rewind(self, step: int) -> None:
        """Goes back to the last checkpoint before the bad steps that end with this one, and leaves their samples out.

        Raises:
            RuntimeError: on every process, there is no checkpoint to go back to.
        """
        config, progress = self.job.config, self.progress
        first = step - progress.judge.in_a_row + 1
        samples = progress.places(first, step)
        with self.watchdog.patient(step, "finishing a save"):
            self.checkpoints.wait()
        to = from_first(lambda: go_back(config.run, first, samples))
        if self.job.is_first:
            print(f"going back to step {to}: samples {samples[0]} to {samples[-1]} are left out", flush=True)
        self.reached = max(self.reached, step)
        with self.watchdog.patient(step, "going back"):
            self._load(agreed_start(self.job))

    def _load(self, start: Start) -> None:
        """Puts the run where a checkpoint says that it is."""
        self.progress, self.saved = Progress(self.job, start.step, start.state, start.left_out), start.step
        self.progress.require_alike()
        if start.checkpoint:
            require_same_data(start.checkpoint, self.progress.identity, self.job.config.data.on_change)
            checkpoint.load(self.engine, start.checkpoint)
