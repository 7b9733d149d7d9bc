"""Workers without a front (the user's own torchrun or srun): the first one prepares, the others wait for it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import TCPStore

KEY, READ = "tessera/prepared", "tessera/read"
CONNECT_S, WAIT_S, READ_S = 5.0, 600.0, 10.0


@contextmanager
def meeting(prepare: Callable[[], object]) -> Iterator[None]:
    """Runs ``prepare`` in the first worker; the others go on after it, or end with exit code 2.

    The store is the one that their process group meets at, so it has to live until that has started.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    if rank == 0:
        try:
            prepare()
        except BaseException as error:
            store.set(KEY, f"failed: {error}")
            deadline = time.monotonic() + READ_S
            while store.add(READ, 0) < world - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            raise
        store.set(KEY, "")
    else:
        while not store.check([KEY]):
            time.sleep(0.1)
        if store.get(KEY):
            store.add(READ, 1)
            raise SystemExit(2)
    yield
    del store


def _store(is_master: bool) -> TCPStore:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=is_master,
                timeout=timedelta(seconds=CONNECT_S),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, ValueError):
            if is_master or time.monotonic() > deadline:
                raise
