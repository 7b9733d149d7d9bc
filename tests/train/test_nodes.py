"""Where a front stands, from variables; what it would start; the fronts of several nodes among each other."""

import os
import threading
import time
from pathlib import Path

import pytest

from train import front
from train.nodes import failed, place, slurm
from train.nodes.place import Nodes
from train.nodes.roster import LOST_S, NodeLost, Roster
from train.settings.tree import ConfigError

VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC", *place.WORKER_VARIABLES)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables but those that a test sets."""
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("SLURM"))]:
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "nodes"),
    [
        ({}, Nodes()),
        ({"NNODES": "1"}, Nodes()),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, Nodes(2, 2, 1, "a")),
        ({"NNODES": "1:4", "NODE_RANK": "3", "MASTER_ADDR": "a:777"}, Nodes(1, 4, 3, "a", 777)),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "778"}, Nodes(2, 2, 0, "a", 778)),
        ({"NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "a"}, Nodes(2, 2, 1, "a")),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "8"}, Nodes(8, 8, slurm=True)),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, Nodes()),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967290", "SLURM_JOB_NUM_NODES": "2"}, Nodes(2, 2, slurm=True)),
    ],
)
def test_where_a_front_stands(monkeypatch, variables: dict[str, str], nodes: Nodes) -> None:
    given(monkeypatch, **variables)
    assert place.here() == nodes


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NNODES": "two"}, "NNODES=two is not a number of nodes"),
        ({"NNODES": "4:2"}, "NNODES=4:2 is not"),
        ({"NNODES": "0"}, "NNODES=0 is not"),
        ({"NNODES": "2"}, "NODE_RANK= is not one of NNODES=2 nodes: give each its own, from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 is not one of"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a:b"}, "MASTER_ADDR=a:b has no port"),
    ],
)
def test_what_cannot_be_meant_is_refused(monkeypatch, variables: dict[str, str], says: str) -> None:
    given(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=says):
        place.here()


def test_a_task_of_srun_is_a_worker(monkeypatch) -> None:
    monkeypatch.setattr(slurm, "_ask", lambda *_: "")
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "localhost"}
    given(monkeypatch, **step, SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_STEP_TASKS_PER_NODE="2(x2)")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    place.adopt_slurm_task()
    assert front.world_size() == 4
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    assert [os.environ.pop(name) for name in names] == ["3", "1", "2", "localhost", "mine"]
    assert int(os.environ.pop("MASTER_PORT")) == place.job_port() + 3
    del os.environ["WORLD_SIZE"]
    monkeypatch.setenv("NNODES", "2")
    place.adopt_slurm_task()
    assert front.world_size() is None, "that is a front, which starts workers"


def test_processes_of_all_nodes(monkeypatch) -> None:
    given(monkeypatch, NNODES="3", NODE_RANK="0", MASTER_ADDR="a", NPROC="2")
    assert front.num_processes() == 6
    monkeypatch.delenv("NPROC")
    assert front.num_processes(needed=6) == 6
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert front.num_processes() == 24
    monkeypatch.delenv("NNODES")
    given(monkeypatch, SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_GPUS_PER_NODE="h100:4")
    assert front.num_processes() == 8


def test_dry_run_shows_what_would_be_started(monkeypatch, capsys) -> None:
    def must_not() -> None:
        raise AssertionError("something was prepared")

    def shown() -> str:
        assert front.launch("train", ["seed=1", "--dry-run"], front.num_processes(), must_not, None) == 0
        return capsys.readouterr().out

    given(monkeypatch, NPROC="2")
    assert "2 processes on this machine: " in shown()
    given(monkeypatch, NNODES="1:4", NODE_RANK="1", MASTER_ADDR="a:77")
    assert "node 1 of 1 to 4, which meet at a:77" in shown()
    monkeypatch.delenv("NNODES")
    given(monkeypatch, SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="n[1-2]")
    text = shown()
    assert text.startswith("NNODES=2 MASTER_ADDR=a:77 NPROC=2 srun --nodes=2 --ntasks=2 ")
    assert text.endswith("-m train train seed=1\n")


def test_launch_env_sets_variables_and_says_so(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "before")
    monkeypatch.setenv("SOME_OTHER", "before")
    (tmp_path / "launch.env").write_text("# for this cluster\nNCCL_DEBUG=WARN\n\nSOME_OTHER='a b'\n")
    front.load_environment([tmp_path / "nowhere", tmp_path])
    assert (os.environ["NCCL_DEBUG"], os.environ["SOME_OTHER"]) == ("WARN", "a b")
    assert capsys.readouterr().err.endswith("launch.env sets NCCL_DEBUG, SOME_OTHER\n")
    (tmp_path / "launch.env").write_text("export NCCL_DEBUG=WARN\n")
    with pytest.raises(ConfigError, match="has the line 'export NCCL_DEBUG=WARN'"):
        front.load_environment([tmp_path])


def test_a_machine_that_failed_twice_is_named_and_left_out(monkeypatch, tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "_ask", lambda *command, errors=False: asked.append(command) or "")
    given(monkeypatch, SLURM_JOB_ID="7")
    assert [failed.note(tmp_path, host) for host in ("a", "b")] == ["", ""] and not asked
    words = failed.note(tmp_path, "a")
    assert words.startswith("a has failed 2 times in this run") and words.endswith("this job leaves it out from now on")
    assert asked == [("scontrol", "update", "JobId=7", "ExcNodeList=a")]
    monkeypatch.setattr(slurm, "_ask", lambda *command, errors=False: "access denied")
    assert failed.note(tmp_path, "b").endswith("leave it out with sbatch --exclude=a,b")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert failed.note(tmp_path, "b").endswith("failed_nodes.txt)")


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(monkeypatch, tmp_path: Path, capsys) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "_ask", lambda *command, errors=False: asked.append(command) or "")
    given(monkeypatch, SLURM_JOB_ID="7", ENVIRONMENT="BATCH")
    for went_on in (False, False, True, False, False):
        slurm._requeue(tmp_path, went_on)
    assert asked == [("scontrol", "requeue", "7")] * 5
    slurm._requeue(tmp_path, False)
    assert len(asked) == 5
    assert "stopped 3 times without a newer checkpoint: not queued again" in capsys.readouterr().err
    monkeypatch.setenv("ENVIRONMENT", "")
    slurm._requeue(tmp_path, True)
    assert len(asked) == 5, "that is a shell of somebody's"


@pytest.fixture
def port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def roster(rank: int, port: int, least: int = 2, lost_s: float = LOST_S) -> Roster:
    return Roster(Nodes(least, 2, rank, "127.0.0.1", port), lambda: None, lost_s)


def on_two_nodes(port: int, first, second, least: int = 2, lost_s: float = LOST_S) -> None:
    """Runs two functions of a roster beside each other, as the fronts of two nodes would."""
    errors: list[BaseException] = []

    def other() -> None:
        made = roster(1, port, least, lost_s)
        try:
            second(made)
        except BaseException as error:
            errors.append(error)
        finally:
            made.leave()

    thread = threading.Thread(target=other)
    thread.start()
    made = roster(0, port, least, lost_s)
    try:
        first(made)
    finally:
        made.leave()
        thread.join(30)
    assert not errors, errors


def test_node_0_prepares_and_all_start_alike(port: int) -> None:
    done, attempts = [], []

    def front_of_a_node(made: Roster) -> None:
        made.together(lambda: done.append(made.nodes.rank))
        assert done == [0]
        attempts.append(attempt := made.next_attempt())
        assert made.end(attempt, 0, "") == (0, "")

    on_two_nodes(port, front_of_a_node, front_of_a_node)
    assert attempts[0] == attempts[1] and attempts[0].members == (0, 1)


def test_a_mistake_on_node_0_ends_the_others_with_it(port: int) -> None:
    def fails() -> None:
        raise ConfigError("data.corpus=x is empty")

    def first(made: Roster) -> None:
        with pytest.raises(ConfigError):
            made.together(fails)

    def second(made: Roster) -> None:
        with pytest.raises(NodeLost, match=r"node 0 ended: data.corpus=x is empty"):
            made.together(fails)

    on_two_nodes(port, first, second)


def test_the_node_that_failed_first_is_named_by_all(port: int) -> None:
    failed = threading.Event()

    def first(made: Roster) -> None:
        made.together(lambda: None)
        attempt = made.next_attempt()
        failed.wait(20)
        code, words = made.end(attempt, 1, "connection closed")
        assert code == 2 and words.startswith("node 1 (") and words.endswith("ended first: a bad shard")

    def second(made: Roster) -> None:
        made.together(lambda: None)
        attempt = made.next_attempt()
        threading.Timer(0.5, failed.set).start()
        assert made.end(attempt, 2, "a bad shard") == (2, "a bad shard")

    on_two_nodes(port, first, second)


def test_a_node_that_falls_silent_is_named_and_the_rest_go_on(port: int, capsys) -> None:
    silent = threading.Event()

    def first(made: Roster) -> None:
        made.together(lambda: None)
        assert made.next_attempt().members == (0, 1)
        silent.set()
        deadline = time.monotonic() + 20
        while not made.again and time.monotonic() < deadline:
            time.sleep(0.1)
        attempt = made.next_attempt()
        assert (attempt.number, attempt.members) == (1, (0,))
        assert made.end(attempt, 0, "") == (0, "")

    def second(made: Roster) -> None:
        made.together(lambda: None)
        made.next_attempt()
        silent.wait(20)
        made._ended = True  # as if it were switched off

    on_two_nodes(port, first, second, least=1, lost_s=2.0)
    assert "has given no sign of life for 2 s" in capsys.readouterr().out
