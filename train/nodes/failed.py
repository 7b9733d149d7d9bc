"""Machines that fail more than once in a run: runs/NAME/logs/failed_nodes.txt has a line for each time."""

import time
from collections import Counter
from pathlib import Path

FILE = "failed_nodes.txt"
TOO_OFTEN = 2
TIME = "%Y-%m-%d %H:%M:%S"  # whose order is that of the texts


def note(run: Path, host: str) -> str:
    """Notes that a machine was lost; what to say of it once that has happened too often."""
    file = run / "logs" / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(f"{host} {time.strftime(TIME)}\n")
    times = _times(run)[host]
    return f"{host} has failed {times} times in this run ({file})" if times >= TOO_OFTEN else ""


def noted_since(run: Path, host: str, since: float) -> bool:
    """Whether a machine was noted since then (seconds since 1970)."""
    last = [line.split(maxsplit=1)[1] for line in _lines(run) if line.split()[0] == host][-1:]
    return bool(last) and last[0] >= time.strftime(TIME, time.localtime(since))


def too_often(run: Path) -> list[str]:
    """Machines that were lost more often than a run should wait for."""
    return sorted(host for host, times in _times(run).items() if times >= TOO_OFTEN)


def _times(run: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in _lines(run))


def _lines(run: Path) -> list[str]:
    file = run / "logs" / FILE
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
