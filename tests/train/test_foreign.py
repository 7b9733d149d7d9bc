"""Every command that reads a checkpoint of others, on one that says what to run: it is refused by name, and not run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from parallel import groups as process_groups
from tests.dist import run_ranks
from tests.faults.runs import make_corpus
from tests.parallel.test_unpickle import MARK, Crafted, _put_in_contents, _put_into_contents, _put_into_objects
from train.__main__ import run
from train.job.shelf import Shelf, read_state, write_state
from train.settings.run import USER_ERRORS

SMALL = [
    *("run.eval_samples=2", "run.eval_prompts=0", "run.log_every=1", "data.seq_length=32", "wandb.mode=disabled"),
    *("batch.global=4", "batch.micro=4", "model.hidden_size=32", "model.experts=4", "model.pattern=GE*E"),
]
CRAFTS: dict[str, Callable[[Path, Path], None]] = {
    "contents": _put_in_contents,
    "inside the contents": _put_into_contents,
    "objects": _put_into_objects,
}


def _train(runs: Path, *changes: str) -> list[str]:
    return ["train", *SMALL, f"run.dir={runs}", f"data.corpus={runs.parent / 'corpus'}", *changes]


def _commands(runs: Path) -> dict[str, list[str]]:
    used = ("run=mine", f"run.dir={runs}")
    return {
        "train": _train(runs, "run.name=mine", "run.steps=2"),
        "run.init": _train(runs, "run.name=child", "run.init=mine"),
        "run.fork": _train(runs, "run.name=branch", "run.fork=mine@1"),
        "evaluate": ["evaluate", *used, "samples=2", "draft=0"],
        "generate": ["generate", *used, "prompt=one", "tokens=2"],
        "export": ["export", *used, f"out={runs / 'exported'}"],
    }


def _said(arguments: list[str]) -> str:
    """What a command says of a mistake; nothing where it makes none."""
    try:
        assert run(arguments) == 0
    except USER_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if torch.distributed.is_initialized():  # a command that fails ends its process
            process_groups.stop()
    return ""


def _resealed(checkpoint: Path) -> None:
    """The hashes of a crafted checkpoint are right, as whoever crafts one would make them."""
    state = read_state(checkpoint)
    for name in ("integrity.json", "state.json"):
        (checkpoint / name).unlink()
    write_state(checkpoint, state["step"], state["data"], state["layout"])


def _try_all(runs: Path) -> dict[tuple[str, str], str]:
    """What each command says of each crafted checkpoint, and `import` of a pickle in place of safetensors."""
    found = {("whole", "train"): _said(_train(runs, "run.name=mine", "run.steps=1"))}
    found["whole", "export"] = _said(["export", "run=mine", f"run.dir={runs}", f"out={runs / 'hf'}"])
    checkpoint = Shelf(runs / "mine" / "checkpoints").path(1)
    shutil.copytree(checkpoint, runs / "good")
    for name, craft in CRAFTS.items():
        shutil.rmtree(checkpoint)
        shutil.copytree(runs / "good", checkpoint)
        craft(checkpoint, runs / MARK)
        _resealed(checkpoint)
        commands = _commands(runs) if name == "contents" else {"train": _commands(runs)["train"]}
        found |= {(name, command): _said(arguments) for command, arguments in commands.items()}
    foreign = runs / "hf"
    torch.save({"a": Crafted(runs / MARK)}, foreign / "pytorch_model.bin")
    (foreign / ".metadata").write_bytes((runs / "mine" / "checkpoints" / "step_00000001" / ".metadata").read_bytes())
    bring = ["import", f"hf={foreign}", f"run.dir={runs}"]
    found["beside safetensors", "import"] = _said([*bring, "run=beside"])
    for file in (*foreign.glob("*.safetensors"), *foreign.glob("*.safetensors.index.json")):
        file.unlink()
    found["pickle", "import"] = _said([*bring, "run=pickle"])
    return found


def test_no_command_runs_what_a_checkpoint_says(tmp_path: Path):
    make_corpus(tmp_path)
    (tmp_path / "runs").mkdir()
    (found,) = run_ranks(_try_all, 1, tmp_path / "runs")
    assert not (tmp_path / "runs" / MARK).exists()
    whole = {key: found.pop(key) for key in [("whole", "train"), ("whole", "export"), ("beside safetensors", "import")]}
    assert set(whole.values()) == {""}
    assert "safetensors" in found.pop(("pickle", "import"))
    assert len(found) == 8
    for (craft, command), said in found.items():
        assert said.startswith("UnsafePickle: ") and " was not read" in said, f"{command}, {craft}: {said!r}"
