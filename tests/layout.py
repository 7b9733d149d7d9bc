"""What is measured of the code: size, nesting, imports. ``python -m tests.layout`` prints the largest of each."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("train", "model", "data", "parallel")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("**/*.py"))
TESTS = sorted((ROOT / "tests").glob("**/*.py"))
# The rooms of each package from top to bottom, folders and single files: what stands in one imports from those below
# it alone. A new file or folder takes its place here.
ROOMS = {
    "train": (
        *(
            "__main__",
            "commands",
            "arguments",
            "usage",
            "loop",
            "observe",
            "training",
            "routing",
            "use",
            "measure",
            "plan",
            "hub",
            "watch",
            "front",
            "nodes",
        ),
        *("job", "settings"),
    ),
    "model": (
        *(
            "preflight",
            "rounding",
            "decode",
            "reference",
            "init",
            "network",
            "stack",
            "layers",
            "kernels",
            "batch",
            "cost",
            "hf",
        ),
        *("documents", "backend", "config"),
    ),
    "data": (
        *(
            "dataset",
            "loader",
            "source",
            "prepare",
            "order",
            "read",
            "text",
            "files",
            "progress",
            "errors",
            "secrets",
            "config",
        ),
    ),
    "parallel": (
        *("engine_deepspeed", "engine_megatron", "deepspeed_groups", "replicas", "board", "alone", "groups", "stages"),
        *(
            "domains",
            "half_state",
            "optimizer_state",
            "checkpoint",
            "compat",
            "layout_cost",
            "main_grads",
            "collectives",
            "transport",
            "engine",
            "topology",
        ),
        "quiet",
    ),
}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Function:
    """A function, its lines (decorators not counted), and how deep its blocks lie in each other."""

    name: str
    lines: int
    nesting: int


def functions(source: str) -> Iterator[Function]:
    """Every function of a source, also those inside others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            yield Function(node.name, node.end_lineno - node.lineno + 1, max(map(_depth, node.body)))


def _depth(node: ast.AST) -> int:
    """Blocks in blocks from here on; an ``elif`` is no deeper than its ``if``, and a function counts for itself."""
    if isinstance(node, FUNCTIONS):
        return 0
    parts = list(ast.iter_child_nodes(node))
    deepest = max(map(_depth, parts), default=0)
    if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        rest = [part for part in parts if part is not node.orelse[0]]
        return max(1 + max(map(_depth, rest), default=0), _depth(node.orelse[0]))
    return deepest + isinstance(node, BLOCKS)


def imports(source: str) -> set[str]:
    """Modules that a source imports, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def imports_upward(path: Path, source: str) -> list[str]:
    """Rooms of its own package that a source imports though they stand above its own, or in no order at all."""
    package, *inside = path.relative_to(ROOT).with_suffix("").parts
    rooms, own = ROOMS[package], inside[0]
    if own == "__init__":
        return []
    if own not in rooms:
        return [f"stands in {own}, which has no place in the order of the rooms (tests/layout.py)"]
    ours = {name.split(".")[1] for name in imports(source) if name.startswith(f"{package}.")}
    above = rooms[: rooms.index(own)]
    return [f"imports {package}.{room}, which stands above {own}" for room in above if room in ours]


def calls(source: str) -> list[ast.Call]:
    """Every call in a source."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def largest() -> tuple[str, str, str]:
    """The longest file, the longest function and the deepest one of the packages, with their numbers."""
    texts = {path.relative_to(ROOT): path.read_text() for path in SOURCES}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    file = max(lines, key=lines.get)
    every = [(path, function) for path, text in texts.items() for function in functions(text)]
    path, long = max(every, key=lambda pair: pair[1].lines)
    deep_path, deep = max(every, key=lambda pair: pair[1].nesting)
    return (
        f"largest file: {file}, {lines[file]} lines",
        f"largest function: {path}: {long.name}, {long.lines} lines",
        f"deepest function: {deep_path}: {deep.name}, {deep.nesting} blocks in each other",
    )


if __name__ == "__main__":
    print("\n".join(largest()))
