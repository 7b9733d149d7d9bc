"""Triton kernels of `model.layers.router`: float32 scores from bfloat16 states, and top-k routing in one pass.

A float32 number is the sum of three bfloat16 numbers to its last bit or two, and a product of two bfloat16 numbers is
exact in float32. So products with a float32 matrix are sums of bfloat16 products with its parts, accumulated in
float32 on the matrix units: as exact as float32 arithmetic, several times as fast.

    s = softmax(l)      w_k = s_k / sum of the top k
    dl = s (ds - sum(s ds)) + at each chosen expert w_k (dw_k - sum_j w_j dw_j)

Shape suffixes as in `model.layers.router`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # tokens of a program


@triton.jit
def _split(x, out, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    rest = tl.load(x + place, inside, 0.0)
    for part in tl.static_range(3):
        high = rest.to(tl.bfloat16)
        tl.store(out + part * numel + place, high, inside)
        rest -= high.to(tl.float32)


def split(x: Tensor) -> Tensor:
    """[3, ...] bfloat16, largest first, whose sum is the float32 tensor x."""
    out = torch.empty(3, *x.shape, dtype=torch.bfloat16, device=x.device)
    _split[(triton.cdiv(x.numel(), 1024),)](x.contiguous(), out, x.numel(), 1024)
    return out


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
        parts = split(weight_EH)
        ctx.save_for_backward(hidden_TH, parts)
        logits = torch.mm(hidden_TH, parts.flatten(0, 1).t(), out_dtype=torch.float32)
        # Smallest first, so that the small ones are not lost one by one.
        high, middle, low = logits.chunk(3, dim=1)
        return low.add(middle).add_(high)

    @staticmethod
    def backward(ctx, grad_TE: Tensor):
        hidden_TH, parts_3EH = ctx.saved_tensors
        grads_3TE = split(grad_TE)
        # The gradient of the states is rounded to bfloat16 in the end: of nine products these three matter.
        left = torch.cat([grads_3TE[0], grads_3TE[0], grads_3TE[1]], dim=1)
        grad_hidden = left @ torch.cat([parts_3EH[0], parts_3EH[1], parts_3EH[0]])
        together = grads_3TE.transpose(0, 1).flatten(1)
        grad_weight = torch.mm(together.t(), hidden_TH, out_dtype=torch.float32)
        return grad_hidden, grad_weight.view_as(parts_3EH).sum(0)


def router_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """See `model.layers.router.router_logits`."""
    return _RouterLogits.apply(hidden_TH.contiguous(), weight_EH)


@triton.jit
def _route(logits, scores, weights, experts, tokens, EXPERTS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert = tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (expert < EXPERTS)
    x = tl.load(logits + token * EXPERTS + expert, inside, float("-inf"))
    e = tl.exp(x - tl.max(x, 1, keep_dims=True))
    score = e / tl.sum(e, 1, keep_dims=True)
    tl.store(scores + token * EXPERTS + expert, score, inside)
    slot = tl.arange(0, SLOTS)[None, :]
    best, chosen = tl.zeros([ROWS, SLOTS], tl.float32), tl.zeros([ROWS, SLOTS], tl.int32)
    # Of a row that holds a NaN or an infinity no score is a number: it takes the first experts, as good as any, and its
    # weights, 0 / 0, carry the NaN on. So indices are experts whatever the logits.
    left = tl.where(inside, tl.where(score == score, score, 0.0), -1.0)
    for k in tl.static_range(K):
        top = tl.max(left, 1, keep_dims=True)
        # The first of equals, as a stable sort has it.
        where = tl.min(tl.where(left == top, expert, COLUMNS), 1, keep_dims=True)
        best = tl.where(slot == k, top, best)
        chosen = tl.where(slot == k, where, chosen)
        left = tl.where(expert == where, -1.0, left)
    kept = (token < tokens) & (slot < K)
    tl.store(weights + token * K + slot, best / tl.sum(best, 1, keep_dims=True), kept)
    tl.store(experts + token * K + slot, chosen.to(tl.int64), kept)


@triton.jit
def _route_backward(scores, weights, experts, grad_scores, grad_weights, grad_logits, tokens, EXPERTS: tl.constexpr,
                    K: tl.constexpr, SCORED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    SLOTS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert, slot = tl.arange(0, COLUMNS)[None, :], tl.arange(0, SLOTS)[None, :]
    inside, kept = (token < tokens) & (expert < EXPERTS), (token < tokens) & (slot < K)
    weight = tl.load(weights + token * K + slot, kept, 0.0)
    dw = tl.load(grad_weights + token * K + slot, kept, 0.0)
    chosen = token * EXPERTS + tl.load(experts + token * K + slot, kept, 0)
    picked = weight * (dw - tl.sum(weight * dw, 1, keep_dims=True))
    dense = tl.zeros([ROWS, COLUMNS], tl.float32)
    if SCORED:
        score = tl.load(scores + token * EXPERTS + expert, inside, 0.0)
        dscore = tl.load(grad_scores + token * EXPERTS + expert, inside, 0.0)
        inner = tl.sum(score * dscore, 1, keep_dims=True)
        dense = score * (dscore - inner)
        picked += tl.load(scores + chosen, kept, 0.0) * (tl.load(grad_scores + chosen, kept, 0.0) - inner)
    tl.store(grad_logits + token * EXPERTS + expert, dense, inside)
    # The chosen are written again, by other threads than before.
    tl.debug_barrier()
    tl.store(grad_logits + chosen, picked, kept)


class _RouteSizes(NamedTuple):
    """The compile-time sizes of a tile of `_route` and `_route_backward`, in their order."""

    rows: int
    columns: int  # experts, to the next power of two
    slots: int  # experts per token, likewise


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE: Tensor, k: int):
        tokens, number = logits_TE.shape
        scores, weights = torch.empty_like(logits_TE), logits_TE.new_empty(tokens, k)
        experts = torch.empty(tokens, k, dtype=torch.int64, device=logits_TE.device)
        ctx.sizes = _RouteSizes(ROWS, triton.next_power_of_2(number), triton.next_power_of_2(k))
        grid = (triton.cdiv(tokens, ROWS),)
        _route[grid](logits_TE, scores, weights, experts, tokens, number, k, *ctx.sizes)
        ctx.save_for_backward(scores, weights, experts)
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        return scores, weights, experts

    @staticmethod
    def backward(ctx, grad_scores_TE: Tensor | None, grad_weights_TK: Tensor | None, _):
        scores, weights, experts = ctx.saved_tensors
        (tokens, number), k = scores.shape, weights.shape[1]
        grad = torch.empty_like(scores)
        if grad_weights_TK is None:
            grad_weights_TK = torch.zeros_like(weights)
        grad_scores_TE = None if grad_scores_TE is None else grad_scores_TE.contiguous()
        _route_backward[(triton.cdiv(tokens, ROWS),)](
            scores, weights, experts, grad_scores_TE, grad_weights_TK.contiguous(), grad, tokens, number, k,
            grad_scores_TE is not None, *ctx.sizes,
        )  # fmt: skip
        return grad, None


def route(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `model.layers.router.route`."""
    return _Route.apply(logits_TE.contiguous(), k)
