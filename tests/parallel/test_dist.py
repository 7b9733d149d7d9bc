"""The runner of the distributed tests itself: results by rank, a failure's traceback, death and hanging."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist import RankError, run_ranks


def _ring(offset: int) -> tuple[int, torch.Tensor]:
    dist.init_process_group("gloo")
    mine = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(mine)
    return dist.get_rank(), mine


def _fail(how: str) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("rank one is unhappy")
        if how == "die":
            os._exit(7)
    if how == "sleep":
        time.sleep(600)
    dist.barrier()


def test_results_come_back_in_order_of_rank():
    results = run_ranks(_ring, 2, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.item() == 21.0 for _, total in results)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"rank 1 raised:[\s\S]*in _fail[\s\S]*ValueError: rank one is unhappy"),
        ("die", "rank 1 died, exit code 7"),
        ("sleep", r"ranks \[0, 1\] of 2 did not end within 3 s"),
    ],
)
def test_a_failing_rank_fails_the_test(how: str, message: str):
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(_fail, 2, how, timeout=3 if how == "sleep" else 60)
    assert time.monotonic() - start < 50
