"""AdamW's state in half the memory: moments in bfloat16, and of float32 weights only what bfloat16 leaves out.

A float32 weight is its bfloat16 self, which the model computes with, and 16 bits more: nothing of it is lost. With
both moments that makes 6 bytes a number where float32 takes 12. Transformer Engine's FusedAdam keeps and steps such a
state, through megatron-core's precision-aware optimizer; here it becomes float32 for checkpoints, and is taken back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel.optimizer_state import MASTER, MOMENTS, OptimizerShard

REST = "master_param"  # FusedAdam's name of the 16 bits, or of a float32 weight itself
# What megatron-core asks FusedAdam for then.
HALVED = {
    "master_weights": True,
    "master_weight_dtype": torch.float32,
    "exp_avg_dtype": torch.bfloat16,
    "exp_avg_sq_dtype": torch.bfloat16,
    "use_decoupled_grad": True,
    "store_param_remainders": True,
}


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """Float32 weights from bfloat16 ones and the int16 bits below: FusedAdam rounds up by the first of these."""
    upper = weight.view(torch.int16).int() - (rest < 0).int()
    return (upper.bitwise_left_shift(16) | (rest.int() & 0xFFFF)).view(torch.float32)


def split(main: Tensor) -> tuple[Tensor, Tensor]:
    """The way back of `join`."""
    bits = main.view(torch.int32)
    rest = (bits & 0xFFFF).to(torch.int16)
    return (bits.bitwise_right_shift(16) + (rest < 0)).to(torch.int16).view(torch.bfloat16), rest


def allocate(adam: Any) -> None:
    """Gives FusedAdam the state that it has after no step."""
    for group in adam.param_groups:
        for held in group["params"]:
            adam.initialize_state(held, held.dtype == torch.bfloat16)


def shard(parameter: nn.Parameter, held: Tensor, state: Mapping[str, Tensor], start: int, stop: int) -> OptimizerShard:
    """What FusedAdam holds of a parameter, as float32 copies.

    Args:
        held: this process's numbers of the parameter itself. state: FusedAdam's of them.
    """
    main = join(held, state[REST]) if held.dtype == torch.bfloat16 else held.detach()
    main.grad = vars(held).get("decoupled_grad")

    def keep(tensors: Mapping[str, Tensor]) -> None:
        for name in MOMENTS:
            state[name].copy_(tensors[name])
        if MASTER in tensors:
            weight, rest = split(tensors[MASTER])
            held.copy_(weight)
            state[REST].copy_(rest)

    return OptimizerShard(parameter, main, {name: state[name].float() for name in MOMENTS}, start, stop, keep)


def fused_adam_error() -> float:
    """The largest error of three steps of FusedAdam's weights, relative, against torch's AdamW in float64; on a GPU.

    Moments that forget everything at once bring no rounding of their own into it.
    """
    from transformer_engine.pytorch.optimizers import FusedAdam  # it need not be installed otherwise

    start, *gradients = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 0.1}
    held: Any = start.bfloat16().cuda()
    slow = nn.Parameter(held.double())
    fast = FusedAdam([held], **settings, **HALVED)
    exact = torch.optim.AdamW([slow], **settings)
    for gradient in gradients:
        held.decoupled_grad, slow.grad = gradient.cuda(), gradient.double().cuda()
        fast.step()
        exact.step()
    with torch.no_grad():
        main = join(held, fast.state[held][REST])
        return float((main - slow).norm() / (slow - start.bfloat16().cuda()).norm())
