"""The lab's page: tables, verdicts and plots of the kept runs, and nothing that does not follow from them."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tests.lab.arms import (
    ARMS,
    COMPARISONS,
    EARLY,
    EARLY_STEPS,
    FAILED_PROBE,
    GAIN_LEAST,
    GAIN_SPREAD,
    SHARPEST,
    Comparison,
    run_name,
)
from tests.lab.kept import KEPT
from tests.lab.plot import Band, svg
from tests.lab.words import FOUND
from train.watch import metrics

PAGE = Path(__file__).parent / "RESULTS.md"
FEWEST_SEEDS = 3  # below it nothing is said to be settled
Runs = Mapping[tuple[str, int], dict[str, Any]]

HEAD = """# What the parts do

Written by `python -m tests.lab page` from the runs kept in `tests/lab/records/` (`python -m tests.lab unpack DIR` makes
run directories of them for `./launch.sh report`). Again: `python -m tests.lab.corpus`, then `python -m tests.lab run`.

Each arm is one change of the recipe `lab/hybrid`; all else is equal, the samples of each step and the tokens read too.
Cells are means over seeds, with the standard deviation over seeds in parentheses. A difference is the mean over seeds
of an arm minus what it is compared with, seed by seed; it counts as settled where it is beyond two standard deviations
of these differences, with {seeds} seeds at least. Otherwise two standard deviations are what could have been missed."""


def at(line: Mapping[str, Any], name: str) -> float | None:
    """A measure of one logged line, or None where the line does not have it."""
    gains = [value for key, value in line.items() if key.startswith((metrics.NORM_GAIN_MIN, metrics.NORM_GAIN_MAX))]
    sinks = [value for key, value in line.items() if key.startswith(f"{metrics.ATTENTION_SINK}/")]
    if name == GAIN_SPREAD:
        return max((abs(gain - 1) for gain in gains), default=None)
    if name == GAIN_LEAST:
        return min(gains, default=None)
    if name == SHARPEST:
        return max(sinks, default=None)
    return line.get(name)


def reading(run: Mapping[str, Any], name: str) -> float | None:
    """A measure of a run: of its last line, or the mean of its early ones."""
    if not name.endswith(EARLY):
        return at(run["metrics"][-1], name)
    plain = name.removesuffix(EARLY)
    found = [at(line, plain) for line in run["metrics"] if line[metrics.STEP] <= EARLY_STEPS]
    numbers = [value for value in found if value is not None]
    return fmean(numbers) if numbers else None


def readings(runs: Runs, arm: str, name: str) -> dict[int, float]:
    """A measure of an arm, by seed."""
    found = {seed: reading(run, name) for (own, seed), run in runs.items() if own == arm}
    return {seed: value for seed, value in found.items() if value is not None}


def number(value: float) -> str:
    """Four digits, no more."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    spread = f" ({stdev(values):.2g})" if len(values) > 1 else ""
    return number(fmean(values)) + spread


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, int] | None:
    """Mean over the common seeds of ours minus theirs, two standard deviations of it, and the number of seeds."""
    each = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return (fmean(each), 2 * stdev(each), len(each)) if len(each) > 1 else None


def verdict(mean: float, missed: float, seeds: int) -> str:
    """What a difference says."""
    if seeds < FEWEST_SEEDS:
        return f"{seeds} seeds only"
    if abs(mean) > missed:
        return f"settled: {'higher' if mean > 0 else 'lower'}"
    return f"not settled; up to {missed:.2g} could have been missed"


def table(runs: Runs, comparison: Comparison) -> list[str]:
    """Means of all arms, in Markdown."""
    lines = [f"| arm | seeds | {' | '.join(comparison.measures)} |", "|---" * (2 + len(comparison.measures)) + "|"]
    for arm in comparison.arms:
        seeds = sum(own == arm for own, _ in runs)
        cells = [cell(list(readings(runs, arm, name).values())) for name in comparison.measures]
        lines.append(f"| {arm} | {seeds or 'not run'} | {' | '.join(cells)} |")
    return lines


def differences(runs: Runs, comparison: Comparison) -> list[str]:
    """What each pair says, in Markdown."""
    lines = ["| difference | of | mean | two standard deviations | |", "|---" * 5 + "|"]
    for base, arm in comparison.pairs:
        for name in comparison.measures:
            found = difference(readings(runs, arm, name), readings(runs, base, name))
            if found:
                mean, missed, seeds = found
                said = verdict(mean, missed, seeds)
                lines.append(f"| {arm} - {base} | {name} | {mean:+.3g} | {missed:.2g} | {said} |")
    return lines if len(lines) > 2 else []


def bands(runs: Runs, arm: str, name: str) -> list[Band]:
    """A measure of an arm over the steps that all its seeds have logged: least, mean and largest of them."""
    by_seed = []
    for (own, _), run in runs.items():
        found = {line[metrics.STEP]: at(line, name) for line in run["metrics"]}
        by_seed += [{step: value for step, value in found.items() if value is not None}] if own == arm else []
    common = set.intersection(*map(set, by_seed)) if by_seed else set()
    each = {step: [values[step] for values in by_seed] for step in sorted(common)}
    return [(step, min(values), fmean(values), max(values)) for step, values in each.items()]


def plots(runs: Runs) -> dict[str, str]:
    """The SVG of each comparison that has numbers, by file name."""
    found = {}
    for letter, comparison in COMPARISONS.items():
        lines = {arm: bands(runs, arm, comparison.curve) for arm in comparison.arms}
        drawn = {arm: line for arm, line in lines.items() if line}
        if len(drawn) > 1:
            found[f"{letter}.svg"] = svg(f"{letter}. {comparison.title}: {comparison.curve}", drawn)
    return found


def where(runs: Runs) -> str:
    """Hardware, versions, sizes: of all runs together."""
    machines = {", ".join(f"{name} {text}" for name, text in sorted(run["machine"].items())) for run in runs.values()}
    sizes = sorted({(run["metrics"][-1][metrics.STEP], run["metrics"][-1][metrics.TOKENS]) for run in runs.values()})
    told = "; ".join(f"{steps:,} steps, {tokens:,} tokens" for steps, tokens in sizes)
    unequal = "" if len({steps for steps, _ in sizes}) == 1 else " Their lengths differ: nothing here may be compared."
    failed = "".join(
        f" {run_name(*pair)} lacks what a probe that failed would say: {key.removeprefix(f'{FAILED_PROBE}/')}."
        for pair, run in runs.items()
        for key in run["metrics"][-1]
        if key.startswith(f"{FAILED_PROBE}/")
    )
    machines_told = "\n".join(f"- {text}" for text in sorted(machines))
    return f"{len(runs)} runs of {told} each.{unequal}{failed}\n\n{machines_told}"


def page(runs: Runs) -> str:
    """The page in Markdown."""
    drawn, parts = plots(runs), [HEAD.format(seeds=FEWEST_SEEDS), where(runs)]
    for letter, comparison in COMPARISONS.items():
        parts.append(f"## {letter}. {comparison.title}\n\n{comparison.question}")
        changed = [
            f"`{arm}`: {' '.join((*ARMS[arm].overrides, *ARMS[arm].seams)) or 'the recipe'}" for arm in comparison.arms
        ]
        parts.append("; ".join(changed) + ".")
        parts.append("\n".join(table(runs, comparison)))
        if lines := differences(runs, comparison):
            parts.append("\n".join(lines))
        if f"{letter}.svg" in drawn:
            parts.append(f"![{comparison.curve}](plots/{letter}.svg)")
        parts += [FOUND[letter]] if letter in FOUND else []
    return "\n\n".join(parts) + "\n"


def write_page(runs: Runs, output: Path = PAGE) -> None:
    """Writes the page and its plots.

    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError(f"no runs are kept in {KEPT}: python -m tests.lab run makes some")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs), encoding="utf-8")
    folder = output.parent / "plots"
    folder.mkdir(exist_ok=True)
    for name, text in plots(runs).items():
        (folder / name).write_text(text, encoding="utf-8")
