"""A run's settings beside the defaults and its recipe, across its starts, and beside other runs'."""

from collections.abc import Sequence
from typing import Any

from train.settings.run import Config, shown_settings

ITS_OWN = ("run.name", "run.dir")  # of each run another


def against_recipe(config: Config, recipe: Config | None) -> list[tuple[str, str, str, str]]:
    """(setting, default, recipe's, run's) where they are not all the same; the recipe's is "" where it is not known."""
    own, default = shown_settings(config), shown_settings(Config())
    of_recipe = shown_settings(recipe) if recipe else {}
    return [
        (path, shown(default[path]), shown(of_recipe[path]) if recipe else "", shown(value))
        for path, value in own.items()
        if path not in ITS_OWN and not (value == default[path] == of_recipe.get(path, value))
    ]


def across_starts(starts: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """(start, step, setting, before, after) of what was changed when a run went on."""
    return [
        (str(number), str(line.get("step")), path, shown(before), shown(after))
        for number, line in enumerate(starts, start=1)
        for path, (before, after) in line.get("changed", {}).items()
        if path not in ITS_OWN
    ]


def between(configs: Sequence[Config]) -> list[tuple[str, ...]]:
    """(setting, each run's) of the settings in which runs differ."""
    every = [shown_settings(config) for config in configs]
    return [
        (path, *(shown(own[path]) for own in every))
        for path in every[0]
        if path not in ITS_OWN and any(own[path] != every[0][path] for own in every)
    ]


def shown(value: Any) -> str:
    """A value as a command line would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
