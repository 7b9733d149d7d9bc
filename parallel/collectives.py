"""The collectives that the model uses, differentiable where a gradient passes, alike on gloo and NCCL."""

import pickle
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.transport import exchange_rows

type Gradients = tuple[Tensor | None, ...]  # one for each input of a function


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over a group, without gradient; x itself is left as it is."""
    total = x.detach().clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


class PendingSum:
    """A sum over a group that is under way."""

    def __init__(self, total: Tensor, work: dist.Work | None) -> None:
        self._total, self._work = total, work

    def wait(self) -> Tensor:
        """The sum, once it is there; on a GPU only the current stream waits."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._total


def start_sum(x: Tensor, group: dist.ProcessGroup) -> PendingSum:
    """Starts the sum of x over a group, without gradient, and returns at once."""
    total = x.detach().clone()
    return PendingSum(total, dist.all_reduce(total, group=group, async_op=True) if group.size() > 1 else None)


class SumsTogether:
    """Sums over a group that are collected one by one and then travel as one all-reduce."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._collected = group, list[tuple[Tensor, LaterSum]]()

    def add(self, x: Tensor) -> "LaterSum":
        """The sum of x to come; all ranks add alike."""
        later = LaterSum(self)
        self._collected.append((x.detach().flatten(), later))
        return later

    def start(self) -> None:
        """Starts the sum of what was collected, and returns at once."""
        if not self._collected:
            return
        parts = [x for x, _ in self._collected]
        pending, place = start_sum(torch.cat(parts), self._group), 0
        for x, later in self._collected:
            later.pending, later.part = pending, slice(place, place + x.numel())
            place += x.numel()
        self._collected.clear()


class LaterSum:
    """One of the sums of `SumsTogether`, flat."""

    def __init__(self, together: SumsTogether) -> None:
        self._together = together
        self.pending: PendingSum | None = None
        self.part = slice(0)

    def wait(self) -> Tensor:
        """The sum, which is started now if nobody has done so; on a GPU only the current stream waits."""
        if self.pending is None:
            self._together.start()
        assert self.pending is not None
        return self.pending.wait()[self.part]


def max_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The elementwise maximum of x over a group, without gradient."""
    largest = x.detach().clone()
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def _everyone() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "no process group was started"
    return world


def sum_over_all(x: Tensor) -> Tensor:
    """The sum of x over every process of the job, without gradient."""
    return sum_over(x, _everyone())


def max_over_all(x: Tensor) -> Tensor:
    """The elementwise maximum of x over every process of the job, without gradient."""
    return max_over(x, _everyone())


def from_last(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the group's last rank has in x, on every rank."""
    copy = x.detach().clone()
    if group.size() > 1:
        dist.broadcast(copy, group_src=group.size() - 1, group=group)
    return copy


def from_first[T](make: Callable[[], T]) -> T:
    """What the job's first process makes, on every process: decided once, whatever the others can see.

    Raises:
        Exception: what it raised there, on every process alike.
    """
    made: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = _portable(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return cast(T, made[0])


def _portable(error: Exception) -> Exception:
    """The error, or its words if it holds what cannot travel, as a lock or a module: the others would wait for it."""
    try:
        pickle.dumps(error)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError):  # what pickling raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gather_to_first[T](value: T) -> list[T]:
    """Every rank's value on the job's first rank, in order; nothing on the others."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, everyone)
    return everyone or []


def gather_objects(own: object) -> list[Any]:
    """What every process of the job gives, in order of rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def gather_numbers(own: int, device: torch.device) -> list[int]:
    """Every process's number (64 bits), in order of rank."""
    return gather_counts(torch.tensor([own], device=device), _everyone()).flatten().tolist()


def gather_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stacks every rank's integers: [...] -> [group size, ...]."""
    gathered = counts.new_empty(group.size() * counts.numel())
    dist.all_gather_into_tensor(gathered, counts.flatten(), group=group)
    return gathered.view(group.size(), *counts.shape)


class HostNumbers:
    """Integers on their way from a GPU to the host, which waits for them alone and not for what was queued later."""

    def __init__(self, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = x
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[int]:
        """The integers."""
        if self._event is not None:
            self._event.synchronize()
        return cast(list[int], self._host.tolist())


class _AllToAll:
    """One all-to-all at a time, there or back: what must stay in memory until it has been waited for."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self._send, self._receive, self._group = send, receive, group
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    def launch(self, x: Tensor, back: bool = False) -> None:
        send, receive = (self._receive, self._send) if back else (self._send, self._receive)
        x, out = x.contiguous(), x.new_empty(sum(receive), *x.shape[1:])
        work = exchange_rows(out, x, receive, send, group=self._group, async_op=True)
        self._under_way = work, x, out

    def wait(self) -> Tensor:
        assert self._under_way is not None, "rows are waited for once"
        work, _, out = self._under_way
        work.wait()
        self._under_way = None  # the stream that waits is the one that allocates: what was sent may be overwritten
        return out


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _AllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(x)
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Gradients:
        return ctx.exchange.wait(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, exchange: _AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        ctx.exchange.launch(grad, back=True)
        return grad.new_zeros(()), None


class PendingRows:
    """Rows on their way between ranks.

    The handle, one number, ties the end to the start in the graph. The rows themselves are not passed through it: in
    the backward pass they would be seen by autograd before they have arrived.
    """

    def __init__(self, handle: Tensor, exchange: _AllToAll) -> None:
        self._handle, self._exchange = handle, exchange

    def wait(self) -> Tensor:
        """The rows that were sent here, [sum(receive), ...], those from rank 0 first; to be called once.

        On a GPU only the current stream waits.
        """
        return _Wait.apply(self._handle, self._exchange)


def start_all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> PendingRows:
    """Starts an all-to-all of rows with unequal counts, and returns at once; the gradient takes the way back.

    The roles turn in the backward pass: it starts the gradient's exchange where rows were waited for, and waits where
    they were sent. Autograd runs what is ready in the reverse of the order it was recorded in, so what was computed
    between the two has its gradient computed between them too. Every rank must start and wait in the same order.

    Args:
        x: [sum(send), ...], the rows for rank 0 first.
        send, receive: rows to and from each rank of the group.
    """
    exchange = _AllToAll(send, receive, group)
    return PendingRows(_Launch.apply(x, exchange), exchange)


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.numel())
        dist.all_gather_into_tensor(out, x.contiguous().flatten(), group=group)
        return out.view(group.size(), *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        # One rounding to the gradient's type, however many parts are summed.
        wide = grad.contiguous().flatten().to(torch.promote_types(grad.dtype, torch.float32))
        out = wide.new_empty(grad[0].numel())
        dist.reduce_scatter_tensor(out, wide, group=ctx.group)
        return out.view(grad.shape[1:]).to(grad.dtype), None


def gather_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x, stacked: [...] -> [group size, ...]; the gradient of each part is summed where it came from."""
    return _GatherParts.apply(x, group)


def earlier_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the ranks before this one have in x, stacked: [rank, ...]; on the first rank one part of zeros.

    Every rank's graph holds the collective, so that all take part in it on the way back.
    """
    rank = group.rank()
    parts = gather_parts(x, group)
    return parts[:rank] if rank else parts[:1] * 0


class _ExchangeEqual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        exchange_rows(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return _ExchangeEqual.apply(grad.contiguous(), ctx.group), None


def heads_to_sequence(x_RLN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From a part of each row with all heads to whole rows with a share of the heads: [R, L, N, ...] ->
    [R, L * size, N / size, ...]. Parts are in rank order; rank r gets the r-th of equal shares of the heads."""
    size = group.size()
    split = x_RLN.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
    return _ExchangeEqual.apply(split, group).movedim(0, 1).flatten(1, 2)


def sequence_to_heads(x_RLN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back of `heads_to_sequence`: [R, L, N, ...] -> [R, L / size, N * size, ...]."""
    size = group.size()
    split = x_RLN.unflatten(1, (size, -1)).movedim(1, 0).contiguous()
    return _ExchangeEqual.apply(split, group).movedim(0, 2).flatten(2, 3)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x unchanged, with a scalar loss attached: backward through x also back-propagates 1.0 into the loss.

    So a loss of an early pipeline stage needs no road of its own to the last one.
    """
    return _AttachLoss.apply(x, loss)
