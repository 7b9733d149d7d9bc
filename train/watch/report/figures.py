"""What the script of a page draws: the figures of all sections and the numbers under them, as plain JSON."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from train.watch.catalog import EVEN, METRICS, Kind
from train.watch.dashboard import SEVERAL, Panel, View
from train.watch.report.events import Event
from train.watch.report.series import Log, Series

COLUMNS = 120  # of a map over the steps, at the most
LINES, DASHES = 10, 4  # lines of a figure, at the most; patterns that tell a run's own lines apart
EACH_STEP = {
    metric.name: metric.name.rpartition("/")[2] for metric in METRICS if metric.kind is Kind.EACH_STEP
}  # lists of numbers of every step, and the metric that each is of


@dataclass(frozen=True)
class Shown:
    """What a figure needs of a run: its name, its log, and what happened to it."""

    name: str
    log: Log
    events: Sequence[Event] = ()


def figure(panel: Panel, runs: Sequence[Shown], number: int) -> dict[str, Any] | None:
    """A panel as a figure of some runs; None where none of them has what it shows."""
    common = {
        "id": f"figure-{number}",
        "view": str(panel.view),
        "title": panel.title,
        "unit": panel.declared[0].unit,
        "log": panel.logarithmic,
    }
    if panel.view is View.CURVES:
        lines = _lines(panel, runs)
        return common | {"lines": lines} if lines else None
    make = _columns if panel.view is View.COLUMNS else _layers
    maps = [{"run": place} | found for place, run in enumerate(runs) for found in make(panel, run.log)]
    return common | {"maps": maps, "even": panel.view is View.COLUMNS and common["unit"] == EVEN} if maps else None


def is_zero(panel: Panel, runs: Sequence[Shown]) -> bool:
    """Whether all that a panel would show is zero."""
    for run in runs:
        for name in panel.names(run.log.names):
            values = run.log.columns.get(name) or [value for point in _points(run.log, name) for value in point[1:]]
            if any(values):
                return False
    return True


def run_data(run: Shown, figures: Sequence[dict[str, Any]], place: int) -> dict[str, Any]:
    """A run's part of a page's data: where its stretches of steps lie, and each series that a curve is drawn of."""
    names = {line["name"] for one in figures for line in one.get("lines", ()) if line["run"] == place}
    marks = [[event.step, event.kind, event.text] for event in run.events if event.step]
    return {
        "name": run.name,
        "steps": run.log.steps,
        "tokens": _tokens(run.log),
        "marks": marks,
        "series": {name: _series(run.log.series[name]) for name in sorted(names)},
    }


def _lines(panel: Panel, runs: Sequence[Shown]) -> list[dict[str, Any]]:
    """A line for each metric and run. Colours tell one run's metrics apart; of several runs they tell the runs."""
    lines, most = [], _most_lines(runs)
    for place, run in enumerate(runs):
        names = _names(panel, run)
        for number, name in enumerate(names[:most]):
            several = len(runs) > 1
            short = _row(name) if len(panel.declared) == 1 and panel.declared[0].kind in SEVERAL else name
            label = short if not several else f"{run.name} {short}" if len(names) > 1 else run.name
            says = _sentence(panel, name) if len(panel.declared) > 1 and not several else ""
            own = {"colour": place, "dash": number} if several else {"colour": number, "dash": (number // 8) % DASHES}
            lines.append({"run": place, "name": name, "metric": short, "label": label, "says": says} | own)
    return lines


def lines_left_out(panel: Panel, runs: Sequence[Shown]) -> str:
    """How many of its lines a figure of curves shows; empty where it shows all."""
    most, found = _most_lines(runs), max(len(_names(panel, run)) for run in runs)
    return f"the first {most} of {found}" if panel.view is View.CURVES and found > most else ""


def _most_lines(runs: Sequence[Shown]) -> int:
    return LINES if len(runs) == 1 else DASHES


def _names(panel: Panel, run: Shown) -> list[str]:
    """The names of a run's log that a panel of curves has a line for."""
    return [name for name in panel.names(run.log.series) if run.log.series[name].last is not None]


def _sentence(panel: Panel, name: str) -> str:
    """What the catalog says of the metric that a line shows."""
    return next(one.sentence for one in panel.declared if re.fullmatch(panel.pattern(one), name))


def _layers(panel: Panel, log: Log) -> Iterator[dict[str, Any]]:
    """[layers x stretches of steps] of a metric, or of each of its parts."""
    coarser = -(-len(log.steps) // COLUMNS)
    for part, group in groupby(panel.names(log.series), key=lambda name: _row(name).rpartition("/")[0]):
        names = list(group)
        points = [log.series[name].points(coarser) for name in names]
        places = sorted({place for own in points for place in own})
        if places:
            yield {
                "part": part,
                "rows": [name.rpartition("/")[2] for name in names],
                "columns": [min(coarser * (place + 1), len(log.steps)) - 1 for place in places],
                "values": [
                    [_rounded(own[place][0], 4) if place in own else None for place in places] for own in points
                ],
            }


def _columns(panel: Panel, log: Log) -> Iterator[dict[str, Any]]:
    """[layers x numbers] of lists."""
    names = panel.names(log.columns)
    values = [[None if one is None else _rounded(one, 3) for one in log.columns[name]] for name in names]
    if values:
        yield {"part": "", "rows": [_row(name) for name in names], "values": values}


def _row(name: str) -> str:
    """What stands behind the metric's own name."""
    return name.partition("/")[2]


def _points(log: Log, name: str) -> list[tuple[float, float, float]]:
    return list(log.series[name].points().values()) if name in log.series else []


def _series(series: Series) -> dict[str, Any]:
    points = series.points()
    found: dict[str, Any] = {"i": list(points), "y": [_rounded(mean) for mean, _, _ in points.values()]}
    if any(least < largest for _, least, largest in points.values()):
        found["lo"] = [_rounded(least) for _, least, _ in points.values()]
        found["hi"] = [_rounded(largest) for _, _, largest in points.values()]
    return found


def _tokens(log: Log) -> list[float] | None:
    """Tokens at the end of each stretch, also of those between two that say so."""
    known = log.tokens()
    if not known:
        return None
    places = np.interp(range(len(log.steps)), list(known), list(known.values()))
    return [round(float(value)) for value in places]


def _rounded(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")
