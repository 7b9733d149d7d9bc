"""Whether replicas of weights are the same, bit for bit: what differs was damaged in some memory or on some way."""

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from parallel.collectives import gather_objects, max_over

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(x: Tensor) -> Tensor:
    """int64, the sum of a tensor's words: any one that differs changes it."""
    return x.detach().contiguous().flatten().view(WORDS[x.element_size()]).sum(dtype=torch.int64)


def damaged_replicas(
    parameters: Sequence[tuple[str, Tensor]], of_expert: Sequence[bool], groups: ProcessGroupCollection
) -> list[str]:
    """Parameters that are not the same on all data-parallel ranks that hold them, with the process; empty if all are.

    Every process calls it, and gets the same answer. Where two ranks differ there is no telling which of them is right.

    Args:
        of_expert: of each parameter, whether the ranks that hold it too are those of an expert.
    """
    names, of_expert_P = [name for name, _ in parameters], torch.tensor(of_expert)
    bits = torch.stack([bits_of(parameter) for _, parameter in parameters])
    apart = torch.zeros(len(names), dtype=torch.bool)
    for own, group in ((~of_expert_P, groups.dp_cp), (of_expert_P, groups.expt_dp)):
        part = bits[own.to(bits.device)]
        apart[own] = (max_over(part, group) != -max_over(-part, group)).cpu()
    found = [name for name, damaged in zip(names, apart.tolist(), strict=True) if damaged]
    return [f"{name} (process {rank})" for rank, own in enumerate(gather_objects(found)) for name in own]
