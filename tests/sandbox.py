"""A copy of the root in which launch.sh is run for real; stand-ins for Python and pip log how they were called."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

Result = subprocess.CompletedProcess[str]
Process = subprocess.Popen[str]

LAUNCH = Path(__file__).parents[1] / "launch.sh"
# Everything launch.sh may call besides Python; nothing else of this machine is on the PATH of a test.
TOOLS = "awk bash cat cksum cp cut df dirname env find flock grep head mkdir mv paste readlink sed sleep sort tr"

# Stands in for python3.12, and in .venv for its Python with pip: a line of calls.log for each call.
FAKE_PYTHON = """#!/bin/bash
root={root}
case "$1 $2" in
  "-c import torch"*) exit "$(cat "$root/imports" 2>/dev/null || echo 0)" ;;
  "-c "*) exec {python} "$@" ;;
  "-m venv") echo venv >>"$root/calls.log"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip") echo "${{@:2}}" >>"$root/calls.log"; source "$root/pip.sh" ;;
  *) printf '%s\\n' "$PWD" "$@" >"$root/command.log"; exit "$(cat "$root/exit_code")" ;;
esac
"""


@dataclass(frozen=True)
class Sandbox:
    """A copy of the root at `root` and the folder of programs, `bin`, that is its whole PATH."""

    root: Path
    bin: Path
    home: Path

    def add_program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, *args: str, cwd: Path | None = None, **environment: str) -> Process:
        return subprocess.Popen(
            [str(self.root / "launch.sh"), *args],
            cwd=cwd or self.root,
            env={"PATH": str(self.bin), "HOME": str(self.home)} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a test can send a signal to the whole group, as a terminal does
            # A test run that was started in the background ignores Ctrl-C, and its children would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *args: str, cwd: Path | None = None, **environment: str) -> Result:
        process = self.start(*args, cwd=cwd, **environment)
        stdout, stderr = process.communicate(timeout=30)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

    def calls(self) -> list[str]:
        """What the set-up called so far: "venv" or "pip ..."."""
        log = self.root / "calls.log"
        return log.read_text().splitlines() if log.exists() else []

    def installs(self) -> int:
        return sum(call.startswith("pip install") for call in self.calls())

    def command(self) -> list[str]:
        """The working directory and the arguments that the last command was handed."""
        return (self.root / "command.log").read_text().splitlines()


@pytest.fixture
def bare(tmp_path: Path) -> Sandbox:
    """A fresh clone on a machine without any Python; its path has a space."""
    sandbox = Sandbox(root=tmp_path / "a clone", bin=tmp_path / "bin", home=tmp_path / "home")
    for folder in (sandbox.root, sandbox.bin, sandbox.home):
        folder.mkdir()
    for tool in TOOLS.split():
        (sandbox.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"this test needs {tool}"))
    shutil.copy(LAUNCH, sandbox.root)
    (sandbox.root / "pyproject.toml").write_text("[project]\n")
    (sandbox.root / "constraints.txt").write_text("torch==1\n")
    (sandbox.root / "pip.sh").write_text("exit 0\n")
    (sandbox.root / "exit_code").write_text("0\n")
    return sandbox


@pytest.fixture
def clone(bare: Sandbox) -> Sandbox:
    """A fresh clone on a machine with a good python3.12."""
    bare.add_program("python3.12", fake_python(bare))
    return bare


def fake_python(sandbox: Sandbox) -> str:
    return FAKE_PYTHON.format(root=shlex.quote(str(sandbox.root)), python=shlex.quote(sys.executable))


def old_python(version: tuple[int, int, int]) -> str:
    """A program that runs `-c` code as a Python of that version would."""
    code = f"import sys; sys.version_info = (*{version}, 'final', 0); exec(sys.argv[1])"
    run_code = f'exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$2"'
    return f"#!/bin/bash\n[[ $1 == -c ]] && {run_code}\nexit 9\n"


def refusal(result: Result) -> str:
    """The one line of a user's mistake."""
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def contents(folder: Path) -> set[str]:
    """Every file in a folder, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {f"{path.relative_to(folder)}: {path.read_bytes()!r}" for path in files}


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.fixture
def installing(clone: Sandbox, request: pytest.FixtureRequest) -> Iterator[Process]:
    """A set-up whose pip does not come to an end by itself: the first one, or (parameter) that of new requirements."""
    if getattr(request, "param", "first") == "renewal":
        clone.run("train")
        (clone.root / "constraints.txt").write_text("torch==2\n")
    (clone.root / "calls.log").unlink(missing_ok=True)
    (clone.root / "pip.sh").write_text("exec sleep 60\n")
    process = clone.start("train")
    wait_for(lambda: clone.installs() == 1, process)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
