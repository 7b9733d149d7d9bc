"""The dry run of the largest recipe at the sizes of clusters: quick, small, and right about what a rank holds."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from train.__main__ import run
from train.settings.run import USER_ERRORS

ROOT = Path(__file__).parents[2]
RECIPE = ["-cn", "qwen3_next_80b_a3b", "run.dry_run=true"]


def dry(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "train", "train", *RECIPE, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def gib(text: str, name: str) -> float:
    return float(re.search(rf"^  {name} +([\d,.]+) GiB", text, re.MULTILINE)[1].replace(",", ""))


@pytest.mark.parametrize(("world", "batch"), [(64, 1024), (512, 1024), (2048, 4096)])
def test_a_rank_of_any_world_in_seconds(world: int, batch: int) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = dry(f"parallel.world={world}", f"dry_run.rank={world - 1}", f"batch.global={batch}")
    assert result.returncode == 0, result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of computing, so that a busy machine does not count.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 60
    assert after.ru_maxrss * 1024 < 8e9  # the largest child so far
    text = result.stdout
    assert f"process {world - 1} of {world}: tensor 0, pipeline 0, context 0, data {world - 1}; experts part 63" in text
    # 1 / 64 of 50 x 512 experts (one layer is MTP's), everything else whole.
    assert "3,637,964,032 parameters" in text
    assert gib(text, "weights") == pytest.approx((3_637_964_032 * 2 + 52e6 * 2) / 2**30, rel=0.01)
    assert gib(text, "gradients") == pytest.approx(3_637_964_032 * 4 / 2**30, rel=1e-3)
    experts = 49 * 512 * 3 * 2048 * 512 / 64
    shared = experts * 12 / (world / 64) + (3_637_964_032 - experts) * 12 / world
    # The float32 parameters have no master copy: some 1 % of the rest.
    assert gib(text, "optimizer") == pytest.approx(shared / 2**30, rel=0.02)


def test_a_stage_of_a_pipeline() -> None:
    pattern = "model.pattern='" + "GEGEGE*E" * 6 + "|" + "GEGEGE*E" * 6 + "'"
    layout = ["parallel.world=64", "parallel.pipeline=2", "parallel.tensor=2", "parallel.expert=16", "model.repeats=1"]
    first, last = (dry(pattern, *layout, f"dry_run.rank={rank}") for rank in (0, 63))
    assert first.returncode == last.returncode == 0, first.stderr + last.stderr
    assert "tensor 1, pipeline 1, context 0, data 15; experts part 15 of 16" in last.stdout
    assert "pipeline: operations of each stage relative to an even share: 0.8" in first.stdout
    for text in (first.stdout, last.stdout):
        assert gib(text, "tensor gathers and scatters") > 1
        # 32 micro-batches of half of 2 x 4096 tokens, 2048 bfloat16 numbers each.
        assert gib(text, "pipeline sends") == 0.5
    # The first stage holds the activations of two micro-batches at once.
    assert gib(first.stdout, "activations") > 1.5 * gib(last.stdout, "activations") * 0.9


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["parallel.world=64", "dry_run.rank=64"], "dry_run.rank=64 is not one of 64 processes: choose 0 to 63"),
        (["parallel.world=48"], "parallel.expert=64 does not divide"),
        (["model.vocab_size=null"], "model.vocab_size=null takes the corpus's"),
        (["parallel.world=2048"], "batch.global=1024 is not a multiple of"),
    ],
)
def test_mistakes_are_refused_with_one_line(arguments: list[str], complaint: str) -> None:
    with pytest.raises(USER_ERRORS) as refusal:
        run(["train", *RECIPE, *arguments])
    assert str(refusal.value).startswith(complaint) and "\n" not in str(refusal.value)


def test_a_rank_without_a_dry_run_is_refused() -> None:
    with pytest.raises(USER_ERRORS, match=r"dry_run.rank=3 but run.dry_run=false"):
        run(["train", "dry_run.rank=3"])
