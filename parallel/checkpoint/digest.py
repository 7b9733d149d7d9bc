"""SHA-256 of files: taken while they are written, by whoever writes them, and again when they are read. No torch."""

import ctypes
import hashlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PIECE_BYTES = 2**22  # hashed, and written while the processor's cache still has them
AHEAD_BYTES = 2**26  # written before the disk is told to begin with them
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


@dataclass(frozen=True)
class Digest:
    """What a file must be: its SHA-256 and its bytes."""

    sha256: str
    size: int


class HashedStream(io.BufferedIOBase):
    """Bytes on their way into a file, hashed as they pass: what the disk then makes of them shows.

    The disk writes along. A machine with much memory would let it begin when some gigabytes have gathered, and whoever
    syncs would wait for all of them.

    Args:
        raw: a new file.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._hash, self._size = raw, hashlib.sha256(), 0
        self._begun = 0  # bytes that the disk was told to write

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data)
        content = content.cast("B") if content.nbytes else content  # nothing at all has no such form
        for begin in range(0, content.nbytes, PIECE_BYTES):
            piece = content[begin : begin + PIECE_BYTES]
            self._hash.update(piece)
            self._raw.write(piece)
            self._size += piece.nbytes
            if self._size - self._begun >= AHEAD_BYTES:
                self._raw.flush()
                begin_sync(self._raw.fileno(), self._begun, self._size - self._begun)
                self._begun = self._size
        return content.nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._raw.flush()

    @property
    def digest(self) -> Digest:
        """Of all that has passed."""
        return Digest(self._hash.hexdigest(), self._size)


def begin_sync(descriptor: int, begin: int, size: int) -> bool:
    """Has the disk begin to write a part of a file, and waits for none of it; whether it has begun.

    What can be lost by it, and by what it cannot do, is time alone: errors of the disk are `sync`'s to find.
    """
    if sys.platform != "linux":
        return False
    start = ctypes.CDLL(None).sync_file_range
    return bool(start(descriptor, ctypes.c_int64(begin), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE) == 0)


def sync(raw: IO[bytes]) -> None:
    """Returns once a file that is being written is on the disk."""
    raw.flush()
    os.fsync(raw.fileno())


def write_synced(path: Path, content: bytes) -> Digest:
    """Writes a whole file, and returns once it is on the disk."""
    with path.open("wb") as raw:
        raw.write(content)
        sync(raw)
    return digest_of(content)


def digest_of(content: bytes) -> Digest:
    """The digest of bytes in memory."""
    return Digest(hashlib.sha256(content).hexdigest(), len(content))


def read_digest(path: Path) -> Digest:
    """The digest of a file as it is on the disk now."""
    with path.open("rb") as raw:
        found = hashlib.file_digest(raw, "sha256")
        return Digest(found.hexdigest(), raw.tell())
