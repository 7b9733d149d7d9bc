"""Gradients of weights that go straight into the float32 sums of megatron-core's data parallelism (``main_grad``).

Otherwise each micro-batch's gradient is written in the weight's type, read again and added, which rounds it to that
type and moves a third more bytes. Who computes a gradient is given the sum to add to, and returns `stand_in`:
megatron-core's hook then finds nothing to add, but knows that the gradient is there.
"""

from typing import Any, cast

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


def accumulate(parameter: Any) -> nn.Parameter:
    """The parameter, whose module adds up its gradients itself once data parallelism has given it a ``main_grad``."""
    parameter.main_grad = None
    return cast(nn.Parameter, parameter)


def fuse(chunk: nn.Module) -> None:
    """Tells megatron-core's linear layers of a wrapped model to add to ``main_grad`` themselves."""
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True


def add_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    """total += left @ right, in at least the total's precision.

    Args:
        left: [M, K]. right: [K, N]. total: [M, N], of the same type or float32.
    """
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif torch.promote_types(left.dtype, total.dtype) == total.dtype:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        total.add_(left @ right)


def stand_in(weight: Any) -> Tensor:
    """What a backward pass returns in place of a gradient that it has added to the weight's ``main_grad``.

    megatron-core drops it unread, so the weight's own memory will do.
    """
    weight.grad_added_to_main_grad = True
    return cast(Tensor, weight.detach())
