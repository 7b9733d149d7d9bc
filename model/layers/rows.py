"""Rows of tokens on their way to experts and back, moved by gathers alone, forwards and backwards.

A scatter-add would be slower and, on a GPU, not reproducible. Two indices describe a movement: for each row the token
that it is a copy of (``source``), and for each of a token's K places the row that stands there (``inverse``), -1 where
none does.

Shape suffixes: T tokens, K places of a token, N rows, H hidden.
"""

import torch
from torch import Tensor

from model.kernels.backends import accelerated
from model.kernels.moves import Permute, Unpermute


def count_sorted(ordered_N: Tensor, values: int) -> Tensor:
    """How often each of 0 to values - 1 stands in a sorted list; on a GPU nothing waits for the answer."""
    borders = torch.arange(values + 1, dtype=ordered_N.dtype, device=ordered_N.device)
    return torch.searchsorted(ordered_N, borders).diff()


def invert(order: Tensor, places: int | None = None) -> Tensor:
    """The inverse of a permutation; of a part of one of so many ``places``, with -1 where nothing stands."""
    inverse = order.new_full((places or order.numel(),), -1)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def sum_rows(x_NH: Tensor, index_TK: Tensor) -> Tensor:
    """out[t] = sum_k x[index[t, k]]; an index of -1 adds nothing."""
    if index_TK.numel() != x_NH.shape[0]:  # else every row stands somewhere
        x_NH = torch.cat([x_NH, x_NH.new_zeros(1, *x_NH.shape[1:])])
    return x_NH[index_TK].sum(dim=1)


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Reorders rows by a permutation, with its inverse for the gradient."""
    return Permute.apply(x, order, inverse[:, None], sum_rows)


@accelerated("model.kernels.experts")
def permute(x_TH: Tensor, source_N: Tensor, inverse_TK: Tensor) -> Tensor:
    """A copy of a token's row for each of its places that has one: out[n] = x[source[n]]."""
    return Permute.apply(x_TH, source_N, inverse_TK, sum_rows)


@accelerated("model.kernels.experts")
def unpermute(y_NH: Tensor, source_N: Tensor, inverse_TK: Tensor) -> Tensor:
    """The sum of each token's rows, the way back of `permute`: out[t] = sum_k y[inverse[t, k]]."""
    return Unpermute.apply(y_NH, source_N, inverse_TK, sum_rows)
