"""Checkpoints on a disk of their own, a small tmpfs, that is filled up or made read-only while a run saves to it."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.faults.campaign import Reference, difference, unsound
from tests.faults.harness import checkpoints, start
from tests.faults.runs import VOCAB_SIZE, campaign_config
from train.job.footprint import VOCAB_MULTIPLE, checkpoint_bytes
from train.settings.run import Config

DISK_BYTES = 64 * 2**20
PATIENCE_S = 60.0
FILLER = "filler"  # what takes the room that is left
VOCAB = -(-VOCAB_SIZE // VOCAB_MULTIPLE) * VOCAB_MULTIPLE  # rows of the campaign's embedding


def why_not(root: Path) -> str:
    """Why no disk can be mounted here; empty where one can."""
    try:
        with small_disk(root / "probe"):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a tmpfs cannot be mounted here: {error}"


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A tmpfs at an empty directory, for as long as the context."""
    place.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _remount(how: str, disk: Path) -> None:
    """Makes a disk `ro` or `rw`; it cannot become read-only while a file is being written."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _mount("-o", f"remount,{how},size={DISK_BYTES}", str(disk))
        except subprocess.CalledProcessError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def _fill(config: Config, disk: Path) -> None:
    """Leaves the room that a checkpoint is foreseen to take; it takes more, with what lies beside its numbers."""
    state = os.statvfs(disk)
    room = (state.f_bavail - 1) * state.f_frsize
    with (disk / FILLER).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, room - checkpoint_bytes(config, VOCAB)))


def _empty(disk: Path) -> None:
    (disk / FILLER).unlink()


def survives(
    reference: Reference, root: Path, corpus: Path, name: str, spoil: Callable[[Config, Path], None], mend
) -> str:
    """A run whose disk is spoilt after its first save, and mended once it has ended; what was lost, or nothing."""
    config = campaign_config(root, name, corpus, run={"keep": 2})
    log = config.run.path / "log"
    with small_disk(config.run.checkpoints) as disk:
        started = start(config, reference.world, log)
        deadline = time.monotonic() + PATIENCE_S
        while not checkpoints(config.run.path) and time.monotonic() < deadline:
            time.sleep(0.002)
        spoil(config, disk)
        code = started.wait()
        text = log.read_text()
        if code not in (0, 1) or "was not saved" not in text:
            return f"exit code {code}, and of a save that failed it says: {text[-1500:]}"
        if failure := unsound(reference, config):
            return failure
        mend(disk)
        code = start(config, reference.world, log).wait()
        return difference(reference, config) if code == 0 else f"exit code {code}: {log.read_text()[-1500:]}"


def spoilt_disks(reference: Reference, root: Path, corpus: Path) -> dict[str, str]:
    """What was lost on each kind of disk."""
    kinds = {
        "tmpfs full in mid-run": (_fill, _empty),
        "tmpfs read-only in mid-run": (lambda _, disk: _remount("ro", disk), partial(_remount, "rw")),
    }
    found = {}
    for number, (name, (spoil, mend)) in enumerate(kinds.items()):
        try:
            found[name] = survives(reference, root, corpus, f"disk_{reference.world}_{number}", spoil, mend)
        except AssertionError as error:
            found[name] = str(error)
    return found
