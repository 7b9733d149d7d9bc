"""SHA-256 of files: taken while they are written, by whoever writes them, and again when they are read. No torch."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Digest:
    """What a file must be: its SHA-256 and its bytes."""

    sha256: str
    size: int


class HashedStream(io.BufferedIOBase):
    """Bytes on their way into a file, hashed as they pass: what the disk then makes of them shows."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._hash, self._size = raw, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        return self._raw.write(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._raw.flush()

    @property
    def digest(self) -> Digest:
        """Of all that has passed."""
        return Digest(self._hash.hexdigest(), self._size)


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
