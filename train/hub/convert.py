"""`export` and `import`: a run's weights as a Hugging Face checkpoint, and the other way, one tensor at a time.

Both write beside the place that is asked for and rename once everything is there, and has been checked.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import Dataset
from data.progress import byte_bar
from data.text.tokenizer import TOKENIZER_FILE, Tokenizer
from model.hf import config as hf_config
from model.hf import names as hf
from model.stack import PARAMS_DTYPES
from parallel import stored
from train.hub.safetensors_files import TORCH_DTYPES as READABLE
from train.hub.safetensors_files import PlannedTensor, SafetensorsReader, SafetensorsWriter
from train.hub.settings import HF_CONFIG, TOKENIZER_DIR, ExportConfig, ImportConfig, max_length, read_json
from train.hub.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILES, write_tokenizer
from train.job.directory import COUNTS, checkpoint_path, write_state
from train.settings.run import Config, save_config
from train.settings.tree import ConfigError

EXACT_FILE = "tessera.json"  # what no other file has room for: the output norms of Gated DeltaNet before 1 was added
WEIGHTS = ("embedding.", "decoder.", "output_layer.", "mtp.")  # of a checkpoint, beside the optimizer's
LISTED = 20  # names of one kind that an error lists
CHUNK_BYTES = 64 * 2**20  # of experts that an import writes as one part
GENERATION_CONFIG = "generation_config.json"

Shapes = Mapping[str, tuple[int, ...]]


def compare(found: Shapes, wanted: Shapes, where: str, mend: str) -> None:
    """Refuses a set of tensors that is not exactly the wanted one.

    Raises:
        ConfigError: lists what is missing, what is there beside, and what has another shape.
    """
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "not known": [name for name in found if name not in wanted],
        "of another shape": misshapen,
    }
    if any(kinds.values()):
        lists = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names)
        raise ConfigError(f"the tensors in {where} are not those of this model: {lists}. {mend}")


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _refuse_broken(names: list[str], where: str) -> None:
    if names:
        raise ConfigError(f"{len(names)} tensors in {where} hold NaN or infinity: {_listed(names)}")


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A directory to fill, which takes its name at the end; whatever goes wrong, nothing is left behind."""
    building = directory.with_name(directory.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{building} cannot be written: {error.strerror}: choose another place") from error
    try:
        yield building
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def export_run(config: ExportConfig, run: Config, checkpoint: Path) -> None:
    """Writes a run's checkpoint as a Hugging Face checkpoint.

    Raises:
        ConfigError: weights that are not those of the run's model, or not finite.
    """
    source = stored.StoredTensors(checkpoint)
    rows, _ = source.shapes.get("embedding.word_embeddings.weight", (run.model.vocab_size, None))
    run = replace(run, model=replace(run.model, vocab_size=rows))
    mtp, stacked = run.mtp.steps > 0, config.experts == "stacked"
    pieces = list(hf.pieces(run.model, mtp, lambda layer: stacked))
    weights = {
        name: shape for name, shape in source.shapes.items() if name.startswith(WEIGHTS) and not name.endswith(COUNTS)
    }
    compare(weights, {piece.ours: piece.whole for piece in pieces}, str(checkpoint), "Train or save that run again.")
    tokenizer = _tokenizer(run)
    dtype = config.dtype or run.model.dtype
    with appearing(Path(config.out)) as building:
        exact = _write_weights(
            pieces, source, building, PARAMS_DTYPES[dtype], int(config.shard_size * 1e9), str(checkpoint)
        )
        length = max_length(config, run)
        values = hf_config.to_hf(run.model, mtp, run.balance.weight, length, dtype, tokenizer.eod_id)
        _write_json(building / HF_CONFIG, values)
        ids = {"eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.eod_id}
        _write_json(building / GENERATION_CONFIG, {**ids, "do_sample": False})
        _write_json(building / EXACT_FILE, {"exact": exact})
        if (imported := run.run.path / TOKENIZER_DIR).is_dir():
            _copy_tokenizer(imported, building)
        else:
            write_tokenizer(tokenizer, building, length)


def _write_weights(
    pieces: list[hf.Piece], source: stored.StoredTensors, directory: Path, dtype: torch.dtype, limit: int, where: str
) -> dict[str, list[float]]:
    """Writes all weights; returns, by their name, what those were that lose digits when something is added."""

    def written(piece: hf.Piece) -> torch.dtype:
        return torch.float32 if piece.float32 else dtype

    planned = [PlannedTensor(part.name, part.shape, written(piece)) for piece in pieces for part in piece.parts]
    writer, broken, exact = SafetensorsWriter(directory, planned, limit), [], {}
    with byte_bar("exporting", sum(tensor.num_bytes for tensor in planned)) as bar:
        for piece in pieces:
            ours = source.read(piece.ours)
            if piece.shift:
                exact[piece.parts[0].name] = ours.tolist()
            for part, tensor in zip(piece.parts, piece.to_theirs(ours), strict=True):
                if not tensor.isfinite().all():
                    broken.append(part.name)
                writer.write(part.name, tensor)
                bar.update(tensor.numel() * written(piece).itemsize)
            del ours
    writer.close()
    _refuse_broken(broken, where)
    return exact


def _tokenizer(run: Config) -> Tokenizer:
    """The tokenizer of a run: the one that an imported model came with, else its corpus's."""
    imported = run.run.path / TOKENIZER_DIR
    if not imported.is_dir():
        return Dataset(run.data).tokenizer
    return Tokenizer.from_path(imported / TOKENIZER_FILE, _end_token(imported))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _end_token(directory: Path) -> str:
    """The token that ends a document, according to the settings beside a tokenizer."""
    token = read_json(directory / TOKENIZER_CONFIG_FILE).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        raise ConfigError(f"{directory / TOKENIZER_CONFIG_FILE} names no eos_token: add the one that ends a document")
    return token


def import_run(config: ImportConfig, run: Config) -> Path:
    """Writes a Hugging Face checkpoint as a run that other runs start from, on any layout.

    Raises:
        ConfigError: tensors that are not those of the model that config.json describes, or not finite.
    """
    directory = Path(config.hf)
    reader = SafetensorsReader(directory)
    skip_mtp = not config.mtp
    found = {name: x for name, x in reader.entries.items() if not (skip_mtp and name.startswith("mtp."))}
    mtp = run.mtp.steps > 0 or any(name.startswith("mtp.") for name in found)
    run = replace(run, mtp=replace(run.mtp, steps=int(mtp)))
    one = run.model.expert_size * run.model.hidden_size * 2 * PARAMS_DTYPES[run.model.dtype].itemsize
    pieces = list(
        hf.pieces(run.model, mtp, lambda layer: f"{layer}{hf.EXPERTS}gate_up_proj" in found, max(1, CHUNK_BYTES // one))
    )
    wanted = {part.name: part.shape for piece in pieces for part in piece.parts}
    mend = "Without its multi-token-prediction layer: mtp=false." if mtp else f"{HF_CONFIG} says what there should be."
    compare({name: entry.shape for name, entry in found.items()}, wanted, str(directory), mend)
    if strange := [f"{name} ({entry.dtype})" for name, entry in found.items() if entry.dtype not in READABLE]:
        raise ConfigError(f"{directory} has tensors of other types than {', '.join(READABLE)}: {_listed(strange)}")
    notes = read_json(directory / EXACT_FILE).get("exact", {}) if (directory / EXACT_FILE).is_file() else {}
    with appearing(run.run.path) as building:
        _write_checkpoint(
            pieces, reader, notes, checkpoint_path(building, 0), PARAMS_DTYPES[run.model.dtype], str(directory)
        )
        save_config(run, building)
        if (directory / TOKENIZER_FILE).is_file():
            (building / TOKENIZER_DIR).mkdir()
            _copy_tokenizer(directory, building / TOKENIZER_DIR)
    return run.run.path


def _write_checkpoint(
    pieces: list[hf.Piece], reader: SafetensorsReader, notes: dict[str, Any], path: Path, dtype: torch.dtype, where: str
) -> None:
    broken: list[str] = []
    size = sum(entry.end - entry.begin for entry in reader.entries.values())
    with byte_bar("importing", size) as bar:

        def make(piece: hf.Piece) -> Tensor:
            theirs = [reader.read(part.name, part.span) for part in piece.parts]
            broken.extend(
                part.name for part, tensor in zip(piece.parts, theirs, strict=True) if not tensor.isfinite().all()
            )
            bar.update(sum(tensor.nbytes for tensor in theirs))
            note = notes.get(piece.parts[0].name)
            exact = None if note is None else torch.tensor(note, dtype=torch.float32)
            return piece.to_ours(theirs, exact).to(torch.float32 if piece.float32 else dtype)

        path.mkdir(parents=True)
        chunks = [
            stored.StoredSlice(
                piece.ours,
                piece.whole,
                piece.first,
                piece.shape,
                torch.float32 if piece.float32 else dtype,
                partial(make, piece),
            )
            for piece in pieces
        ]
        stored.write_checkpoint(path, chunks)
    _refuse_broken(sorted(set(broken)), where)
    write_state(path, 0, None, None)
