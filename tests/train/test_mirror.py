"""Copies of checkpoints elsewhere: whole or not there, kept by the same rule, and what a run goes on from."""

import shutil
import time
from pathlib import Path

import pytest

from tests.data.test_s3 import bucket  # noqa: F401 (a fixture)
from train.job.mirror import Copier, Mirror, fetch_lost
from train.job.shelf import Shelf, why_broken, write_state
from train.settings.run import RunConfig


def _put(shelf: Shelf, step: int) -> Path:
    partial = shelf.prepare(step)
    for name in (".metadata", "__0_0.distcp"):
        (partial / name).write_bytes(f"{name} of {step}".encode() * 50)
    write_state(partial, step, {"samples": step}, {"world": 2})
    return shelf.publish(step)


def _finish(copier: Copier, newest: Path) -> None:
    while not copier.finish(newest):
        time.sleep(0.001)


def _copy_and_return(url: str, place: Path) -> None:
    """Six saves with their copies, a lost disk, and the newest one back from there."""
    run = RunConfig(name="mine", dir=str(place), mirror=url, keep=2, keep_every=3)
    shelf, mirror = Shelf(run.checkpoints), Mirror(f"{url}/mine")
    copier = Copier(run)
    for step in range(1, 7):
        path = _put(shelf, step)
        copier.start(step, path)
        _finish(copier, path)
        shelf.retire(run.keep, run.keep_every, spare=copier.step)
    assert mirror.steps() == shelf.steps() == [3, 5, 6]
    good = {file.name: file.read_bytes() for file in shelf.path(6).iterdir()}
    shutil.rmtree(place)
    assert fetch_lost(run, shelf) == shelf.path(6)
    assert shelf.steps() == [6]
    assert {file.name: file.read_bytes() for file in shelf.path(6).iterdir()} == good


@pytest.mark.parametrize("protocol", ["", "file://", "memory://"])
def test_a_lost_disk_is_made_good_from_the_copies(tmp_path, protocol: str, capsys):
    _copy_and_return(f"{protocol}{tmp_path}/copies", tmp_path / "runs")
    assert "fetched step 6 from run.mirror=" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_over_s3(bucket: str, tmp_path: Path):  # noqa: F811 (the fixture)
    _copy_and_return(f"{bucket}/copies", tmp_path / "runs")


def test_a_copy_that_was_killed_in_the_middle_or_damaged_is_not_used(tmp_path):
    run = RunConfig(name="mine", dir=str(tmp_path / "runs"), mirror=str(tmp_path / "copies"), keep=0)
    shelf, mirror = Shelf(run.checkpoints), Mirror(str(tmp_path / "copies" / "mine"))
    for step in (1, 2, 3):
        mirror.copy(_put(shelf, step))
    (tmp_path / "copies" / "mine" / "step_00000003" / "state.json").unlink()
    assert mirror.steps() == [1, 2]
    place = tmp_path / "copies" / "mine" / "step_00000002" / "__0_0.distcp"
    place.write_bytes(place.read_bytes().replace(b"2", b"3"))
    shutil.rmtree(tmp_path / "runs")
    fetch_lost(run, shelf)
    assert shelf.steps() == [1] and not why_broken(shelf.path(1), deep=True)
    mirror.retire(newest=2, keep=1, keep_every=0)
    assert mirror.steps() == [2]
    assert sorted(path.name for path in (tmp_path / "copies" / "mine").iterdir()) == ["step_00000002"]


def test_copies_of_steps_that_a_run_has_gone_back_behind_do_not_push_out_later_ones(tmp_path):
    run = RunConfig(name="mine", dir=str(tmp_path / "runs"), mirror=str(tmp_path / "copies"), keep=1)
    shelf, copier = Shelf(run.checkpoints), Copier(run)
    for step in (10, 30):
        copier.start(step, _put(shelf, step))
        _finish(copier, shelf.path(step))
    shelf.delete(30)
    copier.start(20, _put(shelf, 20))
    _finish(copier, shelf.path(20))
    assert Mirror(str(tmp_path / "copies" / "mine")).steps() == [20]


@pytest.mark.parametrize("protocol", ["", "file://", "memory://"])
def test_each_copy_reads_credentials_anew(tmp_path, protocol: str):
    one, other = (Mirror(f"{protocol}{tmp_path}") for _ in range(2))
    assert one.fs is not other.fs and one.root == other.root


def test_a_place_that_takes_nothing_is_told_and_costs_nothing_else(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    run = RunConfig(name="mine", dir=str(tmp_path / "runs"), mirror=str(tmp_path / "file"))
    copier = Copier(run)
    path = _put(Shelf(run.checkpoints), 1)
    copier.start(1, path)
    _finish(copier, path)
    assert f"WARNING: {path} was not copied to run.mirror={run.mirror}: " in capsys.readouterr().out
    assert Shelf(run.checkpoints).steps() == [1]
