"""launch.sh where several paths, machines or processes share one checkout: no environment is ever destroyed."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sandbox import Process, Sandbox, contents, refusal

GPU = "#!/bin/bash\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n"
Mount = Callable[..., Sandbox]


@pytest.fixture
def mount(clone: Sandbox) -> Iterator[Mount]:
    """Shows the checkout under another path, as a container does: mount(*options) is a sandbox there."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    mounted: list[Path] = []

    def mount_at(*options: str) -> Sandbox:
        path = clone.root.with_name(f"mounted {len(mounted)}")
        path.mkdir()
        subprocess.run(["mount", "--bind", clone.root, path], check=True)
        mounted.append(path)
        if options:
            subprocess.run(["mount", "-o", ",".join(("remount", "bind", *options)), path], check=True)
        return Sandbox(path, clone.bin, clone.home)

    yield mount_at
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def no_network(sandbox: Sandbox) -> None:
    (sandbox.root / "pip.sh").write_text("exit 1\n")


def test_another_path_uses_the_environment_as_it_is(clone: Sandbox, mount: Mount) -> None:
    clone.run("train")
    before = contents(clone.root / ".venv")
    calls = clone.calls()
    elsewhere = mount()
    assert elsewhere.run("train", "seed=1").stderr == ""
    assert elsewhere.command() == [str(elsewhere.root), "-m", "train", "train", "seed=1"]
    assert (clone.calls(), contents(clone.root / ".venv")) == (calls, before)


@pytest.mark.parametrize("why", ["requirements", "extras", "python"])
def test_another_path_gets_its_own_environment_where_that_one_will_not_do(
    clone: Sandbox, mount: Mount, why: str
) -> None:
    clone.run("train")
    before = contents(clone.root / ".venv")
    elsewhere = mount()
    if why == "requirements":
        (clone.root / "constraints.txt").write_text("torch==2\n")
    elif why == "extras":
        clone.add_program("nvidia-smi", GPU)
    else:
        (clone.root / ".venv/bin/python").write_text("#!/bin/nothing\n")
        before = contents(clone.root / ".venv")
    assert elsewhere.run("train").returncode == 0
    assert clone.calls().count("venv") == 2
    assert contents(clone.root / ".venv") == before, "the first one was touched"
    assert elsewhere.run("train").stderr == ""


def test_a_failed_set_up_elsewhere_leaves_the_first_environment_whole(clone: Sandbox, mount: Mount) -> None:
    clone.run("train")
    before = contents(clone.root / ".venv")
    clone.add_program("nvidia-smi", GPU)
    no_network(clone)
    assert mount().run("train").returncode == 1
    assert contents(clone.root / ".venv") == before
    (clone.bin / "nvidia-smi").unlink()
    assert clone.run("train").stderr == ""


def test_a_gpu_node_without_network_goes_on_with_what_is_there(clone: Sandbox) -> None:
    clone.run("train")
    before = contents(clone.root / ".venv")
    clone.add_program("nvidia-smi", GPU)
    no_network(clone)
    result = clone.run("train")
    assert result.returncode == 0
    assert "WARNING: pip failed" in result.stderr and "./launch.sh setup dev,gpu" in result.stderr
    assert clone.command()[1:] == ["-m", "train", "train"]
    assert contents(clone.root / ".venv") == before
    (clone.bin / "nvidia-smi").unlink()
    assert clone.run("train").stderr == "", "the login node's environment is as good as before"


def test_what_does_not_import_is_not_gone_on_with(clone: Sandbox) -> None:
    clone.run("train")
    clone.add_program("nvidia-smi", GPU)
    no_network(clone)
    (clone.root / "imports").write_text("1\n")
    result = clone.run("train")
    assert result.returncode == 1
    assert "network" in result.stderr.splitlines()[-1]


def test_setup_builds_for_another_machine_and_adds_to_what_is_there(clone: Sandbox) -> None:
    assert clone.run("setup", "gpu").returncode == 0
    assert clone.calls()[-1].endswith("--editable .[dev,gpu]")
    assert not (clone.root / "command.log").exists(), "a command was started"
    result = clone.run("setup", "deepspeed")
    assert result.stderr.splitlines()[-1].endswith("holds: dev,deepspeed,gpu")
    assert clone.calls()[-1].endswith("--editable .[dev,deepspeed,gpu]")
    assert clone.calls().count("venv") == 1
    calls = clone.calls()
    clone.add_program("nvidia-smi", GPU)
    assert clone.run("train").stderr == ""
    assert clone.run("setup").returncode == 0
    assert clone.calls() == calls, "something was installed again"


def test_transformer_engine_is_compiled_once_torch_is_there(clone: Sandbox) -> None:
    clone.run("setup", "te")
    torch, engine = clone.calls()[-2:]
    assert torch.endswith("--editable .[dev]")
    assert engine.endswith("--no-build-isolation --editable .[dev,te]")


def test_setup_fails_without_a_network(clone: Sandbox) -> None:
    clone.run("train")
    no_network(clone)
    assert clone.run("setup", "gpu").returncode == 1
    assert clone.run("train").returncode == 0


def test_an_unknown_extra_is_refused(clone: Sandbox) -> None:
    line = refusal(clone.run("setup", "gpus"))
    assert "'gpus'" in line and line.endswith("gpu te deepspeed s3 dashboard tensorboard")
    assert clone.calls() == []


@pytest.mark.parametrize("code", [69, 127])
def test_a_file_system_without_locks_is_said_and_not_waited_for(clone: Sandbox, code: int) -> None:
    (clone.bin / "flock").unlink()
    if code == 69:  # what flock answers where the system call is not there
        clone.add_program("flock", "#!/bin/bash\necho 'flock: Function not implemented' >&2\nexit 69\n")
    result = clone.run("train")
    assert result.returncode == 0
    assert "cannot be locked" in result.stderr and "another set-up" not in result.stderr


def test_twenty_first_launches_at_once_set_up_once_and_all_run(clone: Sandbox) -> None:
    (clone.root / "pip.sh").write_text("sleep 0.5\n")
    launches = [clone.start("train") for _ in range(20)]
    assert [process.wait(timeout=60) for process in launches] == [0] * 20
    for process in launches:
        process.communicate()
    assert clone.calls().count("venv") == 1
    assert sum(call.endswith("--editable .[dev]") for call in clone.calls()) == 1


def test_the_callers_folder_goes_along(clone: Sandbox, tmp_path: Path) -> None:
    clone.run("prepare", "input=texts", cwd=tmp_path)
    assert clone.command()[1:] == ["-m", "train", "prepare", "--from", str(tmp_path), "input=texts"]
    clone.run("prepare", "input=texts")
    assert clone.command()[1:] == ["-m", "train", "prepare", "input=texts"]


def test_a_checkout_that_cannot_be_written_serves_from_the_callers_folder(
    clone: Sandbox, mount: Mount, tmp_path: Path
) -> None:
    (clone.root / "LICENSE").touch()
    readonly, caller = mount("ro"), tmp_path / "mine"
    caller.mkdir()
    before = contents(clone.root)
    assert readonly.run("train", cwd=caller).returncode == 0
    assert readonly.command() == [str(readonly.root), "-m", "train", "train", "--from", str(caller)]
    assert {path.partition(":")[0] for path in contents(clone.root) - before} == {"calls.log", "command.log"}
    (environment,) = caller.glob(".venv-*")
    assert clone.calls()[-1].endswith(f"{environment}/requirements[dev]")
    assert readonly.run("train", cwd=caller).stderr == ""


def test_a_checkout_set_up_before_it_cannot_be_written_serves_as_it_is(
    clone: Sandbox, mount: Mount, tmp_path: Path
) -> None:
    clone.run("train")
    calls = clone.calls()
    readonly = mount("ro")
    assert readonly.run("train", cwd=tmp_path).stderr == ""
    assert clone.calls() == calls


def test_slurms_copy_finds_the_checkout(clone: Sandbox, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    copy = Sandbox(spool, clone.bin, clone.home)
    (spool / "launch.sh").write_text((clone.root / "launch.sh").read_text())
    (spool / "launch.sh").chmod(0o755)
    assert "is not found" in refusal(copy.run("train", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path)))
    assert copy.run("train", cwd=clone.root, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(clone.root)).returncode == 0
    assert clone.command() == [str(clone.root), "-m", "train", "train"]
    # Submitted elsewhere; of an array Slurm tells of every job.
    clone.add_program(
        "scontrol", f"#!/bin/bash\nfor job in 7 8; do echo '   Command={clone.root}/launch.sh train'; done\n"
    )
    assert copy.run("train", cwd=tmp_path, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path)).returncode == 0


@pytest.mark.parametrize("installing", ["first"], indirect=True)
def test_an_unfinished_environment_is_not_emptied_without_a_lock(clone: Sandbox, installing: Process) -> None:
    os.killpg(installing.pid, signal.SIGKILL)
    installing.communicate(timeout=20)
    (clone.root / ".venv/there").touch()
    (clone.root / "pip.sh").write_text("exit 0\n")
    (clone.bin / "flock").unlink()
    assert clone.run("train").returncode == 0
    assert (clone.root / ".venv/there").exists(), "another set-up may be at work in it"
