"""The heartbeat of a run: a file that says after each step that it lives, and where its time went."""

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HEARTBEAT_FILE = "heartbeat.json"


def write_beat(run: Path, step: int, seconds: Mapping[str, float]) -> None:
    """Says that a run has done a step, now and here; seconds by what they were spent on."""
    beat = {"step": step, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    draft = run / f"{HEARTBEAT_FILE}.draft"
    with suppress(OSError):  # a disk that takes no more ends no run
        draft.write_text(json.dumps(beat | {"seconds": dict(seconds)}) + "\n", encoding="utf-8")
        os.replace(draft, run / HEARTBEAT_FILE)  # without fsync: after a loss of power an older one will do


def last_beat(run: Path) -> dict[str, Any]:
    """What the heartbeat file says; nothing where there is none yet, or none that can be read."""
    try:
        beat: dict[str, Any] = json.loads((run / HEARTBEAT_FILE).read_text(encoding="utf-8"))
        return beat
    except (OSError, ValueError):
        return {}
