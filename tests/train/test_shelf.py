"""Checkpoints come and go by rule, whatever is killed in the middle, and a damaged one is never taken for whole."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from parallel.checkpoint import digest
from parallel.checkpoint.digest import HashedStream, digest_of
from train.job import shelf as module
from train.job.integrity import MANIFEST_FILE, faults, manifest, read_manifest
from train.job.shelf import Shelf, promised, read_state, why_broken, write_state

FILES = {"__0_0.distcp": 5000, "__1_0.distcp": 1_100_000, ".metadata": 700, "metadata.json": 60, "config.yaml": 900}
SMALL = {"__0_0.distcp": 500, ".metadata": 70}


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """No power is lost here, and waiting for the disk hundreds of times takes most of a minute."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it, nothing cleans up after it."""


def _put(shelf: Shelf, step: int, seed: int = 0, files: dict[str, int] = FILES) -> Path:
    """Saves a checkpoint of random bytes, as a job would."""
    partial = shelf.prepare(step)
    numbers = random.Random(seed + step)
    for name, size in files.items():
        (partial / name).write_bytes(numbers.randbytes(size))
    write_state(partial, step, {"samples": step}, {"world": 2})
    return shelf.publish(step)


def test_a_writers_hash_is_that_of_the_file(tmp_path):
    with (tmp_path / "file").open("wb") as raw:
        stream = HashedStream(raw)
        for part in (b"one", memoryview(b"two"), bytearray(b"three")):
            stream.write(part)
    assert stream.tell() == 11
    assert stream.digest == digest_of((tmp_path / "file").read_bytes())


def test_the_disk_begins_with_a_file_while_it_is_written(tmp_path, monkeypatch):
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(digest, "PIECE_BYTES", 100)
    monkeypatch.setattr(digest, "AHEAD_BYTES", 250)
    begin = digest.begin_sync

    def note(descriptor: int, first: int, size: int) -> None:
        assert os.fstat(descriptor).st_size >= first + size, "the disk can only begin with what is in the file"
        begun.append((first, size))
        assert begin(descriptor, first, size), "the order was refused"

    monkeypatch.setattr(digest, "begin_sync", note)
    content = random.Random(0).randbytes(1001)
    with (tmp_path / "file").open("wb") as raw:
        stream = HashedStream(raw)
        assert [stream.write(part) for part in (b"", content[:1], memoryview(content[1:]))] == [0, 1, 1000]
    assert begun == [(0, 301), (301, 300), (601, 300)]
    assert (tmp_path / "file").read_bytes() == content
    assert stream.digest == digest_of(content)


def test_a_hundred_flipped_bits_are_each_found(tmp_path):
    path = _put(Shelf(tmp_path), 1)
    assert why_broken(path, deep=True) == ""
    kinds = sorted(file.name for file in path.iterdir())
    assert kinds == sorted([*FILES, MANIFEST_FILE, "state.json"])
    for number in range(100):
        place, draw = path / kinds[number % len(kinds)], random.Random(number)
        good = place.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        place.write_bytes(bad)
        found = why_broken(path, deep=True)
        # A bit of `state.json` that makes it another step's, or another version's, is found by its hash.
        assert found and (place.name in found or place.name == MANIFEST_FILE or "state.json" in found), place.name
        if len(good) < 2**20:
            assert why_broken(path), f"{place.name} is small: looking at the checkpoint finds it"
        place.write_bytes(good)
    assert why_broken(path, deep=True) == ""


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE, "state.json"])
def test_a_truncated_empty_or_missing_file_is_found_without_reading_large_ones(tmp_path, name: str):
    shelf = Shelf(tmp_path)
    _put(shelf, 1)
    path = _put(shelf, 2)
    good = (path / name).read_bytes()
    for content in (good[: len(good) // 2], b"", None):
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content)
        assert shelf.newest() == shelf.path(1), content
        (path / name).write_bytes(good)
    assert shelf.newest() == path


def test_processes_share_out_the_reading(tmp_path):
    path = _put(Shelf(tmp_path), 1)
    large = path / "__1_0.distcp"
    large.write_bytes(bytes(FILES[large.name]))
    found = [faults(path, deep=True, part=part, parts=3) for part in range(3)]
    assert sorted(map(len, found)) == [0, 0, 1]
    assert faults(path) == [], "looking alone does not read a large file"


def test_the_manifest_is_megatron_cores(tmp_path):
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    path = _put(Shelf(tmp_path), 1)
    verify_integrity_manifest(str(path))
    (path / "config.yaml").write_text("other")
    with pytest.raises(CheckpointingException, match=r"config\.yaml"):
        verify_integrity_manifest(str(path))


def test_a_manifest_names_files_of_its_own_directory_alone(tmp_path):
    (tmp_path / MANIFEST_FILE).write_bytes(manifest({"../other": digest_of(b"")}))
    with pytest.raises(ValueError, match="not as it was written"):
        read_manifest(tmp_path)


def test_what_is_promised():
    steps = [10, 20, 30, 40, 50, 60]
    assert promised(steps, keep=2, keep_every=0) == {50, 60}
    assert promised(steps, keep=2, keep_every=30) == {30, 50, 60}
    assert promised(steps, keep=0, keep_every=30) == set(steps)
    assert promised([], keep=2, keep_every=30) == set()


def _save_all(shelf: Shelf, keep: int, keep_every: int) -> None:
    """Saves up to step 20 under a rule, as a run does them."""
    for step in range(shelf.steps()[-1] + 1 if shelf.steps() else 1, 21):
        _put(shelf, step, files=SMALL)
        shelf.retire(keep, keep_every)


def _mortal(patch: pytest.MonkeyPatch, kill: int) -> None:
    """Every rename, and every deletion of a directory before its last file, may be the last thing that happens."""
    left = [kill]
    rename, rmtree = Path.rename, shutil.rmtree

    def tick() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def mortal_rename(self: Path, target: Path) -> Path:
        tick()
        done = rename(self, target)
        tick()
        return done

    def mortal_rmtree(path: Path, ignore_errors: bool = False) -> None:
        files = sorted(Path(path).glob("*"))
        for file in files[: len(files) // 2]:
            file.unlink()
        if files:
            tick()
        rmtree(path, ignore_errors=ignore_errors)

    patch.setattr(Path, "rename", mortal_rename)
    patch.setattr(module.shutil, "rmtree", mortal_rmtree)


def test_after_twenty_saves_exactly_what_is_promised_lies_there(tmp_path):
    shelf = Shelf(tmp_path)
    _save_all(shelf, keep=3, keep_every=7)
    assert shelf.steps() == [7, 14, 18, 19, 20]
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("kill", range(1, 40, 2))
def test_also_when_killed_in_the_middle(tmp_path, kill: int):
    shelf = Shelf(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        _mortal(patch, kill)
        with pytest.raises(Killed):
            _save_all(shelf, keep=3, keep_every=7)
    newest = shelf.newest()
    assert newest is None or why_broken(newest, deep=True) == ""
    shelf.sweep()
    for step in shelf.steps():
        assert why_broken(shelf.path(step), deep=True) == "", step
    _save_all(shelf, keep=3, keep_every=7)
    assert shelf.steps() == [7, 14, 18, 19, 20]
    assert len(list(tmp_path.iterdir())) == 5, "something was left behind"


@pytest.mark.parametrize("kill", [1, 2, 3, 4])
def test_a_step_that_is_saved_again_is_never_lost(tmp_path, kill: int):
    shelf = Shelf(tmp_path)
    _put(shelf, 1)
    with pytest.MonkeyPatch.context() as patch:
        _mortal(patch, kill)
        with pytest.raises(Killed):
            _put(shelf, 1, seed=1)
    shelf.sweep()
    assert shelf.steps() == [1]
    assert why_broken(shelf.path(1), deep=True) == ""


def test_room_is_made_by_rule_and_never_of_the_last_one(tmp_path, monkeypatch, capsys):
    shelf = Shelf(tmp_path)
    for step in (10, 20, 30, 40):
        _put(shelf, step)
    shelf.set_aside(20)
    size = sum(file.stat().st_size for file in shelf.path(10).iterdir())
    free = [0]
    monkeypatch.setattr(Shelf, "free", lambda self: free[0])
    assert shelf.make_room(needed=2 * size + 1, keep_every=30) == 0
    assert shelf.steps() == [10, 30, 40] and not capsys.readouterr().err, "it would not have been enough"
    assert shelf.make_room(needed=2 * size, keep_every=30) == 0
    assert shelf.steps() == [30, 40]
    assert not list(tmp_path.glob("*.broken"))
    said = capsys.readouterr().err
    assert "lacks room for a checkpoint: deleted step_00000020.broken, step_00000010" in said
    free[0] = 2
    assert shelf.make_room(needed=1, keep_every=0) == 2
    assert shelf.steps() == [30, 40] and not capsys.readouterr().err


def test_a_damaged_checkpoint_is_set_aside_by_name(tmp_path):
    shelf = Shelf(tmp_path)
    _put(shelf, 1)
    aside = shelf.set_aside(1)
    assert aside.name == "step_00000001.broken"
    assert read_state(aside)["step"] == 1
    assert shelf.steps() == [] and shelf.newest() is None
    shelf.sweep()
    assert aside.is_dir()


def test_checkpoints_without_hashes_are_still_read(tmp_path):
    path = _put(Shelf(tmp_path), 1)
    (path / MANIFEST_FILE).unlink()
    (path / "state.json").write_text(json.dumps({"version": 2, "step": 1, "data": {}, "layout": {}}))
    assert why_broken(path) == ""
    (path / "state.json").write_text(json.dumps({"version": 3, "step": 1, "data": {}, "layout": {}}))
    assert MANIFEST_FILE in why_broken(path)
