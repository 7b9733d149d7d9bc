"""`import`: a Hugging Face checkpoint as a run that others start from, one tensor at a time, renamed at the end."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.progress import byte_bar
from data.text.tokenizer import TOKENIZER_FILE
from model.hf import config as hf_config
from model.hf import pieces as hf
from model.hf.names import EXPERTS
from model.stack import PARAMS_DTYPES
from parallel.checkpoint import stored
from train.hub import carried
from train.hub.files import EXACT_FILE, appearing, compare, copy_files, listed, refuse_broken
from train.hub.fp8 import Fp8Reader
from train.hub.safetensors_files import TORCH_DTYPES as READABLE
from train.hub.safetensors_files import SafetensorsReader
from train.hub.settings import HF_CONFIG, TOKENIZER_DIR, ImportConfig, read_json
from train.hub.tokenizer_files import TOKENIZER_FILES
from train.job.shelf import Shelf, write_state
from train.settings.run import Config, save_config
from train.settings.tree import ConfigError

HEAD_NAME = "lm_head.weight"  # some files of tied models repeat the embedding under it
HEAD_ROWS = 2**14  # compared at once
CHUNK_BYTES = 64 * 2**20  # of experts that an import writes as one part


def import_run(config: ImportConfig, run: Config) -> Path:
    """Writes a Hugging Face checkpoint as a run that other runs start from, on any layout.

    Raises:
        ConfigError: tensors that are not those of the model that config.json describes, or not finite.
    """
    directory = Path(config.hf)
    their_config = hf_config.from_hf(read_json(directory / HF_CONFIG), config.dtype)
    reader = Fp8Reader(SafetensorsReader(directory), their_config.fp8_block)
    left_out = carried.SEES if config.mtp else (carried.SEES, "mtp.")
    found = {name: x for name, x in reader.entries.items() if not (name.startswith(left_out))}
    mtp = run.mtp.steps > 0 or any(name.startswith("mtp.") for name in found)
    run = replace(run, mtp=replace(run.mtp, steps=int(mtp)))
    repeated = found.pop(HEAD_NAME, None) if run.model.tied_embeddings else None
    pieces = _import_pieces(run, mtp, their_config, found)
    wanted = {part.name: part.shape for piece in pieces for part in piece.parts}
    mend = "Without its multi-token-prediction layer: mtp=false." if mtp else f"{HF_CONFIG} says what there should be."
    compare({name: entry.shape for name, entry in found.items()}, wanted, str(directory), mend)
    if repeated is not None:
        _require_tied(reader, f"{their_config.family.trunk(their_config.wrapped)}embed_tokens.weight", str(directory))
    if strange := [f"{name} ({entry.dtype})" for name, entry in reader.entries.items() if entry.dtype not in READABLE]:
        raise ConfigError(f"{directory} has tensors of other types than {', '.join(READABLE)}: {listed(strange)}")
    for what, it_is in (("float16", their_config.half), ("FP8", their_config.fp8_block is not None)):
        if it_is:
            print(f"weights stored in {what} are converted to {run.model.dtype}", flush=True)
    notes = _notes(directory)
    if (directory / TOKENIZER_FILE).is_file():
        read_json(directory / TOKENIZER_FILE)  # one that no program can read would be found by the first run
    packed = sorted(
        {part.name.split(EXPERTS)[0] for x in pieces for part in x.parts if part.name.endswith("gate_up_proj")}
    )
    with appearing(run.run.path) as building:
        _write_checkpoint(
            pieces,
            reader,
            notes,
            Shelf(building / "checkpoints").path(0),
            PARAMS_DTYPES[run.model.dtype],
            str(directory),
        )
        save_config(run, building)
        carried.keep(directory, reader, packed, building)
        if (directory / TOKENIZER_FILE).is_file():
            (building / TOKENIZER_DIR).mkdir()
            copy_files(directory, building / TOKENIZER_DIR, TOKENIZER_FILES)
    return run.run.path


def _require_tied(reader: SafetensorsReader, embedding: str, where: str) -> None:
    """Refuses a head that config.json calls the embedding and that is another: transformers would use it (5.23)."""
    shapes = [reader.entries[name].shape for name in (HEAD_NAME, embedding)]
    spans = [slice(first, first + HEAD_ROWS) for first in range(0, shapes[1][0], HEAD_ROWS)]
    if shapes[0] != shapes[1] or not all(
        torch.equal(reader.read(HEAD_NAME, span), reader.read(embedding, span)) for span in spans
    ):
        raise ConfigError(
            f"{where}: {HEAD_NAME} is not {embedding}, and {HF_CONFIG} says tie_word_embeddings=true, which would "
            f"leave it out: set that to false there, or delete the tensor"
        )


def _notes(directory: Path) -> dict[str, list[float]]:
    """What an export noted of weights that lose digits when something is added, by their name."""
    path = directory / EXACT_FILE
    notes = read_json(path).get("exact", {}) if path.is_file() else {}
    lists = notes.values() if isinstance(notes, dict) else [None]
    if not all(isinstance(note, list) and all(isinstance(x, int | float) for x in note) for note in lists):
        raise ConfigError(f"{path} cannot be read: exact must hold a list of numbers by name")
    return notes


def _import_pieces(run: Config, mtp: bool, imported: hf_config.Imported, found: Mapping[str, object]) -> list[hf.Piece]:
    one = run.model.expert_size * run.model.hidden_size * 2 * PARAMS_DTYPES[run.model.dtype].itemsize
    return list(
        hf.pieces(
            run.model,
            mtp,
            lambda layer: f"{layer}{EXPERTS}gate_up_proj" in found,
            max(1, CHUNK_BYTES // one),
            imported.family,
            imported.wrapped,
        )
    )


def _write_checkpoint(
    pieces: list[hf.Piece],
    reader: SafetensorsReader,
    notes: dict[str, list[float]],
    path: Path,
    dtype: torch.dtype,
    where: str,
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
        digests = stored.write_checkpoint(path, chunks)
    refuse_broken(sorted(set(broken)), where)
    write_state(path, 0, None, None, digests)
