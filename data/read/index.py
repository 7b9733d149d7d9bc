"""An index: what is known of a source's units, in arrays that are built once and mapped by every process.

An index is a directory of NumPy files and a line of JSON. It appears whole, under a name that follows from what it
was built from, so that whoever finds it need not look at the source again; while one process builds it, the others
wait for that one. Maps of the same file share their memory.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import CorpusError
from data.files import locked, sync_directory
from data.secrets import one_line

NOTES_FILE = "notes.json"


class Index(NamedTuple):
    """Arrays by name, and notes of JSON beside them."""

    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


def built_once(path: Path, build: Callable[[], Index]) -> Index:
    """The index in the directory `path`, mapped into memory; built first where it is not there.

    Where nothing can be written every process builds its own, in memory.

    Raises:
        CorpusError: the index is damaged.
    """
    if not path.is_dir():
        index = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f".{path.name}.lock"), wait=True):
                index = None if path.is_dir() else build()
                if index is not None:
                    _write(path, index)
        except OSError:
            return build() if index is None else index
    return read_index(path)


def read_index(path: Path) -> Index:
    """Maps an index.

    Raises:
        CorpusError: a file is damaged.
    """
    try:
        notes = json.loads((path / NOTES_FILE).read_text(encoding="utf-8"))
        # An empty array cannot be mapped.
        modes: dict[str, Any] = {name: "r" if size else None for name, size in notes["sizes"].items()}
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode=mode) for name, mode in modes.items()}
        if {name: array.nbytes for name, array in arrays.items()} != notes["sizes"]:
            raise ValueError("a file is cut off")
    except (ValueError, KeyError) as error:
        raise CorpusError(f"the index {path} is damaged ({one_line(error)}): delete that directory") from error
    return Index(arrays, notes["notes"])


def _write(path: Path, index: Index) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, array in index.arrays.items():
            np.save(temporary / f"{name}.npy", array)
        sizes = {name: array.nbytes for name, array in index.arrays.items()}
        (temporary / NOTES_FILE).write_text(json.dumps({"sizes": sizes, "notes": index.notes}), encoding="utf-8")
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():  # else another machine on a disk without locks was faster
                raise
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def digest_of(values: list[Any]) -> str:
    """SHA-256 of a list of JSON."""
    return sha256(json.dumps(values).encode()).hexdigest()
