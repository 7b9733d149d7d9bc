"""Zero-centred RMSNorm: the weight is stored as its distance from one, so that weight decay pulls the gain to 1."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.kernels.backends import accelerated
from model.layers.recompute import recomputable


def at_least_float32(x: Tensor) -> Tensor:
    """float32, or float64 where the input is: where half precision would lose the result."""
    return x if x.dtype == torch.float64 else x.float()


@accelerated("model.kernels.norm")
def zero_centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight) over the last dimension, computed in at least float32 and cast back to x's type."""
    wide = at_least_float32(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1 + weight.to(wide.dtype))).to(x.dtype)


@accelerated("model.kernels.norm")
def rms_norm_with_residual(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`zero_centred_rms_norm` of x, and x itself for the residual connection around what reads the norm.

    Both uses of x are one function, so its backward pass adds their gradients where it writes the norm's.
    """
    return zero_centred_rms_norm(x, weight, eps), x


@accelerated("model.kernels.norm")
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm of x, then times SiLU(gate): the output norm of Gated DeltaNet. Shapes [..., D]."""
    return (zero_centred_rms_norm(at_least_float32(x), weight, eps) * F.silu(at_least_float32(gate))).to(x.dtype)


class ZeroCentredRMSNorm(nn.Module):
    """The norm of every place in the model; signature as megatron-core's specs call it.

    The weight starts at zero (gain one), stays in float32, and is decayed like a matrix
    (Qwen3-Next: "weight decay on norm weights").
    """

    def __init__(self, config, hidden_size: int, eps: float):
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        # Under sequence parallelism each tensor rank sees its own tokens (or its own heads): gradients are summed.
        self.weight.sequence_parallel = config.sequence_parallel

    @recomputable("norm")
    def forward(self, x: Tensor) -> Tensor:
        return zero_centred_rms_norm(x, self.weight, self.eps)


class HeadNorm(ZeroCentredRMSNorm):
    """The norm of queries and keys, which a kernel applies together with what follows it."""

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The norm of x; without x the weight, for a kernel.

        Either is a call of the module: megatron-core's hook before it waits for the weight's parts of other ranks.
        """
        return self.weight if x is None else super().forward(x)


class ResidualRMSNorm(ZeroCentredRMSNorm):
    """The norm at the start of a layer, which hands its input on as the layer's residual (megatron-core takes both)."""

    @recomputable("norm")
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_with_residual(x, self.weight, self.eps)


class GatedRMSNorm(ZeroCentredRMSNorm):
    """The gated form, per value head of Gated DeltaNet."""

    @recomputable("norm")
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)
