"""launch.sh, run for real in a copy of the root; stand-ins for Python and pip log how they were called."""

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
COMMANDS = ["train", "test", "estimate", "prepare", "evaluate", "generate", "export", "import", "bench", "doctor"]
# Everything launch.sh may call besides Python; nothing else of this machine is on the PATH of a test.
TOOLS = "awk bash cat cksum cp df dirname env find flock grep head mkdir readlink sleep sort"

# Stands in for python3.12, and in .venv for its Python with pip: a line of calls.log for each call.
FAKE_PYTHON = """#!/bin/bash
root={root}
case "$1 $2" in
  "-c "*) exec {python} "$@" ;;
  "-m venv") echo venv >>"$root/calls.log"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
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


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_usage_names_every_command_and_needs_no_python(bare: Sandbox, args: list[str]) -> None:
    result = bare.run(*args)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[0] for line in result.stdout.split("\n\n")[2].splitlines()] == COMMANDS
    assert "./launch.sh train run.name=" in result.stdout


def test_unknown_command_is_refused_with_the_known_ones(clone: Sandbox) -> None:
    line = refusal(clone.run("frobnicate"))
    assert "'frobnicate'" in line and line.endswith(" ".join(COMMANDS))
    assert clone.calls() == []


@pytest.mark.parametrize(
    ("typed", "meant"), [("trian", "train"), ("eval", "evaluate"), ("-cn", "train"), ("run.steps=5", "train")]
)
def test_unknown_command_names_the_nearest_one(clone: Sandbox, typed: str, meant: str) -> None:
    clone.add_program("python3", fake_python(clone))
    assert f"did you mean {meant}?" in refusal(clone.run(typed))


def test_no_python_says_how_to_get_one(bare: Sandbox) -> None:
    line = refusal(bare.run("train"))
    assert "3.12" in line and "pyenv install" in line and "PYTHON=" in line


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 15, 0)])
def test_unsupported_python_in_PYTHON_is_refused(clone: Sandbox, version: tuple[int, int, int]) -> None:
    program = clone.add_program("mine", old_python(version))
    line = refusal(clone.run("train", PYTHON=str(program)))
    assert f"PYTHON={program} is Python {'.'.join(map(str, version))};" in line
    assert "3.12 to 3.14" in line


def test_PYTHON_that_does_not_run_is_refused(clone: Sandbox) -> None:
    assert "PYTHON=/nowhere/python does not run" in refusal(clone.run("train", PYTHON="/nowhere/python"))


def test_python_search_passes_over_broken_shims_and_old_versions(bare: Sandbox) -> None:
    bare.add_program("python3.12", "#!/bin/bash\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    bare.add_program("python3", old_python((3, 9, 18)))
    for version in ("3.12.4", "3.12.11"):
        folder = bare.home / ".pyenv/versions" / version / "bin"
        folder.mkdir(parents=True)
        (folder / "python").write_text(fake_python(bare))
        (folder / "python").chmod(0o755)
    result = bare.run("train")
    assert result.returncode == 0
    assert "versions/3.12.11/bin/python" in result.stderr
    assert bare.command()[1:] == ["-m", "train", "train"]


def test_python_found_by_uv_is_used(bare: Sandbox) -> None:
    python = bare.add_program("uv-python", fake_python(bare))
    bare.add_program("uv", f'#!/bin/bash\n[[ "$1 $2" == "python find" ]] && echo "{python}"\n')
    assert f"making .venv with {python}\n" in bare.run("train").stderr


def test_relative_PYTHON_is_taken_from_the_callers_folder(bare: Sandbox, tmp_path: Path) -> None:
    bare.add_program("mine", fake_python(bare))
    assert bare.run("train", cwd=tmp_path, PYTHON="bin/mine").returncode == 0


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate", "generate"])
def test_arguments_and_exit_code_pass_through(clone: Sandbox, command: str) -> None:
    (clone.root / "exit_code").write_text("7\n")
    args = ["-cn", "tiny", "run.name=two words", "data.glob=*.txt", "", "it's", '$HOME "x"']
    assert clone.run(command, *args).returncode == 7
    assert clone.command() == [str(clone.root), "-m", "train", command, *args]


def test_test_hands_its_arguments_to_pytest(clone: Sandbox) -> None:
    assert clone.run("test", "tests/data", "-k", "a or b").returncode == 0
    assert clone.command() == [str(clone.root), "-m", "pytest", "tests/data", "-k", "a or b"]


def test_works_from_another_folder_and_through_a_link(clone: Sandbox, tmp_path: Path) -> None:
    link = tmp_path / "tessera"
    link.symlink_to(clone.root / "launch.sh")
    subprocess.run([link, "train"], cwd="/", env={"PATH": str(clone.bin)}, timeout=30, check=True)
    assert clone.command()[0] == str(clone.root)


def test_set_up_is_done_once_with_the_constraints(clone: Sandbox) -> None:
    first = clone.run("train")
    assert first.returncode == 0
    assert "5 GB" in first.stderr, "what is about to happen is said first"
    assert clone.calls()[0] == "venv"
    assert all("--constraint constraints.txt" in call for call in clone.calls()[1:])
    assert clone.calls()[-1].endswith("--editable .[dev]")
    calls = clone.calls()
    assert clone.run("train").stderr == ""
    assert clone.calls() == calls


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_changed_requirements_are_installed_into_the_same_venv(clone: Sandbox, name: str) -> None:
    clone.run("train")
    installs = clone.installs()
    (clone.root / name).write_text("# changed\n")
    assert clone.run("train").returncode == 0
    assert clone.installs() == 2 * installs
    assert clone.calls().count("venv") == 1


def test_gpu_extra_comes_with_a_gpu_and_stays_without_one(clone: Sandbox) -> None:
    nvidia_smi = clone.add_program("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    clone.run("train")
    assert clone.calls()[-1].endswith("--editable .[dev,gpu]")
    nvidia_smi.unlink()
    assert clone.run("train").stderr == "", "nothing was installed again"


def test_gpu_extra_is_added_to_a_set_up_made_without_a_gpu(clone: Sandbox) -> None:
    clone.add_program("nvidia-smi", "#!/bin/bash\necho 'No devices found' >&2\nexit 6\n")
    clone.run("train")
    assert clone.calls()[-1].endswith("--editable .[dev]")
    clone.add_program("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    assert clone.run("train").returncode == 0
    assert clone.calls()[-1].endswith("--editable .[dev,gpu]")


def test_failed_pip_ends_with_one_clear_line_and_is_tried_again(clone: Sandbox) -> None:
    (clone.root / "pip.sh").write_text("exit 1\n")
    result = clone.run("train")
    assert result.returncode == 1
    assert "network" in result.stderr.splitlines()[-1] and "disk" in result.stderr.splitlines()[-1]
    assert not (clone.root / "command.log").exists()
    (clone.root / "pip.sh").write_text("exit 0\n")
    assert clone.run("train").returncode == 0


@pytest.fixture(params=["first", "renewal"])
def installing(clone: Sandbox, request: pytest.FixtureRequest) -> Iterator[Process]:
    """A set-up whose pip does not come to an end by itself: the first one, or that of new requirements."""
    if request.param == "renewal":
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


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted_set_up_is_made_anew(
    clone: Sandbox, installing: Process, number: signal.Signals, exit_code: int
) -> None:
    os.killpg(installing.pid, number)
    installing.communicate(timeout=20)
    assert installing.returncode == exit_code
    (clone.root / ".venv/half-written").touch()
    (clone.root / "pip.sh").write_text("exit 0\n")
    assert clone.run("train").returncode == 0
    assert not (clone.root / ".venv/half-written").exists()
    assert clone.run("train").stderr == ""


def test_two_at_once_set_up_once(clone: Sandbox) -> None:
    (clone.root / "pip.sh").write_text('until [[ -e "$root/go" ]]; do sleep 0.02; done\n')
    first = clone.start("train")
    wait_for(lambda: clone.installs() == 1, first)
    second = clone.start("train")
    assert "another set-up" in second.stderr.readline()
    (clone.root / "go").touch()
    for process in (first, second):
        process.communicate(timeout=20)
        assert process.returncode == 0
    assert clone.calls().count("venv") == 1
    assert sum(call.endswith("--editable .[dev]") for call in clone.calls()) == 1


def test_lock_is_not_held_by_the_command_that_follows(clone: Sandbox) -> None:
    clone.run("train")
    python = clone.root / ".venv/bin/python"
    (clone.root / "constraints.txt").write_text("torch==2\n")
    python.write_text(python.read_text().replace("  *) ", '  *) echo >"$root/running"; exec sleep 40; '))
    training = clone.start("train")
    wait_for((clone.root / "running").exists, training)
    (clone.root / "constraints.txt").write_text("torch==3\n")
    python.write_text(fake_python(clone))
    assert clone.run("evaluate").returncode == 0, "the second set-up waited for the training run"
    assert clone.command()[1:] == ["-m", "train", "evaluate"]
    os.killpg(training.pid, signal.SIGKILL)
    training.communicate()


def test_moved_folder_is_set_up_anew(clone: Sandbox) -> None:
    clone.run("train")
    moved = Sandbox(clone.root.with_name("moved"), clone.bin, clone.home)
    clone.root.rename(moved.root)
    moved.add_program("python3.12", fake_python(moved))
    assert moved.run("train").returncode == 0
    assert moved.calls().count("venv") == 2
    assert moved.command()[0] == str(moved.root)


def test_venv_whose_python_vanished_is_made_anew(clone: Sandbox) -> None:
    clone.run("train")
    (clone.root / ".venv/bin/python").unlink()
    assert clone.run("train").returncode == 0
    assert clone.calls().count("venv") == 2


def test_ctrl_c_reaches_the_command(clone: Sandbox) -> None:
    clone.run("train")
    code = "import signal, sys; signal.signal(2, lambda *_: sys.exit(77)); open('up', 'w'); signal.pause()"
    program = f"#!/bin/bash\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)}\n"
    (clone.root / ".venv/bin/python").write_text(program)
    process = clone.start("train")
    wait_for((clone.root / "up").exists, process)
    process.send_signal(signal.SIGINT)  # to the first process alone: launch.sh must have become the command
    assert process.wait(timeout=20) == 77
