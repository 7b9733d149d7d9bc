"""Training over two hosts, started by hand on each; what a cable that is cut leads to."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, two_hosts, why_not
from tests.cluster.runs import ROOT, Runs, small_corpus
from train.nodes.roster import LOST_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PATIENCE = float(os.environ.get("CLUSTER_PATIENCE", 300))
STEPS = 60


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs with an undisturbed one, `whole`, on two processes of one machine."""
    root = tmp_path_factory.mktemp("runs")
    made = Runs(root / "runs", small_corpus(root))
    made.train("whole", f"run.steps={STEPS}", processes=2)
    return made


def start(hosts: Hosts, line: list[str], nodes: str = "2") -> list[subprocess.Popen]:
    """The same line on both hosts."""
    started = []
    for host in (0, 1):
        variables = {"NNODES": nodes, "NODE_RANK": str(host), "MASTER_ADDR": hosts.addresses[0]}
        variables |= {"NPROC": "1", "OMP_NUM_THREADS": "1"}
        command = hosts.command(host, sys.executable, "-m", "train", *line)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, **pipes))
    return started


def ends(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit codes and outputs."""
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def reach(runs: Runs, name: str, step: int) -> None:
    """Waits until so many steps are logged."""
    deadline = time.monotonic() + PATIENCE
    while runs.steps(name) < step:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_cut_cable_ends_both_sides_and_the_same_lines_go_on_exactly(hosts: Hosts, runs: Runs) -> None:
    line = runs.line("cut", f"run.steps={STEPS}", "run.save_every=5")
    started = start(hosts, line)
    reach(runs, "cut", 7)
    hosts.cut()
    begin = time.monotonic()
    try:
        (code0, output0), (code1, output1) = ends(started)
    finally:
        hosts.mend()
    assert time.monotonic() - begin < LOST_S + 30
    assert (code0, code1) == (75, 75), output0 + output1
    assert re.search(r"error: node 1 \(.*\) has given no sign of life", output0), output0
    assert f"has heard nothing of node 0 at {hosts.addresses[0]}" in output1, output1
    (code0, output0), (code1, output1) = ends(start(hosts, line))
    assert (code0, code1) == (0, 0), output0 + output1
    assert "starting after step" in output0 and "step " not in output1
    assert runs.losses("cut") == runs.losses("whole")


def test_with_1_to_2_nodes_the_one_that_is_left_goes_on_alone(hosts: Hosts, runs: Runs) -> None:
    line = runs.line("alone", f"run.steps={STEPS}", "run.save_every=5")
    started = start(hosts, line, nodes="1:2")
    reach(runs, "alone", 7)
    hosts.cut()
    try:
        (code0, output0), (code1, output1) = ends(started)
    finally:
        hosts.mend()
    assert (code0, code1) == (0, 75), output0 + output1
    assert "going on with 1 of at most 2 nodes" in output0 and "going on with another layout" in output0
    # Exactly what one process makes of that checkpoint: the same tokens in the same order.
    step = re.findall(r"starting after step (\d+)", output0)[-1]
    runs.train("reference", f"run.steps={step}", processes=2)
    runs.train("reference", f"run.steps={STEPS}", processes=1)
    assert runs.losses("alone") == runs.losses("reference")


def test_the_users_own_torchrun_trains_alike(runs: Runs, tmp_path: Path) -> None:
    line = runs.line("torchrun", "run.steps=6")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29677"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "train", *line]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    assert [code for code, _ in ends(started)] == [0, 0]
    assert runs.losses("torchrun") == runs.losses("whole")[:6]
