"""launch.sh, run for real in a copy of the root; stand-ins for Python and pip log how they were called."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sandbox import Process, Sandbox, contents, fake_python, old_python, refusal, wait_for

COMMANDS = [
    "train",
    "test",
    "setup",
    "estimate",
    "prepare",
    "evaluate",
    "generate",
    "status",
    "report",
    "dashboard",
    "export",
    "import",
    "bench",
    "doctor",
]


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
    assert clone.run("test").returncode == 0
    assert clone.command() == [
        str(clone.root),
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
    ]


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
    assert clone.installs() == installs + 1
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


@pytest.mark.parametrize("installing", ["first", "renewal"], indirect=True)
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_set_up_is_done_again_and_only_a_new_environment_is_made_anew(
    clone: Sandbox, installing: Process, number: signal.Signals, exit_code: int, request: pytest.FixtureRequest
) -> None:
    os.killpg(installing.pid, number)
    installing.communicate(timeout=20)
    assert installing.returncode == exit_code
    (clone.root / ".venv/there").touch()
    (clone.root / "pip.sh").write_text("exit 0\n")
    assert clone.run("train").returncode == 0
    assert (clone.root / ".venv/there").exists() == ("renewal" in request.node.callspec.id)
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


def test_venv_whose_python_vanished_is_left_alone_and_another_made_beside_it(clone: Sandbox) -> None:
    clone.run("train")
    before = contents(clone.root / ".venv")
    (clone.root / ".venv/bin/python").rename(clone.root / "python")  # as in a container that lacks it
    assert clone.run("train").returncode == 0
    assert clone.calls().count("venv") == 2
    (clone.root / "python").rename(clone.root / ".venv/bin/python")
    assert contents(clone.root / ".venv") == before
    assert clone.run("train").stderr == ""


def test_ctrl_c_reaches_the_command(clone: Sandbox) -> None:
    clone.run("train")
    code = "import signal, sys; signal.signal(2, lambda *_: sys.exit(77)); open('up', 'w'); signal.pause()"
    program = f"#!/bin/bash\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)}\n"
    (clone.root / ".venv/bin/python").write_text(program)
    process = clone.start("train")
    wait_for((clone.root / "up").exists, process)
    process.send_signal(signal.SIGINT)  # to the first process alone: launch.sh must have become the command
    assert process.wait(timeout=20) == 77
