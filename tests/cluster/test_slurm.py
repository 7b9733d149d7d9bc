"""Jobs of a real Slurm on three virtual nodes: however one is stopped, it saves and goes on exactly."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import ROOT, Runs, small_corpus
from tests.cluster.slurm import Slurm, install, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PATIENCE = float(os.environ.get("CLUSTER_PATIENCE", 300))  # seconds for a job on a machine that is busy with others
STEPS = 60
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")  # NODE_FAIL is none: such a job is queued again


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    try:
        install()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Slurm cannot be installed: {error}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), nodes=("node1", "node2", "node3"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs with an undisturbed one, `whole`, on two processes of one machine."""
    root = tmp_path_factory.mktemp("runs")
    made = Runs(root / "runs", small_corpus(root))
    made.train("whole", f"run.steps={STEPS}", processes=2)
    return made


class Job:
    """A batch job that trains over two nodes, one process on each."""

    def __init__(
        self,
        slurm: Slurm,
        runs: Runs,
        name: str,
        *options: str,
        nodes: tuple[str, ...] = ("--nodes=2",),
        changes: tuple[str, ...] = (),
    ) -> None:
        self.slurm, self.runs, self.name = slurm, runs, name
        self.log = runs.directory / f"{name}.log"
        runs.directory.mkdir(exist_ok=True)
        given = [*nodes, "--mem=1000", "--export=ALL,NPROC=1,OMP_NUM_THREADS=1", f"--output={self.log}", *options]
        line = [*runs.line(name, f"run.steps={STEPS}"), *changes]
        self.number = slurm.submit(*given, str(ROOT / "launch.sh"), *line, cwd=ROOT)

    def reach(self, step: int) -> None:
        """Waits until so many steps are logged."""
        deadline = time.monotonic() + PATIENCE
        while self.runs.steps(self.name) < step:
            assert time.monotonic() < deadline and self.state() not in ENDS, self.text()
            time.sleep(0.1)

    def say(self, words: str) -> None:
        """Waits until the job has printed that."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.text():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.3)

    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "no log"

    def finish(self) -> int:
        """Waits for the end of the run; how often the job was started again."""
        found = self.slurm.wait(self.number, ENDS, PATIENCE)
        assert found["JobState"] == "COMPLETED", self.text()
        return int(found["Restarts"])


def test_sbatch_trains_over_two_nodes(slurm: Slurm, runs: Runs) -> None:
    job = Job(slurm, runs, "plain")
    assert job.finish() == 0
    assert runs.losses("plain") == runs.losses("whole")
    (logs,) = (path for path in (runs.directory / "plain" / "logs").iterdir() if path.is_dir())
    assert {file.name for file in logs.glob("*.out")} == {"rank_00000.out", "rank_00001.out"}
    assert len(re.findall(r"^step +1/", job.text(), re.MULTILINE)) == 1, "the console is the first process's alone"


@pytest.mark.parametrize("how", ["steps", "batch"])
def test_the_warning_signal_saves_and_queues_again(slurm: Slurm, runs: Runs, how: str) -> None:
    job = Job(slurm, runs, how, changes=("wandb.mode=offline",) if how == "batch" else ())
    job.reach(3)
    slurm.run("scancel", "--signal=USR1", *(["--batch"] if how == "batch" else []), job.number)
    assert job.finish() == 1, job.text()
    assert f"queueing job {job.number} again" in job.text() and "starting after step" in job.text()
    assert runs.losses(how) == runs.losses("whole")
    if how == "batch":
        starts = [path.name for path in (runs.directory / how / "wandb").glob("offline-run-*")]
        assert len(starts) == 2 and len({name.split("-")[-1] for name in starts}) == 1, "not one run of W&B's"


def test_a_recipe_of_two_nodes_wants_no_number_of_nodes_on_sbatch_s_line(
    slurm: Slurm, runs: Runs, tmp_path: Path
) -> None:
    recipe = tmp_path / "pair.yaml"
    recipe.write_text("defaults: [base, _self_]\nparallel:\n  world: 2\n")
    job = Job(slurm, runs, "pair", nodes=(), changes=("-cn", str(recipe), "run.steps=6"))
    assert job.finish() == 1
    assert slurm.job(job.number)["NumNodes"] == "2"
    assert f"parallel.world=2 needs 2 nodes, and job {job.number} has one: queueing it again on 2" in job.text()
    assert runs.losses("pair") == runs.losses("whole")[:6]


def test_a_sweep_is_an_array_whose_jobs_are_each_queued_again_alone(slurm: Slurm, runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(runs.corpus)
    options = ["--array=0-1", "--nodes=1", "--mem=1000", "--export=ALL,NPROC=2,OMP_NUM_THREADS=1"]
    options += [f"--output={tmp_path}/%a.log"]
    line = [*runs.line("sweep", f"run.steps={STEPS}"), "data.corpus=mine", "-m", "seed=1,1234"]
    array = slurm.submit(*options, str(ROOT / "launch.sh"), *line, cwd=tmp_path)
    slurm.wait(f"{array}_1", ("RUNNING",), PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while runs.steps("sweep_seed=1234") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slurm.run("scancel", "--signal=USR1", "--batch", f"{array}_1")
    assert slurm.wait(f"{array}_0", ENDS, PATIENCE)["Restarts"] == "0"
    found = slurm.wait(f"{array}_1", ENDS, PATIENCE)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "1.log").read_text()
    assert runs.losses("sweep_seed=1234") == runs.losses("whole")
    assert len(runs.losses("sweep_seed=1")) == STEPS


def test_requeue_saves_first(slurm: Slurm, runs: Runs) -> None:
    job = Job(slurm, runs, "requeue")
    job.reach(3)
    slurm.run("scontrol", "requeue", job.number)
    assert job.finish() == 1
    assert runs.losses("requeue") == runs.losses("whole")
    text = job.text()
    assert "saved" in text[: text.rindex("starting after step")], text


def test_a_node_that_goes_down_costs_the_steps_since_the_last_checkpoint(slurm: Slurm, runs: Runs) -> None:
    job = Job(slurm, runs, "down", changes=("run.save_every=5",))
    job.reach(7)
    slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    assert job.finish() == 1
    assert runs.losses("down") == runs.losses("whole")


def test_a_node_that_dies_a_second_time_is_named_and_left_out(slurm: Slurm, runs: Runs) -> None:
    (note := runs.directory / "dead" / "logs" / "failed_nodes.txt").parent.mkdir(parents=True)
    note.write_text("node2 2026-01-01 00:00:00\n")  # the first time
    job = Job(slurm, runs, "dead", changes=("run.save_every=5", "run.steps=1000000"))
    job.reach(7)
    slurm.switch_off("node2")
    try:
        job.say("node2 has failed 2 times in this run")
        slurm.wait_for_node("node2", "down", PATIENCE)
    finally:
        slurm.switch_on("node2")
    # Slurm has killed the job and queued it again; if it gets that node again, it queues itself again without it.
    job.reach(runs.steps("dead") + 3)
    slurm.run("scancel", "--signal=USR1", "--batch", job.number)
    job.say(f"queueing job {job.number} again, without node2")
    slurm.wait(job.number, ("PENDING", "RUNNING"), PATIENCE)
    assert slurm.job(job.number)["ExcNodeList"] == "node2"
    slurm.run("scancel", "--full", job.number)


def test_the_time_limit_saves_and_queues_again(slurm: Slurm, runs: Runs) -> None:
    # Slurm warns up to a minute early; the run is too long for its limit, and ended once it has gone on.
    job = Job(slurm, runs, "limit", "--time=3", "--signal=B:USR1@60", changes=("run.steps=1000000",))
    deadline = time.monotonic() + 2 * PATIENCE
    while job.text().count("starting after step") < 2 or len(runs.losses("limit")) < 4:
        assert time.monotonic() < deadline, job.text()
        time.sleep(1)
    slurm.run("scancel", "--full", job.number)
    first = runs.losses("limit")[:STEPS]
    assert len(first) > 3 and first == runs.losses("whole")[: len(first)]


def test_in_an_allocation_s_shell_the_line_spans_three_nodes(slurm: Slurm, runs: Runs) -> None:
    changes = ("batch.global=12", "run.steps=6")
    runs.train("three", *changes, processes=3)
    options = ["--nodes=3", "--ntasks-per-node=1", "--mem=1000"]
    slurm.environment |= {"NPROC": "1", "OMP_NUM_THREADS": "1"}
    slurm.run("salloc", *options, str(ROOT / "launch.sh"), *runs.line("salloc", *changes), cwd=ROOT)
    assert runs.losses("salloc") == runs.losses("three")


def test_the_users_own_srun_trains_alike(slurm: Slurm, runs: Runs) -> None:
    runs.train("four", "run.steps=6", processes=4)
    line = runs.line("srun", "run.steps=6")
    slurm.environment["OMP_NUM_THREADS"] = "1"
    slurm.run("srun", "-N2", "-n4", "--mem=1000", sys.executable, "-m", "train", *line, cwd=ROOT)
    assert runs.losses("srun") == runs.losses("four")


def test_a_mistake_under_the_users_own_srun_is_one_line(slurm: Slurm, runs: Runs, tmp_path: Path) -> None:
    command = ["srun", "-N2", "-n2", "--mem=1000", sys.executable, "-m", "train", *runs.line("bad", "batch.global=7")]
    done = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: batch.global=7")], done.stderr
    assert sum("batch.global=7" in line for line in done.stderr.splitlines()) == 1
