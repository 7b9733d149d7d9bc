"""Gradients of weights that go straight into the float32 sums of megatron-core's data parallelism (``main_grad``).

Otherwise each micro-batch's gradient is written in the weight's type, read again and added, which rounds it to that
type and moves half as many bytes again. A backward pass that computes such a gradient adds it to ``main_grad`` itself
and hands autograd a `dummy_gradient`, from which megatron-core's hook learns that the gradient has been added.
"""

from typing import Any, cast

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


def with_main_grad(parameter: Any) -> nn.Parameter:
    """The parameter, whose module adds up its gradients itself once data parallelism has given it a ``main_grad``."""
    parameter.main_grad = None
    return cast(nn.Parameter, parameter)


def fuse(chunk: nn.Module) -> None:
    """Tells megatron-core's linear layers of a wrapped model to add to ``main_grad`` themselves."""
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True
        elif "fuse_wgrad_accumulation" in vars(module):  # of Transformer Engine, which need not be there
            vars(module)["fuse_wgrad_accumulation"] = True


def add_weight_gradient(x_NI: Tensor, grad_NO: Tensor, total_OI: Tensor) -> None:
    """total += grad^T x, the gradient of a linear layer's weight, in at least the total's precision.

    Args:
        total_OI: of the others' type or float32.
    """
    if x_NI.is_cuda and x_NI.dtype != total_OI.dtype:
        torch.addmm(total_OI, grad_NO.t(), x_NI, out_dtype=total_OI.dtype, out=total_OI)
    elif torch.promote_types(x_NI.dtype, total_OI.dtype) == total_OI.dtype:
        total_OI.addmm_(grad_NO.t().to(total_OI.dtype), x_NI.to(total_OI.dtype))
    else:
        total_OI.add_(grad_NO.t() @ x_NI)


def dummy_gradient(weight: Any) -> Tensor | None:
    """What a backward pass returns in place of a gradient that it has added to the weight's ``main_grad``.

    megatron-core drops it unread, so the weight's own memory will do. One for each pass: autograd would add up those of
    a weight that is used several times, as the MTP layer's are, and experts' in chunks.

    Args:
        weight: the parameter itself, as the forward pass had it. What a forward pass has saved of it is another tensor
            where it was computed under `torch.utils.checkpoint`: the hook would find no mark and add the weight.
    """
    if not weight.requires_grad:
        raise ValueError("a dummy gradient stands for a parameter's, and this is a saved copy of one")
    weight.grad_added_to_main_grad = True
    backward_pass = torch._C._current_graph_task_id()
    if vars(weight).get("dummy_given_in") == backward_pass:
        return None
    weight.dummy_given_in = backward_pass
    return cast(Tensor, weight.detach())
