"""Settings of `export` and `import`, and the checks that come before any work; no torch.

An imported run is a directory like any other, whose only checkpoint holds weights alone, before the first step:

runs/NAME/config.yaml  runs/NAME/checkpoints/step_00000000/  runs/NAME/tokenizer/
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from data.config import DataConfig
from data.errors import check_choice
from data.secrets import one_line
from model.config import BalanceConfig, MtpConfig, check_model
from model.hf.config import from_hf
from model.hf.families import FAMILIES
from train.job.directory import require_checkpoint
from train.settings.checks import check_least
from train.settings.run import Config, RunConfig, RunReference, load_config
from train.settings.tree import ConfigError

HF_CONFIG = "config.json"
TOKENIZER_DIR = "tokenizer"  # of an imported run: the files that came with the model
EXPERT_LAYOUTS = ("separate", "stacked")
EXPORT_DTYPES = ("bfloat16", "float32")
FP8_BLOCKS = "fp8"


@dataclass(frozen=True)
class ExportConfig:
    """A run as a Hugging Face checkpoint."""

    out: Annotated[str, "directory to make; must not exist yet"]
    run: RunReference = field(default_factory=RunReference)
    step: Annotated[int | None, "which checkpoint, by its step; null takes the last"] = None
    dtype: Annotated[
        str | None,
        "bfloat16 or float32; null takes the model's. Norms, routers, A_log and dt_bias stay float32, as in training",
    ] = None
    model_type: Annotated[
        str | None,
        "qwen3_next, qwen3_5_text or qwen3_5_moe_text; null takes the one that the weights were imported as, else "
        "qwen3_next with experts and qwen3_5_text without",
    ] = None
    experts: Annotated[
        str | None,
        "routed experts one by one (separate), or stacked, all of a layer as one; null: as they were imported, else as "
        "published files of the model type are",
    ] = None
    visual: Annotated[
        bool,
        "with what an import carried along, the tower that sees included; false: the text model alone",
    ] = True
    quantize: Annotated[
        str | None,
        "fp8: projections and experts in FP8 (e4m3) with a scale for each 128 x 128 numbers, as published -FP8 files; "
        "null: as dtype says",
    ] = None
    shard_size: Annotated[float, "GB of a file, at most (but a tensor is never cut)"] = 4.0
    max_length: Annotated[
        int | None,
        "longest text in tokens, max_position_embeddings; null: data.seq_length, or what YaRN stretches to",
    ] = None


@dataclass(frozen=True)
class NewRun:
    """The run that an import makes."""

    name: Annotated[str, "the new run and its directory; must not exist yet"] = "imported"
    dir: Annotated[str, "directory that holds the runs"] = "runs"


@dataclass(frozen=True)
class ImportConfig:
    """A Hugging Face checkpoint as a run."""

    hf: Annotated[str, "directory of a qwen3_next, qwen3_5 or qwen3_5_moe checkpoint: config.json and safetensors"]
    run: NewRun = field(default_factory=NewRun)
    dtype: Annotated[str | None, "type to train in, bfloat16 or float32; null takes config.json's"] = None
    mtp: Annotated[bool, "takes the multi-token-prediction layer, if there is one; false leaves it out"] = True
    corpus: Annotated[str, "corpus that evaluate and generate of the new run read, prepared with its tokenizer"] = ""
    seq_length: Annotated[int, "tokens of a sample when the new run is evaluated"] = 4096


def check_export(config: ExportConfig) -> tuple[Config, Path]:
    """The run and its checkpoint, once every check has passed.

    Raises:
        ConfigError: a setting that cannot be used. ModelError: a model that the format cannot hold.
    """
    run = load_config(config.run)
    if config.experts is not None:
        check_choice("experts", config.experts, EXPERT_LAYOUTS, ConfigError)
    if config.model_type is not None:
        check_choice("model_type", config.model_type, tuple(FAMILIES), ConfigError)
    if config.dtype is not None:
        check_choice("dtype", config.dtype, EXPORT_DTYPES, ConfigError)
    if config.quantize is not None:
        check_choice("quantize", config.quantize, (FP8_BLOCKS,), ConfigError)
        if config.experts == "stacked":
            raise ConfigError(
                "experts=stacked is not written in FP8: transformers loads such stacks without their scales; "
                "leave experts out"
            )
    for name in ("shard_size", "max_length"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name}={value} must be above 0")
    if not config.out or Path(config.out).exists():
        why = "exists already" if config.out else "names no directory"
        raise ConfigError(f"out={config.out} {why}: choose a new directory, which appears once the export is complete")
    return run, require_checkpoint(run.run, config.step)


def max_length(config: ExportConfig, run: Config) -> int:
    """The longest text that the exported model says it takes."""
    stretched = int(run.model.yarn_factor * (run.model.yarn_original_length or 0)) if run.model.yarn_factor > 1 else 0
    return config.max_length or stretched or run.data.seq_length


def check_import(config: ImportConfig) -> Config:
    """The settings of the new run, once every check that needs no weights has passed.

    Raises:
        ConfigError: a setting that cannot be used. ModelError: a model that ours cannot be.
    """
    directory = Path(config.hf)
    if not directory.is_dir():
        raise ConfigError(f"hf={config.hf} is not a directory: name a downloaded checkpoint")
    path = Path(config.run.dir) / config.run.name
    if not config.run.name or "/" in config.run.name or config.run.name.startswith((".", "-")):
        raise ConfigError(f"run.name={config.run.name!r} cannot name a directory in {config.run.dir}")
    if path.exists():
        raise ConfigError(f"run.name={config.run.name} exists in {config.run.dir}: choose another name for the import")
    if config.dtype is not None:
        check_choice("dtype", config.dtype, EXPORT_DTYPES, ConfigError)
    imported = from_hf(read_json(directory / HF_CONFIG), config.dtype)
    model, mtp = imported.model, MtpConfig(steps=int(imported.mtp and config.mtp))
    check_model(model, mtp)
    check_least("seq_length", config.seq_length, mtp.steps + 2)
    return Config(
        run=RunConfig(name=config.run.name, dir=config.run.dir),
        data=DataConfig(corpus=config.corpus, seq_length=config.seq_length),
        model=model,
        mtp=mtp,
        balance=BalanceConfig(weight=imported.balance_weight),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} cannot be read: it holds {type(values).__name__}, not an object")
    return values
