"""What a run has logged, for tests."""

from pathlib import Path
from typing import Any

from train.watch.metrics import last_entries


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole objects of a log, in order."""
    return list(last_entries(path))[::-1]
