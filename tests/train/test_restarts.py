"""Real commands that are killed and go on: torchrun's own restarts, and a disk that is lost while copies lie on S3."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.data.test_s3 import bucket  # noqa: F401 (a fixture)
from tests.faults.runs import make_corpus
from tests.layout import ROOT

pytestmark = pytest.mark.slow

STEPS = 12
SMALL = [
    *(f"run.steps={STEPS}", "run.save_every=2", "run.log_every=1", "run.eval_samples=2", "run.eval_prompts=0"),
    *("data.seq_length=32", "batch.global=8", "batch.micro=2", "model.hidden_size=32", "model.experts=4"),
    *("model.pattern=GE*E", "wandb.mode=disabled", "optim.warmup_steps=2", "optim.min_lr=0.004"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus and an undisturbed run, `whole`."""
    path = tmp_path_factory.mktemp("restarts")
    make_corpus(path)
    assert _start(path, "whole").wait(300) == 0
    return path


def _start(root: Path, name: str, *changes: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*launcher, "-m", "train", "train", *SMALL, f"run.dir={root / 'runs'}", f"run.name={name}"]
    return subprocess.Popen(
        [sys.executable, *command, f"data.corpus={root / 'corpus'}", *changes],
        cwd=ROOT,
        env=os.environ | {"NPROC": "2", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _losses(root: Path, name: str) -> list[tuple[float, ...]]:
    lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[key] for key in ("step", "loss", "grad_norm")) for line in lines]


def test_torchrun_starts_the_workers_again_and_the_run_is_the_same(root: Path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    process = _start(root, "restarted", launcher=launcher)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("saved"):
            break
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    assert len(workers) == 1
    os.kill(workers[0].pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 0, rest
    starts = [line for line in [*said, *rest.splitlines()] if line.startswith("starting after step")]
    assert len(starts) == 2 and int(starts[1].split()[-1]) >= 2, rest
    assert _losses(root, "restarted") == _losses(root, "whole")


def test_a_run_whose_disk_is_lost_goes_on_from_its_copies_on_s3(root: Path, bucket: str):  # noqa: F811 (the fixture)
    mirror = f"run.mirror={bucket}/runs"
    process = _start(root, "lost", mirror, "run.steps=6")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"copied step_00000006 to {bucket}/runs" in said, said
    shutil.rmtree(root / "runs" / "lost")
    process = _start(root, "lost", mirror)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "fetched step 6 from run.mirror=" in said, said
    assert "starting after step 6" in said
    assert _losses(root, "lost") == _losses(root, "whole")[6:]
