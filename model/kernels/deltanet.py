"""Kernels of `model.layers.deltanet`: Triton between its projection and the delta rule, fla's for the rule.

    c_t = sum_j w[W-1-j] x_{t-j} over the j that stay in t's document      s = c sigmoid(c)
    q, k = s / |s|      v = s      beta = sigmoid(b)      g = -exp(A_log) softplus(a + dt_bias)

Forwards one pass over the projection; backwards a pass to dc (and dw), and one to the gradient of the projection.

Shape suffixes as in `model.layers.deltanet`. A head's columns in the projection: q, k, its values, their gates, b, a.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.config import MAX_TAPS
from model.documents import Documents

TOKENS = 32  # of a program's tile
GRADIENT_TOKENS = 8  # the same where sums for each tap are held beside it
EPS = 1e-6  # of the L2 norm
PROGRAMS = 66  # that share the tokens of a head's segment in the backward pass


@triton.jit
def _softplus(x):
    u = tl.exp(-tl.abs(x))
    # log(1 + u) without the rounding of 1 + u (Goldberg, 1991, theorem 4).
    log = tl.where(1 + u == 1, u, tl.log(1 + u) * u / tl.where(1 + u == 1, 1.0, (1 + u) - 1))
    return tl.maximum(x, 0.0) + log


@triton.jit
def _segment(segment, KEY: tl.constexpr, VALUE: tl.constexpr, ALIGNED: tl.constexpr):
    """The first column of a head's segment (q, k, a value, a gate), and its width."""
    first = tl.where(segment < 2, segment * KEY, 2 * KEY + (segment - 2) * VALUE)
    # Known to divide both, loads and stores move several numbers at once.
    return tl.multiple_of(first, ALIGNED), tl.multiple_of(tl.where(segment < 2, KEY, VALUE), ALIGNED)


@triton.jit
def _shifted(x, position, token, column, inside, J: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr):
    """The inputs J tokens back, 0 where they are of another document, or where there is no such tap."""
    values = tl.zeros(inside.shape, tl.float32)
    if J < TAPS:
        values = tl.load(x + (token - J) * STRIDE + column, inside & (position >= J), 0.0).to(tl.float32)
    return values


@triton.jit
def _tap(conv, column, width, J: tl.constexpr, TAPS: tl.constexpr):
    """What the inputs J tokens back are multiplied by."""
    values = tl.zeros(column.shape, tl.float32)
    if J < TAPS:
        values = tl.load(conv + column * TAPS + TAPS - 1 - J, column < width, 0.0).to(tl.float32)
    return values


@triton.jit
def _convolve(x, conv, position, token, column, inside, width, STRIDE: tl.constexpr, TAPS: tl.constexpr):
    total = tl.zeros(inside.shape, tl.float32)
    for j in tl.static_range(TAPS):
        total += _shifted(x, position, token, column, inside, j, STRIDE, TAPS) * _tap(conv, column, width, j, TAPS)
    return total


@triton.jit
def _prepare(mixed, conv, A_log, dt_bias, position, q, k, v, z, g, beta, tokens, eps, HEADS: tl.constexpr,
             RATIO: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr,
             COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    CONV: tl.constexpr = 2 * KEY + RATIO * VALUE
    EACH: tl.constexpr = CONV + RATIO * VALUE + 2 * RATIO
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head, segment = tl.program_id(1), tl.program_id(2)
    first, width = _segment(segment, KEY, VALUE, ALIGNED)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < width)
    x = mixed + head * EACH + first
    if segment < 2 + RATIO:
        there = tl.load(position + token, token < tokens, 0)
        own = conv + (head * CONV + first) * TAPS
        c = _convolve(x, own, there, token, column, inside, width, HEADS * EACH, TAPS)
        y = c / (1 + tl.exp(-c))
        if segment < 2:
            y *= 1 / tl.sqrt(tl.sum(y * y, 1, keep_dims=True) + eps)
            out = q
            if segment == 1:
                out = k
            tl.store(out + (token * HEADS + head) * KEY + column, y, inside)
        else:
            tl.store(v + ((token * HEADS + head) * RATIO + segment - 2) * VALUE + column, y, inside)
    else:
        place = ((token * HEADS + head) * RATIO + segment - 2 - RATIO) * VALUE + column
        tl.store(z + place, tl.load(x + token * (HEADS * EACH) + column, inside, 0.0), inside)
    if segment == 0:
        for i in tl.static_range(RATIO):
            own = mixed + token * (HEADS * EACH) + head * EACH + CONV + RATIO * VALUE + i
            b = tl.load(own, token < tokens, 0.0).to(tl.float32)
            a = tl.load(own + RATIO, token < tokens, 0.0).to(tl.float32) + tl.load(dt_bias + head * RATIO + i)
            place = (token * HEADS + head) * RATIO + i
            tl.store(beta + place, 1 / (1 + tl.exp(-b)), token < tokens)
            tl.store(g + place, -tl.exp(tl.load(A_log + head * RATIO + i)) * _softplus(a), token < tokens)


@triton.jit
def _conv_backward(mixed, conv, position, d_q, d_k, d_v, d_c, d_conv, tokens, eps, HEADS: tl.constexpr,
                   RATIO: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, TAPS: tl.constexpr,
                   TOKENS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    CONV: tl.constexpr = 2 * KEY + RATIO * VALUE
    EACH: tl.constexpr = CONV + RATIO * VALUE + 2 * RATIO
    head, segment = tl.program_id(1), tl.program_id(2)
    first, width = _segment(segment, KEY, VALUE, ALIGNED)
    column = tl.arange(0, COLUMNS)[None, :]
    x, own = mixed + head * EACH + first, conv + (head * CONV + first) * TAPS
    w_0 = _tap(own, column, width, 0, TAPS)
    w_1 = _tap(own, column, width, 1, TAPS)
    w_2 = _tap(own, column, width, 2, TAPS)
    w_3 = _tap(own, column, width, 3, TAPS)
    # Sums over tokens stay apart until the end, tap by tap: adding up across threads costs more than all the rest.
    sum_0 = tl.zeros([TOKENS, COLUMNS], tl.float32)
    sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
    for block in range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        token = (block * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
        inside = (token < tokens) & (column < width)
        there = tl.load(position + token, token < tokens, 0)
        x_0 = _shifted(x, there, token, column, inside, 0, HEADS * EACH, TAPS)
        x_1 = _shifted(x, there, token, column, inside, 1, HEADS * EACH, TAPS)
        x_2 = _shifted(x, there, token, column, inside, 2, HEADS * EACH, TAPS)
        x_3 = _shifted(x, there, token, column, inside, 3, HEADS * EACH, TAPS)
        c = x_0 * w_0 + x_1 * w_1 + x_2 * w_2 + x_3 * w_3
        sigmoid = 1 / (1 + tl.exp(-c))
        source = d_q + (token * HEADS + head) * KEY
        if segment == 1:
            source = d_k + (token * HEADS + head) * KEY
        if segment >= 2:
            source = d_v + ((token * HEADS + head) * RATIO + segment - 2) * VALUE
        dy = tl.load(source + column, inside, 0.0).to(tl.float32)
        if segment < 2:
            y = c * sigmoid
            scale = 1 / tl.sqrt(tl.sum(y * y, 1, keep_dims=True) + eps)
            dy = scale * (dy - y * scale * scale * tl.sum(dy * y, 1, keep_dims=True))
        dc = tl.where(inside, dy * sigmoid * (1 + c * (1 - sigmoid)), 0.0)
        tl.store(d_c + (token * HEADS + head) * CONV + first + column, dc, inside)
        sum_0 += dc * x_0
        sum_1 += dc * x_1
        sum_2 += dc * x_2
        sum_3 += dc * x_3
    place = d_conv + ((tl.program_id(0) * HEADS + head) * CONV + first + tl.arange(0, COLUMNS)) * TAPS + TAPS - 1
    some = tl.arange(0, COLUMNS) < width
    tl.store(place, tl.sum(sum_0, 0), some)
    tl.store(place - 1, tl.sum(sum_1, 0), some & (TAPS > 1))
    tl.store(place - 2, tl.sum(sum_2, 0), some & (TAPS > 2))
    tl.store(place - 3, tl.sum(sum_3, 0), some & (TAPS > 3))


@triton.jit
def _input_backward(mixed, conv, A_log, dt_bias, position, d_c, d_z, d_g, d_beta, d_mixed, d_heads, tokens,
                    HEADS: tl.constexpr, RATIO: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
                    TAPS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
                    ALIGNED: tl.constexpr):  # fmt: skip
    CONV: tl.constexpr = 2 * KEY + RATIO * VALUE
    EACH: tl.constexpr = CONV + RATIO * VALUE + 2 * RATIO
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head, segment = tl.program_id(1), tl.program_id(2)
    first, width = _segment(segment, KEY, VALUE, ALIGNED)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < width)
    out = d_mixed + token * (HEADS * EACH) + head * EACH
    if segment < 2 + RATIO:
        dx = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for j in tl.static_range(TAPS):
            reached = tl.load(position + token + j, token + j < tokens, -1) >= j
            dc = tl.load(d_c + ((token + j) * HEADS + head) * CONV + first + column, inside & reached, 0.0)
            w = tl.load(conv + (head * CONV + first + column) * TAPS + TAPS - 1 - j, column < width, 0.0)
            dx += dc.to(tl.float32) * w.to(tl.float32)
        tl.store(out + first + column, dx, inside)
    else:
        place = ((token * HEADS + head) * RATIO + segment - 2 - RATIO) * VALUE + column
        tl.store(out + first + column, tl.load(d_z + place, inside, 0.0), inside)
    if segment == 0:
        for i in tl.static_range(RATIO):
            last = CONV + RATIO * VALUE + i
            own = mixed + token * (HEADS * EACH) + head * EACH + last
            beta = 1 / (1 + tl.exp(-tl.load(own, token < tokens, 0.0).to(tl.float32)))
            a = tl.load(own + RATIO, token < tokens, 0.0).to(tl.float32) + tl.load(dt_bias + head * RATIO + i)
            decay = -tl.exp(tl.load(A_log + head * RATIO + i))
            place = (token * HEADS + head) * RATIO + i
            dg = tl.load(d_g + place, token < tokens, 0.0).to(tl.float32)
            db = tl.load(d_beta + place, token < tokens, 0.0).to(tl.float32) * beta * (1 - beta)
            da = dg * decay / (1 + tl.exp(-a))
            tl.store(out + last, db, token < tokens)
            tl.store(out + last + RATIO, da, token < tokens)
            sums = d_heads + (tl.program_id(0) * HEADS + head) * (2 * RATIO) + i
            tl.store(sums, tl.sum(dg * decay * _softplus(a)))
            tl.store(sums + RATIO, tl.sum(da))


class _DeltaSizes(NamedTuple):
    """The compile-time sizes of `_prepare`, `_conv_backward` and `_input_backward`, in their order."""

    heads: int
    ratio: int  # value heads of a key head
    key_dim: int
    value_dim: int
    taps: int
    tokens: int  # of a tile
    columns: int  # of a tile
    aligned: int  # divides the first column and the width of every segment


class _PrepareDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, conv, A_log, dt_bias, position, ratio: int, key_dim: int, value_dim: int, eps: float):
        *places, heads, _ = mixed.shape
        tokens = position.numel()
        taps = conv.shape[1]
        assert taps <= MAX_TAPS, taps  # `check_kernels`
        columns, aligned = triton.next_power_of_2(max(key_dim, value_dim)), math.gcd(key_dim, value_dim, 16)
        ctx.sizes = _DeltaSizes(heads, ratio, key_dim, value_dim, taps, TOKENS, columns, aligned)
        ctx.eps = eps
        q, k = (mixed.new_empty(*places, heads, key_dim) for _ in range(2))
        v, z = (mixed.new_empty(*places, heads * ratio, value_dim) for _ in range(2))
        g, beta = (mixed.new_empty(*places, heads * ratio, dtype=torch.float32) for _ in range(2))
        grid = (triton.cdiv(tokens, TOKENS), heads, 2 + 2 * ratio)
        _prepare[grid](mixed, conv, A_log, dt_bias, position, q, k, v, z, g, beta, tokens, eps, *ctx.sizes)
        ctx.save_for_backward(mixed, conv, A_log, dt_bias, position)
        return q, k, v, z, g, beta

    @staticmethod
    def backward(ctx, d_q, d_k, d_v, d_z, d_g, d_beta):
        mixed, conv, A_log, dt_bias, position = ctx.saved_tensors
        sizes, heads, ratio = ctx.sizes, ctx.sizes.heads, ctx.sizes.ratio
        tokens, blocks = position.numel(), triton.cdiv(position.numel(), TOKENS)
        programs = min(PROGRAMS, triton.cdiv(tokens, GRADIENT_TOKENS))
        d_q, d_k, d_v, d_z, d_g, d_beta = (grad.contiguous() for grad in (d_q, d_k, d_v, d_z, d_g, d_beta))
        d_c = mixed.new_empty(tokens, heads * (2 * sizes.key_dim + ratio * sizes.value_dim))
        d_conv = torch.empty(programs, *conv.shape, dtype=torch.float32, device=mixed.device)
        _conv_backward[(programs, heads, 2 + ratio)](
            mixed,
            conv,
            position,
            d_q,
            d_k,
            d_v,
            d_c,
            d_conv,
            tokens,
            ctx.eps,
            *sizes._replace(tokens=GRADIENT_TOKENS),
        )
        d_mixed = torch.empty_like(mixed)
        d_heads = torch.empty(blocks, heads, 2, ratio, dtype=torch.float32, device=mixed.device)
        _input_backward[(blocks, heads, 2 + 2 * ratio)](
            mixed, conv, A_log, dt_bias, position, d_c, d_z, d_g, d_beta, d_mixed, d_heads, tokens, *sizes
        )
        d_A_log, d_dt_bias = d_heads.sum(0).movedim(1, 0).flatten(1)
        return d_mixed, d_conv.sum(0).to(conv.dtype), d_A_log, d_dt_bias, None, None, None, None, None


def prepare_delta(
    mixed_RLKP: Tensor,
    conv_CW: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    documents: Documents,
    ratio: int,
    key_dim: int,
    value_dim: int,
) -> tuple[Tensor, ...]:
    """See `model.layers.deltanet.prepare_delta`."""
    position_RL = documents.position_RL.contiguous()
    return _PrepareDelta.apply(
        mixed_RLKP.contiguous(), conv_CW.contiguous(), A_log, dt_bias, position_RL, ratio, key_dim, value_dim, EPS
    )


def gated_delta_rule(
    q_RLKD: Tensor, k_RLKD: Tensor, v_RLVD: Tensor, g_RLV: Tensor, beta_RLV: Tensor, documents: Documents
) -> Tensor:
    """See `model.layers.delta_rule.gated_delta_rule`; fla's, which takes FlashQLA's kernels where they apply."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    rows = (q_RLKD, k_RLKD, v_RLVD, g_RLV, beta_RLV)
    if documents.single:
        return chunk_gated_delta_rule(*rows)[0]
    # Packed documents: one row of all, and where each begins.
    out, _ = chunk_gated_delta_rule(*(x.flatten(0, 1)[None] for x in rows), cu_seqlens=documents.cu_seqlens_q)
    return out.view(v_RLVD.shape)
