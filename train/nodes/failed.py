"""Machines that fail more than once in a run: runs/NAME/logs/failed_nodes.txt has a line for each time."""

import time
from collections import Counter
from pathlib import Path

from train.nodes import slurm

FILE = "failed_nodes.txt"
TOO_OFTEN = 2


def note(run: Path, host: str) -> str:
    """Notes that a machine was lost; what to say of it once that has happened too often, and what Slurm does then."""
    file = run / "logs" / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(f"{host} {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    times = Counter(line.split()[0] for line in file.read_text(encoding="utf-8").splitlines())
    if times[host] < TOO_OFTEN:
        return ""
    often = sorted(name for name, number in times.items() if number >= TOO_OFTEN)
    return f"{host} has failed {times[host]} times in this run ({file}){slurm.exclude(often)}"
