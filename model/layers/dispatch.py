"""How many rows go where between the ranks that hold a layer's experts, and in which order they are computed there.

Shape suffixes: P ranks of the group, S parts that the experts are cut into (P / ranks of an expert), E local experts.
"""

import torch
from torch import Tensor

from parallel.collectives import HostNumbers, gather_counts

# Times an even share, which every rank works out from the same numbers. Where one receives more rows, experts compute
# an even share at a time, and ranks ask each other whether all have memory for what comes.
UNEVEN = 2.0
BUFFERS = 6  # of a row's width that a received row takes at most: arrived, sorted, result, sorted back, two gradients


class DispatchPlan:
    """The counts of one all-to-all: started when it is made, on the host once `wait` was called.

    Args:
        counts: rows of this rank for each expert of the layer. experts: the local `Experts`.
    Attributes:
        parts: rows for each part of the experts. send, receive: rows to and from each rank.
        received_E: rows for each local expert. fullest: most rows that a rank receives, over an even share.
        chunk: rows that the experts should compute at once; None: all.
    """

    def __init__(self, counts: Tensor, group, experts):
        self.group, self.experts, self.copies = group, experts, experts.etp_group.size()
        sent_SE = counts.view(-1, experts.local)
        everywhere_PSE = gather_counts(sent_SE, group)
        self.received_PE = everywhere_PSE[:, experts.ep_group.rank()]
        self.received_E = self.received_PE.sum(0)
        by_part_S = everywhere_PSE.sum((0, 2))
        self._numbers = HostNumbers(torch.cat([sent_SE.sum(1), self.received_PE.sum(1), by_part_S]))
        self.parts: list[int] = []
        self.receive: list[int] = []
        self.fullest = 0.0
        self.chunk: int | None = None

    def wait(self) -> None:
        """Waits for the counts alone: whatever else was queued on the GPU goes on.

        Raises:
            RuntimeError: on every rank, before any row is sent, if one has no memory for its rows.
        """
        numbers, ranks = self._numbers.wait(), self.group.size()
        parts = ranks // self.copies
        self.parts, self.receive, totals = numbers[:parts], numbers[parts : parts + ranks], numbers[parts + ranks :]
        self.send = [size for size in self.parts for _ in range(self.copies)]
        even = sum(totals) * self.copies / ranks
        self.fullest = max(totals) / max(even, 1.0)
        if self.fullest > UNEVEN:
            self.chunk = max(1, int(even))
            self._refuse_what_does_not_fit(totals, even)

    def _refuse_what_does_not_fit(self, totals: list[int], even: float) -> None:
        weight = self.experts.weight1
        if not weight.is_cuda:
            return
        row = BUFFERS * weight.shape[-1] * weight.element_size()
        free, _ = torch.cuda.mem_get_info(weight.device)
        free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        own = torch.tensor([sum(self.receive) * row, free], device=weight.device)
        needed_P2 = gather_counts(own, self.group).tolist()
        short = [(rank, needs, has) for rank, (needs, has) in enumerate(needed_P2) if needs > has]
        if short:
            rank, needs, has = short[0]
            raise RuntimeError(
                f"experts are too unevenly used: rank {rank} of {self.group.size()} that share a layer's experts would "
                f"receive {max(totals):,} rows, {self.fullest:.1f} x an even share of {even:,.0f}, which take up to "
                f"{needs / 1e9:.1f} GB where {has / 1e9:.1f} GB are free; no row was sent. A larger balance.weight, a "
                f"smaller batch.micro or parallel.recompute=full mend it"
            )

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """The permutation from rows as they arrive, by (rank, expert), to rows by (expert, rank), and its inverse.

        Both orders consist of the same blocks: a row's place differs by how far its block's start is moved. No sort.
        """
        number, counts_PE = sum(self.receive), self.received_PE
        arrived = _starts(counts_PE)
        ordered = _starts(counts_PE.T).T
        index, moved = torch.arange(number, device=counts_PE.device), ordered - arrived
        there = index - moved.T.flatten().repeat_interleave(counts_PE.T.flatten(), output_size=number)
        back = index + moved.flatten().repeat_interleave(counts_PE.flatten(), output_size=number)
        return there, back


def _starts(counts: Tensor) -> Tensor:
    """Where each block begins, if blocks of these sizes lie one behind the other."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view(counts.shape)


def repeat_parts(x: Tensor, sizes: list[int], copies: int) -> Tensor:
    """Each of the parts of x of these sizes, ``copies`` times in a row."""
    return x if copies == 1 else torch.cat([part for part in x.split(sizes) for _ in range(copies)])


def add_parts(x: Tensor, sizes: list[int], copies: int) -> Tensor:
    """The way back of `repeat_parts`: the sum of the ``copies`` of each part."""
    if copies == 1:
        return x
    parts = x.split([size * copies for size in sizes])
    return torch.cat([part.view(copies, size, -1).sum(dim=0) for part, size in zip(parts, sizes, strict=True)])
