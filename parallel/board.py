"""What each process of a job last said of itself, in the job's own store: readable while collectives hang."""

import json
from typing import Any

import torch
import torch.distributed as dist


class Board:
    """One note for each process, over a connection of its own, for a thread beside the training."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()

    def put(self, note: dict[str, Any]) -> None:
        """Replaces this process's note."""
        self._store.set(f"note/{self.rank}", json.dumps(note))

    def notes(self) -> list[dict[str, Any] | None]:
        """The processes' notes, in order of rank; None for one that has put up none."""
        keys = [f"note/{rank}" for rank in range(self.world)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]


def flight_record() -> bytes:
    """The last collectives of this process as torch's flight recorder has them, pickled; `torchfrtrace` reads it."""
    recorder: Any = torch._C._distributed_c10d
    record: bytes = recorder._dump_nccl_trace() if dist.get_backend() == "nccl" else recorder._dump_fr_trace()
    return record
