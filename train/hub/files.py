"""What export and import share: directories that appear whole, and the comparison of names and shapes."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.settings.tree import ConfigError

EXACT_FILE = "tessera.json"  # what no other file has room for: the output norms of Gated DeltaNet before 1 was added
LISTED = 20  # names of one kind that an error lists

Shapes = Mapping[str, tuple[int, ...]]


def compare(found: Shapes, wanted: Shapes, where: str, mend: str) -> None:
    """Refuses a set of tensors that is not exactly the wanted one.

    Raises:
        ConfigError: lists what is missing, what is there beside, and what has another shape.
    """
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "not known": [name for name in found if name not in wanted],
        "of another shape": misshapen,
    }
    if any(kinds.values()):
        lists = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names)
        raise ConfigError(f"the tensors in {where} are not those of this model: {lists}. {mend}")


def listed(names: list[str]) -> str:
    """Names in an error, the first of them only."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def refuse_broken(names: list[str], where: str) -> None:
    """Raises ConfigError if there are names of tensors that are not finite."""
    if names:
        raise ConfigError(f"{len(names)} tensors in {where} hold NaN or infinity: {listed(names)}")


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A directory to fill, which takes its name at the end; whatever goes wrong, nothing is left behind."""
    building = directory.with_name(directory.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{building} cannot be written: {error.strerror}: choose another place") from error
    try:
        yield building
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, directory: Path, names: tuple[str, ...]) -> None:
    """Copies those of some files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
