"""What has happened to a run, from its files: each start, and all that went wrong."""

import calendar
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.secrets import hide
from train.job.left_out import LOG_FILE, read_left_out
from train.job.provenance import HISTORY_FILE
from train.job.shelf import BROKEN

START, ALERT, BAD_STEP, HANG, DAMAGE = "start", "alert", "bad step", "hang", "damaged checkpoint"
TIME = "%Y-%m-%dT%H:%M:%SZ"
LAST_WORDS = 12  # lines of what a run wrote last


@dataclass(frozen=True)
class Event:
    """Something that happened to a run.

    Attributes:
        time: seconds since 1970; of an alert, when the start began that told it.
        step: the last step done before, or the one that it is about; None where no file says it.
    """

    time: float
    step: int | None
    kind: str
    text: str


def starts(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's history, one a start."""
    return list(_objects(run / HISTORY_FILE))


def events(run: Path) -> list[Event]:
    """All of them in order."""
    return sorted(
        [*_starts(run), *_alerts(run), *_bad_steps(run), *_hangs(run), *_damaged(run)], key=lambda event: event.time
    )


def left_out(run: Path) -> list[str]:
    """The windows of samples that the run has left out after bad steps."""
    return [f"{first:,} to {last:,}" for first, last in read_left_out(run)]


def last_words(run: Path) -> list[str]:
    """The last lines on standard error of the first process of the last start."""
    files = sorted((run / "logs").glob("*/rank_00000.err"))
    text = files[-1].read_text(encoding="utf-8", errors="replace") if files else ""
    return hide(text).splitlines()[-LAST_WORDS:]


def _starts(run: Path) -> Iterator[Event]:
    for number, line in enumerate(starts(run), start=1):
        where = f"start {number}: {line.get('processes')} processes, {line.get('host')}"
        moment = calendar.timegm(time.strptime(line["time"], TIME))
        yield Event(moment, line.get("step"), START, where)


def _alerts(run: Path) -> Iterator[Event]:
    """What the console was told, in the logs of the first process: ``alert: step 7: what is so: what to do``."""
    for file in sorted((run / "logs").glob("*/rank_00000.err")):
        with suppress(ValueError), file.open(encoding="utf-8", errors="replace") as lines:
            began = time.mktime(time.strptime(file.parent.name, "%Y%m%d-%H%M%S"))
            for found in filter(None, (re.match(r"alert: step (\d+): (.*)", line) for line in lines)):
                yield Event(began, int(found[1]), ALERT, hide(found[2]))


def _bad_steps(run: Path) -> Iterator[Event]:
    for line in _objects(run / "logs" / LOG_FILE):
        named = ", ".join(line.get("parameters", ())[:3])
        text = f"{line.get('reason')}; samples {line.get('samples')}{'; in ' if named else ''}{named}"
        yield Event(line.get("time", 0.0), line.get("step"), BAD_STEP, text)


def _hangs(run: Path) -> Iterator[Event]:
    for file in sorted((run / "logs").glob("hang_*.txt")):
        first = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        step = re.search(r"'step': (\d+)", first)
        text = f"{first.partition(': {')[0]} ({file.name})"
        yield Event(file.stat().st_mtime, int(step[1]) if step else None, HANG, text)


def _damaged(run: Path) -> Iterator[Event]:
    for folder in sorted((run / "checkpoints").glob(f"step_*{BROKEN}")):
        step = int(folder.name.removesuffix(BROKEN).removeprefix("step_"))
        yield Event(folder.stat().st_mtime, step, DAMAGE, f"{folder.name} was set aside")


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; what is torn is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
