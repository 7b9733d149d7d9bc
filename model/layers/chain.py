"""Attention over a document's keys and a draft's own: what an MTP step after the first sees at inference.

A draft that starts from position p reads, in one softmax, the keys that the first step wrote at the positions up to p
(the prefix) and those that its own steps wrote since (the chain). In training every position starts a draft, so a row
of queries probs the prefix's keys and has C chain keys to itself. The prefix goes through the attention kernel as
usual; the few chain scores join its softmax by their log-sum-exp, so no [T, T] scores ever exist.

Shape suffixes: R rows, L queries of a row, T = R*L, S keys of the prefix, N query heads, M key heads, G = N/M, D
dimension of a head, C keys of the chain.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from model.documents import Documents, attention_mask
from model.kernels.backends import accelerated
from model.layers.norm import at_least_float32

aten = torch.ops.aten


def _by_rows(x: Tensor, documents: Documents) -> Tensor:
    """[T, N, D] -> [R, N, L, D]."""
    return x.view(documents.ids_RL.shape[0], -1, *x.shape[1:]).transpose(1, 2)


def _additive_mask(q_TND: Tensor, documents: Documents) -> Tensor | None:
    """The mask as the kernels take it: 0 or -inf, in q's type; None where a plain causal mask is enough."""
    mask = attention_mask(documents)
    if mask is None:
        return None
    # A GPU's kernels want rows that start at multiples of 16 numbers.
    room = q_TND.new_zeros(*mask.shape[:-1], -(-mask.shape[-1] // 16) * 16)[..., : mask.shape[-1]]
    return room.masked_fill_(~mask, -torch.inf)


@accelerated("model.kernels.attention")
def prefix_attention(q_TND: Tensor, k_SMD: Tensor, v_SMD: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """`packed_attention` [T, N, D] and the log-sum-exp of its scores [T, N] (at least float32); no gradient."""
    q, k, v = (_by_rows(x, documents) for x in (q_TND, k_SMD, v_SMD))
    mask = _additive_mask(q_TND, documents)
    if q.is_cuda:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        bias = None if mask is None else mask.expand(-1, q.shape[1], -1, -1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, is_causal=mask is None)
        lse = lse[..., : q.shape[2]]  # the kernel pads it
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask)
    return out.transpose(1, 2).reshape(q_TND.shape), lse.transpose(1, 2).reshape(q_TND.shape[:2])


@accelerated("model.kernels.attention")
def prefix_gradients(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_SMD: Tensor,
    v_SMD: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the prefix's part of a larger softmax.

    The kernels recompute the probs as exp(score - lse) and need out only for rowsum(grad * out). So with the whole
    softmax's ``out_TND`` and ``lse_TN`` they give its exact gradients (as in ring attention: Liu, Zaharia, Abbeel,
    "Ring Attention with Blockwise Transformers", 2023).
    """
    grad, q, k, v, out = (_by_rows(x, documents) for x in (grad_TND, q_TND, k_SMD, v_SMD, out_TND))
    lse = lse_TN.view(q.shape[0], q.shape[2], -1).transpose(1, 2)
    mask = _additive_mask(q_TND, documents)
    if q.is_cuda:
        ratio, heads = q.shape[1] // k.shape[1], k.shape[1]
        k, v = (x.repeat_interleave(ratio, dim=1) for x in (k, v))
        bias = None if mask is None else mask.expand(-1, q.shape[1], -1, -1)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32)).contiguous()
        none = torch.zeros((), dtype=torch.int64)  # seed and offset of a dropout that there is not
        gradients = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, bias, out, lse, none, none, 0.0, [True, True, True, False], mask is None
        )
        found = [gradients[0], *(x.unflatten(1, (heads, ratio)).sum(2) for x in gradients[1:3])]
    else:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask
        )
    inputs = (q_TND, k_SMD, v_SMD)
    return tuple(x.transpose(1, 2).reshape(like.shape) for x, like in zip(found, inputs, strict=True))


def _chain_scores(q_TND: Tensor, k_TCMD: Tensor) -> Tensor:
    """Scaled scores of each query with its own chain's keys, at least float32: [T, M, G, C]."""
    q = at_least_float32(q_TND).unflatten(1, (k_TCMD.shape[2], -1))
    return torch.einsum("tmgd,tcmd->tmgc", q, at_least_float32(k_TCMD)) * q_TND.shape[-1] ** -0.5


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TND, k_SMD, v_SMD, k_TCMD, v_TCMD, documents: Documents) -> Tensor:
        prefix, lse = prefix_attention(q_TND, k_SMD, v_SMD, documents)
        scores = _chain_scores(q_TND, k_TCMD)
        whole = torch.logaddexp(lse, scores.logsumexp(dim=-1).flatten(1))
        probs = (scores - whole.view_as(scores[..., 0])[..., None]).exp()
        chain = torch.einsum("tmgc,tcmd->tmgd", probs, at_least_float32(v_TCMD)).flatten(1, 2)
        out = (at_least_float32(prefix) * (lse - whole).exp()[..., None] + chain).to(q_TND.dtype)
        ctx.save_for_backward(q_TND, k_SMD, v_SMD, k_TCMD, v_TCMD, out, whole)
        ctx.documents = documents
        return out

    @staticmethod
    def backward(ctx, grad_TND: Tensor):
        q_TND, k_SMD, v_SMD, k_TCMD, v_TCMD, out, whole = ctx.saved_tensors
        grad_TND = grad_TND.contiguous()
        grad_q, grad_k, grad_v = prefix_gradients(grad_TND, q_TND, k_SMD, v_SMD, out, whole, ctx.documents)
        heads, scale = (k_TCMD.shape[2], -1), q_TND.shape[-1] ** -0.5
        grad, q, values = at_least_float32(grad_TND), at_least_float32(q_TND), at_least_float32(v_TCMD)
        mean = (grad * at_least_float32(out)).sum(-1)
        grad, q, mean, whole = (x.unflatten(1, heads) for x in (grad, q, mean, whole))
        probs = (_chain_scores(q_TND, k_TCMD) - whole[..., None]).exp()
        grad_scores = probs * (torch.einsum("tmgd,tcmd->tmgc", grad, values) - mean[..., None]) * scale
        grad_q = grad_q + torch.einsum("tmgc,tcmd->tmgd", grad_scores, at_least_float32(k_TCMD)).flatten(1, 2)
        grad_chain_k = torch.einsum("tmgc,tmgd->tcmd", grad_scores, q).to(k_TCMD.dtype)
        grad_chain_v = torch.einsum("tmgc,tmgd->tcmd", probs, grad).to(v_TCMD.dtype)
        return grad_q.to(q_TND.dtype), grad_k, grad_v, grad_chain_k, grad_chain_v, None


def chain_attention(
    q_TND: Tensor, k_SMD: Tensor, v_SMD: Tensor, k_TCMD: Tensor, v_TCMD: Tensor, documents: Documents
) -> Tensor:
    """Softmax attention of each query over its document's keys up to its position and its own C chain keys.

    Args:
        q_TND: queries. k_SMD, v_SMD: the prefix, as of `packed_attention`. k_TCMD, v_TCMD: the chains.
    Returns:
        [T, N, D]; differentiable in all five.
    """
    return _ChainAttention.apply(q_TND, k_SMD, v_SMD, k_TCMD, v_TCMD, documents)


@dataclass
class ChainCache:
    """The keys and values of the MTP steps so far, as this process attends to them (see `context_attention`).

    Handed to the layers as megatron-core's ``inference_context``: what an attention has to remember between calls.
    """

    prefix: tuple[Tensor, Tensor] | None = None
    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def is_static_batching(self) -> bool:
        """megatron-core asks this of its own contexts."""
        return False

    def attend(self, attention, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        """What ``attention`` (a `GatedAttention`) gives at the next step; the first step's keys are the prefix."""
        first = self.prefix is None
        core = partial(self._first if first else self._later, attention.attend)
        return attention.over_context(core, query, key, value, documents)

    def _first(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        self.prefix = (key, value)
        return attend(query, key, value, documents)

    def _later(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        assert self.prefix is not None  # the first step has left it
        self.steps.append((key, value))
        keys, values = (torch.stack(part, dim=1) for part in zip(*self.steps, strict=True))
        return attend(query, *self.prefix, documents, keys, values)
