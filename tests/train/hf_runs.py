"""Runs made of telling weights instead of training, for the tests of export and import."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.config import DataConfig, PrepareConfig
from data.prepare.prepare import prepare
from model.config import ModelConfig, MtpConfig
from model.hf import pieces as hf
from parallel.checkpoint import stored
from train.hub.exporting import export_run as write_export
from train.hub.importing import import_run
from train.hub.settings import ExportConfig, ImportConfig, check_export, check_import
from train.job.shelf import Shelf, write_state
from train.settings.run import Config, RunConfig, RunReference, save_config

VOCAB = 320
SHAPE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    attention_heads=4,
    key_value_heads=2,
    head_dim=32,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=16,
    linear_value_dim=24,
    experts=8,
    experts_per_token=2,
    expert_size=32,
    shared_expert_size=48,
)


def make_corpus(directory: Path) -> Path:
    """A corpus of a few lines, with a tokenizer of 300 tokens at most."""
    (directory / "text.txt").write_text(
        "".join(f"the {i} quick brown foxes jump over the lazy dog\n" for i in range(400))
    )
    settings = PrepareConfig(
        input=str(directory / "text.txt"), output=str(directory / "corpus"), vocab_size=300, sample_by="line"
    )
    return prepare(settings)


def telling(shape: ModelConfig, mtp: bool = True) -> dict[str, Tensor]:
    """Our weights, each in the type that training keeps it in: gains off one, routing far from uniform."""
    weights = {}
    for seed, piece in enumerate(hf.pieces(shape, mtp, lambda layer: False)):
        noise = torch.randn(piece.whole, generator=torch.Generator().manual_seed(seed))
        if piece.ours.endswith("norm.weight"):
            noise = 0.3 * noise
        elif len(piece.whole) > 1 and "embedding" not in piece.ours:
            noise = noise * piece.whole[-1] ** -0.5
        weights[piece.ours] = noise if piece.float32 or shape.dtype == "float32" else noise.bfloat16()
    return weights


def add_checkpoint(run: Path, weights: dict[str, Tensor], step: int = 1) -> Path:
    """Stores weights as a run's checkpoint."""
    path = Shelf(run / "checkpoints").path(step)
    path.mkdir(parents=True)
    chunks = [
        stored.StoredSlice(name, tuple(x.shape), 0, tuple(x.shape), x.dtype, lambda x=x: x)
        for name, x in weights.items()
    ]
    stored.write_checkpoint(path, chunks)
    write_state(path, step, {}, {})
    return path


def make_run(runs: Path, name: str, shape: ModelConfig, corpus: Path, mtp: int = 1, **parts) -> Config:
    """The directory of a run, as yet without a checkpoint."""
    config = Config(
        run=RunConfig(name=name, dir=str(runs)),
        data=DataConfig(corpus=str(corpus), seq_length=64),
        model=shape,
        mtp=MtpConfig(steps=mtp),
        **parts,
    )
    config.run.path.mkdir(parents=True)
    save_config(config)
    return config


def export_run(run: Config, out: Path, **settings) -> Path:
    """What the export command does."""
    config = ExportConfig(str(out), run=RunReference(run.run.name, run.run.dir), **settings)
    write_export(config, *check_export(config))
    return out


def import_as(source: Path, runs: Path, name: str, **settings) -> Path:
    """What the import command does."""
    config = ImportConfig(str(source), **settings)
    config = replace(config, run=replace(config.run, name=name, dir=str(runs)))
    return import_run(config, check_import(config))


def read_all(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    source = stored.StoredTensors(checkpoint)
    return {name: source.read(name) for name in source.shapes}
