"""Checkpoints written while training goes on: copied, written by other processes, finished between two steps."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel.checkpoint.digest import Digest
from parallel.checkpoint.writer import SaveStrategy, Staging, Written, storage_of, write_contents, write_files
from parallel.collectives import from_first, gather_to_first
from parallel.engine import State


class SaveError(Exception):
    """A checkpoint could not be written; raised on every process alike, with the first reason."""


type Complete = Callable[[dict[str, Digest]], None]


class BackgroundSaver:
    """Writes one state after the other, each while the next steps are computed.

    Every rank makes the same calls. A state's structure must stay as it was at the first save.

    Args:
        replicas: processes that hold parts in common, which they share out among themselves.
    Attributes:
        seconds: for which the slowest process wrote the last state, until it was on the disk; on the first rank.
    """

    def __init__(self, replicas: ProcessGroup) -> None:
        self._plain = SaveStrategy()
        self._strategy = FullyParallelSaveStrategyWrapper(self._plain, replicas, do_cache_distribution=True)
        self._queue = AsyncCallsQueue()
        self._staged: tuple[Staging, AsyncRequest] | None = None  # not being written yet
        self._validated = False
        self.seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether a state is still being written."""
        return self._staged is not None or self._queue.get_num_unfinalized_calls() > 0

    def start(self, state: State, directory: Path, complete: Complete) -> None:
        """Begins to copy a state, to write it then; returns before it is on the disk. Nothing else may be under way.

        Weights and optimizer must stay as they are until `settle` was called.

        Args:
            directory: an empty one that every process sees.
            complete: called on the first rank, by `poll` or `wait`, once all files are there, with their digests.
        """
        assert not self.busy, "one state at a time"
        steady = frozenset(map(storage_of, _optimized(state)))
        request: AsyncRequest = dist_checkpointing.save(
            state,
            str(directory),
            self._strategy,
            validate_access_integrity=not self._validated,
            async_sharded_save=True,
            async_strategy="mcore",  # "nvrx" wants nvidia-resiliency-ext 0.6, and PyPI has 0.4.1 (megatron-core 0.19.2)
        )
        self._validated = True
        outcome = request.finalize_fns[0]
        request = request._replace(finalize_fns=[partial(self._finish, outcome, directory, complete)])
        self._staged = Staging(request.async_fn_args[1], steady), request
        if not self._staged[0].copying:
            self.settle()

    def settle(self) -> None:
        """Waits for what is still being copied, and begins to write it: afterwards the state may change."""
        if self._staged is None:
            return
        (staging, request), self._staged = self._staged, None
        directory, _, report = request.async_fn_args
        buckets = staging.finish()
        try:
            self._queue.schedule_async_request(request._replace(async_fn_args=(directory, buckets, report)))
        except OSError:  # no memory for another process: this one writes
            self._queue.call_idx -= 1  # the call that did not begin has been counted, and the others count one
            write_files(directory, buckets, report)
            self._queue.schedule_async_request(request._replace(async_fn=None, async_fn_args=()))

    def poll(self) -> bool:
        """Whether a state has become complete since the last call; every rank calls it between two steps.

        Raises:
            SaveError: on every rank, if any could not write its part or `complete` failed.
        """
        return bool(self._queue.maybe_finalize_async_calls())  # one that is being copied is not in it yet

    def wait(self) -> None:
        """Returns once nothing is being written any more. Raises SaveError as `poll` does."""
        self.settle()
        self._queue.maybe_finalize_async_calls(blocking=True)

    def _finish(self, outcome: Callable[[], Written], directory: Path, complete: Complete) -> None:
        parts = gather_to_first(outcome())

        def finish() -> None:
            try:
                if error := next((part.error for part in parts if part.error), ""):
                    raise SaveError(error)
                assert self._plain.metadata is not None, "the first rank plans"
                self.seconds = max(part.seconds for part in parts)
                complete(write_contents(directory, self._plain.metadata, parts))
            except Exception as error:  # every process hears of it, and goes on
                raise SaveError(str(error) if isinstance(error, SaveError) else repr(error)) from None

        from_first(finish)


def _optimized(state: State) -> Iterator[Tensor]:
    """The tensors of an engine's state that nothing but the optimizer changes: weights, and its own."""
    for part, entries in state.items():
        if isinstance(entries, dict):
            tensors = (entry.data for entry in nested_values(entries) if isinstance(entry, ShardedTensor))
            yield from (x for x in tensors if isinstance(x, nn.Parameter) or (part == "optimizer" and x is not None))
