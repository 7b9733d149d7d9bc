"""Slow, readable twin of the online estimate of the experts' shares (`model.balance`).

Shape suffixes: M micro-batches, E experts.
"""

import torch
from torch import Tensor

from model.balance import FEEDBACK


def online_shares(counts_ME: Tensor, last_E: Tensor, in_flight: int) -> Tensor:
    """[M, E]: the shares f that the backward pass of each micro-batch takes for those of the global batch.

    Args:
        counts_ME: assignments in each micro-batch. last_E: assignments in the last step, or zeros.
        in_flight: micro-batches whose forward passes are done when a backward pass comes, itself included.
    """
    weights, given = counts_ME.sum(dim=1) / counts_ME.sum(), []
    for m in range(len(counts_ME)):
        seen, to_come = counts_ME[: m + in_flight].sum(dim=0), counts_ME[m + in_flight :].sum()
        estimate = seen + to_come * last_E / last_E.sum().clamp(min=1)
        estimate = estimate / estimate.sum()
        owed = sum((weights[j] * (estimate - given[j]) for j in range(m)), torch.zeros_like(estimate))
        given.append(estimate + FEEDBACK * owed / weights[m:].sum())
    return torch.stack(given)
