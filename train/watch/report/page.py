"""One HTML page of runs: it needs no network, no server and no other file."""

import html
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from data.files import write_whole
from data.secrets import hidden
from train.job.provenance import commit
from train.settings.run import Config
from train.settings.tree import to_dict
from train.watch.dashboard import SECTIONS, Panel, Section, View
from train.watch.metrics import METRICS_FILE, duration
from train.watch.report import differences, events
from train.watch.report.events import Event
from train.watch.report.figures import EACH_STEP, Shown, figure, is_zero, lines_left_out, run_data
from train.watch.report.series import Log, read_log
from train.watch.report.summary import Summary, summarise

MAPS = (View.LAYERS, View.COLUMNS)  # which stand under the curves
SHOWN_EVENTS = 200  # the last ones, where there are more
ANCHORS = {"Starts and faults": "starts", "Settings": "settings"}
esc = html.escape


@dataclass(frozen=True)
class Run:
    """All that a page says of a run.

    Attributes:
        recipe: the recipe's name, and what it comes to today; None where it is not known, or not there any more.
    """

    config: Config
    recipe: tuple[str, Config | None]
    log: Log
    starts: list[dict[str, Any]]
    events: list[Event]
    summary: Summary

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.run.name

    @property
    def shown(self) -> Shown:
        """What its figures are made of."""
        return Shown(self.name, self.log, self.events)


def read_run(config: Config, recipe: tuple[str, Config | None], now: float | None = None) -> Run:
    """All of a run from its files, whether it runs or not."""
    path = config.run.path
    log, happened = read_log(path / METRICS_FILE, EACH_STEP), events.events(path)
    return Run(config, recipe, log, events.starts(path), happened, summarise(config, log, happened, now))


def last_command(run: Path) -> list[str]:
    """The command line of a run's last start; empty where none is noted."""
    known = events.starts(run)
    command: list[str] = known[-1].get("command", []) if known else []
    return command


def write_page(runs: Sequence[Run], path: Path) -> int:
    """Writes the page of some runs; returns its bytes."""
    text = page(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return len(text.encode())


def page(runs: Sequence[Run]) -> str:
    """The page of some runs."""
    shown, numbers = [run.shown for run in runs], count(1)
    figures: list[dict[str, Any]] = []
    parts, contents = [], []
    for section in SECTIONS:
        text, is_there = _section(section, shown, figures, numbers)
        parts.append(text)
        contents += [section.title] if is_there else []
    parts += [_starts(runs), _settings(runs)]
    title = ", ".join(run.name for run in runs)
    data = {
        "runs": [run_data(run, figures, place) for place, run in enumerate(shown)],
        "figures": figures,
    }
    links = [f'<a href="#{_anchor(name)}">{esc(name)}</a>' for name in [*contents, *ANCHORS]]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    fill = {
        "title": esc(title),
        "style": _file("page.css"),
        "contents": "\n".join(links),
        "head": _head(runs),
        "sections": "\n".join(parts),
        "foot": f"Made {made} by <code>launch.sh report</code>, code {esc(commit() or 'outside a checkout')}.",
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "script": _file("page.js"),
    }
    text = _file("page.html")
    for name in ("title", "style", "contents", "head", "sections", "foot", "script", "data"):  # what users wrote last
        text = text.replace("{{" + name + "}}", fill[name])
    return text


def _file(name: str) -> str:
    return files("train.watch.report").joinpath(name).read_text(encoding="utf-8").strip()


def _anchor(title: str) -> str:
    return ANCHORS.get(title, title.lower().replace(" ", "-"))


def _head(runs: Sequence[Run]) -> str:
    title = f"<h1>{esc(' · '.join(run.name for run in runs))}</h1>"
    if len(runs) == 1:
        run = runs[0]
        tiles = "".join(
            f'<div><dt>{esc(number.name)}</dt><dd class="value">{esc(number.value)}</dd>'
            f'<dd class="note">{esc(number.note)}</dd></div>'
            for number in run.summary.numbers
        )
        return f'{title}\n{_state(run)}\n<dl class="tiles">{tiles}</dl>'
    named = {number.name: None for run in runs for number in run.summary.numbers}
    own = [{number.name: number for number in run.summary.numbers} for run in runs]
    rows = [["", *(f"<b>{esc(run.name)}</b>" for run in runs)], ["state", *map(_state, runs)]]
    for name in named:
        cells = []
        for numbers in own:
            found = numbers.get(name)
            note = f'<div class="note">{esc(found.note)}</div>' if found else ""
            cells.append(f"<b>{esc(found.value)}</b>{note}" if found else "–")
        rows.append([esc(name), *cells])
    return title + _table(rows[0], rows[1:])


def _state(run: Run) -> str:
    summary = run.summary
    text = f'<span class="state {summary.state.replace(" ", "-")}">{esc(summary.state)}</span>'
    text += f' <span class="muted">{esc(summary.life)}</span>'
    if not run.log.final:
        text += ' <span class="muted">Nothing is logged yet.</span>'
    if run.log.broken:
        text += f' <span class="complaint">{run.log.broken} lines of {METRICS_FILE} cannot be read.</span>'
    for complaint in summary.complaints:
        text += f' <span class="complaint">{esc(complaint)}.</span>'
    words = events.last_words(run.config.run.path) if summary.state == "stopped" else []
    if words:
        text += f"<details><summary>its last words</summary><pre>{esc(chr(10).join(words))}</pre></details>"
    return f"<div>{text}</div>"


def _section(
    section: Section, runs: Sequence[Shown], figures: list[dict[str, Any]], numbers: Iterable[int]
) -> tuple[str, bool]:
    """A section's HTML, whose figures are added to the others, and whether there is anything in it."""
    drawn: dict[bool, list[str]] = {False: [], True: []}
    zero: list[str] = []
    absent: list[str] = []
    for panel, number in zip(section.panels, numbers, strict=False):
        found = _shares(panel, runs) if panel.view is View.SHARES else _figure(panel, runs, figures, number)
        if not found:
            absent.append(panel.title)
        elif is_zero(panel, runs):
            zero.append(panel.title)
            figures[:] = [one for one in figures if one["title"] != panel.title]
        else:
            drawn[panel.view in MAPS or (panel.view is View.SHARES and len(runs) > 1)].append(found)
    title = esc(section.title)
    if not zero and not any(drawn.values()):
        return f'<p class="none"><b>{title}</b>: nothing to show; {esc(section.without)}.</p>', False
    text = f'<section id="{_anchor(section.title)}"><h2>{title}</h2>'
    text += "".join(f'<div class="figures">{"".join(group)}</div>' for group in drawn.values() if group)
    if zero:
        text += f'<p class="none">Zero all along: {esc(", ".join(zero))}.</p>'
    if absent:
        text += f'<p class="none">Not logged: {esc(", ".join(absent))}.</p>'
    return text + "</section>", True


def _figure(panel: Panel, runs: Sequence[Shown], figures: list[dict[str, Any]], number: int) -> str:
    """The place of a figure, which the script draws."""
    found = figure(panel, runs, number)
    if found is None:
        return ""
    figures.append(found)
    return f'<figure id="{found["id"]}">{_caption(panel, runs)}</figure>'


def _caption(panel: Panel, runs: Sequence[Shown]) -> str:
    unit = panel.declared[0].unit
    shown = "".join(f' <span class="unit">{esc(text)}</span>' for text in (unit, lines_left_out(panel, runs)) if text)
    several = len(panel.declared) > 1
    says = [f"<code>{esc(metric.name)}</code> {esc(metric.sentence)}" for metric in panel.declared]
    if several and len(runs) == 1:  # the legend says it
        says = []
    return f'<figcaption>{esc(panel.title)}{shown}</figcaption><p class="says">{"; ".join(says)}</p>'


def _shares(panel: Panel, runs: Sequence[Shown]) -> str:
    """A table with a bar for each part of a whole."""
    tables = []
    for run in runs:
        names = panel.names(run.log.series)
        values = [run.log.last(name) or 0.0 for name in names]
        whole = sum(values)
        if not whole:
            continue
        rows = "".join(
            f'<tr><td class="name">{esc(name.rpartition("/")[2])}</td><td class="bar"><i style="width:'
            f'{100 * value / whole:.1f}%"></i></td><td class="number">{duration(value)}</td>'
            f'<td class="number">{value / whole:.1%}</td></tr>'
            for name, value in zip(names, values, strict=True)
        )
        which = f'<div class="which">{esc(run.name)}</div>' if len(runs) > 1 else ""
        tables.append(f'<div>{which}<table class="bars">{rows}</table></div>')
    wide = ' class="wide"' if len(tables) > 2 else ""
    cells = f'<div class="cells">{"".join(tables)}</div>'
    return f"<figure{wide}>{_caption(panel, runs)}{cells}</figure>" if tables else ""


def _starts(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        of_starts = [
            [str(number), *(esc(str(line.get(key, ""))) for key in ("time", "step", "processes", "host")),
             f"<code>{esc(str(line.get('commit') or '')[:12])}</code>"]
            for number, line in enumerate(run.starts, start=1)
        ]  # fmt: skip
        wrong = [event for event in run.events if event.kind != events.START]
        text = _table(["start", "time", "after step", "processes", "host", "commit"], of_starts)
        if wrong:
            rows = [
                [_moment(event), "" if event.step is None else str(event.step), esc(event.kind), esc(event.text)]
                for event in wrong[-SHOWN_EVENTS:]
            ]
            more = f"the last {SHOWN_EVENTS} of {len(wrong)}" if len(wrong) > SHOWN_EVENTS else f"{len(wrong)} in all"
            text += f"<h3>What went wrong ({more})</h3>" + _table(["time", "step", "what", ""], rows)
        else:
            text += '<p class="none">No alert, bad step, hang or damaged checkpoint has left a trace.</p>'
        if windows := events.left_out(run.config.run.path):
            text += f'<p class="none">Samples left out after bad steps: {esc("; ".join(windows))}.</p>'
        parts.append(_of_run(run, runs, text))
    return f'<section id="starts"><h2>Starts and faults</h2>{"".join(parts)}</section>'


def _moment(event: Event) -> str:
    """When it was; of an alert the log says no time."""
    return "" if event.kind == events.ALERT else time.strftime(events.TIME, time.gmtime(event.time))


def _settings(runs: Sequence[Run]) -> str:
    parts = []
    if len(runs) > 1:
        rows = [_code(row) for row in differences.between([run.config for run in runs])]
        names = [esc(run.name) for run in runs]
        found = _table(["setting", *names], rows) if rows else '<p class="none">In no setting.</p>'
        parts.append(f"<h3>In which these runs differ</h3>{found}")
    for run in runs:
        name, recipe = run.recipe
        differing = differences.against_recipe(run.config, recipe)
        rows = [_code([path, default, of, _changed(own, of or default)]) for path, default, of, own in differing]
        word = f"recipe {name}" if recipe else f"recipe {name} (not found today)"
        text = f"<h3>Against its recipe and the defaults</h3>{_table(['setting', 'default', esc(word), 'run'], rows)}"
        if changed := differences.across_starts(run.starts):
            header = ["start", "after step", "setting", "before", "after"]
            text += f"<h3>Changed between starts</h3>{_table(header, [_code(row) for row in changed])}"
        whole = yaml.safe_dump(hidden(to_dict(run.config)), sort_keys=False)
        text += f"<details><summary>all settings</summary><pre>{esc(whole)}</pre></details>"
        parts.append(_of_run(run, runs, text))
    return f'<section id="settings"><h2>Settings</h2>{"".join(parts)}</section>'


def _of_run(run: Run, runs: Sequence[Run], text: str) -> str:
    """What belongs to one run, under its name where there are several."""
    if len(runs) == 1:
        return text
    return f"<details open><summary>{esc(run.name)}</summary>{text}</details>"


def _changed(value: str, usual: str) -> str:
    return value if value == usual else f"\0{value}"


def _code(row: Iterable[str]) -> list[str]:
    """Cells of settings; one that differs from what is usual begins with a zero byte."""
    return [
        f'<code class="changed">{esc(cell[1:])}</code>' if cell.startswith("\0") else f"<code>{esc(cell)}</code>"
        for cell in row
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
