"""Held-out loss of parts of the text: of each source, and of tokens by their place in their document."""

import sys
from statistics import fmean

import torch
from torch import Tensor

from data.errors import CorpusError
from data.secrets import hide
from parallel.collectives import from_last, sum_over
from train.job.build import Job
from train.use.evaluate import heldout_metrics, read_heldout
from train.watch import metrics

PARTED = (metrics.HELDOUT_LM_LOSS, metrics.HELDOUT_BITS_PER_BYTE)


def places(documents_RS: Tensor) -> Tensor:
    """int64 [R, L]: how many tokens of its document stand before each token of a row, the last one left out."""
    ids_RL = documents_RS[:, :-1]
    index_RL = torch.arange(ids_RL.shape[1]).expand_as(ids_RL)
    first_RL = torch.ones_like(ids_RL, dtype=torch.bool)
    first_RL[:, 1:] = ids_RL[:, 1:] != ids_RL[:, :-1]
    return index_RL - torch.where(first_RL, index_RL, 0).cummax(dim=1).values


class ByPlace:
    """Sums losses by the place of a token in its document, in buckets: behind 0, 1-2, 3-6, 7-14 ... others."""

    def __init__(self, length: int) -> None:
        self._sums = torch.zeros(2, length.bit_length(), dtype=torch.float64)  # of losses, of targets

    def add(self, documents_RS: Tensor, losses_T: Tensor, valid_T: Tensor) -> None:
        """Notes a micro-batch: the ids of its documents, and its tokens' losses, of which some are valid."""
        bucket_T = (places(documents_RS).flatten() + 1).double().log2().long()
        for row, values_T in zip(
            self._sums, (losses_T.double().cpu(), torch.ones(len(bucket_T)).double()), strict=True
        ):
            row.index_add_(0, bucket_T, values_T * valid_T.cpu())

    def values(self, job: Job) -> dict[str, float]:
        """Mean losses by bucket, the same on every process; buckets without a target are left out."""
        total = from_last(sum_over(self._sums.to(job.device), job.groups.dp_cp), job.groups.pp).cpu()
        return {
            f"{metrics.HELDOUT_LM_LOSS}/after_{2**bucket - 1}": (losses / count).item()
            for bucket, (losses, count) in enumerate(total.T)
            if count
        }


def source_metrics(job: Job, samples: int) -> dict[str, float]:
    """Loss and bits a byte of each of several sources, and their means over sources (macro); nothing for one."""
    found: dict[str, list[float]] = {name: [] for name in PARTED}
    values: dict[str, float] = {}
    for source in job.dataset.sources if len(job.dataset.sources) > 1 else ():
        try:
            own = heldout_metrics(job, read_heldout(job, samples, source))
        except CorpusError as error:
            if job.is_first:
                print(f"warning: {hide(source.path)} is left out of the parts: {hide(str(error))}", file=sys.stderr)
            continue
        for name in PARTED:
            values[f"{name}/{hide(source.path)}"] = own[name]
            found[name].append(own[name])
    return values | {f"{name}/macro": fmean(each) for name, each in found.items() if each}


def part_lines(values: dict[str, float]) -> list[str]:
    """The losses of parts, one a line."""
    return [f"  {name} {value:.4f}" for name, value in values.items() if name.startswith(f"{PARTED[0]}/")]
