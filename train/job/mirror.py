"""Copies of a run's checkpoints elsewhere: another directory, or whatever fsspec writes (s3://, gs://...). No torch.

URL/NAME/step_NNNNNNNN/    as on the run's own disk; without `state.json`, its last file, it is not there

A checkpoint is written to the run's disk first, while training goes on, and copied from there by a thread of the first
process. A run whose disk is lost, or that goes on on another machine, begins with the newest copy.
"""

import threading
from contextlib import suppress
from pathlib import Path

from fsspec.core import url_to_fs

from data.secrets import hide, one_line
from train.job.shelf import NAME, STATE_FILE, Shelf, promised, read_state, why_broken
from train.settings.run import RunConfig


class Mirror:
    """The copies of one run's checkpoints. One process at a time changes them.

    Args:
        url: under which the run's copies lie.
    """

    def __init__(self, url: str) -> None:
        # Made anew each time: a kept one would go on with credentials that have expired.
        self.fs, self.root = url_to_fs(url, skip_instance_cache=True)

    def steps(self) -> list[int]:
        """The steps of all complete copies, in order."""
        found = [NAME.fullmatch(Path(file).parent.name) for file in self.fs.glob(f"{self.root}/step_*/{STATE_FILE}")]
        return sorted(int(match[1]) for match in found if match)

    def copy(self, checkpoint: Path) -> None:
        """Copies a complete checkpoint there."""
        place = f"{self.root}/{checkpoint.name}"
        self._delete(place)
        self.fs.makedirs(place, exist_ok=True)
        names = sorted(path.name for path in checkpoint.iterdir() if path.name != STATE_FILE)
        for name in [*names, STATE_FILE]:
            self.fs.put_file(str(checkpoint / name), f"{place}/{name}")

    def fetch(self, shelf: Shelf) -> int | None:
        """Brings the newest copy that is as it was written to a run's own disk; returns its step, None without one."""
        for step in reversed(self.steps()):
            partial = shelf.prepare(step)
            for file in self.fs.ls(f"{self.root}/{partial.stem}", detail=False):
                self.fs.get_file(file, str(partial / Path(file).name))
            if not why_broken(partial, deep=True):
                shelf.publish(step)
                return step
            shelf.give_up(step)
        return None

    def retire(self, newest: int, keep: int, keep_every: int) -> None:
        """Deletes all copies that are not `promised`, and what was killed in the middle of a copy.

        Args:
            newest: a step; the run has gone back behind later ones, which would take its place.
        """
        steps = [step for step in self.steps() if step <= newest]
        stay = {f"step_{step:08d}" for step in promised(steps, keep, keep_every)}
        for place in self.fs.glob(f"{self.root}/step_*"):
            if Path(place).name not in stay:
                self._delete(place)

    def _delete(self, place: str) -> None:
        """Deletes a copy; killed in the middle, it leaves none that could be taken for whole."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(f"{place}/{STATE_FILE}")
        with suppress(FileNotFoundError):
            self.fs.rm(place, recursive=True)


class Copier:
    """Copies one checkpoint after the other in the background; what fails is told, and tried with the next one.

    A copy under way ends with the process, and is then none: its last file is not there.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._under_way: tuple[int, threading.Thread] | None = None

    @property
    def step(self) -> int | None:
        """The step whose checkpoint is being copied, which must not go meanwhile."""
        return self._under_way[0] if self._under_way and self._under_way[1].is_alive() else None

    def start(self, step: int, checkpoint: Path) -> None:
        """Copies a checkpoint, unless another one is still under way: the next one will be newer."""
        if self._run.mirror and self.step is None:
            thread = threading.Thread(
                target=self._copy, args=(self._run.mirror, checkpoint), name="mirror", daemon=True
            )
            self._under_way = step, thread
            thread.start()

    def finish(self, newest: Path | None) -> bool:
        """Whether the newest checkpoint is copied, or could not be; else it is begun with. To be asked until it is."""
        if self._under_way is None or newest is None:
            return True
        if self.step is not None:
            return False
        if newest.name == f"step_{self._under_way[0]:08d}":
            return True
        self.start(read_state(newest)["step"], newest)
        return False

    def _copy(self, url: str, checkpoint: Path) -> None:
        try:
            mirror = Mirror(f"{url.rstrip('/')}/{self._run.name}")
            step = read_state(checkpoint)["step"]
            mirror.copy(checkpoint)
            mirror.retire(step, self._run.keep, self._run.keep_every)
            print(f"copied {checkpoint.name} to {hide(url)}", flush=True)
        except Exception as error:  # of whatever stands behind a URL; training does not depend on it
            print(f"WARNING: {checkpoint} was not copied to run.mirror={hide(url)}: {one_line(error)}", flush=True)


def fetch_lost(run: RunConfig, shelf: Shelf) -> Path | None:
    """Brings the newest copy of a run's checkpoints to its own disk, which has none; returns where it lies then.

    Where there is one of its own, newer copies may be of steps that the run has gone back behind.

    Raises:
        Exception: of whatever stands behind the URL.
    """
    step = Mirror(f"{run.mirror.rstrip('/')}/{run.name}").fetch(shelf) if run.mirror else None
    if step is None:
        return None
    print(f"fetched step {step} from run.mirror={hide(run.mirror or '')}", flush=True)
    return shelf.path(step)
