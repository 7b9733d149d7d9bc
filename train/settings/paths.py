"""Paths on a command line are those of the folder where the user stands, which need not be the checkout."""

import json
import os
import re
from pathlib import Path

import yaml

OPTION = "--from"  # launch.sh gives it where the user stands in another folder
ROOT = Path(__file__).parents[2]
# Settings that name files or folders, by their paths in the commands' trees; what else they may say stays as it is.
PATHS = (
    "run.dir",
    "run.mirror",
    "run.kernel_cache",
    "data.corpus",
    "data.sources",
    "data.sources_file",
    "data.node_cache",
    "data.tokenizer",
    "data.cache",
    "data.node_cache",
    "data.sources_file",
    "bench.output",
    "corpus",
    "hf",
    "input",
    "out",
    "output",
    "prompt_file",
    "tokenizer",
)
CHOICE = re.compile(r"choice\((.*)\)")  # the other way to write a sweep
RUNS = ("run", "run.init", "run.fork")  # names of runs, or their directories, which have a slash
WORDS = ("", "null", "embedded", "train")
SWEEP = ("-m", "--multirun")
OPTIONS = ("-cd", "--config-dir", "-cn", "--config-name", "--check", "--repair", "--join", "--index")
# Where a checkout that cannot be written keeps what it would write into itself.
WRITTEN = {"run.dir": "runs", "run.kernel_cache": ".cache/kernels", "data.cache": ".cache/corpus"}


def anchored(arguments: list[str], known: set[str]) -> list[str]:
    """A command's arguments without ``--from DIR``, their paths as seen from the checkout.

    Args:
        known: the command's settings. Of a checkout that cannot be written, those in WRITTEN lie in DIR.
    """
    if arguments[:1] != [OPTION]:
        return arguments
    folder, rest = Path(arguments[1]), arguments[2:]
    sweeps = bool({*SWEEP} & {*rest})
    pairs = zip(["", *rest], rest, strict=False)
    found = [_anchored(before, argument, folder, sweeps) for before, argument in pairs]
    given = {argument.partition("=")[0].lstrip("+") for argument in rest}
    if not os.access(ROOT, os.W_OK):
        found += [f"{key}={folder / place}" for key, place in WRITTEN.items() if key in known - given]
    return found


def _anchored(before: str, argument: str, folder: Path, sweeps: bool) -> str:
    key, equals, value = argument.partition("=")
    if before in OPTIONS and not argument.startswith("-"):
        return _path(argument, folder, must_exist=before != "--join")  # which is not there yet
    if equals and key in OPTIONS:
        return f"{key}={_path(value, folder, must_exist=True)}"
    if not equals or key.lstrip("+") not in RUNS + PATHS:
        return argument
    if not sweeps:
        return f"{key}={_valued(key, value, folder)}"
    choices = CHOICE.fullmatch(value)
    parts = _parts(choices[1] if choices else value)
    # Quotes stay, as they may hold a comma.
    quotes = [part[0] if part[:1] in ("'", '"') else "" for part in parts]
    values = [
        quote + _valued(key, part, folder).strip("'\"") + quote for quote, part in zip(quotes, parts, strict=True)
    ]
    return f"{key}={','.join(values)}"


def _valued(key: str, value: str, folder: Path) -> str:
    if key == "run" and value.startswith("["):  # several runs
        names = [name.strip() for name in value.strip("[]").split(",")]
        return f"[{','.join(_path(name, folder, must_exist=False) if '/' in name else name for name in names)}]"
    if key.lstrip("+") in RUNS and "/" not in value:
        return value
    if key.endswith("sources"):
        return _listed(value, folder)
    loose = key.endswith(("tokenizer", "input", "hf"))  # which may be names on the hub
    return _path(value, folder, must_exist=loose)


def _parts(value: str) -> list[str]:
    """The values of a sweep: what stands between commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        depth += 0 if quote else (letter in "[{(") - (letter in "]})")
        parts[-1] += letter
    return parts


def _listed(value: str, folder: Path) -> str:
    """``[[path, weight], ...]``; what is no such list is left for its check to refuse."""
    try:
        sources = [[_path(path, folder, must_exist=False), weight] for path, weight in yaml.safe_load(value)]
    except (yaml.YAMLError, TypeError, ValueError, AttributeError):
        return value
    return json.dumps(sources, separators=(",", ":"))


def _path(value: str, folder: Path, must_exist: bool) -> str:
    """The value as a path of the folder.

    Args:
        must_exist: whether it may be something else than a path, and is one only if it is there.
    """
    bare = value.strip("'\"")
    if bare in WORDS or "://" in bare or bare.startswith(("~", "/")):
        return value
    there = Path(os.path.normpath(folder / bare))
    return value if must_exist and not there.exists() else str(there)
