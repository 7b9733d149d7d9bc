"""What a run leaves out of its data after bad steps, and where it tells of them. No torch."""

import json
from collections.abc import Iterable
from pathlib import Path

from data.files import write_whole
from data.order.skips import Window, merged

LOG_FILE, LEFT_OUT_FILE = "bad_steps.jsonl", "left_out.json"


def read_left_out(run: Path) -> list[Window]:
    """The windows of samples that a run has left out so far."""
    path = run / LEFT_OUT_FILE
    return [(first, last) for first, last in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def leave_out(run: Path, windows: Iterable[Window]) -> list[Window]:
    """Adds to the windows of samples that a run leaves out from now on; all of them then."""
    known = read_left_out(run)
    whole = merged([*known, *windows])
    if whole != known:
        write_whole(run / LEFT_OUT_FILE, json.dumps(whole))
    return whole
