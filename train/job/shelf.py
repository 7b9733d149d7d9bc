"""Where the checkpoints of a run lie, which of them stay, and how they come and go. No torch.

step_NNNNNNNN/            a complete checkpoint: `state.json` is its last file, and it got its name after that
step_NNNNNNNN.partial/    one that is being written
step_NNNNNNNN.deleting/   one that is being deleted
step_NNNNNNNN.broken/     one that was not as it was written when it was to be read; it stays for a person to look at

Whatever is killed in the middle leaves one of these names, and `sweep` makes good at the next start.
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import sync_directory
from data.secrets import hidden, one_line
from parallel.checkpoint.digest import Digest, digest_of, read_digest, write_synced
from train.job.integrity import MANIFEST_FILE, faults, manifest
from train.settings.tree import ConfigError

STATE_FILE = "state.json"
VERSION = 3  # of a checkpoint's state: raised when older ones cannot be resumed
FIRST_HASHED = 3  # versions before this one have no hashes
PARTIAL, DELETING, BROKEN = ".partial", ".deleting", ".broken"
NAME = re.compile(r"step_(\d{8,})")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: its step, the identity of its data and its layout.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state["step"], int):
            raise ValueError("it is no object with a step")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{checkpoint / STATE_FILE} cannot be read ({one_line(error)}): delete that checkpoint"
        ) from error
    return state


def write_state(
    checkpoint: Path,
    step: int,
    data: dict[str, Any] | None,
    layout: dict[str, Any] | None,
    digests: Mapping[str, Digest] | None = None,
) -> None:
    """Writes the last two files of a checkpoint: the hashes of all, and what it says of itself.

    Args:
        data: what was read and how far; None for imported weights, as is ``layout``.
        digests: of the files that are there, as their writers took them; None: they are read for that.
    """
    if digests is None:
        digests = {path.name: read_digest(path) for path in checkpoint.iterdir()}
    state = (json.dumps({"version": VERSION, "step": step, "data": hidden(data), "layout": layout}) + "\n").encode()
    write_synced(checkpoint / MANIFEST_FILE, manifest({**digests, STATE_FILE: digest_of(state)}))
    write_synced(checkpoint / STATE_FILE, state)


def why_broken(checkpoint: Path, deep: bool = False, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint; empty if it is as it was written. See `integrity.faults` for the arguments."""
    try:
        version = read_state(checkpoint).get("version", 1)
    except ConfigError as error:
        return str(error).removesuffix(": delete that checkpoint")
    if version < FIRST_HASHED and not (checkpoint / MANIFEST_FILE).exists():
        return ""
    return "; ".join(faults(checkpoint, deep, part, parts))


def promised(steps: list[int], keep: int, keep_every: int) -> set[int]:
    """The steps that stay: the newest ``keep`` (0: all), and each multiple of ``keep_every`` (0: none for that)."""
    newest = sorted(steps)[-keep:] if keep else steps
    return {*newest, *(step for step in steps if keep_every and step % keep_every == 0)}


def _size(checkpoint: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in checkpoint.iterdir())


class Shelf:
    """The checkpoints of a run in a directory of a file system. One process at a time changes it.

    Attributes:
        root: the directory; it may not exist yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps lies."""
        return self.root / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        found = [NAME.fullmatch(path.parent.name) for path in self.root.glob(f"step_*/{STATE_FILE}")]
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are all there and have their sizes; large ones are not read."""
        return next((self.path(step) for step in reversed(self.steps()) if not why_broken(self.path(step))), None)

    def prepare(self, step: int) -> Path:
        """An empty directory to write a checkpoint into."""
        partial = self._named(step, PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def publish(self, step: int) -> Path:
        """Gives a checkpoint that is whole its name; one that had it goes."""
        partial, path = self._named(step, PARTIAL), self.path(step)
        sync_directory(partial)
        if path.exists():
            self._rename(path, DELETING)
        partial.rename(path)
        sync_directory(self.root)
        shutil.rmtree(self._named(step, DELETING), ignore_errors=True)
        return path

    def delete(self, step: int) -> None:
        """Deletes a checkpoint; killed in the middle, it leaves none that could be taken for whole."""
        shutil.rmtree(self._rename(self.path(step), DELETING), ignore_errors=True)

    def give_up(self, step: int) -> None:
        """Deletes what was written of a checkpoint that could not be finished."""
        shutil.rmtree(self._named(step, PARTIAL), ignore_errors=True)

    def set_aside(self, step: int) -> Path:
        """Renames a checkpoint that is not as it was written, so that nothing reads it again."""
        return self._rename(self.path(step), BROKEN)

    def retire(self, keep: int, keep_every: int, spare: int | None = None) -> list[int]:
        """Deletes all checkpoints that are not `promised`, the oldest first; returns their steps.

        Args:
            spare: a step that stays until the next time.
        """
        steps = self.steps()
        gone = sorted(set(steps) - promised(steps, keep, keep_every) - {spare})
        for step in gone:
            self.delete(step)
        return gone

    def make_room(self, needed: int, keep_every: int) -> int:
        """Deletes checkpoints while a disk lacks room for ``needed`` bytes: never the newest, nor those kept for good.

        Those that were set aside go first; none go where all together would not be enough. Each is named on stderr,
        since run.keep may have promised it. Returns the bytes that are free then.
        """
        broken = sorted(self.root.glob(f"step_*{BROKEN}"))
        older = [step for step in self.steps()[:-1] if not (keep_every and step % keep_every == 0)]
        if self.free() + sum(map(_size, [*broken, *map(self.path, older)])) < needed:
            return self.free()
        gone = []
        for path in broken if self.free() < needed else ():
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path.name)
        for step in older:
            if self.free() >= needed:
                break
            self.delete(step)
            gone.append(self.path(step).name)
        if gone:
            names = ", ".join(gone)
            print(f"warning: {self.root} lacks room for a checkpoint: deleted {names}", file=sys.stderr, flush=True)
        return self.free()

    def free(self) -> int:
        """Bytes that the disk still takes."""
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        return shutil.disk_usage(there).free

    def sweep(self) -> None:
        """Makes good what was killed in the middle; only while nothing is being written."""
        for partial in self.root.glob(f"step_*{PARTIAL}"):
            step = int(match[1]) if (match := NAME.fullmatch(partial.name.removesuffix(PARTIAL))) else None
            # A whole one in the moment between two renames: its forerunner has gone, and it is not there yet.
            if step is not None and not self.path(step).exists() and not why_broken(partial):
                self.publish(step)
            shutil.rmtree(partial, ignore_errors=True)
        for deleting in self.root.glob(f"step_*{DELETING}"):
            shutil.rmtree(deleting, ignore_errors=True)

    def _named(self, step: int, ending: str) -> Path:
        path = self.path(step)
        return path.with_name(path.name + ending)

    def _rename(self, path: Path, ending: str) -> Path:
        target = path.with_name(path.name + ending)
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        sync_directory(self.root)
        return target
