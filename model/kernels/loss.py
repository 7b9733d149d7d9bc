"""Triton kernels of `model.layers.loss`: logits are read twice and turned into their gradient
in place.

    m, s, t: largest logit, sum of exp(logit - m), target's logit of each row; then, over the tensor-parallel group,
    loss = log(sum of exp) - target logit      dlogit = (exp(logit) / sum of exp - [is the target]) weight

Shape suffixes as in `model.layers.loss`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.collectives import max_over, sum_over

BLOCK = 4096
WARPS = 8


@triton.jit
def _row_sums(logits, target, out, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * WIDTH
    top = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(own + column, column < WIDTH, float("-inf")).to(tl.float32)
        # One for all lanes: the exponential of each column is then the only one that is taken.
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
    wanted = tl.load(target + row)
    here = (wanted >= 0) & (wanted < WIDTH)
    tl.store(out + row, top)
    tl.store(out + rows + row, tl.sum(total, 0))
    tl.store(out + 2 * rows + row, tl.load(own + tl.where(here, wanted, 0), here, 0.0).to(tl.float32))


@triton.jit
def _row_gradients(logits, target, weight, log_sum, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * WIDTH + column
    probability = tl.exp(tl.load(place, column < WIDTH, float("-inf")).to(tl.float32) - tl.load(log_sum + row))
    grad = (probability - tl.where(column == tl.load(target + row), 1.0, 0.0)) * tl.load(weight + row)
    tl.store(place, grad, column < WIDTH)


def softmax_gradient(
    logits_CV: Tensor, target_C: Tensor, weight_C: Tensor | None, group
) -> tuple[Tensor, Tensor | None]:
    """See `model.layers.loss.softmax_gradient`."""
    rows, width = logits_CV.shape
    local_C = target_C - group.rank() * width
    sums = torch.empty(3, rows, dtype=torch.float32, device=logits_CV.device)
    _row_sums[(rows,)](logits_CV, local_C, sums, rows, width, BLOCK, num_warps=WARPS)
    largest, total, wanted = sums
    if group.size() > 1:
        everywhere = max_over(largest, group)
        total, wanted = sum_over(torch.stack([total * (largest - everywhere).exp(), wanted]), group)
        largest = everywhere
    log_sum = largest + total.log()
    if weight_C is None:
        return log_sum - wanted, None
    _row_gradients[(rows, triton.cdiv(width, BLOCK))](
        logits_CV, local_C, weight_C, log_sum, width, BLOCK, num_warps=WARPS
    )
    return log_sum - wanted, logits_CV


@triton.jit
def _scale(x, factor, numel, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + place, tl.load(x + place, place < numel).to(tl.float32) * by, place < numel)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """See `model.layers.loss.scaled`: in place, and nothing is read or written where the factor is 1."""
    _scale[(triton.cdiv(x.numel(), BLOCK),)](x, factor, x.numel(), BLOCK)
    return x


def add_product(left: Tensor, right: Tensor, total: Tensor | None) -> Tensor:
    """See `model.layers.loss.add_product`: the sum is part of the product, in float32."""
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
