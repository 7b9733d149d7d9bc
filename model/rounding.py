"""How far Transformer Engine's linear layers are from float64 on this machine, in each way of rounding.

The widths are those of the model that is to be trained, as in `model.preflight`; rows are few.
"""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from model.backend import linear_sizes
from model.config import ModelConfig, MtpConfig
from model.kernels.backends import LINEARS
from model.stack import hybrid_config

ROWS = 512
ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


def linear_errors(shape: ModelConfig, device: torch.device) -> dict[str, float]:
    """The largest error |fast - slow| / |slow| of the output and gradients of each of `model.backend.TE_LINEARS`."""
    linears, config = LINEARS[shape.backend], hybrid_config(shape, MtpConfig(steps=0))
    builders = {"in_proj": linears.heads, "linear_qkv": linears.column, "linear_fc1": linears.column}
    generator, found = torch.Generator().manual_seed(0), {}
    for name, (rows_in, rows_out) in linear_sizes(shape).items():
        with torch.device(device):
            layer = builders.get(name, linears.row)(rows_in, rows_out, config, ALONE)
        weight = layer.get_parameter("weight")
        with torch.no_grad():
            weight.copy_(torch.randn(rows_out, rows_in, generator=generator) * rows_in**-0.5)
        drawn = (torch.randn(ROWS, 1, width, generator=generator) for width in (rows_in, rows_out))
        x, upstream = (y.to(device, weight.dtype) for y in drawn)
        leaves = [x.requires_grad_(), weight]
        out = layer(x)[0]
        fast = [out.detach(), *torch.autograd.grad(out, leaves, upstream.clone())]
        wide = [y.detach().double().requires_grad_() for y in leaves]
        exact = F.linear(*wide)
        slow = [exact.detach(), *torch.autograd.grad(exact, wide, upstream.double())]
        found[name] = max(
            float((one.double() - other).norm() / other.norm()) for one, other in zip(fast, slow, strict=True)
        )
    return found
