"""Held-out loss of parts of the text: of each source, and of tokens by their place in their document and its length."""

import sys
from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor

from data.secrets import hide
from parallel.collectives import from_last, sum_over
from train.job.build import Job
from train.use.heldout import heldout_metrics, read_heldout
from train.watch import metrics

PARTED = (metrics.HELDOUT_LM_LOSS, metrics.HELDOUT_BITS_PER_BYTE)


def places(documents_RS: Tensor) -> Tensor:
    """int64 [R, L]: how many tokens of its document stand before each token of a row, the last one left out."""
    ids_RL = documents_RS[:, :-1]
    index_RL = torch.arange(ids_RL.shape[1]).expand_as(ids_RL)
    first_RL = torch.ones_like(ids_RL, dtype=torch.bool)
    first_RL[:, 1:] = ids_RL[:, 1:] != ids_RL[:, :-1]
    return index_RL - torch.where(first_RL, index_RL, 0).cummax(dim=1).values


def lengths(documents_RS: Tensor) -> Tensor:
    """int64 [R, L]: how many tokens of its document each row holds, the row's last one left out."""
    which_RL = (places(documents_RS) == 0).flatten().cumsum(0) - 1
    return which_RL.bincount()[which_RL].view(len(documents_RS), -1)


class Buckets:
    """Sums losses by a number of each token, in buckets that double: 1, 2-3, 4-7, 8-15 ... others.

    Args:
        number: int64 [R, L], at least 1, from the ids of a micro-batch's documents [R, S]. largest: the largest number.
    """

    def __init__(self, number: Callable[[Tensor], Tensor], largest: int) -> None:
        self._number = number
        self._sums = torch.zeros(2, largest.bit_length(), dtype=torch.float64)  # of losses, of targets

    def add(self, documents_RS: Tensor, losses_T: Tensor, valid_T: Tensor) -> None:
        """Notes a micro-batch: the ids of its documents, and its tokens' losses, of which some are valid."""
        bucket_T = self._number(documents_RS).flatten().double().log2().long()
        for row, values_T in zip(
            self._sums, (losses_T.double().cpu(), torch.ones(len(bucket_T)).double()), strict=True
        ):
            row.index_add_(0, bucket_T, values_T * valid_T.cpu())

    def means(self, job: Job) -> dict[int, float]:
        """Mean losses by the first number of their bucket, the same on every process; empty buckets are left out."""
        total = from_last(sum_over(self._sums.to(job.device), job.groups.dp_cp), job.groups.pp).cpu()
        return {2**bucket: (losses / count).item() for bucket, (losses, count) in enumerate(total.T) if count}


class TextParts:
    """Held-out loss by the place of a token in its document, and by the length of its document (as rows hold it)."""

    def __init__(self, length: int) -> None:
        self._by_place = Buckets(lambda documents: places(documents) + 1, length)
        self._by_length = Buckets(lengths, length)

    def add(self, documents_RS: Tensor, losses_T: Tensor, valid_T: Tensor) -> None:
        """See `Buckets.add`."""
        self._by_place.add(documents_RS, losses_T, valid_T)
        self._by_length.add(documents_RS, losses_T, valid_T)

    def values(self, job: Job) -> dict[str, float]:
        """Losses of tokens behind 0, 1-2, 3-6 ... others, and of documents of 1, 2-3, 4-7 ... tokens."""
        by_place, by_length = self._by_place.means(job), self._by_length.means(job)
        name = metrics.HELDOUT_LM_LOSS
        values = {f"{name}/after_{first - 1}": loss for first, loss in by_place.items()}
        return values | {f"{name}/documents_of_{first}": loss for first, loss in by_length.items()}


def source_metrics(job: Job, samples: int) -> dict[str, float]:
    """Loss and bits a byte of each of several sources, and their means over sources (macro); nothing for one."""
    found: dict[str, list[float]] = {name: [] for name in PARTED}
    values: dict[str, float] = {}
    for source in job.dataset.sources if len(job.dataset.sources) > 1 else ():
        if not job.dataset.fills_heldout([source]):
            if job.is_first:
                print(f"no parts of {hide(source.path)}: its held-out text fills no sample", file=sys.stderr)
            continue
        own = heldout_metrics(job, read_heldout(job, samples, source))
        for name in (name for name in PARTED if name in own):
            values[f"{name}/{hide(source.path)}"] = own[name]
            found[name].append(own[name])
    return values | {f"{name}/macro": fmean(each) for name, each in found.items() if each}


def part_lines(values: dict[str, float]) -> list[str]:
    """The losses of parts, one a line."""
    return [f"  {name} {value:.4f}" for name, value in values.items() if name.startswith(f"{PARTED[0]}/")]
