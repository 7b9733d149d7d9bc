"""Whoever reads a foreign checkpoint reads data: what its files say to run is not run, by none of our readers."""

import io
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from parallel import groups as process_groups
from parallel.checkpoint.stored import COMMON, StoredTensors
from parallel.checkpoint.unpickle import UnsafePickle, load_pickle, require_plain
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, build_tiny, start_engine, tiny_config
from tests.test_layout import SOURCES
from train.job.build import Job
from train.job.checkpoint import load, load_model, save, starting_point
from train.job.shelf import Shelf, write_state
from train.settings.run import RunConfig

MARK = "ran"  # the file that crafted code makes


class Crafted:
    """A pickle of this runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


class CraftedText(Crafted):
    """A pickle of this evaluates a text, which `eval` would be asked for by another module's name."""

    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


def _seal(checkpoint: Path) -> None:
    """Makes the hashes right again, as whoever crafts a checkpoint would."""
    for name in ("integrity.json", "state.json"):
        (checkpoint / name).unlink()
    write_state(checkpoint, 1, {"identity": {}}, {"world": 1})


def _put_in_contents(checkpoint: Path, mark: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Crafted(mark)))


def _put_into_contents(checkpoint: Path, mark: Path) -> None:
    """The table of contents is whole, and one of its values is not what it seems."""
    metadata: Metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = CraftedText(mark)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _put_into_objects(checkpoint: Path, mark: Path) -> None:
    """The bytes of what megatron-core keeps beside the tensors."""
    content = io.BytesIO()
    torch.save([Crafted(mark)], content)
    metadata: Metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (index,) = [index for index in metadata.storage_data if index.fqn == COMMON]
    place = metadata.storage_data[index]
    metadata.storage_data[MetadataIndex(COMMON, index.offset, index.index)] = replace(
        place, relative_path="objects.distcp", offset=0, length=len(content.getvalue())
    )
    (checkpoint / "objects.distcp").write_bytes(content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _put_beside(checkpoint: Path, mark: Path) -> None:
    """The pickle of an older format, which megatron-core reads first where it is there."""
    torch.save({"a": Crafted(mark)}, checkpoint / "common.pt")


CRAFTS = (_put_in_contents, _put_into_contents, _put_into_objects, _put_beside)


def _job(runs: Path) -> Job:
    run = RunConfig(name="mine", dir=str(runs))
    run.path.mkdir(exist_ok=True)
    return build_tiny(tiny_config(replace(MODEL, pattern="GE*E"), run=run))


def _complaint(reader, *args) -> str | None:
    try:
        reader(*args)
    except UnsafePickle as error:
        return str(error)
    return None


def _read_all(runs: Path) -> dict[str, dict[str, str | None]]:
    """What each of our readers says of each crafted checkpoint; resuming loads the optimizer too, the rest weights."""
    process_groups.start(torch.device("cpu"))
    job = _job(runs)
    engine = start_engine(job)
    engine.sharded_state_dict(is_loading=True)  # AdamW has its moments, as after a step
    save(job, engine, 1, {})
    path, good = Shelf(job.config.run.checkpoints).path(1), runs / "good"
    shutil.copytree(path, good)
    found = {}
    for craft in CRAFTS:
        shutil.rmtree(path)
        shutil.copytree(good, path)
        craft(path, runs / MARK)
        _seal(path)
        assert starting_point(job) == path, "its hashes are right"
        found[craft.__name__] = {
            "resume, fork": _complaint(load, engine, path),
            "evaluate, generate, run.init": _complaint(load_model, job, path),
            "export": _complaint(StoredTensors, path),
        }
    return found


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    (found,) = run_ranks(_read_all, 1, tmp_path)
    assert not (tmp_path / MARK).exists()
    for craft in ("_put_in_contents", "_put_into_contents"):
        for reader, complaint in found[craft].items():
            assert complaint and ".metadata was not read: it names" in complaint, reader
    # Weights alone lie in tensors; what reads objects too refuses them.
    assert "common_state" in found["_put_into_objects"]["resume, fork"]
    assert "common_state" in found["_put_into_objects"]["evaluate, generate, run.init"]
    assert found["_put_into_objects"]["export"] is None
    assert set(found["_put_beside"].values()) == {None}, "a file that no checkpoint has is not looked at"


def test_pytorchs_own_reader_would_run_it(tmp_path):
    """The patch of megatron-core's choice of a reader is still needed."""
    mark = tmp_path / MARK
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Crafted(mark)))
    with pytest.raises(AttributeError):
        FileSystemReader(tmp_path).read_metadata()
    assert mark.exists()


def test_only_the_names_of_a_table_of_contents_are_found():
    for allowed in (torch.Size([2, 3]), torch.bfloat16, MetadataIndex("a")):
        assert load_pickle(io.BytesIO(pickle.dumps(allowed)), "here") == allowed
    for named in (os.system, torch.load, eval, io.open, torch.nn.Linear):
        with pytest.raises(UnsafePickle, match="here was not read: it names"):
            load_pickle(io.BytesIO(pickle.dumps(named)), "here")
    with pytest.raises(UnsafePickle, match="here is damaged"):
        load_pickle(io.BytesIO(b"\x80\x04nonsense"), "here")


def test_a_table_of_contents_names_files_of_its_own_directory_alone(tmp_path):
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    metadata = Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo("../secret", 0, 1)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafePickle, match=r"names '\.\./secret', outside the checkpoint"):
        StoredTensors(tmp_path)


def test_the_bytes_of_an_object_hold_numbers_and_texts():
    for plain in ([{"step": 3}], [torch.ones(2)], ["text"]):
        content = io.BytesIO()
        torch.save(plain, content)
        assert require_plain(content, "here") is content
    content = io.BytesIO()
    torch.save([Crafted(Path("nowhere"))], content)
    with pytest.raises(UnsafePickle, match="here was not read"):
        require_plain(content, "here")


def test_no_other_source_unpickles_a_file():
    calls = ("pickle.load", "torch.load(", "dcp.load(", "dist_checkpointing.load(", "Unpickler(")
    own = {path.name for path in SOURCES if path.parent.name == "checkpoint" and path.parents[1].name == "parallel"}
    found = {path.name for path in SOURCES if any(call in path.read_text() for call in calls)}
    assert found <= own, f"{found - own} read pickles"
