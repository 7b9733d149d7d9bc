"""The needle probe: what a model makes of words that it has read once, far back.

Into a held-out sequence, taken as one document, a needle of random tokens is laid at some depth, and again at its end.
What the end costs is what the model did not find; what the needle costs where it first stands is what it costs to one
that finds nothing. As the passkey test of Mohtashami and Jaggi, "Landmark Attention", 2023, but in nats, so that small
and young models show something too.

Shape suffixes: R rows, L length, S = L + 1, T = R*L.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from data.order.batches import Batch
from parallel.collectives import from_last, sum_over
from train.job.build import Job
from train.use.heldout import heldout_metrics, read_heldout
from train.watch import metrics

DEPTHS = (0, 25, 50, 75)  # percent of the way from the start to the needle's second place
NEEDLE, CUE = 16, 4  # tokens of a needle; those of its second place that are given
FOUND = math.log(2)  # nats: a token that costs less has more than half of the probability


def needle_places(length: int, depth: int) -> tuple[int, int]:
    """Where a needle stands in a sequence of so many tokens, first and again."""
    last = length + 1 - NEEDLE
    return (last - NEEDLE) * depth // 100, last


def with_needle(batch: Batch, depth: int, vocab_size: int) -> Batch:
    """The rows of a batch, each one document, with a needle of their own; the same for a row on any process."""
    tokens_RS = batch.tokens.clone()
    first, last = needle_places(tokens_RS.shape[1] - 1, depth)
    for row in tokens_RS:
        generator = torch.Generator().manual_seed(int(row.sum()))
        needle = torch.randint(0, vocab_size, (NEEDLE,), generator=generator)
        row[first : first + NEEDLE] = needle
        row[last : last + NEEDLE] = needle
    documents = torch.where((batch.documents >= 0).any(dim=1, keepdim=True), 0, -1)
    return Batch(tokens_RS, documents.expand_as(batch.documents).contiguous().to(batch.documents.dtype))


class Needles:
    """Sums what the needles of one depth cost, first and again, and how many of their tokens were found."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._sums = torch.zeros(4, dtype=torch.float64)  # of losses: again, first; tokens found; tokens

    def add(self, documents_RS: Tensor, losses_T: Tensor, valid_T: Tensor) -> None:
        """Notes a micro-batch, as `heldout_metrics` shows it."""
        losses_RL = losses_T.double().cpu().view(len(documents_RS), -1)
        real_R = valid_T.cpu().view_as(losses_RL).any(dim=1)
        # The token before predicts: the loss at place p is that of the token at p + 1.
        first, again = (
            losses_RL[real_R, place + CUE - 1 : place + NEEDLE - 1]
            for place in needle_places(losses_RL.shape[1], self._depth)
        )
        found = torch.stack([again.sum(), first.sum(), (again < FOUND).sum(), torch.tensor(again.numel())])
        self._sums += found.double()

    def values(self, job: Job) -> dict[str, float]:
        """Nats a token of the needle again and at first, and the share found, the same on every process."""
        total = from_last(sum_over(self._sums.to(job.device), job.groups.dp_cp), job.groups.pp).tolist()
        again, first, found = (value / max(1.0, total[3]) for value in total[:3])
        names = (metrics.NEEDLE_LOSS, metrics.NEEDLE_FIRST_LOSS, metrics.NEEDLE_FOUND)
        return {f"{name}/at_{self._depth}": x for name, x in zip(names, (again, first, found), strict=True)}


def needle_metrics(job: Job, samples: int) -> dict[str, float]:
    """The probe at every depth, on so many held-out sequences; where rows are whole on a process."""
    values: dict[str, float] = {}
    for depth in DEPTHS:
        needles = Needles(depth)
        heldout_metrics(job, _batches(job, samples, depth), needles.add)
        values |= needles.values(job)
    return values


def _batches(job: Job, samples: int, depth: int) -> Iterator[Batch]:
    for batch in read_heldout(job, samples):
        yield with_needle(batch, depth, job.dataset.vocab_size)


def needle_lines(values: dict[str, float]) -> list[str]:
    """What was found, a line a depth."""
    return [
        f"  needle at {depth} %: {values[f'{metrics.NEEDLE_LOSS}/at_{depth}']:.4f} nats a token "
        f"({values[f'{metrics.NEEDLE_FIRST_LOSS}/at_{depth}']:.4f} unseen), "
        f"{values[f'{metrics.NEEDLE_FOUND}/at_{depth}']:.1%} found"
        for depth in DEPTHS
        if f"{metrics.NEEDLE_LOSS}/at_{depth}" in values
    ]
