"""The distributed optimizer's state by the model's tensors, so that a checkpoint goes on on any layout.

A data-parallel process holds a run of each parameter's numbers, cut without regard to its rows. Such a run is a few
boxes of the tensor: the rest of a row, whole rows, the beginning of a row. Each box is saved as a piece of a tensor
that has the parameter's name and shape, and torch's distributed checkpoint finds the pieces that another layout asks
for. Nothing is gathered: a process writes and reads its own part, at once with all others.

megatron-core has two formats: `dp_reshardable` follows its buffers, and fits other numbers of data-parallel processes
alone; `fully_reshardable` gathers everything on every process first, and does not know AdamW's `step` (0.19.2).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from parallel.engine import AdamW, State

MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = 2**23  # numbers of a shard that are worked on at once: what is made of them stays in a GPU's cache
MASTER = "master"  # the float32 copy of a parameter of another type
type Box = tuple[tuple[int, ...], tuple[int, ...]]  # first index and size in each dimension


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The numbers [start, stop) of a tensor in the order in which they lie, as boxes: 2 * dimensions - 1 at most."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if start < first * inner:
        row = first - 1
        yield from _within(row, boxes(shape[1:], start - row * inner, min(stop - row * inner, inner)))
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last >= first:
        yield from _within(last, boxes(shape[1:], 0, stop - last * inner))


def _within(row: int, inner: Iterator[Box]) -> Iterator[Box]:
    return (((row, *first), (1, *size)) for first, size in inner)


type HeldAs = Callable[[nn.Parameter, Tensor, Mapping[str, Tensor], int, int], OptimizerShard]


@dataclass(frozen=True)
class OptimizerShard:
    """A process's part of a parameter as the optimizer holds it.

    Attributes:
        main: what AdamW works on: float32 [stop - start], the parameter's own numbers or a copy of them; its ``grad``
            is what the last step took, after clipping.
        moments: AdamW's two of these numbers, by `MOMENTS`.
        start, stop: which numbers of the parameter.
        keep: takes changed `tensors` back, where these are copies of what the optimizer holds in another type.
    """

    parameter: nn.Parameter
    main: Tensor
    moments: Mapping[str, Tensor]
    start: int
    stop: int
    keep: Callable[[Mapping[str, Tensor]], None] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All numbers of the optimizer's that no weight of the model holds, by name; copies lie in host memory."""
        tensors = {**self.moments, **({} if self.parameter.dtype == torch.float32 else {MASTER: self.main})}
        return tensors if self.keep is None else {name: tensor.cpu() for name, tensor in tensors.items()}

    @torch.no_grad()
    def squares(self, adamw: AdamW, lr: float, steps: int, decayed: bool, centre: float) -> Tensor:
        """float64 [3], sums of squares after a step: the gradient that it took, what it added, and the numbers now.

        The update follows from AdamW's moments, so that no copy of the weights before the step is kept.

        Args:
            steps: that the optimizer has taken. decayed: whether weight decay applies. centre: is added to the
                numbers now: 1 where weights are stored as their distance from it.
        """
        (beta1, beta2), decay = adamw.betas, lr * adamw.weight_decay * decayed
        mean_scale, square_scale, back = lr / (1 - beta1**steps), 1 / (1 - beta2**steps), decay / (1 - decay)
        total = torch.zeros(3, dtype=torch.float64, device=self.main.device)
        for part in () if self.main.grad is None else self.main.grad.flatten().split(CHUNK):
            total[0] += _sum_of_squares(part)
        parts = (self.main, *(self.moments[name] for name in MOMENTS))
        for now, mean, square in zip(*(x.flatten().split(CHUNK) for x in parts), strict=True):
            step = (mean * mean_scale).div_((square * square_scale).sqrt_().add_(adamw.eps))
            # Decay took ``decay`` of what the numbers were before, (now + step) / (1 - decay).
            total[1] += _sum_of_squares(step.mul_(1 + back).add_(now, alpha=back))
            total[2] += _sum_of_squares(now + centre if centre else now)
        return total


def _sum_of_squares(x: Tensor) -> Tensor:
    """float64 [], in one pass: nothing of x is kept in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def distributed_shards(optimizers: list[DistributedOptimizer], held_as: HeldAs) -> Iterator[OptimizerShard]:
    """What this process holds of every parameter in megatron-core's distributed optimizers.

    Args:
        held_as: makes the shard of a parameter, of the numbers that AdamW steps, of its state of them, and of their
            range.
    """
    for optimizer in optimizers:
        ranges = (bucket for buffer in optimizer.gbuf_ranges for buckets in buffer.values() for bucket in buckets)
        for parameter, places in ((p, places) for bucket in ranges for p, places in bucket["param_map"].items()):
            group, order = optimizer.model_param_group_index_map[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            place = (places["param"].start, places["param"].end)
            yield held_as(parameter, main, optimizer.optimizer.state[main], *place)


def plain_shard(
    parameter: nn.Parameter, main: Tensor, state: Mapping[str, Tensor], start: int, stop: int
) -> OptimizerShard:
    """Of torch's AdamW, whose state is float32."""
    return OptimizerShard(parameter, main, {name: state[name] for name in MOMENTS}, start, stop)


def sharded_state(shards: Iterable[OptimizerShard], weights: State) -> dict[str, list[ShardedTensor]]:
    """megatron-core's description of the optimizer's state, for saving, or for loading into the same tensors.

    Args:
        shards: of every parameter that this process holds something of.
        weights: the sharded state dict of the model, which says where its parameters lie in the whole tensors.
    """
    described = {id(entry.data): entry for entry in nested_values(weights) if isinstance(entry, ShardedTensor)}
    found = {}
    for part in shards:
        whole = described[id(part.parameter)]
        for name, tensor in part.tensors.items():
            key = f"optimizer.{name}.{whole.key}"
            found[key] = [_piece(whole, key, box, view) for box, view in _views(part, tensor)]
    return found


def take(shards: Iterable[OptimizerShard], weights: State, state: dict[str, list[Tensor]]) -> None:
    """Takes what `sharded_state` described and a checkpoint filled."""
    described = {id(entry.data): entry for entry in nested_values(weights) if isinstance(entry, ShardedTensor)}
    for part in shards:
        tensors = part.tensors
        for name, tensor in tensors.items():
            loaded = state[f"optimizer.{name}.{described[id(part.parameter)].key}"]
            for (_, view), values in zip(_views(part, tensor), loaded, strict=True):
                view.copy_(values.view_as(view))
        if part.keep is not None:
            part.keep(tensors)


def _views(part: OptimizerShard, tensor: Tensor) -> Iterator[tuple[Box, Tensor]]:
    done = 0
    for first, size in boxes(tuple(part.parameter.shape), part.start, part.stop):
        numel = math.prod(size)
        yield (first, size), tensor.view(-1)[done : done + numel].view(size)
        done += numel


def _piece(whole: ShardedTensor, key: str, box: Box, view: Tensor) -> ShardedTensor:
    first, size = box
    lead = whole.prepend_axis_num  # dimensions that the whole tensor has in front of the parameter's
    offset = [base + own for base, own in zip(whole.global_offset, [0] * lead + list(first), strict=True)]
    shape = (*[1] * lead, *size)
    return replace(
        whole,
        key=key,
        data=view.view(shape),
        dtype=view.dtype,
        local_shape=shape,
        global_offset=tuple(offset),
        axis_fragmentations=None,  # boxes form no grid
        prepend_axis_num=0,
        allow_shape_mismatch=False,
        # Its data-parallel number, the last, is that of a copy of the parameter: each part here is the only one.
        replica_id=(*whole.replica_id[:2], 0),
    )
