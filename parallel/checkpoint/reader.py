"""How the files of a checkpoint are read, by whatever reads them: nothing in them is run."""

from collections.abc import Callable
from functools import cache
from pathlib import PurePosixPath
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from parallel.checkpoint.unpickle import UnsafePickle, load_pickle, require_plain


class _Careful:
    """A planner, as far as reading needs one, that is given the bytes of an object only once they are harmless."""

    def __init__(self, planner: LoadPlanner, where: str) -> None:
        self._planner, self._where = planner, where
        self.resolve_tensor: Callable[[ReadItem], Tensor] = planner.resolve_tensor
        self.commit_tensor: Callable[[ReadItem, Tensor], None] = planner.commit_tensor

    def load_bytes(self, item: ReadItem, value: Any) -> None:
        where = f"{item.storage_index.fqn} in {self._where}"
        self._planner.load_bytes(item, require_plain(value, where))


class CheckpointReader(dcp.FileSystemReader):
    """PyTorch's reader of a checkpoint's directory; the table of contents is read once.

    Raises:
        UnsafePickle: a file that says what to run, or names files outside the checkpoint.
    """

    @cache  # noqa: B019 (one reader a checkpoint, for as long as it is read)
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path()
        with self.fs.create_stream(path, "rb") as stream:
            metadata = load_pickle(cast(Any, stream), str(path))
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise UnsafePickle(f"{path} was not read: it is no table of contents")
        for place in metadata.storage_data.values():
            if PurePosixPath(place.relative_path).name != place.relative_path:
                raise UnsafePickle(f"{path} was not read: it names {place.relative_path!r}, outside the checkpoint")
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return super().read_data(plan, cast(LoadPlanner, _Careful(planner, str(self.path))))
