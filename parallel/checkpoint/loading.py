"""A sharded checkpoint into the tensors of a job, each part read from storage once."""

from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from parallel import compat
from parallel.checkpoint.reader import CheckpointReader
from parallel.checkpoint.unpickle import UnsafePickle
from parallel.engine import State


def load_state(template: State, checkpoint: Path, replicas: ProcessGroup) -> State:
    """What a checkpoint, written on whatever layout, holds of a sharded state dict.

    Args:
        template: megatron-core's sharded state dict, whose tensors say which parts this process needs.
        replicas: processes that need parts in common: each part is read by one of them and sent to the others.
    Raises:
        UnsafePickle: a file that says what to run. CheckpointingException: not all that is asked for is there.
    """
    CheckpointReader(checkpoint).read_metadata()  # an error in here is raised as it is
    compat.read_with(CheckpointReader)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), replicas)
    try:
        with compat.loading_context():
            # What the parts are was validated when they were saved.
            return dist_checkpointing.load(template, str(checkpoint), strategy, validate_access_integrity=False)
    except CheckpointException as error:
        found = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in found if isinstance(cause, UnsafePickle)), error) from None
