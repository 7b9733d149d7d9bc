"""What a run leaves out of its data after bad steps, and where it tells of them. No torch."""

import json
from pathlib import Path

from data.order.skips import Window

LOG_FILE, LEFT_OUT_FILE = "bad_steps.jsonl", "left_out.json"


def read_left_out(run: Path) -> list[Window]:
    """The windows of samples that a run has left out so far."""
    path = run / LEFT_OUT_FILE
    return [(first, last) for first, last in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
