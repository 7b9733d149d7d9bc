"""Files of this machine: written whole or not at all, and whether a directory can be written."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all, also after a loss of power."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory last: a rename is a change of the directory, not of the file."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why_unwritable(directory: Path) -> str:
    """Why nothing can be written to a directory that may not exist yet, or an empty text. Leaves nothing behind."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"probe")
    except OSError as error:
        return f"{directory}: {error.strerror}"
    return ""


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Holds the lock of a file, alone of all processes.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            # Some cluster disks know no locks. Processes that make the same thing write the same bytes, each file
            # whole, and the first to end wins.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
