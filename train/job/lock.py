"""One writer for each run: a lock on its directory, with who holds it.

The lock is the operating system's (flock), which ends with its process. Some shared file systems have none (Lustre
without ``-o flock``): there the file is one that only its holder writes to, and it counts for as long as that happens.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from train.settings.run import RunConfig
from train.settings.tree import ConfigError

LOCK_FILE, EXCLUSIVE_FILE = "lock", "lock.exclusive"
UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # answers of file systems without flock
PATIENCE_S = 2.0  # for a holder that is just ending, or for one who only looks
BEAT_S, STALE_S = 10.0, 60.0


def _owner() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _lives(pid: int) -> bool:
    """Whether a process of this machine runs; one that is dead and not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _refusal(run: RunConfig, path: Path) -> ConfigError:
    """Who has the run, and what to do about it."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        job = f" of job {owner['job']}" if owner["job"] else ""
        who = f"process {owner['pid']}{job} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):  # it is being written
        who = "another process"
    return ConfigError(
        f"run.name={run.name} is being trained by {who} ({path}): wait for it, end it, or choose another run.name"
    )


class RunLock:
    """The right to write to a run, from `take` to `release`; it ends with the process at the latest."""

    def __init__(self, run: RunConfig, patience_s: float = PATIENCE_S) -> None:
        self._run, self._file, self._patience_s = run, run.path / LOCK_FILE, patience_s
        self._handle: int | None = None
        self._exclusive: _ExclusiveFile | None = None

    def take(self) -> None:
        """Takes the lock.

        Raises:
            ConfigError: another process has it, by name.
        """
        deadline = time.monotonic() + self._patience_s
        self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        while not self._taken():
            if time.monotonic() > deadline:
                raise _refusal(self._run, self._file)
            time.sleep(0.1)
        if self._exclusive is None:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(_owner()).encode(), 0)

    def _taken(self) -> bool:
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
            print(
                f"warning: {self._run.path} lies on a file system without flock: a file that is kept fresh stands in",
                file=sys.stderr,
            )
            self._exclusive = _ExclusiveFile(self._run, self._patience_s)
        return True

    def release(self) -> None:
        """Gives the lock back, if it was taken."""
        if self._exclusive is not None:
            self._exclusive.release()
        if self._handle is not None:
            os.close(self._handle)
        self._exclusive = self._handle = None


class _ExclusiveFile:
    """A file that its holder touches every BEAT_S seconds and that anybody may take once it is STALE_S old."""

    def __init__(self, run: RunConfig, patience_s: float) -> None:
        self._patience_s = patience_s
        self._path, self._token = run.path / EXCLUSIVE_FILE, uuid.uuid4().hex
        self._released = threading.Event()
        content = json.dumps(_owner() | {"token": self._token})
        try:
            with self._path.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            if self._age() < STALE_S and not self._is_left_behind():
                raise _refusal(run, self._path) from None
            self._take_over(run, content)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _age(self) -> float:
        """Seconds since the holder's last sign of life, both by the file system's clock."""
        probe = self._path.with_name(f"{self._path.name}.{self._token}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - self._path.stat().st_mtime

    def _is_left_behind(self) -> bool:
        """Whether the holder was a process of this machine that is gone, so that nothing touches the file any more.

        A container may have the name of its host and cannot see its processes: the file alone says that one lives.
        """
        try:
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            if owner["host"] != socket.gethostname() or _lives(owner["pid"]):
                return False
            before = self._path.stat().st_mtime_ns
            time.sleep(1.5 * BEAT_S)
            return self._path.stat().st_mtime_ns == before
        except (OSError, ValueError, KeyError):
            return False

    def _take_over(self, run: RunConfig, content: str) -> None:
        """Of several that find the file stale, the last to write has it; the others see so."""
        draft = self._path.with_name(f"{self._path.name}.{self._token}")
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, self._path)
        time.sleep(self._patience_s)
        if not self._is_ours():
            raise _refusal(run, self._path)

    def _is_ours(self) -> bool:
        return bool(json.loads(self._path.read_text(encoding="utf-8")).get("token") == self._token)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError, ValueError):  # a storage that is away for a moment
                if not self._is_ours():
                    print(f"error: another process has taken {self._path}: this one ends", file=sys.stderr)
                    os._exit(1)
                os.utime(self._path)

    def release(self) -> None:
        self._released.set()
        with contextlib.suppress(OSError, ValueError):
            if self._is_ours():  # else another process has taken it over since the last look
                self._path.unlink()


def is_held(run: Path) -> bool:
    """Whether a process has a run, as far as this file system tells; changes nothing."""
    with contextlib.suppress(OSError):
        if time.time() - (run / EXCLUSIVE_FILE).stat().st_mtime < STALE_S:
            return True
    try:
        handle = os.open(run / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def refuse_if_held(run: RunConfig, patience_s: float = PATIENCE_S) -> None:
    """Refuses a run that another process trains, before any work. Its first process takes the lock itself, later.

    Raises:
        ConfigError: another process has it, by name.
    """
    lock = RunLock(run, patience_s)
    try:
        lock.take()
    finally:
        lock.release()
