"""A command line before it is composed: its options, its recipe's file, its overrides. Knows no Hydra."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.secrets import hide
from train import usage
from train.nodes.place import DRY_RUN
from train.settings.tree import ConfigError, Setting, hint, hint_known, takes_text

DEFAULT_RECIPE = "tiny"
# The options of commands that take a recipe: by each spelling, the name of the long one.
OPTIONS = {"-cn": "--config-name", "-cd": "--config-dir", "-m": "--multirun", "-c": "--cfg"}
WITHOUT_VALUE = ("--multirun", DRY_RUN)
ARRAY_TASK = "SLURM_ARRAY_TASK_ID"  # of a job of an array: which run of a sweep it is to do


@dataclass(frozen=True)
class CommandLine:
    """``[-cn RECIPE] [-cd DIR] [-m] [--cfg job] [--dry-run] [key=value ...]``, its overrides as they were typed."""

    recipe: str = DEFAULT_RECIPE
    directory: str | None = None
    multirun: bool = False
    cfg: bool = False
    dry_run: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The recipe's file: its name in DIR, then in recipes/, or a path to it.

        Raises:
            ConfigError: there is none.
        """
        name = self.recipe if self.recipe.endswith(".yaml") else f"{self.recipe}.yaml"
        of_ours = [usage.RECIPES] if self.recipe in usage.recipes() else []
        folders = [*([Path(self.directory)] if self.directory else []), *of_ours]
        if "/" in name:
            folders.append(Path())
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        known = [*(usage.recipes(Path(self.directory)) if self.directory else ()), *usage.recipes()]
        raise ConfigError(f"unknown recipe {self.recipe!r}: {hint_known(self.recipe, known)}")

    @property
    def folders(self) -> list[Path]:
        """Where groups and other recipes are looked for, in this order: beside the recipe, in DIR, in recipes/."""
        found = [self.file.parent, *([Path(self.directory)] if self.directory else []), usage.RECIPES]
        return list(dict.fromkeys(folder.resolve() for folder in found))

    @property
    def arguments(self) -> list[str]:
        """The same as one run's arguments."""
        directory = ["--config-dir", self.directory] if self.directory else []
        dry_run = [DRY_RUN] if self.dry_run else []
        return ["--config-name", self.recipe, *directory, *dry_run, *self.overrides]


def read(arguments: Sequence[str]) -> CommandLine:
    """The parts of a command line.

    Raises:
        ConfigError: an unknown option, one without its value, or a folder that is none.
    """
    found: dict[str, str] = {}
    overrides, rest = [], list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        option = OPTIONS.get(name, name)
        if not name.startswith("-"):
            overrides.append(name + equals + value)
        elif option not in (*OPTIONS.values(), DRY_RUN):
            raise ConfigError(
                f"unknown option {name}: use -cn RECIPE, -cd DIR, -m, --cfg job, --dry-run, --help, or "
                "key=value for a setting"
            )
        elif option in WITHOUT_VALUE or equals:
            found[option] = value
        elif rest:
            found[option] = rest.pop(0)
        else:
            raise ConfigError(f"{name} needs {_wanted(option)}")
    directory = found.get("--config-dir")
    if directory is not None and not Path(directory).is_dir():
        raise ConfigError(
            f"--config-dir {directory} is no directory: name one that holds recipes or groups of settings"
        )
    if found.get("--cfg", "job") != "job":
        raise ConfigError(f"--cfg {found['--cfg']} is not known: --cfg job shows what a command line comes to")
    recipe, multirun = found.get("--config-name", DEFAULT_RECIPE), "--multirun" in found
    return CommandLine(recipe, directory, multirun, "--cfg" in found, DRY_RUN in found, tuple(overrides))


def _wanted(option: str) -> str:
    if option == "--config-name":
        return f"a recipe. Known: {', '.join(usage.recipes())}"
    return "job" if option == "--cfg" else "a directory"


def typed(override: str, known: dict[str, Setting], groups: dict[str, list[str]]) -> str:
    """The override for Hydra: a known setting need not stand in a recipe, and text needs no quotes.

    Raises:
        ConfigError: it sets nothing that is known.
    """
    key, equals, value = override.partition("=")
    path = key.lstrip("+~")
    sections = {name.partition(".")[0] for name in known if "." in name}
    if path in sections and (key.startswith("~") or not equals):
        choices = f" {path}=CHOICE ({', '.join(groups[path])}) swaps it," if path in groups else ""
        raise ConfigError(
            f"{override}: every run has its section {path}:{choices} {path}.SETTING=VALUE changes one of its settings"
        )
    if path in groups and equals:
        if value not in groups[path]:
            raise ConfigError(f"unknown choice {override}: {hint_known(value, groups[path])}")
    elif path not in known:
        raise ConfigError(f"unknown setting {override}: {hint(path, [*known, *groups])}")
    elif not equals and not key.startswith("~"):
        raise ConfigError(f"{override} has no value: write {override}=...")
    elif takes_text(known[path].annotation) and not re.fullmatch(r"null|'.*'|\".*\"", value):
        value = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (found[2] and "\\'"), value)
        return f"++{path}='{value}'"
    elif equals:
        if known[path].annotation == tuple[str, ...] and (bare := re.fullmatch(r"\[([^\[\]'\"]+)\]", value)):
            value = "[" + ",".join(f"'{item.strip()}'" for item in bare[1].split(",")) + "]"  # NAME=VALUE, for one
        return f"++{path}={value}"
    return override


def combinations(line: CommandLine, swept: Sequence[Sequence[str]]) -> list[CommandLine]:
    """The command lines of a sweep, the last setting changing fastest.

    Args:
        swept: for each override of the line its values as overrides: one, or those that it sweeps over.
    """
    one = replace(line, multirun=False)
    return [replace(one, overrides=tuple(values)) for values in itertools.product(*swept)]


def label(line: CommandLine, swept: Sequence[Sequence[str]]) -> str:
    """What is one run's own in a sweep, fit for a directory's name: ``seed=1_optim.lr=1e-3``."""
    own = [value for value, values in zip(line.overrides, swept, strict=True) if len(values) > 1]
    return "_".join(re.sub(r"[^\w.=+-]+", "-", hide(value.lstrip("+~"))).strip("-") for value in own)


def named(line: CommandLine, name: str) -> CommandLine:
    """The command line of a run of that name."""
    return replace(line, overrides=(*line.overrides, f"run.name={name}"))


def share_of_array(runs: int) -> range:
    """Which runs of a sweep are this process's: all, or of a job of a Slurm array the one of its number.

    Raises:
        ConfigError: an array that counts otherwise.
    """
    task = os.environ.get(ARRAY_TASK)
    if task is None:
        return range(runs)
    if not 0 <= int(task) < runs:
        raise ConfigError(f"{ARRAY_TASK}={task} is none of a sweep of {runs} runs: use sbatch --array=0-{runs - 1}")
    return range(int(task), int(task) + 1)


def own_settings(arguments: list[str], section: str) -> tuple[list[str], list[str]]:
    """A command's own settings, and the rest."""
    own = [argument for argument in arguments if argument.startswith(section)]
    return own, [argument for argument in arguments if argument not in own]


def run_by_name(arguments: list[str]) -> list[str]:
    """``run=NAME``, or a directory (``run=runs/NAME``), where the only thing to say of a run is which."""
    found: list[str] = []
    for text in arguments:
        key, _, value = text.partition("=")
        if key != "run":
            found.append(text)
        elif "/" in value:
            path = Path(value)
            found += [f"run.name={path.name}", f"run.dir={path.parent}"]
        else:
            found.append(f"run.name={value}")
    return found


def runs_by_name(arguments: list[str]) -> list[str]:
    """``run=NAME`` or ``run=[NAME,NAME]`` where several runs may be named, or their directories."""
    found: list[str] = []
    for text in arguments:
        key, equals, value = text.partition("=")
        names = [name.strip(" '\"") for name in value.removeprefix("[").removesuffix("]").split(",")]
        is_list = equals and key in ("run", "run.name")
        found.append(f"run.name={json.dumps([name for name in names if name])}" if is_list else text)
    return found


def layout_and_data(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Settings of a layout and of data, which a run is used with in place of its own, and the rest."""
    asked = [argument for argument in arguments if argument.startswith(("parallel.", "data."))]
    return asked, [argument for argument in arguments if argument not in asked]
