"""Kernels of `model.layers.attention`: Triton around softmax attention, cuDNN's and FlashAttention's for itself.

    n = x / rms(x) (1 + w)      y_c = n_c cos_c -+ n_c' sin_c      c' the column that RoPE pairs with c
    gated: y = x sigmoid(gate)

Shape suffixes as in `model.layers.attention`; S slots of a key/value group: its queries, their gates, key, value.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # that share the tokens of a slot in the backward pass
TOKENS = 16  # of a program's tile
BLOCK = 4096


@triton.jit
def _prepare(mixed, q_weight, k_weight, table, query, key, value, gate, tokens, eps, GROUPS: tl.constexpr,
             EACH: tl.constexpr, GATES: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr, TOKENS: tl.constexpr,
             COLUMNS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    group, slot = tl.program_id(1) // (EACH + GATES + 2), tl.program_id(1) % (EACH + GATES + 2)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < DIM)
    row = mixed + (token * GROUPS + group) * ((EACH + GATES + 2) * DIM) + slot * DIM
    x = tl.load(row + column, inside, 0.0).to(tl.float32)
    out = query + (token * GROUPS + group) * (EACH * DIM) + slot * DIM
    if (slot >= EACH) & (slot < EACH + GATES):
        out = gate + (token * GROUPS + group) * (GATES * DIM) + (slot - EACH) * DIM
    if slot >= EACH + GATES:
        out = key + (token * GROUPS + group) * DIM
    if slot == EACH + GATES + 1:
        out = value + (token * GROUPS + group) * DIM
    if (slot < EACH) | (slot == EACH + GATES):
        weight = q_weight
        if slot >= EACH:
            weight = k_weight
        pair = tl.where(column < TURNED // 2, column + TURNED // 2, column - TURNED // 2)
        turned = column < TURNED
        scale = 1 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / DIM + eps)
        n = x * scale * (1 + tl.load(weight + column, column < DIM, 0.0))
        other = tl.load(row + pair, inside & turned, 0.0).to(tl.float32)
        other *= scale * (1 + tl.load(weight + pair, turned, 0.0))
        cos = tl.load(table + token * TURNED + column, inside & turned, 1.0)
        sin = tl.load(table + (tokens + token) * TURNED + column, inside & turned, 0.0)
        x = n * cos + tl.where(column < TURNED // 2, -other, other) * sin
    tl.store(out + column, x, inside)


@triton.jit
def _prepare_backward(mixed, q_weight, k_weight, table, d_query, d_key, d_value, d_gate, d_mixed, d_weight, tokens,
                      eps, GROUPS: tl.constexpr, EACH: tl.constexpr, GATES: tl.constexpr, DIM: tl.constexpr,
                      TURNED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    group, slot = tl.program_id(1) // (EACH + GATES + 2), tl.program_id(1) % (EACH + GATES + 2)
    column = tl.arange(0, COLUMNS)[None, :]
    pair = tl.where(column < TURNED // 2, column + TURNED // 2, column - TURNED // 2)
    turned = column < TURNED
    weight = q_weight
    if slot >= EACH:
        weight = k_weight
    gain = 1 + tl.load(weight + column, column < DIM, 0.0)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        token = (block * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
        inside = (token < tokens) & (column < DIM)
        place = (token * GROUPS + group) * ((EACH + GATES + 2) * DIM) + slot * DIM
        source = d_query + (token * GROUPS + group) * (EACH * DIM) + slot * DIM
        if (slot >= EACH) & (slot < EACH + GATES):
            source = d_gate + (token * GROUPS + group) * (GATES * DIM) + (slot - EACH) * DIM
        if slot >= EACH + GATES:
            source = d_key + (token * GROUPS + group) * DIM
        if slot == EACH + GATES + 1:
            source = d_value + (token * GROUPS + group) * DIM
        grad = tl.load(source + column, inside, 0.0).to(tl.float32)
        if (slot < EACH) | (slot == EACH + GATES):
            cos = tl.load(table + token * TURNED + column, inside & turned, 1.0)
            sin = tl.load(table + (tokens + token) * TURNED + column, inside & turned, 0.0)
            other = tl.load(source + pair, inside & turned, 0.0).to(tl.float32)
            dn = grad * cos + tl.where(column < TURNED // 2, other, -other) * sin
            x = tl.load(mixed + place + column, inside, 0.0).to(tl.float32)
            scale = 1 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / DIM + eps)
            n = x * scale
            total += dn * n
            u = dn * gain
            grad = (u - n * (tl.sum(n * u, 1, keep_dims=True) / DIM)) * scale
        tl.store(d_mixed + place + column, grad, inside)
    own = d_weight + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * DIM + tl.arange(0, COLUMNS)
    tl.store(own, tl.sum(total, 0), tl.arange(0, COLUMNS) < DIM)


class _HeadSizes(NamedTuple):
    """The compile-time sizes of `_prepare` and `_prepare_backward`, in their order."""

    groups: int
    each: int  # queries of a key/value group
    gates: int
    dim: int
    turned: int  # dimensions that RoPE rotates
    tokens: int  # of a tile
    columns: int  # of a tile: the next power of two


class _PrepareHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, each: int, gates: int, eps):
        tokens, groups, slots, dim = mixed.shape
        turned = table.shape[-1]
        query, key, value, gate = (
            mixed.new_empty(tokens, groups * number, dim) for number in (each, 1, 1, gates)
        )  # fmt: skip
        ctx.sizes = _HeadSizes(groups, each, gates, dim, turned, TOKENS, triton.next_power_of_2(dim))
        grid = (triton.cdiv(tokens, TOKENS), groups * slots)
        _prepare[grid](mixed, q_weight, k_weight, table, query, key, value, gate, tokens, eps, *ctx.sizes)
        ctx.save_for_backward(mixed, q_weight, k_weight, table)
        ctx.eps = eps
        return query, key, value, gate

    @staticmethod
    def backward(ctx, *grads: Tensor):
        mixed, q_weight, k_weight, table = ctx.saved_tensors
        tokens, groups, slots, dim = mixed.shape
        programs = min(PROGRAMS, triton.cdiv(tokens, TOKENS))
        d_mixed = torch.empty_like(mixed)
        d_weight = torch.empty(groups, slots, programs, dim, dtype=torch.float32, device=mixed.device)
        _prepare_backward[(programs, groups * slots)](
            mixed, q_weight, k_weight, table, *(grad.contiguous() for grad in grads), d_mixed, d_weight, tokens,
            ctx.eps, *ctx.sizes,
        )  # fmt: skip
        key = ctx.sizes.each + ctx.sizes.gates  # the slot behind the queries and their gates
        d_q, d_k = d_weight[:, : ctx.sizes.each].sum((0, 1, 2)), d_weight[:, key].sum((0, 1))
        return d_mixed, d_q.to(q_weight.dtype), d_k.to(k_weight.dtype), None, None, None, None


def prepare_heads(mixed_TGSD: Tensor, q_norm, k_norm, table: Tensor, each: int, gates: int) -> tuple[Tensor, ...]:
    """See `model.layers.attention.prepare_heads`."""
    return _PrepareHeads.apply(mixed_TGSD.contiguous(), q_norm(), k_norm(), table, each, gates, q_norm.eps)


@triton.jit
def _gate(x, gate, out, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(gate + place, place < numel, 0.0).to(tl.float32)
    y = tl.load(x + place, place < numel, 0.0).to(tl.float32) / (1 + tl.exp(-z))
    tl.store(out + place, y, place < numel)


@triton.jit
def _gate_backward(x, gate, grad, grad_x, grad_gate, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    sigmoid = 1 / (1 + tl.exp(-tl.load(gate + place, inside, 0.0).to(tl.float32)))
    dy = tl.load(grad + place, inside, 0.0).to(tl.float32) * sigmoid
    tl.store(grad_x + place, dy, inside)
    tl.store(grad_gate + place, dy * tl.load(x + place, inside, 0.0).to(tl.float32) * (1 - sigmoid), inside)


class _GateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
        out = torch.empty_like(x)
        _gate[(triton.cdiv(x.numel(), BLOCK),)](x, gate, out, x.numel(), BLOCK)
        ctx.save_for_backward(x, gate)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gate = ctx.saved_tensors
        grad_x, grad_gate = torch.empty_like(x), torch.empty_like(x)
        _gate_backward[(triton.cdiv(x.numel(), BLOCK),)](
            x, gate, grad.contiguous(), grad_x, grad_gate, x.numel(), BLOCK
        )
        return grad_x, grad_gate


def gate_heads(x_TND: Tensor, gate_TND: Tensor) -> Tensor:
    """See `model.layers.attention.gate_heads`."""
    return _GateHeads.apply(x_TND.contiguous(), gate_TND.contiguous())


def _rows(x: Tensor, documents) -> Tensor:
    """[T, N, D] as [R, N, L, D], without a copy."""
    return x.view(documents.ids_RL.shape[0], -1, *x.shape[1:]).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _whole_rows(q: Tensor, k: Tensor, v: Tensor, documents) -> bool:
    """Whether every row is one document that cuDNN's kernels take as it is."""
    if not documents.single:
        return False
    q, k, v = (_rows(x, documents) for x in (q, k, v))
    with torch.enable_grad():  # autograd functions switch it off, and then nobody asks for the backward pass
        parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
        return torch.backends.cuda.can_use_cudnn_attention(parameters)


def attention_forward(q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document, and the logarithm of each softmax's denominator.

    Returns:
        out [T, N, D], and the log-sum-exp of the scaled scores as `attention_backward` wants it: float32,
        [R, N, L, 1] where every row is one document, else [N, T].
    """
    q, k, v = q_TND, k_TMD, v_TMD
    if _whole_rows(q, k, v, documents):
        q, k, v = (_rows(x, documents) for x in (q, k, v))
        out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
        return _flat(out), log_sum
    border, longest = documents.cu_seqlens_q, documents.max_seqlen_q
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, border, border, longest, longest, 0.0, True, False
    )
    return out, log_sum


def attention_backward(
    grad_TND: Tensor, q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, out_TND: Tensor, log_sum: Tensor, documents
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    With the output and the log-sum-exp of a softmax over more keys than these, they are the gradients through these
    keys' part of it: so parts of one softmax can be computed apart.
    """
    q, k, v, out, grad = q_TND, k_TMD, v_TMD, out_TND, grad_TND
    if _whole_rows(q, k, v, documents):
        q, k, v, out, grad = (_rows(x, documents) for x in (q, k, v, out, grad))
        length = q.shape[2]
        state = torch.zeros((), dtype=torch.int64, device=q.device)  # of the generator: nothing is dropped
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, log_sum, state, state, None, None, None, length, length, 0.0, True
        )
        return tuple(_flat(x) for x in grads)
    border, longest = documents.cu_seqlens_q, documents.max_seqlen_q
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, log_sum, border, border, longest, longest, 0.0, True, state, state[:0]
    )


def prefix_attention(q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents) -> tuple[Tensor, Tensor]:
    """See `model.layers.chain.prefix_attention`."""
    q, k, v = (x.contiguous() for x in (q_TND, k_TMD, v_TMD))
    out, log_sum = attention_forward(q, k, v, documents)
    by_token = log_sum[..., 0].transpose(1, 2).flatten(0, 1) if _whole_rows(q, k, v, documents) else log_sum.t()
    return out, by_token.contiguous()


def prefix_gradients(
    grad_TND: Tensor, q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, out_TND: Tensor, lse_TN: Tensor, documents
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model.layers.chain.prefix_gradients`."""
    grad, q, k, v, out = (x.contiguous() for x in (grad_TND, q_TND, k_TMD, v_TMD, out_TND))
    log_sum = lse_TN.t()
    if _whole_rows(q, k, v, documents):
        log_sum = lse_TN.unflatten(0, (documents.ids_RL.shape[0], -1)).transpose(1, 2)[..., None]
    return attention_backward(grad, q, k, v, out, log_sum.contiguous(), documents)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents) -> Tensor:
        out, log_sum = attention_forward(q_TND, k_TMD, v_TMD, documents)
        ctx.save_for_backward(q_TND, k_TMD, v_TMD, out, log_sum)
        ctx.documents = documents
        return out

    @staticmethod
    def backward(ctx, grad_TND: Tensor):
        return *attention_backward(grad_TND, *ctx.saved_tensors, ctx.documents), None


def packed_attention(q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents) -> Tensor:
    """See `model.layers.attention.packed_attention`, for queries and keys of the same tokens."""
    return _PackedAttention.apply(q_TND.contiguous(), k_TMD.contiguous(), v_TMD.contiguous(), documents)
