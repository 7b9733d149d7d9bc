"""What a checkpoint holds beside the model: kept with the imported run, so that an export gives it back untouched.

runs/NAME/carried/config.json  model*.safetensors (the tower that sees)  preprocessor_config.json ...
"""

import json
import shutil
from pathlib import Path
from typing import Any

from data.progress import byte_bar
from train.hub.safetensors_files import TORCH_DTYPES, PlannedTensor, SafetensorsReader, SafetensorsWriter
from train.hub.settings import HF_CONFIG, read_json
from train.settings.run import Config, load_origin

CARRIED = "carried"
SEES = "model.visual."  # start of the names of the tower that sees
SIDE_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
LAYOUT = "layout.json"  # which experts the imported files held packed
FILE_BYTES = 4 * 10**9


def keep(source: Path, reader: SafetensorsReader, packed: list[str], run: Path) -> None:
    """Copies what an import leaves beside the model into the run's directory.

    Args:
        packed: starts of the names of layers whose experts were one tensor each.
    """
    directory = run / CARRIED
    directory.mkdir()
    for name in (HF_CONFIG, *SIDE_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    (directory / LAYOUT).write_text(json.dumps({"packed": packed}) + "\n", encoding="utf-8")
    names = [name for name in reader.entries if name.startswith(SEES)]
    if names:
        entries = reader.entries
        planned = [PlannedTensor(name, entries[name].shape, TORCH_DTYPES[entries[name].dtype]) for name in names]
        writer = SafetensorsWriter(directory, planned, FILE_BYTES)
        copy(reader, writer, planned)
        writer.close()


def copy(reader: SafetensorsReader, writer: SafetensorsWriter, planned: list[PlannedTensor]) -> None:
    """Copies tensors as they are, bit by bit."""
    with byte_bar("copying what goes with the model", sum(tensor.num_bytes for tensor in planned)) as bar:
        for tensor in planned:
            writer.write(tensor.name, reader.read(tensor.name))
            bar.update(tensor.num_bytes)


def carried_by(run: Config) -> Path | None:
    """Where a run, or the one that its weights first came from, keeps what goes with the model."""
    while True:
        if (run.run.path / CARRIED).is_dir():
            return run.run.path / CARRIED
        if not (run.run.init or run.run.fork) or not run.run.origin.path.is_dir():
            return None
        run = load_origin(run.run)


def tower(directory: Path | None) -> SafetensorsReader | None:
    """The tensors of the tower that sees, if there are any."""
    return SafetensorsReader(directory) if directory and any(directory.glob("*.safetensors")) else None


def original_config(directory: Path) -> dict[str, Any]:
    """The config.json that was imported."""
    return read_json(directory / HF_CONFIG)


def packed_layers(directory: Path) -> list[str]:
    """Starts of the names of layers whose experts were one tensor each."""
    return list(read_json(directory / LAYOUT)["packed"])
