"""The model's collectives over three processes, against the same computation in one."""

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import (
    attach_loss,
    from_last,
    gather_counts,
    max_over,
    max_over_all,
    start_all_to_all,
    sum_over,
    sum_over_all,
)
from tests.dist import run_ranks

# counts[source][target] rows: empty parts, a rank that sends nothing, one that receives nothing.
COUNTS = [
    [[1, 2, 3], [0, 1, 0], [4, 0, 2]],
    [[0, 0, 5], [0, 0, 1], [0, 0, 0]],
    [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
]
WIDTH = 3


def _rows(source: int, count: int) -> torch.Tensor:
    """Distinct values, so that a row in the wrong place shows."""
    return 100.0 * (source + 1) + torch.arange(count * WIDTH, dtype=torch.float64).view(count, WIDTH)


def _slopes(target: int, count: int) -> torch.Tensor:
    """Gradients of the received rows: a different one for each element."""
    return 1.0 + target + torch.arange(count * WIDTH, dtype=torch.float64).view(count, WIDTH).square()


def _exchange() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rank, group = dist.get_rank(), dist.group.WORLD
    results = []
    for counts in COUNTS:
        send, receive = counts[rank], [row[rank] for row in counts]
        x = _rows(rank, sum(send)).requires_grad_()
        received = start_all_to_all(x, send, receive, group).wait()
        (received.square() * _slopes(rank, sum(receive))).sum().backward()
        results.append((received.detach(), x.grad))
    return results


def _exchange_in_one(counts: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    world = len(counts)
    sent = [_rows(source, sum(counts[source])).requires_grad_() for source in range(world)]
    parts = [rows.split(row) for rows, row in zip(sent, counts, strict=True)]
    received = [torch.cat([parts[source][target] for source in range(world)]) for target in range(world)]
    sum((x.square() * _slopes(target, len(x))).sum() for target, x in enumerate(received)).backward()
    return [(x.detach(), rows.grad) for x, rows in zip(received, sent, strict=True)]


def _reductions() -> dict:
    rank, world = dist.get_rank(), dist.group.WORLD
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]]).mul(rank + 1).requires_grad_()
    before = x.detach().clone()
    found = {
        "sum": sum_over(x, world),
        "max": max_over(x, world),
        "sum of all": sum_over_all(x),
        "max of all": max_over_all(x),
        "last": from_last(x, world),
        "alone": (sum_over(x, alone), max_over(x, alone), from_last(x, alone)),
        "counts": gather_counts(torch.tensor([[rank, 10], [20, 30 + rank]]), world),
    }
    assert torch.equal(x, before), "the input was overwritten"
    tensors = [*found["alone"], *(found[name] for name in ("sum", "max", "sum of all", "max of all", "last"))]
    assert not any(tensor.requires_grad for tensor in tensors)
    for tensor in tensors:
        tensor.add_(1)
    assert torch.equal(x, before), "a result shares the input's memory"
    return found


def _checks() -> tuple[list, dict]:
    dist.init_process_group("gloo")
    return _exchange(), _reductions()


@pytest.fixture(scope="module")
def results() -> list[tuple[list, dict]]:
    return run_ranks(_checks, 3)


def test_start_exchange(results):
    for index, counts in enumerate(COUNTS):
        for rank, (received, grad) in enumerate(_exchange_in_one(counts)):
            # Rows are only moved, and each gradient is one product: equal to the last bit.
            assert torch.equal(results[rank][0][index][0], received)
            assert torch.equal(results[rank][0][index][1], grad)


def test_reductions(results):
    for rank, (_, found) in enumerate(results):
        # Each rank has added 1 to what it got.
        assert found["sum"].tolist() == found["sum of all"].tolist() == [[7.0, -11.0], [19.0, 25.0]]
        assert found["max"].tolist() == found["max of all"].tolist() == [[4.0, -1.0], [10.0, 13.0]]
        assert found["last"].tolist() == [[4.0, -5.0], [10.0, 13.0]]
        own = torch.tensor([[1.0, -2.0], [3.0, 4.0]]) * (rank + 1)
        assert all(torch.equal(tensor, own + 1) for tensor in found["alone"])
        assert found["counts"].tolist() == [[[0, 10], [20, 30]], [[1, 10], [20, 31]], [[2, 10], [20, 32]]]
        assert found["counts"].dtype == torch.int64


def test_attach_loss():
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    x = a * 2
    y = attach_loss(x, b**2)
    assert torch.equal(y, x)
    # Whatever the gradient through y, the hung-on loss receives 1.0: d(b^2)/db = 6.
    (y * torch.tensor([5.0, -7.0])).sum().backward()
    assert a.grad.tolist() == [10.0, -14.0]
    assert b.grad.item() == 6.0
