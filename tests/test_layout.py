"""The shape of the code: which way imports point, how long and how deep things are, and that the texts speak of what
is there."""

import ast
from pathlib import Path

import pytest

from tests.layout import PACKAGES, ROOMS, ROOT, SOURCES, TESTS, calls, functions, imports, imports_upward

FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES, NESTING = 350, 500, 60, 4
LOOKUPS = 1.0  # getattr in a thousand lines
FOR_THE_MODEL = ("parallel.collectives", "parallel.main_grads")
HYDRA = ROOT / "train" / "__main__.py"
ASSEMBLY = ROOT / "train" / "job" / "build.py"  # the one place that knows which engines there are
COLLECTIVES = {"all_reduce", "all_gather", "all_to_all_single", "all_to_all", "broadcast", "barrier", "reduce_scatter"}


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes of a module without a docstring."""
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node.name for node in named if not node.name.startswith("_") and not ast.get_docstring(node)]


def asks_for_the_engine(source: str) -> bool:
    """Whether a source compares the setting ``engine`` with something."""
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    sides = [side for node in compared for side in (node.left, *node.comparators)]
    return any(isinstance(side, ast.Attribute) and side.attr == "engine" for side in sides)


def flaws(path: Path, source: str) -> list[str]:
    """What is wrong with one source of a package."""
    package, tree, found = path.relative_to(ROOT).parts[0], ast.parse(source), []
    modules = imports(source)
    ours = {name for name in modules if name.split(".")[0] in set(PACKAGES) - {package}}
    if package == "model":
        ours = {name for name in ours if not name.startswith(FOR_THE_MODEL) and name != "parallel"}
    if package != "train":
        found += [f"imports {name}" for name in sorted(ours)]
    found += imports_upward(path, source)
    if package == "train" and path != ASSEMBLY:
        found += [f"imports {name}" for name in sorted(modules) if name.startswith("parallel.engine_")]
        found += ["asks which engine"] * asks_for_the_engine(source)
    if path != HYDRA and any(name.split(".")[0] in ("hydra", "omegaconf") for name in modules):
        found.append("uses Hydra")
    if len(source.splitlines()) > FILE_LINES:
        found.append(f"has {len(source.splitlines())} lines")
    if path.name != "__init__.py" and not ast.get_docstring(tree):
        found.append("says nothing of itself")
    found += [f"{name} says nothing of itself" for name in undocumented(tree)]
    found += [f"{f.name} has {f.lines} lines" for f in functions(source) if f.lines > FUNCTION_LINES]
    found += [f"{f.name} has {f.nesting} blocks in each other" for f in functions(source) if f.nesting > NESTING]
    called = {call.func.attr for call in calls(source) if isinstance(call.func, ast.Attribute)}
    if package != "parallel":
        found += [f"calls {name}" for name in sorted(called & COLLECTIVES)]
    names = [call.func.id for call in calls(source) if isinstance(call.func, ast.Name)]
    found += ["asks hasattr"] * names.count("hasattr")
    asked = [call for call in calls(source) if isinstance(call.func, ast.Name) and call.func.id == "getattr"]
    return found + ["gives getattr a default"] * sum(len(call.args) > 2 for call in asked)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_keeps_to_its_room(path: Path) -> None:
    assert flaws(path, path.read_text()) == []


DEEP = "def f():\n" + "".join(f"{'    ' * depth}if x:\n" for depth in range(1, 6)) + "    " * 6 + "pass\n"


@pytest.mark.parametrize(
    ("where", "source", "flaw"),
    [
        ("model/x.py", '"""X."""\nimport parallel.groups\n', "imports parallel.groups"),
        ("data/x.py", '"""X."""\nfrom train import config\n', "imports train"),
        ("train/watch/x.py", '"""X."""\nimport train.loop\n', "imports train.loop, which stands above watch"),
        ("model/layers/x.py", '"""X."""\nfrom model import stack\n', "imports model.stack, which stands above layers"),
        (
            "data/read/x.py",
            '"""X."""\nfrom data.order.mixture import y\n',
            "imports data.order, which stands above read",
        ),
        ("parallel/x.py", '"""X."""\n', "stands in x, which has no place in the order of the rooms (tests/layout.py)"),
        ("train/loop.py", '"""X."""\nimport parallel.engine_x\n', "imports parallel.engine_x"),
        ("train/loop.py", '"""X."""\nif config.engine == "megatron":\n    pass\n', "asks which engine"),
        ("train/x.py", '"""X."""\nfrom omegaconf import OmegaConf\n', "uses Hydra"),
        ("train/x.py", '"""X."""\n' + "x = 1\n" * FILE_LINES, f"has {FILE_LINES + 1} lines"),
        ("train/x.py", "x = 1\n", "says nothing of itself"),
        ("train/x.py", '"""X."""\ndef f():\n    return 1\n', "f says nothing of itself"),
        ("train/x.py", '"""X."""\ndef f():\n' + "    x = 1\n" * FUNCTION_LINES, f"f has {FUNCTION_LINES + 1} lines"),
        ("train/x.py", '"""X."""\n' + DEEP, "f has 5 blocks in each other"),
        ("model/x.py", '"""X."""\ndist.all_reduce(x)\n', "calls all_reduce"),
        ("train/x.py", '"""X."""\nhasattr(x, "y")\n', "asks hasattr"),
        ("train/x.py", '"""X."""\ngetattr(x, "y", None)\n', "gives getattr a default"),
    ],
)
def test_every_flaw_is_seen(where: str, source: str, flaw: str) -> None:
    assert flaw in flaws(ROOT / where, source)


def test_every_room_has_one_place_in_the_order() -> None:
    for package in PACKAGES:
        there = {
            path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in (ROOT / package).rglob("*.py")
        }
        assert sorted(ROOMS[package]) == sorted(there - {"__init__"})


def test_an_elif_is_as_deep_as_its_if() -> None:
    source = "def f():\n  if a:\n    pass\n  elif b:\n    for c in d:\n      pass\n  else:\n    pass\n"
    assert [function.nesting for function in functions(source)] == [2]


def test_attributes_are_seldom_looked_up_by_name() -> None:
    texts = [path.read_text() for path in SOURCES]
    names = [call.func.id for text in texts for call in calls(text) if isinstance(call.func, ast.Name)]
    lines = sum(len(text.splitlines()) for text in texts)
    assert names.count("getattr") / lines * 1000 <= LOOKUPS


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_test_file_is_readable_in_one_go(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= TEST_FILE_LINES


def readme_tree() -> dict[str, set[str]]:
    """The folders that README's tree names, by package."""
    block = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    tree: dict[str, set[str]] = {}
    package = ""
    for line in block.strip().splitlines():
        name = line.split()[0].rstrip("/")
        if line.startswith(" "):
            tree[package].add(name)
        else:
            package = name
            tree[package] = set()
    return tree


def folders(package: Path) -> set[str]:
    """The rooms of a package."""
    return {path.parent.name for path in package.glob("*/__init__.py")}


def test_readme_names_every_room_and_no_other() -> None:
    tree = readme_tree()
    assert {package: tree[package] for package in PACKAGES} == {p: folders(ROOT / p) for p in PACKAGES}
