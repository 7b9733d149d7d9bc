"""Which rows go where between the ranks that hold a layer's experts, and in which order they are computed there.

A token's row travels once to each part of the experts that has any of its own, not once for each expert; with it go
its probabilities there and which rows they belong to. Where it arrives, the experts' first product reads it as often
as it is asked for, and what they make of it is added up before one row returns.

Shape suffixes: T tokens, K experts of a token, P ranks of the group, S parts that the experts are cut into (P / ranks
of an expert), E local experts, M rows that are sent, R rows that arrive, N assignments of a token to an expert.
"""

import torch
from torch import Tensor

from model.layers.rows import invert, reorder
from parallel.collectives import HostNumbers, gather_counts

# Times an even share, which every rank works out from the same numbers. Where one receives more assignments, experts
# compute about an even share at a time, and ranks ask each other whether all have memory for what comes. All tokens on
# one of two ranks are 2 even shares, so that the bound lies below.
UNEVEN = 1.5
EXACT = 2**24  # whole numbers up to this are exact in float32
# Of a row's width, at most, for each row that arrives: itself, its result, the gradients of both. Of an expert's, for
# each assignment that is computed at once: both halves of its first product, their product, the gradients of the three.
ROW_BUFFERS, WIDTH_BUFFERS = 4, 6


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still take; on a CPU the operating system sees to that."""
    if device.type != "cuda":
        return 2**62
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class DispatchPlan:
    """The counts of one exchange: started when it is made, on the host once `wait` was called.

    Args:
        chosen_TK: the experts of this rank's tokens; their number where a token was dropped. counts: how often each
            expert of the layer is among them. experts: the local `Experts`.
    Attributes:
        inverse_TK: the row that is sent of each token for an expert; -1 where an earlier expert's does.
        parts, choices: rows and assignments for each part of the experts.
        received, received_choices: rows and assignments from each rank.
        received_E: assignments to each local expert. fullest: most that a rank receives, over an even share.
        chunk: rows that the experts should compute at once; None: all.
    """

    def __init__(self, chosen_TK: Tensor, counts: Tensor, group, experts):
        self.group, self.experts, self.copies = group, experts, experts.etp_group.size()
        sent_SE = counts.view(-1, experts.local)
        (tokens, k), parts = chosen_TK.shape, len(sent_SE)
        if tokens * k > EXACT:
            raise RuntimeError(f"{tokens} tokens of {k} experts each are more assignments than {EXACT:,} on a process")
        part_TK = chosen_TK // experts.local
        used_TS = torch.zeros(tokens, parts + 1, dtype=torch.int32, device=counts.device).scatter_(1, part_TK, 1)
        # The last row of each token and part, counted from 1.
        self._ends = used_TS[:, :parts].T.flatten().cumsum(0)
        ends_S = self._ends[tokens - 1 :: tokens]
        rows_S = ends_S.diff(prepend=ends_S.new_zeros(1))
        everywhere_PSX = gather_counts(torch.cat([sent_SE, rows_S[:, None]], dim=1), group)
        received_PX = everywhere_PSX[:, experts.ep_group.rank()]
        self.received_PE, self._received_P = received_PX[:, :-1], received_PX[:, -1]
        self.received_E = self.received_PE.sum(0)
        by_part_SX = everywhere_PSX.sum(0)
        lists = [rows_S, sent_SE.sum(1), self._received_P, self.received_PE.sum(1)]
        lists += [by_part_SX[:, -1], by_part_SX[:, :-1].sum(1)]
        self._sizes = [x.numel() for x in lists]
        self._numbers = HostNumbers(torch.cat(lists))
        # What follows is done while the counts are on their way to the host.
        there_TK = part_TK.clamp(max=parts - 1)
        row_TK = self._ends.view(parts, tokens).T.gather(1, there_TK) - 1
        earlier_TK = (part_TK[:, :, None] == part_TK[:, None, :]).tril(-1).any(dim=-1)
        self.inverse_TK = row_TK.masked_fill(earlier_TK | (part_TK == parts), -1)
        self._place_TK = (row_TK - (ends_S - rows_S)[there_TK]) * k + torch.arange(k, device=counts.device)
        self.parts: list[int] = []
        self.received: list[int] = []
        self.fullest = 0.0
        self.chunk: int | None = None

    def routes(self, probs_N: Tensor, order_N: Tensor) -> Tensor:
        """[N, 2], what tells of each assignment where it is computed: its probability, and as a number its place: K
        places for each row that goes there.

        Args:
            probs_N: sorted by expert, as order_N is: places in [T, K].
        """
        return torch.stack([probs_N, self._place_TK.flatten()[order_N].to(probs_N.dtype)], dim=1)

    def wait(self) -> None:
        """Waits for the counts alone: whatever else was queued on the GPU goes on.

        Raises:
            RuntimeError: on every rank, before any row is sent, if one has no memory for its rows.
        """
        numbers = iter(self._numbers.wait())
        lists = [[next(numbers) for _ in range(size)] for size in self._sizes]
        self.parts, self.choices, self.received, self.received_choices, rows, choices = lists
        even = sum(choices) * self.copies / self.group.size()
        self.fullest = max(choices) / max(even, 1.0)
        if self.fullest > UNEVEN:
            self.chunk = max(1, int(sum(self.received) * even / max(1, sum(self.received_choices))))
            self._refuse_what_does_not_fit(max(rows), even)

    def sent_to_all(self, sizes: list[int]) -> list[int]:
        """To each rank, from numbers for each part."""
        return [size for size in sizes for _ in range(self.copies)]

    def _refuse_what_does_not_fit(self, most: int, even: float) -> None:
        weight = self.experts.weight1
        width, hidden = weight.shape[-2:]
        at_once = min(sum(self.received_choices), int(even) + 1) * (2 * hidden + WIDTH_BUFFERS * width)
        needs = weight.element_size() * (sum(self.received) * ROW_BUFFERS * hidden + at_once)
        own = torch.tensor([needs, free_bytes(weight.device)], device=weight.device)
        needed_P2 = gather_counts(own, self.group).tolist()
        short = [(rank, needs, has) for rank, (needs, has) in enumerate(needed_P2) if needs > has]
        if short:
            rank, needs, has = short[0]
            raise RuntimeError(
                f"experts are too unevenly used: rank {rank} of {self.group.size()} that share a layer's experts would "
                f"compute {self.fullest:.1f} x an even share of {even:,.0f} assignments, and up to {most:,} rows of "
                f"tokens arrive at a rank, which take up to {needs / 1e9:.3g} GB there where {has / 1e9:.3g} GB are "
                f"free; no row was sent. A larger balance.weight, a balance.capacity, a smaller batch.micro or "
                f"parallel.recompute=full mend it"
            )

    def source_M(self) -> Tensor:
        """The token of each row that is sent."""
        number = torch.arange(1, sum(self.parts) + 1, device=self._ends.device)
        return torch.searchsorted(self._ends, number) % len(self.inverse_TK)

    def arrived(self, routes_N2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the assignments that arrived with their rows, sorted by expert: their probabilities, their rows, and
        the assignments in each of a row's places ([R, K], see `model.layers.rows`)."""
        k, rows = self.inverse_TK.shape[1], sum(self.received)
        there, back = self.by_expert()
        routes_N2 = reorder(routes_N2, there, back)
        first_P = self._received_P.cumsum(0) - self._received_P
        first_N = first_P.repeat_interleave(self.received_PE.sum(1), output_size=len(there))[there]
        place_N = routes_N2[:, 1].detach().long() + first_N * k
        return routes_N2[:, 0].contiguous(), place_N // k, invert(place_N, rows * k).view(rows, k)

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """The permutation from assignments as they arrive, by (rank, expert), to those by (expert, rank), and its
        inverse.

        Both orders consist of the same blocks: a place differs by how far its block's start is moved. No sort.
        """
        number, counts_PE = sum(self.received_choices), self.received_PE
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
