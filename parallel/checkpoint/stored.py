"""Single tensors of a sharded checkpoint, read and written without processes, a model or the memory for all of it.

The format is megatron-core's ``torch_dist``: PyTorch's distributed checkpoint with an object of megatron-core's beside
the tensors. Its tensors are whole, whatever layout of processes wrote them.
"""

import dataclasses
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from parallel.checkpoint.digest import Digest, HashedStream, sync
from parallel.checkpoint.reader import CheckpointReader
from parallel.checkpoint.writer import FORMAT_FILE, write_format

COMMON = ShardedObject("common_state", None, (1,), (0,)).unique_key  # where megatron-core keeps all but tensors


@dataclass(frozen=True)
class StoredSlice:
    """Some rows of a tensor, and how to come by them.

    Attributes:
        name: of the tensor. whole: its shape. first: the piece's first row. shape: of the piece.
        make: called when the piece is written; its tensor is let go before the next one is made.
    """

    name: str
    whole: tuple[int, ...]
    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class StoredTensors:
    """Reads a checkpoint tensor by tensor.

    Attributes:
        shapes, dtypes: of every tensor, by its name.
    Raises:
        UnsafePickle: a file that says what to run.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._reader = CheckpointReader(checkpoint)
        metadata = self._reader.read_metadata().state_dict_metadata
        tensors = {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
        self.shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def read(self, name: str) -> Tensor:
        """A whole tensor on the host, in the type it was saved in."""
        state = {name: torch.empty(self.shapes[name], dtype=self.dtypes[name])}
        dcp.load(state, storage_reader=self._reader, no_dist=True)
        return state[name]


class _Planner(dcp.DefaultSavePlanner):
    """Plans slices that do not exist yet, and makes each when its turn comes."""

    def __init__(self, slices: list[StoredSlice]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._slices = {(piece.name, piece.first): piece for piece in slices}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [_item(piece) for piece in self._slices.values()]
        self.plan = dataclasses.replace(plan, items=[*plan.items, *items])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self.state_dict[write_item.index.fqn]  # already as megatron-core stores it
        offset = write_item.index.offset
        assert offset is not None  # `_item` gives one to every piece
        piece = self._slices[write_item.index.fqn, offset[0]]
        tensor = piece.make()
        if tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
            raise RuntimeError(f"{piece.name} was made as {tuple(tensor.shape)} {tensor.dtype}, not as planned")
        return tensor


def _item(piece: StoredSlice) -> WriteItem:
    offsets = torch.Size([piece.first, *[0] * (len(piece.whole) - 1)])
    return WriteItem(
        index=MetadataIndex(piece.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(piece.shape)),
            TensorProperties(dtype=piece.dtype),
            torch.Size(piece.whole),
        ),
    )


class _HashedFiles(FileSystem):
    """The local disk, with the digests of what was written."""

    def __init__(self) -> None:
        self.digests: dict[str, Digest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as raw:
            if "w" not in mode:
                yield raw
                return
            stream = HashedStream(raw)
            yield stream
            sync(raw)
            self.digests[Path(path).name] = stream.digest


class _Writer(dcp.FileSystemWriter):
    """Writes a file for each tensor: within a file PyTorch's writer keeps hold of what it has written."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, sync_files=False)  # every stream is synced when it ends
        self.fs = self.files = _HashedFiles()

    def storage_meta(self) -> StorageMeta:
        """Nothing of where it was written."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        written = []
        for number, (_, items) in enumerate(groupby(plan.items, key=lambda item: item.index.fqn)):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = dataclasses.replace(plan, items=list(items), storage_data=prefix)
            written += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done


def write_checkpoint(checkpoint: Path, slices: list[StoredSlice]) -> dict[str, Digest]:
    """Writes a checkpoint of tensors alone into an empty directory, a piece at a time; returns its digests."""
    common, writer = io.BytesIO(), _Writer(checkpoint)
    torch.save([{}], common)
    dcp.save({COMMON: common}, storage_writer=writer, planner=_Planner(slices), no_dist=True)
    digests = {name.removesuffix(".tmp"): digest for name, digest in writer.files.digests.items()}
    return digests | {FORMAT_FILE: write_format(checkpoint)}
