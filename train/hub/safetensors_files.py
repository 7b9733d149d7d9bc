"""Safetensors files, written and read one tensor at a time: neither a file nor a model is ever held in memory.

The format is 8 bytes of length, a JSON header with each tensor's type, shape and place, and the numbers. So a file's
header is known before its numbers are. Nothing but that header and numbers is read: no pickle, no code.
"""

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from data.secrets import one_line
from train.hub.settings import read_json
from train.settings.tree import ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100 * 2**20  # bytes; the limit of the safetensors library
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        dtype: as the format names it. begin, end: bytes from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(tensors: list[PlannedTensor], limit: int) -> dict[str, list[PlannedTensor]]:
    """Tensors, in their order, shared out over files of at most ``limit`` bytes (or of one tensor)."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _header(tensors: list[PlannedTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        end = place + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes planned tensors into a directory; they come in the order of the plan, and all of them come."""

    def __init__(self, directory: Path, tensors: list[PlannedTensor], limit: int) -> None:
        self._directory = directory
        self._files = plan_files(tensors, limit)
        self._waiting = [(name, tensor) for name, group in self._files.items() for tensor in group][::-1]
        self._name = ""
        self._file: BinaryIO | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor, in the type that was planned.

        Raises:
            RuntimeError: it is not the one that was planned.
        """
        file, planned = self._waiting.pop()
        if (name, tuple(tensor.shape)) != (planned.name, planned.shape):
            raise RuntimeError(f"{name} {tuple(tensor.shape)} came where {planned.name} {planned.shape} was planned")
        numbers = tensor.detach().to(planned.dtype).contiguous()
        self._opened(file).write(numbers.flatten().view(torch.uint8).numpy())

    def close(self) -> None:
        """Ends the last file and writes the index of several.

        Raises:
            RuntimeError: planned tensors are missing.
        """
        self._finish_file()
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} tensors were not written: {self._waiting[-1][1].name}, ...")
        if len(self._files) > 1:
            where = {tensor.name: file for file, group in self._files.items() for tensor in group}
            size = sum(tensor.num_bytes for group in self._files.values() for tensor in group)
            index = {"metadata": {"total_size": size}, "weight_map": where}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _opened(self, name: str) -> BinaryIO:
        if self._file is None or name != self._name:
            self._finish_file()
            self._name, self._file = name, (self._directory / name).open("wb")
            self._file.write(_header(self._files[name]))
        return self._file

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


class SafetensorsReader:
    """Reads the tensors of a checkpoint directory; their numbers wait until they are asked for.

    Raises:
        ConfigError: no safetensors files, or one that is broken.
    """

    def __init__(self, directory: Path) -> None:
        self.entries: dict[str, Entry] = {}
        for file in _weight_files(directory):
            for name, entry in _read_header(file).items():
                if name in self.entries:
                    raise ConfigError(f"{name} is in {self.entries[name].file} and in {file}: one of them is left over")
                self.entries[name] = entry

    def read(self, name: str, span: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        entry = self.entries[name]
        rows, *others = entry.shape or (1,)
        first, last, _ = (span or slice(None)).indices(rows)
        row = (entry.end - entry.begin) // rows
        numbers = bytearray((last - first) * row)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.begin + first * row)
            view = memoryview(numbers)
            while view and (count := file.readinto(view)):
                view = view[count:]
        if view:
            raise ConfigError(f"{entry.file} ends inside {name}: copy it again")
        return torch.frombuffer(numbers, dtype=TORCH_DTYPES[entry.dtype]).reshape(last - first, *others)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        where = read_json(directory / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ConfigError(f"{directory / INDEX} cannot be read: it has no weight_map of file names")
        files = [directory / name for name in sorted(set(where.values()))]
        if outside := [str(file) for file in files if file.name != file.relative_to(directory).as_posix()]:
            raise ConfigError(f"{directory / INDEX} names files outside its directory: {', '.join(outside)}")
        if missing := [file.name for file in files if not file.is_file()]:
            raise ConfigError(f"{directory} lacks files that {INDEX} names: {', '.join(missing)}")
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    why = f"; {', '.join(pickles)} are pickles, which can run code: save them as safetensors" if pickles else ""
    raise ConfigError(f"hf={directory} holds neither {SINGLE} nor {INDEX}{why}")


def _read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file, checked so far that reading them stays inside it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(f"its header claims {length} bytes")
            values = json.loads(stream.read(length))
        values.pop("__metadata__", None)
        start, found = 8 + length, {}
        for name, value in values.items():
            dtype, shape = str(value["dtype"]), tuple(int(x) for x in value["shape"])
            begin, end = (start + int(x) for x in value["data_offsets"])
            wanted = math.prod(shape) * TORCH_DTYPES[dtype].itemsize if dtype in TORCH_DTYPES else end - begin
            if not (start <= begin <= end <= size and end - begin == wanted and min(shape, default=1) > 0):
                raise ValueError(f"{name} lies outside it")
            found[name] = Entry(file, dtype, shape, begin, end)
        placed = sorted(found.items(), key=lambda item: item[1].begin)
        for (before, first), (name, second) in itertools.pairwise(placed):
            if second.begin < first.end:
                raise ValueError(f"{name} lies where {before} is")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {one_line(error)}") from error
