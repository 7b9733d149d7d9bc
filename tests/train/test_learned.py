"""Tokens that are only read have no part in the loss, and the mean is over the learned ones of all ranks."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from data.order.batches import Batch
from model.batch import count_targets
from train import loop
from train.job.build import Job
from train.use import heldout

STEPS, RANKS = 2, 3


def batch(seed: int, masked: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randint(2, (2, 17), generator=generator).cumsum(1).int() // 4
    documents[0, 12:] = -1  # padding
    learned = torch.rand(2, 17, generator=generator) < 0.3 if masked else None
    return Batch(torch.randint(1, 90, (2, 17), generator=generator), documents, learned)


def test_the_mean_is_over_what_all_ranks_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [[batch(2 * rank, masked=rank < 2), batch(2 * rank + 1)] for rank in range(RANKS)]
    total = sum(count_targets(own.documents, STEPS, own.learned) for batches in ranks for own in batches)
    given: list[torch.Tensor] = []  # what each rank brings to the sum
    monkeypatch.setattr(loop, "sum_over", lambda counts, group: given.append(counts) or total)
    job = SimpleNamespace(
        config=SimpleNamespace(mtp=SimpleNamespace(steps=STEPS)),
        device=torch.device("cpu"),
        groups=SimpleNamespace(dp=None),
        sequence_part=(0, 1),
    )
    weights, targets = torch.zeros(1 + STEPS), torch.zeros(1 + STEPS, dtype=torch.int64)
    for batches in ranks:
        for ready, own in zip(loop.micro_batches(cast(Job, job), batches), batches, strict=True):
            weights += ready.weights_KT.sum(dim=1)
            for step in range(1 + STEPS):
                counted = torch.zeros(2, 16, dtype=torch.bool)
                counted[:, : 16 - step] = (own.documents[:, step + 1 :] == own.documents[:, : 16 - step]) & (
                    own.documents[:, step + 1 :] >= 0
                )
                if own.learned is not None:
                    counted[:, : 16 - step] &= own.learned[:, step + 1 :]
                targets[step] += counted.sum()
                assert torch.equal(ready.weights_KT[step] > 0, counted.flatten())
    assert torch.equal(sum(given), total) and len(given) == RANKS
    assert torch.equal(targets, total[1:]) and (targets > 0).all()
    # Of float32 summands of 1 / targets; a target more or less would change the sum by a hundredth.
    torch.testing.assert_close(weights, torch.ones(1 + STEPS), atol=1e-5, rtol=0)


def test_a_pipeline_is_filled_up_with_rows_that_count_nothing() -> None:
    (group,) = heldout.in_groups([batch(0)], 2)
    assert count_targets(group[1].documents, STEPS, group[1].learned).tolist() == [0] * (2 + STEPS)
