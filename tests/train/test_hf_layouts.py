"""Weights that travel: saved from TP2, EP2 and PP2, read by transformers, and trained on from its own checkpoints.

One call of two processes does all that needs a model of ours on a layout; the rest happens before and after it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3NextForCausalLM

from model.batch import MicroBatch, count_targets
from model.config import ModelConfig, MtpConfig
from model.network import LanguageModel
from parallel import groups as process_groups
from parallel.checkpoint.saving import BackgroundSaver
from parallel.engine_megatron import MegatronEngine
from parallel.stages import sharded_weights
from parallel.topology import ParallelConfig, resolve
from tests.dist import run_ranks
from tests.model import hf as as_theirs
from tests.parallel.tiny import leave_layout, tiny_config
from tests.train.hf_runs import (
    SHAPE,
    VOCAB,
    add_checkpoint,
    export_run,
    import_as,
    make_corpus,
    make_run,
    read_all,
    telling,
)
from train.job.build import Job, build_chunks
from train.job.checkpoint import load_model
from train.job.optim import adamw, decays
from train.job.shelf import Shelf, write_state
from train.settings.optim import OptimConfig
from train.settings.run import RunReference, load_config

TOKENS = 512
LAYOUTS = {
    "TP2": (ParallelConfig(tensor=2), SHAPE),
    "EP2": (ParallelConfig(expert=2), SHAPE),
    "PP2": (ParallelConfig(pipeline=2), replace(SHAPE, pattern="GEGE|GE*E")),
}
# Summed in float32 in other orders through eight layers and their norms: 1e-6 a module; a wrong weight shows as 0.1.
LOGITS, LOSS = 1e-4, 1e-5


def tokens() -> Tensor:
    """One sequence and the token after it."""
    return torch.randint(VOCAB, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))


def micro_batch(mtp: int) -> MicroBatch:
    documents = torch.zeros_like(tokens())
    return MicroBatch.build(tokens(), documents, count_targets(documents, mtp))


def job_on(parallel: ParallelConfig, shape: ModelConfig, checkpoint: Path, mtp: int) -> Job:
    """A job on a layout with the weights of a checkpoint."""
    leave_layout()
    config = tiny_config(shape, parallel, mtp=MtpConfig(steps=mtp))
    topology = resolve(parallel, shape, dist.get_world_size())
    groups = process_groups.lay_out(topology)
    job = Job(config, topology, groups, torch.device("cpu"), None, build_chunks(config, topology, groups, VOCAB))
    load_model(job, checkpoint)
    return job


@torch.no_grad()
def logits_of(network: LanguageModel) -> Tensor:
    return network.logits(network.trunk_of(micro_batch(0)))


def travel(telling_checkpoint: Path, runs: Path, imported: list[Path]) -> dict[str, Tensor]:
    """On each process: saves the telling weights from each layout; logits; the loss of a first step."""
    process_groups.start(torch.device("cpu"))
    results = {}
    for name, (parallel, shape) in LAYOUTS.items():
        job = job_on(parallel, shape, telling_checkpoint, mtp=1)
        path = Shelf(runs / name / "checkpoints").path(1)
        saver = BackgroundSaver(job.groups.dp_cp)
        saver.start(sharded_weights(job.chunks, {"dp_cp_group": job.groups.dp_cp}), path, lambda digests: None)
        saver.wait()
        if name == "TP2":
            results["ours"] = logits_of(job.chunks[0])
    for (name, (parallel, shape)), path in zip(list(LAYOUTS.items())[:2], imported, strict=True):
        job = job_on(parallel, shape, path, mtp=0)
        results[f"theirs on {name}"] = logits_of(job.chunks[0])
        engine = MegatronEngine(job.chunks, job.groups, adamw(OptimConfig()), job.device, decays)
        # Data-parallel processes read the same sequence, each with the weight of the whole batch.
        (losses,), _ = engine.train_step([micro_batch(0)], TOKENS, 1e-3)
        results[f"loss on {name}"] = losses.by_step[0]
    return {name: tensor.tolist() for name, tensor in results.items()}


def random_theirs() -> Qwen3NextForCausalLM:
    """A model of transformers', with weights that make every part count."""
    torch.manual_seed(1)
    model = Qwen3NextForCausalLM(as_theirs.config(SHAPE, VOCAB)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif parameter.dim() > 1 and "embed" not in name:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
            else:  # embeddings; decays of long and of short memory
                parameter.copy_(torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def travelled(tmp_path_factory) -> Iterator[tuple[Path, dict[str, Tensor], Qwen3NextForCausalLM]]:
    """Where all runs are, what a process found, and the model of transformers' that was imported."""
    place = tmp_path_factory.mktemp("travel")
    theirs, corpus = random_theirs(), make_corpus(place)
    imported = []
    for name, original in (("separate", True), ("stacked", False)):
        theirs.save_pretrained(place / name, save_original_format=original)
        imported.append(Shelf(import_as(place / name, place / "runs", f"theirs-{name}") / "checkpoints").path(0))
    source = add_checkpoint(make_run(place / "runs", "telling", SHAPE, corpus).run.path, telling(SHAPE))
    for name, (_, shape) in LAYOUTS.items():
        run = make_run(place / "runs", name, shape, corpus)
        Shelf(run.run.checkpoints).path(1).mkdir(parents=True)
    found = run_ranks(travel, 2, source, place / "runs", imported, timeout=300)[0]
    for name in LAYOUTS:
        write_state(Shelf(place / "runs" / name / "checkpoints").path(1), 1, {}, {})
    yield place, {name: torch.tensor(values) for name, values in found.items()}, theirs


@torch.no_grad()
def test_both_layouts_of_experts_were_written_by_transformers(travelled) -> None:
    place, *_ = travelled
    names = {name: (place / name / "model.safetensors").read_bytes()[:200_000] for name in ("separate", "stacked")}
    assert b"experts.7.up_proj.weight" in names["separate"] and b"experts.gate_up_proj" not in names["separate"]
    assert b"experts.gate_up_proj" in names["stacked"] and b"experts.7.up_proj" not in names["stacked"]


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_exports_what_transformers_reads(travelled, name: str) -> None:
    place, found, _ = travelled
    run, experts = load_config(RunReference(name, str(place / "runs"))), "stacked" if name == "EP2" else "separate"
    out = export_run(run, place / f"out-{name}", experts=experts)
    back = read_all(Shelf(import_as(out, place / "runs", f"back-{name}") / "checkpoints").path(0))
    expected = telling(SHAPE)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in expected.items())
    model, loading = Qwen3NextForCausalLM.from_pretrained(
        out, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    logits = model(tokens()[:, :-1]).logits[0]
    assert logits.std() >= 1
    assert (logits - found["ours"]).abs().max() <= LOGITS


@torch.no_grad()
@pytest.mark.parametrize("name", ["TP2", "EP2"])
def test_a_checkpoint_of_transformers_trains_on_from_its_loss(travelled, name: str) -> None:
    _, found, theirs = travelled
    result = theirs(tokens()[:, :-1])
    assert result.logits.std() >= 1
    assert (result.logits[0] - found[f"theirs on {name}"]).abs().max() <= LOGITS
    loss = torch.nn.functional.cross_entropy(result.logits[0], tokens()[0, 1:])
    assert (loss - found[f"loss on {name}"]).abs() <= LOSS
