"""A process's part of a checkpoint: planned once, copied, then written and hashed by a process of its own.

megatron-core plans what each rank writes and starts the writing process, a fork: on a CPU the fork itself is the copy
of the state, on a GPU the numbers are copied to pinned memory first, while the next gradients are computed. A fork
cannot use CUDA: the writer is handed host memory alone, and collects no garbage, which may hold tensors of a GPU's.
What is written is PyTorch's format.
"""

import ctypes
import gc
import io
import os
import pickle
import signal
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StoragePrefix, _write_item
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from parallel.checkpoint.digest import Digest, HashedStream, read_digest, sync, write_synced
from parallel.checkpoint.host_memory import host_copies
from parallel.engine import State

METADATA_FILE, FORMAT_FILE = ".metadata", "metadata.json"
FORMAT = CheckpointingConfig("torch_dist", 1)
FILES = 4  # of a process's part, written side by side: checksums and hash of one file keep a core at 0.6 GB/s
NICENESS = 10  # training comes first
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent dies

type Items = list[tuple[WriteItem, Tensor | io.BytesIO]]
type Bucket = tuple[str, Items]  # a file's name and what goes into it


@dataclass
class Written:
    """What one process has written, or why it could not."""

    results: list[WriteResult] = field(default_factory=list)
    digests: dict[str, Digest] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""


def _write_file(directory: Path, bucket: Bucket) -> Written:
    name, items = bucket
    written = Written()
    with (directory / name).open("wb") as raw:
        stream: Any = HashedStream(raw)
        for item, data in items:
            if isinstance(data, Tensor):
                data = _alone(data)
            result = _write_item(_NO_TRANSFORMS, stream, data, item, name, SerializationFormat.TORCH_SAVE)
            written.results.append(result)
        sync(raw)
    written.digests[name] = stream.digest
    return written


def _alone(tensor: Tensor) -> Tensor:
    """A tensor, all of whose storage is its own, as PyTorch writes whole storages; not copied if it has no gaps."""
    if type(tensor) is not Tensor or not tensor.is_contiguous():
        return tensor.clone()
    begin = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[begin : begin + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


_NO_TRANSFORMS = dcp.FileSystemWriter("").transforms


def write_files(directory: Path, buckets: list[Bucket], report: IO[bytes], parent: int | None = None) -> None:
    """Writes this process's files, and what came of it into ``report``; raises nothing.

    Args:
        parent: the training process, if this is one that it forked: the writer then does not outlive it.
    """
    if parent is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os._exit(1)
        gc.disable()  # whatever it found of a GPU's could not be freed here
        os.nice(NICENESS)
        torch.set_num_threads(1)  # OpenMP's threads did not come along
    total, began = Written(), time.perf_counter()
    try:
        with ThreadPoolExecutor(max(1, len(buckets))) as pool:
            for part in pool.map(partial(_write_file, directory), buckets):
                total.results += part.results
                total.digests |= part.digests
    except Exception as error:  # told to the training processes, which go on
        total = Written(error=f"{type(error).__name__}: {error}")
    total.seconds = time.perf_counter() - began
    pickle.dump(total, report)
    report.flush()


def storage_of(tensor: Tensor) -> int:
    """What tells the memory of a tensor from that of others; its views have the same."""
    return tensor.untyped_storage().data_ptr()


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


class Staging:
    """A state on its way from the GPU to pinned memory, over a stream beside that of the computation.

    The computation goes on once the copy has what a forward pass may change. The rest is copied while it runs, and must
    stay as it is until `finish` has returned.

    Args:
        steady: memory (`storage_of`) that only the optimizer changes.
    Attributes:
        copying: whether it takes time, on all processes alike: not on a CPU, where the writer's fork is the copy.
    """

    def __init__(self, buckets: list[Bucket], steady: Collection[int]) -> None:
        self._buckets = buckets  # whose tensors must live for as long as they are read
        self.copying = torch.cuda.is_available()
        self._copies: dict[int, Tensor] = {}
        if self.copying:
            self._begin(steady)

    def _begin(self, steady: Collection[int]) -> None:
        self._stream, compute = torch.cuda.Stream(), torch.cuda.current_stream()
        self._stream.wait_stream(compute)
        everything = [data for _, items in self._buckets for _, data in items]
        tensors = [data for data in everything if isinstance(data, Tensor) and _is_on_gpu(data)]
        plain = [tensor for tensor in tensors if type(tensor) is Tensor and tensor.is_contiguous()]
        rooms = dict(zip(map(id, plain), host_copies(plain, pin=True), strict=True))
        changing = [tensor for tensor in tensors if storage_of(tensor) not in steady]
        resting = [tensor for tensor in tensors if storage_of(tensor) in steady]
        for group in (changing, resting):
            with torch.cuda.stream(self._stream):
                for tensor in group:
                    room = rooms.get(id(tensor))
                    # To the host without blocking is to pinned memory, which PyTorch keeps for the next time.
                    to = tensor.to("cpu", non_blocking=True) if room is None else room.copy_(tensor, non_blocking=True)
                    self._copies[id(tensor)] = to
            if group is changing:
                compute.wait_stream(self._stream)

    def finish(self) -> list[Bucket]:
        """The same with everything in host memory."""
        if not self.copying:
            return self._buckets
        self._stream.synchronize()
        copies, buckets = self._copies, self._buckets
        self._copies, self._buckets = {}, []
        return [(name, [(item, copies.get(id(data), data)) for item, data in items]) for name, items in buckets]


class _Writer(dcp.FileSystemWriter):
    """Takes megatron-core's plan apart into files, and writes nothing itself."""

    can_run_decentralized_global_plan = True
    buckets: Sequence[Bucket] = ()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # whoever saves has made the directory

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        parts = _split_by_size_and_type(FILES, plan.items)
        self.buckets = [
            (f"{plan.storage_data.prefix}{number}.distcp", [(item, _data(planner, item)) for item in items])
            for number, items in enumerate(parts)
            if items
        ]


def _data(planner: SavePlanner, item: WriteItem) -> Tensor | io.BytesIO:
    data = planner.resolve_data(item)
    return data.detach() if isinstance(data, Tensor) else data


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's strategy for PyTorch's format with a writer of ours; what each rank writes is planned once.

    Attributes:
        metadata: the table of contents, on the first rank; it lacks where things lie.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metadata: Metadata | None = None
        self._plans: tuple[SavePlan | None, SavePlan | None, bool] = None, None, False

    def async_save(
        self, sharded_state_dict: State, checkpoint_dir: Path, async_strategy: str = "mcore"
    ) -> AsyncRequest:
        """A request to write into a directory; its first finalize function returns what was written.

        Its buckets hold the state itself, wherever that lies.
        """
        entries, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        writer = _Writer(checkpoint_dir)
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        (_, metadata, _), central, local, _, _ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(entries, False), writer, planner=planner, cached_ckpt_structure=self._plans
        )
        self.metadata, self._plans = metadata or self.metadata, (central, local, True)
        # Read when the request is finalized. In memory: a node whose temporary directory is full saves all the same.
        report = os.fdopen(os.memfd_create("report of a checkpoint's writer"), "w+b")
        return AsyncRequest(
            write_files,
            (Path(checkpoint_dir), list(writer.buckets), report),
            [partial(_outcome, report)],
            {"parent": os.getpid()},
        )


# What unpickling raises of a file that is empty or torn.
UNREADABLE = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError)


def _outcome(report: IO[bytes]) -> Written:
    with report:
        report.seek(0)
        content = report.read()
    try:
        written: Written = pickle.loads(content)
    except UNREADABLE as error:  # it was killed
        how = f", and left a report that cannot be read: {error}" if content else ""
        return Written(error=f"the writing process died{how}")
    return written


def write_contents(directory: Path, metadata: Metadata, parts: list[Written]) -> dict[str, Digest]:
    """Writes the table of contents of what all processes have written; returns every file's digest."""
    metadata.storage_data = {result.index: result.storage_data for part in parts for result in part.results}
    metadata.storage_meta = StorageMeta()
    plain = Metadata(metadata.state_dict_metadata, metadata.planner_data, metadata.storage_data, StorageMeta())
    digests = {name: digest for part in parts for name, digest in part.digests.items()}
    digests[METADATA_FILE] = write_synced(directory / METADATA_FILE, pickle.dumps(plain))
    digests[FORMAT_FILE] = write_format(directory)
    return digests


def write_format(directory: Path) -> Digest:
    """Writes what tells megatron-core the format, and returns once it is on the disk."""
    save_config(FORMAT, str(directory))
    with (directory / FORMAT_FILE).open("rb") as raw:
        os.fsync(raw.fileno())
    return read_digest(directory / FORMAT_FILE)
