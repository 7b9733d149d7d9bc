"""The gradients of moving rows: what is copied forwards is summed backwards, and the other way round.

One class for each way, whatever sums a token's rows: plain torch (`model.layers.rows`) or Triton
(`model.kernels.experts`).

Shape suffixes: T tokens, K places of a token, N rows, H hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor

type SumRows = Callable[[Tensor, Tensor], Tensor]  # out[t] = sum_k x[index[t, k]]; an index of -1 adds nothing


class Permute(torch.autograd.Function):
    """out[n] = x[source[n]]."""

    @staticmethod
    def forward(ctx, x_TH: Tensor, source_N: Tensor, inverse_TK: Tensor, sum_rows: SumRows) -> Tensor:
        ctx.save_for_backward(inverse_TK)
        ctx.sum_rows = sum_rows
        return x_TH.index_select(0, source_N)

    @staticmethod
    def backward(ctx, grad_NH: Tensor):
        return ctx.sum_rows(grad_NH, *ctx.saved_tensors), None, None, None


class Unpermute(torch.autograd.Function):
    """out[t] = sum_k y[inverse[t, k]]."""

    @staticmethod
    def forward(ctx, y_NH: Tensor, source_N: Tensor, inverse_TK: Tensor, sum_rows: SumRows) -> Tensor:
        ctx.save_for_backward(source_N)
        return sum_rows(y_NH, inverse_TK)

    @staticmethod
    def backward(ctx, grad_TH: Tensor):
        return grad_TH.index_select(0, *ctx.saved_tensors), None, None, None
