"""The pipeline stages of a process, whoever trains them: micro-batches run through them, and their weights by name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from parallel.engine import State


def run_schedule(
    chunks: Sequence[MegatronModule], batches: Sequence[Any], tokens: int, forward_only: bool
) -> list[Any]:
    """Runs megatron-core's schedule (plain, pipelined or interleaved) over micro-batches of ``tokens`` tokens each.

    Args:
        chunks: the pipeline stages of this process, in order.
    Returns:
        What the network returned for each micro-batch, on the last pipeline stage; an empty list elsewhere.
    """

    def count(losses: Any) -> tuple[Tensor, Tensor, Any]:
        return losses.total, torch.tensor(1, dtype=torch.int), losses

    def forward_step(iterator: Iterator[Any], model: MegatronModule) -> tuple[Any, Callable[..., Any]]:
        return model(next(iterator)), count

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def sharded_weights(chunks: Sequence[MegatronModule], metadata: State | None = None) -> State:
    """megatron-core's sharded state dict of the weights: model0, model1, ... for the process's pipeline stages.

    The names of these parts stay out of the checkpoint, whose layers are numbered through the whole model.
    """
    return {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}


def load_weights(chunks: Sequence[MegatronModule], state: State) -> None:
    """Takes what `sharded_weights` described and the checkpoint filled."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{index}"])
