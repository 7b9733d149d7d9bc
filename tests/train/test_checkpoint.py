"""Checkpoints: a resumed run is the run that never stopped, and the weights load on any layout."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.batch import MicroBatch, count_targets
from model.config import BalanceConfig, ModelConfig
from model.init import WIDE
from parallel import groups as process_groups
from parallel.checkpoint.saving import SaveError
from parallel.checkpoint.stored import StoredTensors
from parallel.stages import run_schedule
from parallel.topology import ParallelConfig, Topology
from tests.dist import run_ranks
from tests.parallel.tiny import (
    INTERLEAVED,
    MODEL,
    PIPELINED,
    VOCAB,
    build_tiny,
    fill,
    leave_layout,
    parameters,
    part_of,
    random_batch,
    start_engine,
    tiny_config,
)
from train.job import directory, shelf
from train.job.build import Job, build_engine
from train.job.checkpoint import load, load_model, save
from train.job.directory import require_same_data, steps_done
from train.job.footprint import checkpoint_bytes
from train.job.shelf import Shelf, read_state, write_state
from train.loop import train_step
from train.observe import step_metrics
from train.settings.run import BatchConfig, Config, RunConfig, save_config
from train.settings.tree import ConfigError
from train.watch.metrics import GRAD_NORM

HALF, STEPS, ROWS, MICRO_BATCHES = 3, 6, 4, 2
DATA = {"identity": {"seed": 1, "data.seq_length": 64}, "samples": HALF * ROWS, "sources": {}}
BFLOAT16 = "DP2 in bfloat16"
# Name -> layout and model. bfloat16 also has float32 parameters, whose optimizer state lies apart.
CASES: dict[str, tuple[ParallelConfig, ModelConfig]] = {
    "EP2": (ParallelConfig(expert=2), MODEL),
    BFLOAT16: (ParallelConfig(expert=1), replace(MODEL, dtype="bfloat16")),
    "TP2": (ParallelConfig(tensor=2), MODEL),
    "PP2": (ParallelConfig(pipeline=2), PIPELINED),
    "PP2, interleaved": (ParallelConfig(pipeline=2), INTERLEAVED),
}


def _job(name: str, runs: Path, parallel: ParallelConfig | None = None, model: ModelConfig | None = None) -> Job:
    leave_layout()
    layout, shape = CASES[name]
    run = RunConfig(name=name, dir=str(runs))
    run.path.mkdir(exist_ok=True)
    balance = BalanceConfig(weight=0.01, z_weight=0.001, bias_rate=0.01 if name == BFLOAT16 else 0.0)
    job = build_tiny(tiny_config(model or shape, parallel or layout, run=run, balance=balance))
    batch = BatchConfig(global_=ROWS, micro=ROWS // job.topology.data // MICRO_BATCHES)
    return replace(job, config=replace(job.config, batch=batch))


def _train(job: Job, engine, first: int, last: int) -> list[dict[str, float]]:
    values = []
    for step in range(first, last + 1):
        own = part_of(random_batch(ROWS, step), job.groups.dp.rank(), job.topology.data)
        batches = [part_of(own, index, MICRO_BATCHES) for index in range(MICRO_BATCHES)]
        outputs, grad_norm = train_step(job, engine, batches, 1e-3 * step)
        values.append(step_metrics(job, outputs) | {GRAD_NORM: grad_norm})
    return values


def _weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters(job).items()}


def _wide(job: Job) -> dict[str, torch.Tensor]:
    """What stays wide in a bfloat16 model, by name."""
    (network,) = job.chunks
    named = (*network.named_parameters(), *network.named_buffers())
    return {name: x.detach().clone() for name, x in named if name.endswith(tuple(WIDE))}


def _refusal(runs: Path) -> str:
    """What a run says whose model something has made bfloat16 throughout."""
    job = _job(BFLOAT16, runs)
    fill(job)[0].bfloat16()
    with pytest.raises(RuntimeError) as caught:
        build_engine(job)
    return str(caught.value)


@torch.no_grad()
def _predictions(job: Job) -> dict[str, torch.Tensor]:
    """Cross-entropy of every token at every prediction step, and the logits of the next token where they are whole."""
    batch = random_batch(ROWS, seed=99)
    counts = count_targets(batch.documents, job.config.mtp.steps)
    parts = [part_of(batch, index, MICRO_BATCHES) for index in range(MICRO_BATCHES)]
    ready = [MicroBatch.build(part.tokens, part.documents, counts) for part in parts]
    outputs = run_schedule(job.chunks, ready, parts[0].documents[:, 1:].numel(), forward_only=True)
    found = {"losses": torch.cat([losses.tokens_KT for losses in outputs], dim=1)} if outputs else {}
    if job.topology.tensor == job.topology.pipeline == 1:
        found["logits"] = job.chunks[0].logits(job.chunks[0].predictions(ready[0])[0])
    return found


def _straight_and_save(runs: Path) -> dict:
    """For each case the metrics and the last weights of six steps; then three steps again, and a checkpoint."""
    process_groups.start(torch.device("cpu"))
    found = {}
    for name in CASES:
        job = _job(name, runs)
        found[name] = _train(job, start_engine(job), 1, STEPS), _weights(job)
        job = _job(name, runs)
        engine = start_engine(job)
        _train(job, engine, 1, HALF)
        for _ in range(2):  # the second replaces the first
            save(job, engine, HALF, DATA)
        if name == BFLOAT16:
            found["wide"] = _wide(job)
    return found | {"full disk": _save_on_a_full_disk(job, engine)}


def _save_on_a_full_disk(job: Job, engine) -> str:
    """What is said of the same checkpoint where a byte of room is missing, on each process."""
    free = checkpoint_bytes(job.config, job.vocab_size) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        with pytest.raises(SaveError) as refusal:
            save(job, engine, HALF + 1, DATA)
    return str(refusal.value)


def _resume(runs: Path) -> dict:
    """Each case from its checkpoint: what it predicts, and metrics and last weights of the steps that were left."""
    process_groups.start(torch.device("cpu"))
    found = {}
    for name in CASES:
        job = _job(name, runs)
        engine = start_engine(job)
        load(engine, Shelf(job.config.run.checkpoints).path(HALF))
        if name == BFLOAT16:
            found["wide"] = _wide(job)
        predictions = _predictions(job)
        found[name] = _train(job, engine, HALF + 1, STEPS), _weights(job), predictions
    return found | {"settings": _settings_after_loading(runs), "refusal": _refusal(runs)}


def _settings_after_loading(runs: Path) -> set[tuple]:
    """Weight decay, betas and eps of the optimizer's groups in a run that goes on with other settings."""
    job = _job("EP2", runs)
    optim = replace(job.config.optim, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    engine = start_engine(replace(job, config=replace(job.config, optim=optim)))
    load(engine, Shelf(job.config.run.checkpoints).path(HALF))
    return {(group["weight_decay"], group["betas"], group["eps"]) for group in engine.optimizer.param_groups}


def _load_alone(runs: Path) -> dict:
    process_groups.start(torch.device("cpu"))
    found = {}
    for name, (_, model) in CASES.items():
        job = _job(name, runs, ParallelConfig(), replace(model, pattern=model.layers))
        load_model(job, Shelf(job.config.run.checkpoints).path(HALF))
        found[name] = _predictions(job)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(runs) -> list[dict]:
    return run_ranks(_straight_and_save, 2, runs, timeout=300)


@pytest.fixture(scope="module")
def resumed(straight, runs) -> list[dict]:
    return run_ranks(_resume, 2, runs, timeout=300)


@pytest.fixture(scope="module")
def alone(straight, runs) -> dict:
    return run_ranks(_load_alone, 1, runs, timeout=300)[0]


@pytest.mark.parametrize("name", CASES)
def test_resuming_is_bit_for_bit(straight, resumed, name: str):
    for before, after in zip(straight, resumed, strict=True):
        metrics, weights = before[name]
        assert after[name][0] == metrics[HALF:]
        assert len({step[GRAD_NORM] for step in metrics}) == STEPS
        assert weights.keys() == after[name][1].keys()
        for parameter, value in weights.items():
            assert torch.equal(after[name][1][parameter], value), parameter


def test_what_must_stay_wide_does_and_comes_back_bit_for_bit(straight, resumed):
    """In a bfloat16 model: routers, their counts, bias and what they learnt of them, and decay rates."""
    types = {name: types[0] for name, types in WIDE.items()}
    for before, after in zip(straight, resumed, strict=True):
        saved, loaded = before["wide"], after["wide"]
        assert saved.keys() == loaded.keys()
        assert {ending for name in saved for ending in types if name.endswith(ending)} == types.keys()
        for name, value in saved.items():
            assert value.dtype == next(kind for ending, kind in types.items() if name.endswith(ending)), name
            assert value.any(), f"{name} is all zero, as it was before training"
            assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


def test_a_model_made_narrow_is_refused(resumed):
    for rank in resumed:
        assert rank["refusal"].startswith("the engine changed types that training relies on: ")
        for name in ("router.weight is bfloat16, not float32", "A_log is bfloat16", "balance.bias is bfloat16"):
            assert name in rank["refusal"]


@pytest.mark.parametrize("name", CASES)
def test_one_process_reads_the_weights_of_two(resumed, alone, name: str):
    compared = set()
    for rank in resumed:
        for kind, expected in rank[name][2].items():
            compared.add(kind)
            # The weights are the same numbers; sums over experts, heads and ranks are taken in another order, which
            # moves values of size 5 by a few roundings of float32 (2.4e-7 each) or of bfloat16 (0.016 each).
            tolerance = 0.1 if name == BFLOAT16 else 1e-5
            torch.testing.assert_close(alone[name][kind], expected, rtol=0.0, atol=tolerance)
    assert compared == ({"losses", "logits"} if name in ("EP2", BFLOAT16) else {"losses"})


def test_a_run_goes_on_with_the_settings_it_is_given(resumed):
    for rank in resumed:
        assert rank["settings"] == {(0.3, (0.8, 0.9), 1e-6), (0.0, (0.8, 0.9), 1e-6)}


def test_a_checkpoint_that_says_nothing_of_domains_is_no_other_layout(monkeypatch):
    topology = Topology(world=2, tensor=1, pipeline=1, context=1, expert=1, data=2, nvlink_domain=2)
    before = {key: size for key, size in vars(topology).items() if key != "nvlink_domain"} | {"expert": 2}
    monkeypatch.setattr(directory, "starting_checkpoint", lambda run: run.path)
    monkeypatch.setattr(directory, "read_state", lambda path: {"layout": before})
    assert directory.layout_change(Config(), topology) == "going on with another layout: expert 1 (was 2)"


def test_the_directory_of_a_checkpoint(straight, runs):
    kept = Shelf(runs / "EP2" / "checkpoints")
    path = kept.path(HALF)
    assert path == runs / "EP2" / "checkpoints" / "step_00000003"
    assert kept.newest() == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "a partial checkpoint was left behind"
    layout = {
        "world": 2,
        "tensor": 1,
        "pipeline": 1,
        "context": 1,
        "expert": 2,
        "data": 2,
        "virtual": 1,
        "expert_tensor": 1,
        "nvlink_domain": 2,
    }
    assert read_state(path) == {"version": 3, "step": HALF, "data": DATA, "layout": layout}


def test_a_checkpoint_is_as_large_as_is_asked_for_ahead(straight, runs):
    for name, (layout, model) in CASES.items():
        stored = StoredTensors(Shelf(runs / name / "checkpoints").path(HALF))
        sizes = {name: math.prod(shape) * stored.dtypes[name].itemsize for name, shape in stored.shapes.items()}
        written = sum(size for name, size in sizes.items() if ".balance." not in name)  # what routers remember is small
        expected = checkpoint_bytes(tiny_config(model, layout), VOCAB)
        # Beside it lies padding; on the last of two pipeline stages a copy of the embedding.
        assert expected <= written < expected * (1.04 if layout.pipeline > 1 or layout.tensor > 1 else 1.002), name


def test_a_full_disk_is_told_on_every_process_and_costs_no_checkpoint(straight, runs):
    for rank in straight:
        assert re.fullmatch(r"\S+ GB are free, and a checkpoint takes \S+ GB", rank["full disk"])
    assert Shelf(runs / list(CASES)[-1] / "checkpoints").steps() == [HALF]


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"step": HALF, "data": DATA, "layout": {}}))
    require_same_data(tmp_path, {"seed": 1, "data.seq_length": 64}, on_change="stop")
    for changed, name in (
        ({"seed": 1, "data.seq_length": 32}, r"data\.seq_length \(was 64, is 32\): set"),
        ({"seed": 2, "data.seq_length": 64}, r"seed \(was 1, is 2\): set"),
        (
            {"seed": 1, "data.seq_length": 64, "data.corpus": "a" * 64},
            r"data\.corpus \(was unset, is aaaaaaaaaaaa\.\.\.\)",
        ),
    ):
        with pytest.raises(ConfigError, match=name + r".*data\.on_change=continue"):
            require_same_data(tmp_path, changed, on_change="stop")
        require_same_data(tmp_path, changed, on_change="continue")


@pytest.fixture
def begun(tmp_path):
    """Settings of a run that has done three steps in two pipeline stages."""
    config = tiny_config(PIPELINED, ParallelConfig(pipeline=2), run=RunConfig(name="begun", dir=str(tmp_path)))
    path = Shelf(config.run.checkpoints).path(HALF)
    path.mkdir(parents=True)
    save_config(config)
    write_state(path, HALF, DATA, {"world": 2})
    return config


def test_a_run_may_go_on_in_other_pipeline_stages_but_not_with_another_model(begun):
    assert steps_done(begun) == HALF
    assert steps_done(replace(begun, model=replace(MODEL, pattern="GEGEGE*E"), parallel=ParallelConfig())) == HALF
    with pytest.raises(ConfigError, match=r"model\.pattern=GE\*E \(was GEGE\|GE\*E\)"):
        steps_done(replace(begun, model=replace(MODEL, pattern="GE*E")))


def test_a_checkpoint_of_an_earlier_version_says_how_to_go_on(begun):
    state = {"step": HALF, "fingerprint": "abc", "layout": {"world": 2}}
    path = Shelf(begun.run.checkpoints).path(HALF)
    (path / "integrity.json").unlink()
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"format 1, .* resumes format 3: .* run\.init=begun"):
        steps_done(begun)
