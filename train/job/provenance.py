"""What a checkpoint holds beside its numbers, so that it can be used and understood without the run around it.

config.yaml            the resolved settings
tokenizer.json         the tokenizer, and tokenizer_config.json the token that ends its documents
provenance.json        code, packages, machine and command line that wrote it

And `history.jsonl` of a run: one line a start, with what changed in the settings, where it ran, and which code ran.
"""

import importlib.metadata
import json
import platform
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data.secrets import hidden, one_line
from data.text.tokenizer import TOKENIZER_FILE, Tokenizer
from train.settings.run import CONFIG_FILE, Config, shown_settings
from train.settings.tree import ConfigError, to_dict

PROVENANCE_FILE, HISTORY_FILE = "provenance.json", "history.jsonl"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GIT_SECONDS = 10  # a file system may hang


@cache
def commit() -> str | None:
    """The commit of this code, with "-dirty" after it where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def packages() -> dict[str, str]:
    """Every installed package and its version."""
    found = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found) if name}


def provenance(world: int) -> dict[str, Any]:
    """What runs here and now, on ``world`` processes."""
    return {
        "commit": commit(),
        "command": hidden(sys.orig_argv),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processes": world,
        "packages": packages(),
    }


def sidecars(config: Config, tokenizer: Tokenizer | None, world: int) -> dict[str, bytes]:
    """The files of a checkpoint beside its numbers, by name."""
    files = {
        CONFIG_FILE: yaml.safe_dump(hidden(to_dict(config)), sort_keys=False),
        PROVENANCE_FILE: json.dumps(provenance(world), indent=1) + "\n",
    }
    if tokenizer is not None:
        files[TOKENIZER_FILE] = tokenizer.text
        files[TOKENIZER_CONFIG_FILE] = json.dumps({"eos_token": tokenizer.eod_token}) + "\n"
    return {name: text.encode() for name, text in files.items()}


def kept_tokenizer(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer that lies in a checkpoint, or came with an imported run; None where there is none.

    Raises:
        ConfigError: its settings cannot be read. CorpusError: it cannot be read itself.
    """
    for directory in (checkpoint, checkpoint.parents[1] / "tokenizer"):
        if (directory / TOKENIZER_FILE).is_file() and (directory / TOKENIZER_CONFIG_FILE).is_file():
            path = directory / TOKENIZER_CONFIG_FILE
            try:
                token = json.loads(path.read_text(encoding="utf-8"))["eos_token"]
                token = token["content"] if isinstance(token, dict) else token
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} names no eos_token that can be read: {one_line(error)}") from error
            return Tokenizer.from_path(directory / TOKENIZER_FILE, token)
    return None


def note_start(config: Config, before: Config | None, step: int, world: int) -> None:
    """Adds a line to the history of a run that starts after ``step`` steps.

    Args:
        before: its settings at the last start; None for a new run.
    """
    old = {} if before is None else shown_settings(before)
    new = shown_settings(config)
    changed = {key: [old.get(key), new[key]] for key in new if old and old.get(key) != new[key]}
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "step": step, "changed": changed}
    line |= {name: value for name, value in provenance(world).items() if name != "packages"}
    with (config.run.path / HISTORY_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
