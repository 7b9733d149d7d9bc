"""Triton kernels of `model.layers.experts` and `.dense`: rows moved by gathers alone, and SwiGLU in one pass.

    combine: out_t = sum_k y[inverse[t, k]]       its gradient is a gather, as combine is a gather's
    swiglu:  a = silu(g) u w                      w is a row's probability, its token's weight of that expert

Shape suffixes as in `model.layers.experts`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.grouped import grouped_gradient, grouped_product, tile_rows
from model.kernels.moves import Permute, Unpermute
from parallel.main_grads import dummy_gradient

BLOCK = 1024


@triton.jit
def _sum_rows(x, index, out, WIDTH: tl.constexpr, COPIES: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for copy in tl.static_range(COPIES):
        row = tl.load(index + token * COPIES + copy).to(tl.int64)
        total += tl.load(x + row * WIDTH + column, (column < WIDTH) & (row >= 0), 0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total, column < WIDTH)


def sum_rows(x_NH: Tensor, index_TK: Tensor) -> Tensor:
    """out[t] = sum_k x[index[t, k]], summed in float32; an index of -1 adds nothing."""
    x_NH = x_NH.contiguous()
    (tokens, copies), width = index_TK.shape, x_NH.shape[1]
    out_TH = x_NH.new_empty(tokens, width)
    columns = min(BLOCK, triton.next_power_of_2(width))
    if tokens:
        _sum_rows[(tokens, triton.cdiv(width, columns))](x_NH, index_TK, out_TH, width, copies, columns)
    return out_TH


def permute(x_TH: Tensor, source_N: Tensor, inverse_TK: Tensor) -> Tensor:
    """See `model.layers.rows.permute`."""
    return Permute.apply(x_TH, source_N, inverse_TK, sum_rows)


def unpermute(y_NH: Tensor, source_N: Tensor, inverse_TK: Tensor) -> Tensor:
    """See `model.layers.rows.unpermute`."""
    return Unpermute.apply(y_NH, source_N, inverse_TK, sum_rows)


@triton.jit
def _swiglu(x, weight, out, WIDTH: tl.constexpr, UNIT: tl.constexpr, UP: tl.constexpr, WEIGHTED: tl.constexpr,
            COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + column * UNIT, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + column * UNIT + UP, inside, 0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    if WEIGHTED:
        y *= tl.load(weight + row)
    tl.store(out + row * WIDTH + column, y, inside)


@triton.jit
def _swiglu_backward(x, weight, grad, grad_x, grad_weight, out, WIDTH: tl.constexpr, UNIT: tl.constexpr,
                     UP: tl.constexpr, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(weight + row) if WEIGHTED else 1.0
    dot = tl.zeros([COLUMNS], tl.float32)
    for first in tl.static_range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < WIDTH
        place = row * 2 * WIDTH + column * UNIT
        gate = tl.load(x + place, inside, 0.0).to(tl.float32)
        up = tl.load(x + place + UP, inside, 0.0).to(tl.float32)
        dy = tl.load(grad + row * WIDTH + column, inside, 0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        y = gate * sigmoid * up
        if WEIGHTED:
            dot += dy * y
            tl.store(out + row * WIDTH + column, y * prob, inside)
        dy *= prob
        tl.store(grad_x + place, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), inside)
        tl.store(grad_x + place + UP, dy * gate * sigmoid, inside)
    if WEIGHTED:
        tl.store(grad_weight + row, tl.sum(dot, 0))


def _columns(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


def _swiglu_forward(x: Tensor, weight_N: Tensor | None, interleaved: bool) -> Tensor:
    """silu(gate) * up (* weight) of rows [N, 2F]: gate and up in halves, or interleaved."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    layout = (2, 1) if interleaved else (1, width)
    if rows:
        grid = (rows, triton.cdiv(width, _columns(width)))
        _swiglu[grid](x, weight_N, out, width, *layout, weight_N is not None, _columns(width))
    return out


def swiglu_backward(x: Tensor, weight_N: Tensor | None, grad: Tensor, interleaved: bool):
    """Gradients of x and of the weights, and the output again where there are weights."""
    rows, width = x.shape[0], x.shape[1] // 2
    grad_x, grad_weight = torch.empty_like(x), None if weight_N is None else torch.empty_like(weight_N)
    out = None if weight_N is None else x.new_empty(rows, width)
    layout = (2, 1) if interleaved else (1, width)
    if rows:
        _swiglu_backward[(rows,)](
            x, weight_N, grad.contiguous(), grad_x, grad_weight, out, width, *layout, weight_N is not None,
            _columns(width),
        )  # fmt: skip
    return grad_x, grad_weight, out


class _SwiGLUPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed: Tensor) -> Tensor:
        ctx.save_for_backward(mixed)
        return _swiglu_forward(mixed.flatten(0, -2), None, interleaved=True).view(*mixed.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (mixed,) = ctx.saved_tensors
        grad_x, _, _ = swiglu_backward(mixed.flatten(0, -2), None, grad.flatten(0, -2), interleaved=True)
        return grad_x.view_as(mixed)


def swiglu_pairs(mixed: Tensor) -> Tensor:
    """See `model.layers.dense.swiglu_pairs`."""
    return _SwiGLUPairs.apply(mixed.contiguous())


def _forward(x_TH, source_N, weight1_E2FH, weight2_EHF, probs_N, tiles):
    """Both products and SwiGLU between them: the first product, and the rows [N, H] of the second."""
    rows = probs_N.numel()
    inner_NG = grouped_product(x_TH, weight1_E2FH.flatten(1, 2), tiles, rows, True, source_N)
    active_NF = _swiglu_forward(inner_NG, probs_N, interleaved=False)
    return inner_NG, grouped_product(active_NF, weight2_EHF, tiles, rows, True)


def _weight_gradient(left_NO, right_NI, ends_E, weight, total):
    """The gradient of a weight [E, ...], or what stands for it once it was added to ``total``."""
    if total is None:
        return grouped_gradient(left_NO, right_NI, ends_E).view_as(weight)
    grouped_gradient(left_NO, right_NI, ends_E, total.view(ends_E.numel(), left_NO.shape[1], right_NI.shape[1]))
    return dummy_gradient(weight)


def _backward(grad_TH, weights, main_grads, x_TH, inner_NG, source_N, probs_N, ends_E, tiles):
    """Gradients of the rows [N, H] that were read, of both weights and of the probabilities."""
    (weight1_E2FH, weight2_EHF), rows = weights, probs_N.numel()
    # A gradient's product reads its rows once for every tile: there gathering on the way costs more than a copy.
    grad_NH = grad_TH.index_select(0, source_N)
    grad_active_NF = grouped_product(grad_NH, weight2_EHF, tiles, rows, False)
    grad_inner_NG, grad_probs_N, active_NF = swiglu_backward(inner_NG, probs_N, grad_active_NF, interleaved=False)
    grad_weight2 = _weight_gradient(grad_NH, active_NF, ends_E, weight2_EHF, main_grads[1])
    del grad_NH, grad_active_NF, active_NF
    x_NH = x_TH.index_select(0, source_N)
    grad_weight1 = _weight_gradient(grad_inner_NG, x_NH, ends_E, weight1_E2FH, main_grads[0])
    del x_NH
    grad_x_NH = grouped_product(grad_inner_NG, weight1_E2FH.flatten(1, 2), tiles, rows, False)
    return grad_x_NH, grad_weight1, grad_weight2, grad_probs_N


class _FusedMoE(torch.autograd.Function):
    """Nothing is kept for the backward pass of the rows but what the first product made of them."""

    @staticmethod
    def forward(ctx, x_TH, weight1_E2FH, weight2_EHF, probs_N, counts_E, source_N, inverse_TK, main_grads):
        ends_E = counts_E.cumsum(0).int()
        tiles = tile_rows(ends_E, source_N.numel())
        inner_NG, out_NH = _forward(x_TH, source_N, weight1_E2FH, weight2_EHF, probs_N, tiles)
        ctx.save_for_backward(inverse_TK, x_TH, inner_NG, source_N, probs_N, ends_E, tiles)
        ctx.weights, ctx.main_grads = (weight1_E2FH, weight2_EHF), main_grads  # themselves, see `dummy_gradient`
        return sum_rows(out_NH, inverse_TK)

    @staticmethod
    def backward(ctx, grad_TH: Tensor):
        inverse_TK, *rest = ctx.saved_tensors
        grad_x_NH, *grads = _backward(grad_TH.contiguous(), ctx.weights, ctx.main_grads, *rest)
        return sum_rows(grad_x_NH, inverse_TK), *grads, None, None, None, None


def fused_moe(
    x_TH: Tensor,
    weight1_E2FH: Tensor,
    weight2_EHF: Tensor,
    probs_N: Tensor,
    counts_E: Tensor,
    source_N: Tensor,
    inverse_TK: Tensor,
    main_grads: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """See `model.layers.experts.fused_moe`."""
    weights = (weight1_E2FH, weight2_EHF)
    return _FusedMoE.apply(x_TH.contiguous(), *weights, probs_N.float(), counts_E, source_N, inverse_TK, main_grads)


@triton.jit
def _gate_rows(x, score, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    prob = 1 / (1 + tl.exp(-tl.load(score + row).to(tl.float32)))
    y = tl.load(x + row * WIDTH + column, column < WIDTH, 0.0).to(tl.float32) * prob
    tl.store(out + row * WIDTH + column, y, column < WIDTH)


@triton.jit
def _gate_rows_backward(x, score, grad, grad_x, grad_score, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    prob = 1 / (1 + tl.exp(-tl.load(score + row).to(tl.float32)))
    dy = tl.load(grad + row * WIDTH + column, column < WIDTH, 0.0).to(tl.float32)
    y = tl.load(x + row * WIDTH + column, column < WIDTH, 0.0).to(tl.float32)
    tl.store(grad_x + row * WIDTH + column, dy * prob, column < WIDTH)
    tl.store(grad_score + row, tl.sum(dy * y, 0) * prob * (1 - prob))


class _GateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, score: Tensor) -> Tensor:
        out, width = torch.empty_like(x), x.shape[-1]
        _gate_rows[(score.numel(),)](x, score, out, width, triton.next_power_of_2(width))
        ctx.save_for_backward(x, score)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, score = ctx.saved_tensors
        grad_x, grad_score, width = torch.empty_like(x), torch.empty_like(score), x.shape[-1]
        columns = triton.next_power_of_2(width)
        _gate_rows_backward[(score.numel(),)](x, score, grad.contiguous(), grad_x, grad_score, width, columns)
        return grad_x, grad_score


def gate_rows(x: Tensor, score: Tensor) -> Tensor:
    """See `model.layers.experts.gate_rows`."""
    return _GateRows.apply(x.contiguous(), score.contiguous())
