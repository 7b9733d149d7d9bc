"""One reader a machine: processes share decoded units through files that all of them map.

The first process that needs a unit reads and decodes it, and writes its tokens as they lie in memory; the others, and
the ranks of tensor, pipeline and context parallelism that need the same samples, map that file. So a machine fetches,
decompresses, hashes and tokenizes a unit once. Files go when those that were used last longest ago exceed a budget of
bytes; whoever has one mapped keeps it.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.files import locked
from data.read.faults import Faults
from data.read.index import digest_of
from data.read.readers import Reader, Wrapped
from data.read.units import Sizes, Unit

ENDING = ".unit"
HEADER = 6  # int64: documents, tokens, bytes of a token, empty documents, bytes of the mask, xxh3 of all behind


def node_directory(setting: str) -> Path:
    """Where a machine's processes share units: the setting, or a place of this user among the temporary files."""
    return Path(setting).expanduser() if setting else Path(tempfile.gettempdir()) / f"units-{os.getuid()}"


class Shared(Wrapped):
    """A reader whose units are kept in files of this machine.

    Args:
        num_bytes: of the files of all sources with the same directory, but for what is just being read.
    """

    mapped = True

    def __init__(self, base: Reader, directory: Path, num_bytes: int) -> None:
        super().__init__(base)
        self._directory, self._num_bytes = directory, num_bytes
        self.key = digest_of(base.identity)[:24]

    def read(self, unit: int, faults: Faults) -> Unit:
        path = self._directory / f"{self.key}-{unit}{ENDING}"
        found = _map(path)
        if found is not None:
            return found
        read: Unit | None = None
        try:
            self._open_directory()
            with locked(path.with_suffix(".lock"), wait=True):
                found = _map(path)
                if found is None:
                    read = self._base.read(unit, faults)
                    _write(path, read)
                    self._sweep()
            path.with_suffix(".lock").unlink(missing_ok=True)
        except OSError:  # full, or not to be written: this process reads for itself
            return read or self._base.read(unit, faults)
        return found or _map(path) or read or self._base.read(unit, faults)

    @property
    def identity(self) -> list[Any]:
        return self._base.identity

    def lengths(self, unit: int, faults: Faults) -> np.ndarray:
        return self._base.lengths(unit, faults)

    def known(self) -> Sizes | None:
        return self._base.known()

    def forget(self) -> None:
        """Deletes this source's files. Whoever has one mapped keeps it, whoever needs one reads it again."""
        for path in self._directory.glob(f"{self.key}-*"):
            path.unlink(missing_ok=True)

    def _open_directory(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._directory.stat().st_uid != os.getuid():  # of temporary files: anybody may have made it
            raise PermissionError(f"{self._directory} belongs to another user")

    def _sweep(self) -> None:
        """Deletes the files that were used last longest ago, down to the budget."""
        stats = [(path, path.stat()) for path in self._directory.glob(f"*{ENDING}")]
        files = sorted((stat.st_mtime_ns, stat.st_size, path) for path, stat in stats)
        excess = sum(size for _, size, _ in files) - self._num_bytes
        for _, size, path in files[:-1]:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _write(path: Path, unit: Unit) -> None:
    # Documents end to end: those of a subset have gaps between them.
    tokens = np.concatenate([unit.document(number) for number in range(unit.num_documents)] or [unit.tokens[:0]])
    masks = [unit.learned_of(number) for number in range(unit.num_documents)]
    learned = np.concatenate([np.zeros(0, dtype=bool), *(mask for mask in masks if mask is not None)])
    proof = xxhash.xxh3_64(unit.lengths.astype(np.int64).tobytes())
    proof.update(tokens)
    proof.update(learned)
    header = [unit.num_documents, len(tokens), tokens.itemsize, unit.empty, len(learned), proof.intdigest() >> 1]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(np.array(header, dtype=np.int64).tobytes())
            file.write(unit.lengths.astype(np.int64).tobytes())
            file.write(tokens.data)
            file.write(learned.data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _map(path: Path) -> Unit | None:
    """The unit in a file; None where there is none, or a damaged one."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        os.utime(path)
    except (OSError, ValueError):
        return None
    numbers = content[: HEADER * 8].view(np.int64)
    if len(numbers) < HEADER:
        return None
    documents, tokens, itemsize, empty, masked, proof = numbers.tolist()
    first = 8 * (HEADER + documents)
    last = first + tokens * itemsize
    if len(content) != last + masked or xxhash.xxh3_64_intdigest(content[HEADER * 8 :]) >> 1 != proof:
        return None
    lengths = content[HEADER * 8 : first].view(np.int64)
    learned = content[last:].view(bool) if masked else None
    return Unit.from_lengths(
        content[first:last].view(np.uint16 if itemsize == 2 else np.int32), lengths, empty, learned
    )
