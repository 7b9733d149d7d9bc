"""Triton kernels of `model.layers.norm`: each row is read once and written once, forwards and backwards.

    n = x / rms(x)      y = n (1 + w)      gated: y = n (1 + w) silu(z)
    dx = (u - n mean(n u)) / rms(x)  with  u = dy (1 + w)      dw = sum over rows of dy n
    with a residual: dx + dr, where dr is the gradient of x that came around the norm

What the backward pass needs beside the inputs (rms) is computed again there. Arithmetic is float32 throughout.

Shape suffixes: M rows, D width of a row, P programs, each of which sums dw over rows of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # four for each multiprocessor of an H100 or H200
ELEMENTS = 2048  # of a program's tile


def tile(width: int) -> dict[str, int]:
    """Rows and columns of a program's tile."""
    columns = triton.next_power_of_2(width)
    return {"ROWS": max(1, ELEMENTS // columns), "COLUMNS": columns}


@triton.jit
def _forward(x, gate, weight, out, rows, eps, WIDTH: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < WIDTH)
    place = row * WIDTH + column
    x_MD = tl.load(x + place, inside, 0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x_MD * x_MD, 1, keep_dims=True) / WIDTH + eps)
    y = x_MD * scale * (1 + tl.load(weight + column, column < WIDTH, 0.0).to(tl.float32))
    if GATED:
        z = tl.load(gate + place, inside, 0.0).to(tl.float32)
        y *= z / (1 + tl.exp(-z))
    tl.store(out + place, y, inside)


@triton.jit
def _backward(x, gate, weight, grad, grad_residual, grad_x, grad_gate, grad_weight, rows, eps, WIDTH: tl.constexpr,
              GATED: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    gain = 1 + tl.load(weight + column, column < WIDTH, 0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < WIDTH)
        place = row * WIDTH + column
        x_MD = tl.load(x + place, inside, 0.0).to(tl.float32)
        dy = tl.load(grad + place, inside, 0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(x_MD * x_MD, 1, keep_dims=True) / WIDTH + eps)
        n = x_MD * scale
        if GATED:
            z = tl.load(gate + place, inside, 0.0).to(tl.float32)
            sigmoid = 1 / (1 + tl.exp(-z))
            tl.store(grad_gate + place, dy * n * gain * sigmoid * (1 + z * (1 - sigmoid)), inside)
            dy *= z * sigmoid
        total += dy * n
        u = dy * gain
        dx = (u - n * (tl.sum(n * u, 1, keep_dims=True) / WIDTH)) * scale
        if RESIDUAL:
            dx += tl.load(grad_residual + place, inside, 0.0).to(tl.float32)
        tl.store(grad_x + place, dx, inside)
    own = grad_weight + tl.program_id(0) * WIDTH + tl.arange(0, COLUMNS)
    tl.store(own, tl.sum(total, 0), tl.arange(0, COLUMNS) < WIDTH)


class _RMSNorm(torch.autograd.Function):
    """The normed input, and the input as it is (autograd makes it a view, which nothing can change in place)."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # a result that nobody used has no gradient, rather than one of zeros
        rows_MD, gate = x.contiguous(), None if gate is None else gate.contiguous()
        out, width, sizes = torch.empty_like(rows_MD), x.shape[-1], tile(x.shape[-1])
        rows = x.numel() // width
        _forward[(triton.cdiv(rows, sizes["ROWS"]),)](
            rows_MD, gate, weight, out, rows, eps, width, gate is not None, **sizes
        )
        ctx.save_for_backward(rows_MD, gate, weight)
        ctx.eps = eps
        return out, x

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_residual: Tensor | None):
        if grad is None:
            return grad_residual, None, None, None
        x, gate, weight = ctx.saved_tensors
        width, sizes = x.shape[-1], tile(x.shape[-1])
        rows = x.numel() // width
        programs = min(PROGRAMS, triton.cdiv(rows, sizes["ROWS"]))
        grad_residual = None if grad_residual is None else grad_residual.contiguous()
        grad_x, grad_gate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        grad_weight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            x, gate, weight, grad.contiguous(), grad_residual, grad_x, grad_gate, grad_weight, rows, ctx.eps, width,
            gate is not None, grad_residual is not None, **sizes,
        )  # fmt: skip
        return grad_x, grad_gate, grad_weight.sum(0).to(weight.dtype), None


def zero_centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `model.layers.norm.zero_centred_rms_norm`."""
    return _RMSNorm.apply(x, None, weight, eps)[0]


def rms_norm_with_residual(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `model.layers.norm.rms_norm_with_residual`."""
    return _RMSNorm.apply(x, None, weight, eps)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `model.layers.norm.gated_rms_norm`."""
    return _RMSNorm.apply(x, gate, weight, eps)[0]
