"""Which files of a path are data, and of which split: the rules of Hugging Face `datasets` and its hub.

A directory or URL is laid out in one of these ways, and the first that fits decides:

1. by `DatasetDict.save_to_disk`: `dataset_dict.json` names the splits, each a folder;
2. by `push_to_hub`: `data/train-00000-of-00001.parquet`, whatever comes before the numbers is the split;
3. a folder is named after a split (`train`, `validation`, `test` and their usual other names, also as a part of the
   name: `my-train`, `dev_2`);
4. a file is;
5. nothing is: all of it is the train split.

Of a folder written by `save_to_disk` only the files in its `state.json` are data: what `map` leaves there is a cache.
A file or a pattern says itself what is meant, so no split is chosen then.
"""

import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from data.config import TRAIN_SPLIT
from data.errors import CorpusError
from data.read.endings import ending_of
from data.read.faults import BrokenUnit, Faults
from data.read.manifest import MANIFEST_FILE
from data.read.remote import File, Found, fetch, find, redacted
from data.secrets import one_line

KEYWORDS = {
    TRAIN_SPLIT: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATOR = r"[-._ 0-9]"
SHARDED = re.compile(r"data/([^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
# JSON that `datasets` and the hub put beside the data.
SIDE_FILES = frozenset(
    {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "dummy_data.zip"}
)
PREPARED_SHARD = re.compile(r"(train|heldout)-\d{5,}(-\d{5,})?\.parquet")


@dataclass(frozen=True)
class Listing:
    """The files of a source in the order of their names, and what lies beside them and is not read, for people."""

    files: list[File]
    left_out: tuple[str, ...] = ()


def list_files(path: str, endings: tuple[str, ...], split: str = TRAIN_SPLIT, setting: str = "data.corpus") -> Listing:
    """The files of a split in a file, directory, pattern or URL, of those that end in one of `endings`.

    Raises:
        CorpusError: there is none, the path holds corpora made by prepare, or its file system cannot be reached.
    """
    found = find(path, setting)
    files = {_relative(file, found): file for file in found.files}
    data = {name: file for name, file in files.items() if is_data(name, endings)}
    _refuse_prepared(path, files, setting)
    if found.root is None and split != TRAIN_SPLIT:
        raise CorpusError(f"{setting}={redacted(path)} is no directory, so it has no split {split}: name its files")
    left_out: list[str] = []
    if found.root is not None:
        data = _without_caches(data, files, left_out)
        data = _of_split(data, files, split, left_out, f"{setting}={redacted(path)}")
    filled = [file for _, file in sorted(data.items()) if file.size]
    if not filled:
        what = "is empty" if data else f"holds no file of {', '.join(endings)}"
        raise CorpusError(f"{setting}={redacted(path)} {what}: there is no text or token in it")
    return Listing(filled, tuple(left_out))


def is_data(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a file's name, without what compresses it, ends like data and is no side file."""
    return not PurePosixPath(name).name.startswith(".") and ending_of(name) in endings and not _is_side_file(name)


def splits_of(names: list[str]) -> dict[str, set[str]]:
    """Split -> names of its files, relative to their directory, as `datasets` sorts them."""
    for sort in (_by_shard, _by_folder, _by_file):
        splits: dict[str, set[str]] = {}
        for name in names:
            for split in sort(name):
                splits.setdefault(split, set()).add(name)
        if splits:
            return splits
    return {TRAIN_SPLIT: set(names)}


def _is_side_file(name: str) -> bool:
    return PurePosixPath(name).name in SIDE_FILES


def _relative(file: File, found: Found) -> str:
    return file.path if found.root is None else file.path.removeprefix(found.root).lstrip("/")


def _by_shard(name: str) -> list[str]:
    match = SHARDED.fullmatch(name)
    return [match[1]] if match else []


def _by_folder(name: str) -> list[str]:
    folders = PurePosixPath(name).parts[:-1]
    return [split for split in KEYWORDS if any(_names(folder, split, r"($|{sep}.*)") for folder in folders)]


def _by_file(name: str) -> list[str]:
    return [split for split in KEYWORDS if _names(PurePosixPath(name).name, split, r"{sep}.*")]


def _names(text: str, split: str, following: str) -> bool:
    """Whether a keyword of the split stands in a name, between its borders or separators."""
    words = "|".join(KEYWORDS[split])
    return re.fullmatch(rf"(.*{SEPARATOR})?({words}){following.format(sep=SEPARATOR)}", text) is not None


def _of_split(
    data: dict[str, File], files: dict[str, File], split: str, left_out: list[str], where: str
) -> dict[str, File]:
    """The files of one split; the other splits are noted in `left_out`."""
    if "dataset_dict.json" in files:
        splits = {name: {n for n in data if n.startswith(f"{name}/")} for name in _saved_splits(files)}
    else:
        splits = splits_of(list(data))
    if data and split not in splits:
        raise CorpusError(f"{where} has no split {split}: it has {', '.join(sorted(splits))}")
    own = splits.get(split, set())
    for other, names in sorted(splits.items()):
        if names - own:
            left_out.append(f"split {other}: {_few(names - own)}")
    rest = set(data) - set().union(*splits.values())
    if rest:
        left_out.append(f"of no split: {_few(rest)}")
    return {name: file for name, file in data.items() if name in own}


def _saved_splits(files: dict[str, File]) -> list[str]:
    return list(_json(files["dataset_dict.json"]).get("splits", []))


def _without_caches(data: dict[str, File], files: dict[str, File], left_out: list[str]) -> dict[str, File]:
    """Of folders written by `save_to_disk` only what their `state.json` names."""
    kept = dict(data)
    for state in (name for name in files if PurePosixPath(name).name == "state.json"):
        folder = PurePosixPath(state).parent
        named = _json(files[state]).get("_data_files")
        if named is None:
            continue
        listed = {str(folder / entry["filename"]) for entry in named}
        missing = sorted(name for name in listed if name not in files)
        if missing:
            raise BrokenUnit(f"{files[state].shown} names {missing[0]}, which is missing")
        stale = {name for name in kept if PurePosixPath(name).parent == folder and name not in listed}
        if stale:
            left_out.append(f"not named in {state}: {_few(stale)}")
        kept = {name: file for name, file in kept.items() if name not in stale}
    return kept


def _refuse_prepared(path: str, files: dict[str, File], setting: str) -> None:
    """A corpus made by prepare is read through its manifest, which tells training from held-out documents."""
    shards = {name for name in files if PREPARED_SHARD.fullmatch(PurePosixPath(name).name)}
    folders = {str(PurePosixPath(name).parent) for name in files if PurePosixPath(name).name == MANIFEST_FILE}
    prepared = sorted({str(PurePosixPath(name).parent) for name in shards} & folders)
    if prepared:
        raise CorpusError(
            f"{setting}={redacted(path)} holds corpora made by prepare ({', '.join(prepared[:3])}): give the "
            f"directory of one, or several in data.sources"
        )
    heldout = sorted(name for name in shards if PurePosixPath(name).name.startswith("heldout-"))
    if heldout:
        raise CorpusError(
            f"{setting}={redacted(path)} holds shards of a corpus made by prepare ({heldout[0]}), but not its "
            f"{MANIFEST_FILE}: give the corpus's directory; one that is not finished, or copied in part, cannot be read"
        )


def _json(file: File) -> dict[str, Any]:
    try:
        content = json.loads(fetch(file.path, 0, file.size, Faults()))
    except ValueError as error:
        raise BrokenUnit(f"{file.shown} is not JSON: {one_line(error)}") from error
    return content if isinstance(content, dict) else {}


def _few(names: set[str]) -> str:
    """The first names of many."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more files"
