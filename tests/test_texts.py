"""What README, the other texts and ``--help`` say of commands, recipes, settings, flags and files is so."""

import re
import shlex
from pathlib import Path

import pytest

from tests.layout import ROOT
from train import usage
from train.__main__ import COMMANDS
from train.settings.run import Config
from train.settings.tree import settings

TEXTS = ("README.md", "CONTRIBUTING.md", "OPERATIONS.md", "recipes/README.md")
PLACEHOLDERS = {"COMMAND", "RECIPE", "NAME", "DIR", "PATH", "key", "arguments", "pytest"}
EXTRAS = {"gpu", "te", "deepspeed", "s3", "dashboard", "tensorboard"}
OF_PREPARE = {"--check", "--join", "--repair"}
FLAGS = {"--help", "-h", "-cn", "-cd", "-m", "--cfg", "--dry-run"}


def code_of(text: str) -> list[str]:
    """The lines of a text's code blocks, continued ones joined, and its inline code."""
    pieces = re.split(r"^```.*$", text, flags=re.MULTILINE)
    lines = [line for block in pieces[1::2] for line in block.replace("\\\n", " ").splitlines()]
    return lines + [code.replace("\n", " ") for prose in pieces[::2] for code in re.findall(r"`([^`]+)`", prose)]


def is_set(command: str, name: str, value: str) -> bool:
    """Whether a command takes ``name=value``: a setting of that name, or a choice of a group."""
    known = {setting.path for setting in settings(usage.CONFIGS[command])}
    if command in usage.ANYWHERE and name.startswith(("parallel.", "data.")):
        known |= {setting.path for setting in settings(Config)}
    if command not in usage.WITH_RECIPE:
        return name in known or (name == "run" and "run.name" in known)
    known |= {setting.path for setting in settings(Config)}
    return name in known or value in usage.groups().get(name, ())


def wrong_words(command: str, words: list[str]) -> list[str]:
    """The words of a command line that the command does not know."""
    if command == "test":
        return [word for word in words if not word.startswith("-") and "/" in word and not (ROOT / word).exists()]
    if command == "setup":
        return [word for word in ",".join(words).split(",") if word and word not in EXTRAS]
    if command not in COMMANDS:
        return [command]
    if (command, *words[:1]) == ("prepare", "--index"):  # takes a recipe, as train does
        return wrong_words("train", words[1:])
    wrong = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if word in PLACEHOLDERS or name in PLACEHOLDERS or (command == "prepare" and before in OF_PREPARE):
            continue
        if before in ("-cn", "-cd"):
            known = word in usage.recipes() or "/" in word
        elif before == "--cfg":
            known = word == "job"
        elif equals:
            known = is_set(command, name, value)
        else:
            known = word in FLAGS or (command == "prepare" and word in OF_PREPARE)
        if not known:
            wrong.append(word)
    return wrong


def misstatements(code: str) -> list[str]:
    """What a piece of code in a text says that is not so: commands, recipes, settings, flags and files."""
    if "./launch.sh" in code:
        line = code[code.index("./launch.sh") :].partition(" #")[0]
        words = shlex.split(re.sub(r"[][]|\.\.\.", " ", re.sub(r"=\[\S*\]", "=list", line)))
        return wrong_words(words[1], words[2:]) if len(words) > 1 else []
    every = {setting.path for command in usage.CONFIGS for setting in settings(usage.CONFIGS[command])}
    sections = {path.partition(".")[0] for path in every if "." in path}
    wrong = []
    for name, rest in re.findall(r"(?<![\w./{])([a-z_]+(?:\.[a-z_]+)+)(\W|$)", code):
        file, is_module = name.replace(".", "/"), (ROOT / name.split(".")[0]).is_dir()
        known = name in every or (rest == "." and name + "." in {path[: len(name) + 1] for path in every})
        known |= is_module and any((ROOT / part).with_suffix(".py").exists() for part in (file, str(Path(file).parent)))
        if name.split(".")[0] in sections and not known and Path(name).suffix not in (".py", ".yaml", ".safetensors"):
            wrong.append(name)
    known = every | set(usage.groups()) | PLACEHOLDERS | {"run"}
    return wrong + [name for name in re.findall(r"^([a-z][a-z_.]*)=", code) if name not in known]


@pytest.mark.parametrize("name", [name for name in TEXTS if (ROOT / name).exists()])
def test_a_text_speaks_of_commands_settings_and_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    assert {code: wrong for code in code_of(text) if (wrong := misstatements(code))} == {}
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / name).parent / link).exists(), link


def test_readme_names_every_command() -> None:
    named = set(re.findall(r"\./launch\.sh (\w+)", (ROOT / "README.md").read_text()))
    assert named == {"train", "test", "setup", *COMMANDS}


@pytest.mark.parametrize("command", usage.EXAMPLES)
def test_the_examples_of_help_exist(command: str) -> None:
    for example, _ in usage.EXAMPLES[command]:
        assert misstatements(f"./launch.sh {example}") == []


@pytest.mark.parametrize(
    "code",
    [
        "./launch.sh trian",
        "./launch.sh train -cn tinny",
        "./launch.sh train run.step=3",
        "./launch.sh train optim=adam",
        "./launch.sh evaluate run=mine batch.global=2",
        "./launch.sh bench --fast",
        "./launch.sh test tests/nowhere",
        "data.subsets=0.5",
        "balance.method",
        "parallel.collective",
    ],
)
def test_every_misstatement_is_seen(code: str) -> None:
    assert misstatements(code)
