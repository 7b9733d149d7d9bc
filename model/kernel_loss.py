"""Triton kernels of `model.loss`: logits are read twice and turned into their gradient in place.

    m, s, t: largest logit, sum of exp(logit - m), target's logit of each row; then, over the tensor-parallel group,
    loss = log(sum of exp) - target logit      dlogit = (exp(logit) / sum of exp - [is the target]) weight

Shape suffixes as in `model.loss`.
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
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(own + column, column < WIDTH, float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        # -inf - -inf is no number: a lane that has met no column keeps its sum of zero.
        total = tl.where(new == float("-inf"), 0.0, total * tl.exp(largest - new) + tl.exp(x - new))
        largest = new
    top = tl.max(largest, 0)
    wanted = tl.load(target + row)
    here = (wanted >= 0) & (wanted < WIDTH)
    tl.store(out + row, top)
    tl.store(out + rows + row, tl.sum(tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - top)), 0))
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
    """See `model.loss.softmax_gradient`."""
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


def add_product(left: Tensor, right: Tensor, total: Tensor | None) -> Tensor:
    """See `model.loss.add_product`: the sum is part of the product, in float32."""
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
