"""`export`: a run's weights as a Hugging Face checkpoint, one tensor at a time, renamed into place at the end."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import Dataset
from data.progress import byte_bar
from data.text.tokenizer import TOKENIZER_FILE, Tokenizer
from model.hf import config as hf_config
from model.hf import pieces as hf
from model.hf.families import FAMILIES, TEXT_CONFIG, Family, family_of
from model.stack import PARAMS_DTYPES
from parallel.checkpoint import stored
from train.hub import carried, fp8
from train.hub.files import EXACT_FILE, appearing, compare, copy_files, refuse_broken, write_json
from train.hub.safetensors_files import TORCH_DTYPES as READABLE
from train.hub.safetensors_files import PlannedTensor, SafetensorsReader, SafetensorsWriter
from train.hub.settings import FP8_BLOCKS, HF_CONFIG, TOKENIZER_DIR, ExportConfig, max_length, read_json
from train.hub.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILES, write_tokenizer
from train.job.directory import COUNTS
from train.job.provenance import kept_tokenizer
from train.job.shelf import why_broken
from train.settings.run import Config
from train.settings.tree import ConfigError

WEIGHTS = ("embedding.", "decoder.", "output_layer.", "mtp.")  # of a checkpoint, beside the optimizer's
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Form:
    """How a run becomes a Hugging Face checkpoint.

    Attributes:
        packed: starts of the names of layers whose experts are one tensor each.
        directory: where what goes with the model was kept; None: nothing goes with it.
    """

    family: Family
    packed: tuple[str, ...]
    directory: Path | None
    config: dict[str, Any] | None

    @property
    def wrapped(self) -> bool:
        """Whether the model is part of one that also sees."""
        return self.config is not None and TEXT_CONFIG in self.config


def export_form(config: ExportConfig, run: Config) -> Form:
    """What an export of a run looks like.

    Raises:
        ModelError: the model type cannot hold the run's model.
    """
    directory = carried.carried_by(run)
    old = carried.original_config(directory) if directory else None
    imported = hf_config.from_hf(old, run.model.dtype) if old else None
    family = FAMILIES[config.model_type] if config.model_type else (imported.family if imported else None)
    family = family or family_of(run.model)
    hf_config.check_exportable(run.model, family)
    if imported is None or imported.family is not family:
        directory = old = None
    elif not config.visual and imported.wrapped:
        assert old is not None
        directory, old = None, old[TEXT_CONFIG]
    wrapped = old is not None and TEXT_CONFIG in old
    trunk = (f"{family.trunk(wrapped)}layers.",)
    packed: tuple[str, ...] = trunk if family.packed else ()
    if config.quantize is not None:
        packed = ()  # as published; transformers reads stacks of FP8 without their scales, in silence
    elif config.experts is not None:
        packed = (*trunk, "mtp.layers.") if config.experts == "stacked" else ()
    elif directory is not None:
        packed = tuple(carried.packed_layers(directory))
    return Form(family, packed, directory, old)


def export_run(config: ExportConfig, run: Config, checkpoint: Path) -> None:
    """Writes a run's checkpoint as a Hugging Face checkpoint.

    Raises:
        ConfigError: weights that are not those of the run's model, or not finite.
    """
    if fault := why_broken(checkpoint, deep=True):
        raise ConfigError(f"{checkpoint} is damaged: {fault}: export another one (step=...)")
    form = export_form(config, run)
    source = stored.StoredTensors(checkpoint)
    rows, _ = source.shapes.get("embedding.word_embeddings.weight", (run.model.vocab_size, None))
    run = replace(run, model=replace(run.model, vocab_size=rows))
    mtp = run.mtp.steps > 0
    pieces = list(
        hf.pieces(run.model, mtp, lambda layer: layer.startswith(form.packed), family=form.family, wrapped=form.wrapped)
    )
    weights = {
        name: shape for name, shape in source.shapes.items() if name.startswith(WEIGHTS) and not name.endswith(COUNTS)
    }
    compare(weights, {piece.ours: piece.whole for piece in pieces}, str(checkpoint), "Train or save that run again.")
    tokenizer, eod_id = _tokenizer(run, checkpoint)
    dtype = config.dtype or run.model.dtype
    with appearing(Path(config.out)) as building:
        storage = Storage(PARAMS_DTYPES[dtype], config.quantize == FP8_BLOCKS)
        limit = int(config.shard_size * 1e9)
        tower = carried.tower(form.directory) if form.wrapped else None
        exact = _write_weights(pieces, source, building, storage, limit, tower, str(checkpoint))
        length = max_length(config, run)
        values = hf_config.to_hf(run.model, mtp, run.balance.weight, length, dtype, eod_id, form.family, form.config)
        if storage.fp8:
            parts = [part for piece in pieces for part in piece.parts]
            kept = [part.name for part in parts if not fp8.quantizable(part.name, part.shape)]
            values["quantization_config"] = fp8.quantization_config(kept + (list(tower.entries) if tower else []))
        write_json(building / HF_CONFIG, values)
        ids = {} if eod_id is None else {"eos_token_id": eod_id, "pad_token_id": eod_id}
        write_json(building / GENERATION_CONFIG, {**ids, "do_sample": False})
        write_json(building / EXACT_FILE, {"exact": exact})
        if (imported := run.run.path / TOKENIZER_DIR).is_dir():
            copy_files(imported, building, TOKENIZER_FILES)
        elif tokenizer is not None:
            write_tokenizer(tokenizer, building, length)
        if form.directory is not None:
            copy_files(form.directory, building, carried.SIDE_FILES)


@dataclass(frozen=True)
class Storage:
    """In which types tensors are written: norms and their like in float32, projections perhaps in FP8."""

    dtype: torch.dtype
    fp8: bool

    def planned(self, piece: hf.Piece, part: hf.Part) -> list[PlannedTensor]:
        """One of their tensors, and its scales where it has some."""
        if self.fp8 and fp8.quantizable(part.name, part.shape):
            scales = (*part.shape[:-2], *(-(-size // fp8.EXPORT_BLOCK) for size in part.shape[-2:]))
            return [
                PlannedTensor(part.name, part.shape, torch.float8_e4m3fn),
                PlannedTensor(part.name + fp8.SCALE, scales, torch.float32),
            ]
        return [PlannedTensor(part.name, part.shape, torch.float32 if piece.float32 else self.dtype)]

    def tensors(self, planned: list[PlannedTensor], tensor: Tensor) -> list[Tensor]:
        """What is written for `planned`."""
        return list(fp8.block_scales(tensor, (fp8.EXPORT_BLOCK,) * 2)) if len(planned) > 1 else [tensor]


def _write_weights(
    pieces: list[hf.Piece],
    source: stored.StoredTensors,
    directory: Path,
    storage: Storage,
    limit: int,
    tower: SafetensorsReader | None,
    where: str,
) -> dict[str, list[float]]:
    """Writes all weights; returns, by their name, what those were that lose digits when something is added.

    Args:
        tower: what goes with the model as it is.
    """
    beside = [PlannedTensor(name, x.shape, READABLE[x.dtype]) for name, x in tower.entries.items()] if tower else []
    planned = [tensor for piece in pieces for part in piece.parts for tensor in storage.planned(piece, part)]
    writer, broken, exact = SafetensorsWriter(directory, planned + beside, limit), [], {}
    with byte_bar("exporting", sum(tensor.num_bytes for tensor in planned)) as bar:
        for piece in pieces:
            ours = source.read(piece.ours)
            if piece.shift:
                exact[piece.parts[0].name] = ours.tolist()
            for part, tensor in zip(piece.parts, piece.to_theirs(ours), strict=True):
                if not tensor.isfinite().all():
                    broken.append(part.name)
                plan = storage.planned(piece, part)
                for its_plan, numbers in zip(plan, storage.tensors(plan, tensor), strict=True):
                    writer.write(its_plan.name, numbers)
                    bar.update(its_plan.num_bytes)
            del ours
    if tower:
        carried.copy(tower, writer, beside)
    writer.close()
    refuse_broken(broken, where)
    return exact


def _tokenizer(run: Config, checkpoint: Path) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer of a run, and the token that ends its documents.

    An imported model brings its own, which may name no such token; the checkpoints of other runs have that of their
    corpus, which is opened for it where an older version wrote them.
    """
    imported = run.run.path / TOKENIZER_DIR
    if not imported.is_dir():
        tokenizer = kept_tokenizer(checkpoint) or Dataset(run.data).tokenizer
        return tokenizer, tokenizer.eod_id
    token = _end_token(imported)
    if token is None:
        return None, None
    tokenizer = Tokenizer.from_path(imported / TOKENIZER_FILE, token)
    return tokenizer, tokenizer.eod_id


def _end_token(directory: Path) -> str | None:
    """The token that ends a document, according to the settings beside a tokenizer, if there are any."""
    if not (directory / TOKENIZER_CONFIG_FILE).is_file():
        return None
    token = read_json(directory / TOKENIZER_CONFIG_FILE).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        raise ConfigError(f"{directory / TOKENIZER_CONFIG_FILE} names no eos_token: add the one that ends a document")
    return token
