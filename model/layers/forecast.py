"""Loads of the micro-batches still to come, forecast from their tokens, which are all known when a step begins.

The tokens of a micro-batch fall into a few buckets. What tokens of each bucket ask of the experts is learnt from the
micro-batches of past steps: ridge regression of their counts on their histograms, towards what the last step asked.
Where micro-batches hold text of different kinds, their histograms tell the kinds apart; where they do not, the last
step is what is left.

Shape suffixes: M micro-batches of a step, B buckets, U uses of a router, E experts.
"""

import torch
from torch import Tensor, nn

BUCKETS = 64
DECAY = 0.9  # weight of what a step taught, a step later: a router moves on
RIDGE = 0.03  # times the mean square of a bucket's counts
_SPREAD, _MODULUS = 2654435761, 2**32  # Knuth's multiplicative hash, "The Art of Computer Programming", 6.4


def histogram(tokens: Tensor, valid: Tensor) -> Tensor:
    """int64 [B]: how many valid tokens fall into each bucket."""
    bucket = (tokens.flatten() * _SPREAD) % _MODULUS * BUCKETS // _MODULUS
    counts = torch.zeros(BUCKETS, dtype=torch.int64, device=tokens.device)
    return counts.scatter_add_(0, bucket, valid.flatten().long())


class Forecast(nn.Module):
    """What one router's past steps teach of the steps to come; saved with the model, equal on all its replicas.

    Attributes:
        squares: float64 [B, B], sum of products of histograms.
        products: float64 [U, B, E], sum of products of histograms and counts.
    """

    squares: Tensor
    products: Tensor

    def __init__(self, uses: int, experts: int):
        super().__init__()
        self.register_buffer("squares", torch.zeros(BUCKETS, BUCKETS, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(uses, BUCKETS, experts, dtype=torch.float64))

    def learn(self, histogram_MB: Tensor, counts_UME: Tensor) -> None:
        """Takes in a step: its micro-batches' histograms and counts, summed over the ranks."""
        tokens = histogram_MB.double()
        self.squares.mul_(DECAY).add_(tokens.T @ tokens)
        self.products.mul_(DECAY).add_(tokens.T @ counts_UME.double())

    def counts(self, histogram_MB: Tensor, last_UE: Tensor) -> Tensor:
        """float64 [U, M, E], expected of micro-batches with these histograms. ``last_UE``: counts of the last step."""
        tokens = histogram_MB.double()
        plain_UE = last_UE / tokens.sum().clamp(min=1)  # of any token, were the kinds of tokens all alike
        strength = (RIDGE * self.squares.diagonal().mean()).clamp(min=1.0)
        system = self.squares + strength * torch.eye(BUCKETS, dtype=torch.float64, device=tokens.device)
        unexplained = self.products - self.squares.sum(dim=1)[:, None] * plain_UE[:, None]
        beyond_UBE = torch.cholesky_solve(unexplained, torch.linalg.cholesky_ex(system).L)
        return (tokens @ (beyond_UBE + plain_UE[:, None])).clamp(min=0)
