"""Which rows go where between the ranks that hold a layer's experts, and in which order they are computed there.

A token's row travels once to each part of the experts that has any of its own, not once for each expert; with it go
its probabilities there and which rows they belong to. Where it arrives, the experts' first product reads it as often
as it is asked for, and what they make of it is added up before one row returns.

Where the ranks lie evenly in several NVLink domains, it travels in two such legs: over the network once to each domain
that has any of its experts, to the rank with the sender's own place there, and from that one to the ranks of the domain
that hold them; what those return is added up before one row goes back over the network.

Shape suffixes: T tokens, K experts of a token, P ranks of a leg's group, S parts that its experts are cut into (P /
ranks of an expert), E experts of a part, M rows that are sent, R rows that arrive, N assignments of a token to an
expert; D domains, L ranks of one, C parts of the experts in one, X numbers for a part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.layers.rows import invert, permute, reorder, unpermute
from parallel.collectives import HostNumbers, PendingRows, gather_counts, start_all_to_all

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


def _used(chosen_TK: Tensor, parts: int, each: int) -> Tensor:
    """[T, S]: 1 for each part of so many experts in which a token has any."""
    used = torch.zeros(len(chosen_TK), parts + 1, dtype=torch.int32, device=chosen_TK.device)
    return used.scatter_(1, chosen_TK // each, 1)[:, :parts]


@dataclass
class Sizes:
    """The counts of a leg that the host knows.

    Attributes:
        parts, choices: rows and assignments for each part of the experts.
        received, received_choices: rows and assignments from each rank.
    """

    parts: list[int]
    choices: list[int]
    received: list[int]
    received_choices: list[int]


class Leg:
    """One exchange of rows: from tokens to the holders of their experts, or on the way there.

    Args:
        chosen_TK: the experts of each token, from the first one of these parts on; their number where it has none.
        parts, each: parts that the experts are cut into, experts of one. copies: ranks that get a part's rows each.
    Attributes:
        rows_S: rows for each part of the experts. inverse_TK: the row that is sent of each token for an expert; -1
            where an earlier expert's does; once `settle` was called.
        received_P, received_PE: rows from each rank, and assignments to each expert of this part; to be given.
        sizes: those of the host; to be given before rows travel.
    """

    received_P: Tensor
    received_PE: Tensor
    sizes: Sizes

    def __init__(self, chosen_TK: Tensor, parts: int, each: int, group, copies: int = 1):
        self.group, self.copies = group, copies
        self._tokens, self._parts = len(chosen_TK), parts
        used_TS = _used(chosen_TK, parts, each)
        # The last row of each token and part, counted from 1.
        self._ends = used_TS.T.flatten().cumsum(0)
        self.rows_S = used_TS.sum(0)
        self._part_TK = chosen_TK // each

    def settle(self) -> None:
        """Works out which row is whose."""
        part_TK, (_, k) = self._part_TK, self._part_TK.shape
        there_TK = part_TK.clamp(max=self._parts - 1)
        row_TK = self._ends.view(self._parts, self._tokens).T.gather(1, there_TK) - 1
        earlier_TK = (part_TK[:, :, None] == part_TK[:, None, :]).tril(-1).any(dim=-1)
        self.inverse_TK = row_TK.masked_fill(earlier_TK | (part_TK == self._parts), -1)
        first_S = self.rows_S.cumsum(0) - self.rows_S
        self._place_TK = (row_TK - first_S[there_TK]) * k + torch.arange(k, device=row_TK.device)

    def routes(self, probs_N: Tensor, order_N: Tensor) -> Tensor:
        """[N, 2], what tells of each assignment where it is computed: its probability, and as a number its place: K
        places for each row that goes there.

        Args:
            probs_N: sorted by expert, as order_N is: places in [T, K].
        """
        return torch.stack([probs_N, self._place_TK.flatten()[order_N].to(probs_N.dtype)], dim=1)

    def start_routes(self, routes_N2: Tensor) -> PendingRows:
        """Sends what `routes` made."""
        sizes = self.sizes
        routes_N2 = repeat_parts(routes_N2[: sum(sizes.choices)], sizes.choices, self.copies)
        return start_all_to_all(routes_N2, self.to_all(sizes.choices), sizes.received_choices, self.group)

    def start_rows(self, x_TH: Tensor) -> PendingRows:
        """Sends tokens, one row for each part of the experts that a token uses."""
        number = torch.arange(1, sum(self.sizes.parts) + 1, device=self._ends.device)
        self._source_M = torch.searchsorted(self._ends, number) % max(1, self._tokens)
        rows = repeat_parts(permute(x_TH, self._source_M, self.inverse_TK), self.sizes.parts, self.copies)
        return start_all_to_all(rows, self.to_all(self.sizes.parts), self.sizes.received, self.group)

    def start_results(self, results_RH: Tensor) -> PendingRows:
        """Sends what became of the rows that arrived back to where they came from."""
        return start_all_to_all(results_RH, self.sizes.received, self.to_all(self.sizes.parts), self.group)

    def combine(self, results: PendingRows) -> Tensor:
        """[T, H]: the results of each token's rows, added up."""
        return unpermute(add_parts(results.wait(), self.sizes.parts, self.copies), self._source_M, self.inverse_TK)

    def arrived(self, routes_N2: Tensor) -> tuple[Tensor, Tensor]:
        """Of the assignments that arrived with their rows, sorted by expert: their probabilities, and their places, K
        for each row."""
        k = self.inverse_TK.shape[1]
        there, back = self.by_expert()
        routes_N2 = reorder(routes_N2, there, back)
        first_P = self.received_P.cumsum(0) - self.received_P
        first_N = first_P.repeat_interleave(self.received_PE.sum(1), output_size=len(there))[there]
        return routes_N2[:, 0].contiguous(), routes_N2[:, 1].detach().long() + first_N * k

    def by_row(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Of the places of `arrived`: their rows, and the assignments in each of a row's places ([R, K], see
        `model.layers.rows`)."""
        k, rows = self.inverse_TK.shape[1], sum(self.sizes.received)
        return place_N // k, invert(place_N, rows * k).view(rows, k)

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """The permutation from assignments as they arrive, by (rank, expert), to those by (expert, rank), and its
        inverse.

        Both orders consist of the same blocks: a place differs by how far its block's start is moved. No sort.
        """
        number, counts_PE = sum(self.sizes.received_choices), self.received_PE
        arrived = _starts(counts_PE)
        ordered = _starts(counts_PE.T).T
        index, moved = torch.arange(number, device=counts_PE.device), ordered - arrived
        there = index - moved.T.flatten().repeat_interleave(counts_PE.T.flatten(), output_size=number)
        back = index + moved.flatten().repeat_interleave(counts_PE.flatten(), output_size=number)
        return there, back

    def to_all(self, sizes: list[int]) -> list[int]:
        """To each rank, from numbers for each part."""
        return [size for size in sizes for _ in range(self.copies)]


class DispatchPlan:
    """The counts of one exchange: started when it is made, on the host once `wait` was called.

    Args:
        chosen_TK: the experts of this rank's tokens; their number where a token was dropped. counts: how often each
            expert of the layer is among them. experts: the local `Experts`. domains: see `parallel.domains`.
    Attributes:
        first: the leg that tokens leave by. received_E: assignments to each local expert.
        fullest: most that a rank receives, over an even share. network_rows: rows that leave for other domains.
        chunk: rows that the experts should compute at once; None: all.
    """

    def __init__(self, chosen_TK: Tensor, counts: Tensor, group, experts, domains):
        self.group, self.experts, self._domains = group, experts, domains
        self._copies = experts.etp_group.size()
        sent_SE = counts.view(-1, experts.local)
        (tokens, self._k), parts = chosen_TK.shape, len(sent_SE)
        self._require_exact(tokens)
        self._two_legs = domains.across is not None
        columns = [sent_SE]
        if self._two_legs:
            number = domains.across.size()
            self.first = Leg(chosen_TK, number, counts.numel() // number, domains.across)
            columns.append(_used(chosen_TK, parts, experts.local).sum(0)[:, None])
            columns.append(self.first.rows_S.repeat_interleave(parts // number, output_size=parts)[:, None])
        else:
            self.first = Leg(chosen_TK, parts, experts.local, group, self._copies)
            columns.append(self.first.rows_S[:, None])
        everywhere_PSX = gather_counts(torch.cat(columns, dim=1), group)
        lists = self._count_two_legs(everywhere_PSX) if self._two_legs else self._count(everywhere_PSX, sent_SE)
        self._sizes = [x.numel() for x in lists]
        self._numbers = HostNumbers(torch.cat(lists))
        self.first.settle()  # while the counts are on their way to the host
        self.fullest = 0.0
        self.chunk: int | None = None

    def _require_exact(self, tokens: int) -> None:
        if tokens * self._k > EXACT:
            raise RuntimeError(
                f"{tokens} tokens of {self._k} experts each are more assignments than {EXACT:,} on a process"
            )

    def _count(self, everywhere_PSX: Tensor, sent_SE: Tensor) -> list[Tensor]:
        leg, experts = self.first, self.experts
        received_PX = everywhere_PSX[:, experts.ep_group.rank()]
        leg.received_PE, leg.received_P = received_PX[:, :-1], received_PX[:, -1]
        self.received_E = leg.received_PE.sum(0)
        by_part_SX = everywhere_PSX.sum(0)
        lists = [leg.rows_S, sent_SE.sum(1), leg.received_P, leg.received_PE.sum(1)]
        return [*lists, by_part_SX[:, -1], by_part_SX[:, :-1].sum(1)]

    def _count_two_legs(self, everywhere_PSX: Tensor) -> list[Tensor]:
        """The same for the first leg, and for the second one all that it will need."""
        leg, inside, across, e = self.first, self._domains.inside, self._domains.across, self.experts.local
        here, place, part = across.rank(), inside.rank(), inside.rank() // self._copies
        everywhere_DLDCX = everywhere_PSX.view(across.size(), inside.size(), across.size(), -1, e + 2)
        own_DCX, arriving_DCX = everywhere_DLDCX[here, place], everywhere_DLDCX[:, place, here]
        leg.received_P, leg.received_PE = arriving_DCX[:, 0, -1], arriving_DCX[:, :, :e].flatten(1)
        self._passed_E = leg.received_PE.sum(0)
        landing_LX = everywhere_DLDCX[:, :, here, part].sum(0)
        self._landing_P, self._landing_PE = landing_LX[:, e], landing_LX[:, :e]
        self.received_E = self._landing_PE.sum(0)
        passed_CX, by_part_SX = arriving_DCX.sum(0), everywhere_PSX.sum(0)
        passing = everywhere_DLDCX[:, :, :, 0, -1].sum(0).flatten()
        lists = [leg.rows_S, own_DCX[:, :, :e].sum((1, 2)), leg.received_P, leg.received_PE.sum(1)]
        lists += [by_part_SX[:, e], by_part_SX[:, :e].sum(1)]
        return [*lists, passed_CX[:, e], passed_CX[:, :e].sum(1), self._landing_P, self._landing_PE.sum(1), passing]

    def wait(self) -> None:
        """Waits for the counts alone: whatever else was queued on the GPU goes on.

        Raises:
            RuntimeError: on every rank, before any row is sent, if one has no memory for its rows.
        """
        numbers = iter(self._numbers.wait())
        parts, choices, received, received_choices, rows, by_part, *second = (
            [next(numbers) for _ in range(size)] for size in self._sizes
        )
        last = self.first.sizes = Sizes(parts, choices, received, received_choices)
        passing = 0
        if second:
            *lists, passing_everywhere = second
            self._require_exact(max(passing_everywhere))
            passing, last = sum(received), Sizes(*lists)
            self._second_sizes = last
        self.network_rows = self._domains.leaving(self.first.to_all(parts))
        even = sum(by_part) * self._copies / self.group.size()
        self.fullest = max(by_part) / max(even, 1.0)
        if self.fullest > UNEVEN:
            self.chunk = max(1, int(sum(last.received) * even / max(1, sum(last.received_choices))))
            self._refuse_what_does_not_fit(last, passing, max(rows), even)

    def second(self, place_N: Tensor) -> Leg | None:
        """The leg from where rows arrived to the holders of their experts; None if they have arrived there.

        Args:
            place_N: see `Leg.arrived`.
        """
        if not self._two_legs:
            return None
        expert, passed, rows = self._passed_E.numel(), len(place_N), sum(self.first.sizes.received)
        number_N = torch.arange(expert, device=place_N.device).repeat_interleave(self._passed_E, output_size=passed)
        chosen_RK = place_N.new_full((rows * self._k,), expert)
        chosen_RK[place_N] = number_N
        local = self.experts.local
        leg = Leg(chosen_RK.view(rows, self._k), expert // local, local, self._domains.inside, self._copies)
        leg.received_P, leg.received_PE, leg.sizes = self._landing_P, self._landing_PE, self._second_sizes
        leg.settle()
        return leg

    def _refuse_what_does_not_fit(self, last: Sizes, passing: int, most: int, even: float) -> None:
        weight = self.experts.weight1
        width, hidden = weight.shape[-2:]
        at_once = min(sum(last.received_choices), int(even) + 1) * (2 * hidden + WIDTH_BUFFERS * width)
        needs = weight.element_size() * ((sum(last.received) + passing) * ROW_BUFFERS * hidden + at_once)
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
    return torch.cat([part.view(copies, size, x.shape[1]).sum(dim=0) for part, size in zip(parts, sizes, strict=True)])
