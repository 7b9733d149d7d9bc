"""A bound on what an expert takes of a micro-batch (``balance.capacity``): its weakest assignments are dropped.

Weakest by the router's weight, over the tokens of all ranks together; of equal weights the later tokens' are, and
padding's before all others'. So the same ones are dropped however the tokens are spread over processes. The bound is
found digit by digit of a key that orders an expert's assignments: each digit takes one sum over the ranks of how many
have which, and no weight travels.

Shape suffixes: T tokens, K experts per token, E experts.
"""

import math

import torch
from torch import Tensor

from model.layers.balance import RoutedTokens
from parallel.collectives import HostNumbers, sum_over

WEIGHT_BITS = 24  # of a weight, as float32 has them between 0.5 and 1
DIGIT = 8  # bits that are found at once


class Capacity:
    """Drops what is more than ``share`` times an even share of a micro-batch's assignments for each expert."""

    def __init__(self, share: float, experts: int, pg_collection):
        self.share, self.experts = share, experts
        self.dp_group, self.cp_group, self.group = pg_collection.dp, pg_collection.cp, pg_collection.tp_dp_cp

    def drop(self, weights_TK: Tensor, chosen_TK: Tensor, tokens: RoutedTokens) -> Tensor:
        """The chosen experts [T, K], with E where the assignment is dropped; on a GPU the host waits."""
        length = tokens.length * self.cp_group.size()
        everyone = self.dp_group.size() * tokens.rows * length
        limit = math.ceil(self.share * chosen_TK.shape[1] * everyone / self.experts)
        totals_E = self._count(chosen_TK.flatten(), torch.ones_like(chosen_TK.flatten()), self.experts)
        if HostNumbers(totals_E.max()[None]).wait()[0] <= limit:
            return chosen_TK
        place_T = tokens.first + torch.arange(len(chosen_TK), device=chosen_TK.device)
        row_T = self.dp_group.rank() * tokens.rows + place_T // tokens.length
        place_T = row_T * length + self.cp_group.rank() * tokens.length + place_T % tokens.length
        valid_TK = (tokens.weight_T > 0)[:, None] & (weights_TK > 0)
        strength_TK = torch.where(valid_TK, weights_TK * (2**WEIGHT_BITS - 1), 0).long()
        key_TK = strength_TK * everyone + (everyone - 1 - place_T)[:, None]
        bits = WEIGHT_BITS + everyone.bit_length()
        least_E = self._least(key_TK.flatten(), chosen_TK.flatten(), limit, bits)
        dropped_TK = (totals_E > limit)[chosen_TK] & (key_TK < least_E[chosen_TK])
        return chosen_TK.masked_fill(dropped_TK, self.experts)

    def _least(self, key_N: Tensor, expert_N: Tensor, limit: int, bits: int) -> Tensor:
        """int64 [E]: the limit-th largest key of each expert that has so many over all ranks."""
        found_E = torch.zeros(self.experts, dtype=torch.int64, device=key_N.device)
        needed_E = torch.full_like(found_E, limit)
        for shift in reversed(range(0, bits, DIGIT)):
            # Of the assignments whose higher digits are those found: how many have which next digit.
            alike_N = key_N >> (shift + DIGIT) == found_E[expert_N]
            place_N = expert_N * 2**DIGIT + (key_N >> shift) % 2**DIGIT
            counts = self._count(place_N, alike_N.long(), self.experts * 2**DIGIT).view(self.experts, -1)
            above_ED = counts.flip(1).cumsum(1).flip(1)  # that have this digit or a larger one
            digit_E = ((above_ED >= needed_E[:, None]).sum(1) - 1).clamp(min=0)
            needed_E = needed_E - (above_ED - counts).gather(1, digit_E[:, None])[:, 0]
            found_E = found_E * 2**DIGIT + digit_E
        return found_E

    def _count(self, place_N: Tensor, ones_N: Tensor, places: int) -> Tensor:
        """int64 [places]: how many ones stand in each place, over all ranks."""
        counts = torch.zeros(places, dtype=torch.int64, device=place_N.device)
        return sum_over(counts.scatter_add_(0, place_N, ones_N), self.group)
