"""Slow, readable twins of the online estimate of the experts' load fractions and of its forecast (`model.layers`).

Shape suffixes: M micro-batches, E experts.
"""

import torch
from torch import Tensor

from model.layers.balance import FEEDBACK
from model.layers.forecast import BUCKETS, DECAY, RIDGE


def online_fractions(counts_ME: Tensor, expected_ME: Tensor, in_flight: int) -> Tensor:
    """[M, E]: the fractions f that the backward pass of each micro-batch takes for those of the global batch.

    Args:
        counts_ME: assignments in each micro-batch. expected_ME: what they were expected to be.
        in_flight: micro-batches whose forward passes are done when a backward pass comes, itself included.
    """
    weights = counts_ME.sum(dim=1) / counts_ME.sum()
    given: list[Tensor] = []
    for m in range(len(counts_ME)):
        seen, to_come = counts_ME[: m + in_flight].sum(dim=0), counts_ME[m + in_flight :].sum()
        expected = expected_ME[m + in_flight :].sum(dim=0)
        estimate = seen + to_come * expected / expected.sum().clamp(min=1)
        estimate = estimate / estimate.sum()
        owed = sum((weights[j] * (estimate - given[j]) for j in range(m)), torch.zeros_like(estimate))
        given.append(estimate + FEEDBACK * owed / weights[m:].sum())
    return torch.stack(given)


def bucket(token: int) -> int:
    """The bucket of a token."""
    return token * 2654435761 % 2**32 // (2**32 // BUCKETS)


def forecast(history: list[tuple[list[list[int]], Tensor]], tokens: list[list[int]], last_E: Tensor) -> Tensor:
    """[M, E]: counts to expect of micro-batches, by the rows of one least-squares problem.

    Args:
        history: of each past step, oldest first, its micro-batches' valid tokens and counts [M, E].
        tokens: valid tokens of the micro-batches of the step to come. last_E: counts of the last step.
    """

    def rows(batches: list[list[int]]) -> Tensor:
        found = torch.zeros(len(batches), BUCKETS, dtype=torch.float64)
        for m, batch in enumerate(batches):
            for token in batch:
                found[m, bucket(token)] += 1
        return found

    now, plain_E = rows(tokens), last_E / max(sum(map(len, tokens)), 1)
    known, counted = [torch.zeros(0, BUCKETS).double()], [torch.zeros(0, last_E.numel()).double()]
    for age, (batches, counts_ME) in enumerate(reversed(history), start=0):
        known.append(DECAY ** (age / 2) * rows(batches))
        counted.append(DECAY ** (age / 2) * counts_ME.double())
    x, y = torch.cat(known), torch.cat(counted)
    ridge = max(RIDGE * x.square().sum().item() / BUCKETS, 1.0) ** 0.5 * torch.eye(BUCKETS, dtype=torch.float64)
    padded_y = torch.cat([y - x.sum(dim=1, keepdim=True) * plain_E, torch.zeros(BUCKETS, last_E.numel()).double()])
    beyond = torch.linalg.lstsq(torch.cat([x, ridge]), padded_y).solution
    return (now @ (beyond + plain_E)).clamp(min=0)
