"""Where a front stands, from variables; what it would start; the fronts of several nodes among each other."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train import front
from train.nodes import failed, place, slurm
from train.nodes.place import Nodes
from train.nodes.roster import LOST_S, NodeLost, Roster
from train.settings.tree import ConfigError

VARIABLES = ("ENVIRONMENT", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC", *place.WORKER_VARIABLES)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variables but those that a test sets, and SIGTERM as it was."""
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("SLURM"))]:
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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
    slurm.adopt_slurm_task()
    assert front.world_size() == 4
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    assert [os.environ.pop(name) for name in names] == ["3", "1", "2", "localhost", "mine"]
    assert int(os.environ.pop("MASTER_PORT")) == place.job_port() + 3
    del os.environ["WORLD_SIZE"]
    monkeypatch.setenv("NNODES", "2")
    slurm.adopt_slurm_task()
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
    given(monkeypatch, RANK="1")
    front.load_environment([tmp_path])
    assert capsys.readouterr().err == "", "each process has them, one says so"
    (tmp_path / "launch.env").write_text("export NCCL_DEBUG=WARN\n")
    with pytest.raises(ConfigError, match="has the line 'export NCCL_DEBUG=WARN'"):
        front.load_environment([tmp_path])


def test_a_recipe_s_variables_go_before_those_of_launch_env(monkeypatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    front.set_environment(("NCCL_DEBUG=INFO,COLL", "NCCL_IB_HCA=mlx5_0=1"))
    assert (os.environ["NCCL_DEBUG"], os.environ.pop("NCCL_IB_HCA")) == ("INFO,COLL", "mlx5_0=1")
    with pytest.raises(ConfigError, match=r"run\.environment has 'NCCL_DEBUG', which sets nothing: write NAME=VALUE"):
        front.set_environment(("NCCL_DEBUG",))
    with pytest.raises(ConfigError, match=r"run\.environment sets HF_TOKEN, and settings are written down: export it"):
        front.set_environment(("HF_TOKEN=hf_1234",))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of Slurm's commands in a batch job of the number 7. Nodes whose name has an x are down."""
    lines: list[str] = []

    def answer(*command: str, errors: bool = False) -> str:
        lines.append(" ".join(command))
        if command[:3] == ("scontrol", "show", "hostnames"):
            return command[3].replace(",", "\n")
        if command[:3] == ("scontrol", "show", "node"):
            return f"NodeName={command[3]}\n   State={'DOWN*+DRAIN' if 'x' in command[3] else 'IDLE'} ThreadsPerCore=1"
        return "   ReqNodeList=(null) ExcNodeList=(null)" if command[:3] == ("scontrol", "show", "job") else ""

    monkeypatch.setattr(slurm, "_ask", answer)
    given(monkeypatch, SLURM_JOB_ID="7", ENVIRONMENT="BATCH")
    yield lines


def changes(asked: list[str]) -> list[str]:
    """What was asked but only for information."""
    return [line for line in asked if " show " not in line]


def test_a_machine_that_failed_twice_is_named_and_left_out(asked, tmp_path: Path, capsys) -> None:
    assert [failed.note(tmp_path, host) for host in ("a", "b")] == ["", ""] and failed.too_often(tmp_path) == []
    assert failed.note(tmp_path, "a").startswith("a has failed 2 times in this run (")
    assert failed.too_often(tmp_path) == ["a"]
    assert slurm._requeue(tmp_path, went_on=True)
    assert changes(asked) == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=a"]
    assert "queueing job 7 again, without a: " in capsys.readouterr().err


def test_nodes_that_the_user_leaves_out_stay_out(asked, tmp_path: Path, monkeypatch) -> None:
    for _ in range(2):
        failed.note(tmp_path, "a")
    known = slurm._ask
    show = lambda *command, errors=False: known(*command, errors=errors).replace("ExcNodeList=(null)", "ExcNodeList=c")  # noqa: E731
    monkeypatch.setattr(slurm, "_ask", show)
    slurm._requeue(tmp_path, went_on=True)
    assert changes(asked)[-1] == "scontrol update JobId=7 ExcNodeList=a,c"


def test_a_node_that_took_the_job_with_it_is_noted_at_its_next_start(
    asked, tmp_path: Path, monkeypatch, capsys
) -> None:
    given(monkeypatch, SLURM_JOB_NODELIST="a,x1,b")
    assert slurm._note_start(tmp_path) == ["a", "x1", "b"]
    assert capsys.readouterr().err == "", "the first start has none before it"
    given(monkeypatch, SLURM_JOB_NODELIST="a,b,c")
    slurm._note_start(tmp_path)
    assert capsys.readouterr().err == "x1 went down under this job\n"
    given(monkeypatch, SLURM_JOB_NODELIST="a,x2")
    for _ in range(2):
        slurm._note_start(tmp_path)
    assert capsys.readouterr().err == "x2 went down under this job\n"
    failed.note(tmp_path, "x2")
    slurm._note_start(tmp_path)
    assert capsys.readouterr().err == "", "it was noted when it happened"
    given(monkeypatch, SLURM_JOB_NODELIST="a")
    slurm._note_start(tmp_path)
    assert capsys.readouterr().err == "", "nodes that are well are blamed for nothing"
    given(monkeypatch, SLURM_JOB_ID="8")
    slurm._note_start(tmp_path)
    assert failed._times(tmp_path) == {"x1": 1, "x2": 2}


def test_a_job_of_an_array_queues_itself_and_no_other(asked, monkeypatch, tmp_path: Path) -> None:
    given(monkeypatch, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")  # the last one has the array's number
    slurm._requeue(tmp_path, went_on=True)
    slurm.grow(2, 4, dry=False)
    assert asked == ["scontrol requeue 7_3", "scontrol requeue 7_3", "scontrol update JobId=7_3 NumNodes=2 NumTasks=2"]


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(asked, monkeypatch, tmp_path: Path, capsys) -> None:
    for went_on in (False, False, True, False, False):
        slurm._requeue(tmp_path, went_on)
    assert asked == ["scontrol requeue 7"] * 5
    slurm._requeue(tmp_path, False)
    assert len(asked) == 5
    assert "stopped 3 times without a newer checkpoint: not queued again" in capsys.readouterr().err
    monkeypatch.setenv("ENVIRONMENT", "")
    slurm._requeue(tmp_path, True)
    assert len(asked) == 5, "that is a shell of somebody's"


@pytest.mark.parametrize(
    ("variables", "processes", "world", "nodes"),
    [
        ({"NPROC": "8"}, 8, 64, 8),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4, 64, 16),
        ({"NPROC": "8"}, 8, 8, 0),
        ({"NPROC": "8"}, 8, None, 0),
        ({"NPROC": "8"}, 8, 12, 0),  # which the check of the layout will refuse
        ({"NPROC": "8", "SLURM_JOB_NUM_NODES": "2"}, 16, 64, 0),  # somebody has asked for two
        ({"NPROC": "8", "ENVIRONMENT": ""}, 8, 64, 0),  # salloc
        ({"NPROC": "8", "SLURM_STEP_ID": "0"}, 8, 64, 0),
    ],
)
def test_a_batch_job_of_one_node_takes_as_many_as_its_recipe_needs(
    asked, monkeypatch, variables: dict[str, str], processes: int, world: int | None, nodes: int
) -> None:
    given(monkeypatch, **variables)
    assert slurm.nodes_wanted(place.here(), processes, world) == nodes


def test_many_nodes_without_gpus_are_taken_only_where_nproc_asks_for_it(asked, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"parallel\.world=64 but the node of this job has no GPU: .*gpus-per-node"):
        slurm.nodes_wanted(place.here(), 2, 64)


def test_a_job_grows_by_going_back_into_the_queue(asked, monkeypatch, tmp_path: Path, capsys) -> None:
    assert slurm.grow(8, 64, dry=True) == 0 and changes(asked) == []
    line = "scontrol requeue 7 && scontrol update JobId=7 NumNodes=8 NumTasks=8"
    assert capsys.readouterr().out == f"parallel.world=64 needs 8 nodes, and job 7 has one: {line}\n"
    assert slurm.grow(8, 64, dry=False) == 75
    assert changes(asked) == line.split(" && ")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "Slurm's TERM must not come between the two"
    assert "queueing it again on 8 (sbatch -N 8 " in capsys.readouterr().err
    asked.clear()
    known = slurm._ask
    refuse = lambda *command, errors=False: known(*command, errors=errors) or "denied" * (command[1] == "update")  # noqa: E731
    monkeypatch.setattr(slurm, "_ask", refuse)
    assert slurm.grow(8, 64, dry=False) == 2
    assert changes(asked)[-1] == "scancel 7", "it would come back on one node for ever"
    assert "Slurm refuses: denied; submit the same line with sbatch -N 8" in capsys.readouterr().err
    for _ in range(2):
        failed.note(tmp_path, "a")
    assert slurm._requeue(tmp_path, went_on=True), "it is queued, if with that node"
    assert "Slurm refuses: denied; submit the same line again with sbatch --exclude=a" in capsys.readouterr().err
    asked.clear()
    monkeypatch.setattr(slurm, "_ask", lambda *command, errors=False: asked.append(" ".join(command)) or "disabled")
    assert slurm.grow(8, 64, dry=False) == 2
    assert asked == ["scontrol requeue 7"], "it was not queued, so nothing is to be cancelled"


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
