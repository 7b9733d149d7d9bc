"""Single tensors of a sharded checkpoint, read and written without processes, a model or the memory for all of it.

The format is megatron-core's ``torch_dist``: PyTorch's distributed checkpoint with an object of megatron-core's beside
the tensors. Its tensors are whole, whatever layout of processes wrote them.
"""

import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
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

TORCH_DIST = CheckpointingConfig("torch_dist", 1)
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


class _Reader(dcp.FileSystemReader):
    """Reads the table of contents once, not once a tensor."""

    @cache  # noqa: B019 (one reader a checkpoint, for as long as it is read)
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return super().read_metadata(*args, **kwargs)


class StoredTensors:
    """Reads a checkpoint tensor by tensor.

    Attributes:
        shapes, dtypes: of every tensor, by its name.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._reader = _Reader(checkpoint)
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


class _Writer(dcp.FileSystemWriter):
    """Writes a file for each tensor: within a file PyTorch's writer keeps hold of what it has written."""

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        written = []
        for number, (_, items) in enumerate(groupby(plan.items, key=lambda item: item.index.fqn)):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = dataclasses.replace(plan, items=list(items), storage_data=prefix)
            written += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done


def write_checkpoint(checkpoint: Path, slices: list[StoredSlice]) -> None:
    """Writes a checkpoint of tensors alone into an empty directory, one piece after the other."""
    common = io.BytesIO()
    torch.save([{}], common)
    dcp.save({COMMON: common}, storage_writer=_Writer(checkpoint), planner=_Planner(slices), no_dist=True)
    save_config(TORCH_DIST, str(checkpoint))
