"""The shape of the code: which way imports point, how long things are, and that README speaks of what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("train", "model", "data", "parallel")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("**/*.py"))
TESTS = sorted((ROOT / "tests").glob("**/*.py"))
FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES = 350, 500, 60
COLLECTIVES = {"all_reduce", "all_gather", "all_to_all_single", "all_to_all", "broadcast", "barrier", "reduce_scatter"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def forbidden(path: Path) -> set[str]:
    """Imports of ours that this file's package may not have."""
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imports(path) if name.split(".")[0] in PACKAGES and name.split(".")[0] != package}
    if package == "train":
        return set()
    if package == "model":
        return {name for name in ours if not name.startswith("parallel.collectives") and name != "parallel"}
    return ours


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_keeps_to_its_room(path: Path) -> None:
    assert not forbidden(path)
    assert len(path.read_text().splitlines()) <= FILE_LINES
    tree = ast.parse(path.read_text())
    assert path.name == "__init__.py" or ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES} == {}
    package = path.relative_to(ROOT).parts[0]
    called = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")}
    assert package == "parallel" or not called & COLLECTIVES
    uses_hydra = any(name.split(".")[0] in ("hydra", "omegaconf") for name in imports(path))
    assert not uses_hydra or path == ROOT / "train" / "__main__.py"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_test_file_is_readable_in_one_go(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= TEST_FILE_LINES


def readme_tree() -> dict[str, set[str]]:
    """The files that README's tree names, by folder."""
    block = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    tree: dict[str, set[str]] = {}
    folder = ""
    for line in block.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name.rstrip("/")
        else:
            tree.setdefault(folder, set()).add(name)
    return tree


def test_readme_names_every_source_and_no_other() -> None:
    tree = readme_tree()
    for package in PACKAGES:
        assert tree[package] == {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}


def test_readme_speaks_of_commands_settings_and_files_that_exist() -> None:
    from train.__main__ import COMMANDS
    from train.config import Config
    from train.requests import BenchConfig, EvaluateConfig, GenerateConfig
    from train.settings import settings

    text = (ROOT / "README.md").read_text()
    known = {"train", "test", *COMMANDS}
    assert set(re.findall(r"\./launch\.sh (\w+)", text)) <= known
    assert known <= set(re.findall(r"\./launch\.sh (\w+)", text))
    paths = {
        setting.path for config in (Config, BenchConfig, EvaluateConfig, GenerateConfig) for setting in settings(config)
    }
    named = set(re.findall(r"\b([a-z_]+\.[a-z_]+)=", text))
    assert named <= paths
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
