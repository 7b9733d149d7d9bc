"""Slow twins of `prefix_attention` and `prefix_gradients` (`model.layers.chain`): all scores at once.

Shape suffixes: R rows, L = S tokens of a row, T = R*L, N query heads, M key heads, D dimension of a head.
"""

import torch
from torch import Tensor

from model.documents import Documents


def _dense_scores(q_TND: Tensor, k_TMD: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Scaled scores [R, N, L, S] of every query with every key, -inf where it may not look, and the repeated keys."""
    rows, ratio = documents.ids_RL.shape[0], q_TND.shape[1] // k_TMD.shape[1]
    q, k = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q_TND, k_TMD.repeat_interleave(ratio, dim=1)))
    same = documents.ids_RL[:, None, :, None] == documents.ids_RL[:, None, None, :]
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~same.tril(), -torch.inf), k


def _by_row(x_TND: Tensor, documents: Documents, heads: int) -> Tensor:
    """[T, M, D] -> [R, N, L, D], every key head as often as queries read it."""
    repeated = x_TND.repeat_interleave(heads // x_TND.shape[1], dim=1)
    return repeated.unflatten(0, (documents.ids_RL.shape[0], -1)).transpose(1, 2)


def dense_prefix(q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """`prefix_attention` by its formula: all scores, then their softmax."""
    scores, _ = _dense_scores(q_TND, k_TMD, documents)
    out = scores.softmax(dim=-1) @ _by_row(v_TMD, documents, q_TND.shape[1])
    return out.transpose(1, 2).flatten(0, 1), scores.logsumexp(dim=-1).transpose(1, 2).flatten(0, 1)


def dense_prefix_gradients(
    grad_TND: Tensor, q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, out_TND: Tensor, lse_TN: Tensor, documents: Documents
) -> tuple[Tensor, ...]:
    """`prefix_gradients` by its formula: P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO O))."""
    heads, (scores, k) = q_TND.shape[1], _dense_scores(q_TND, k_TMD, documents)
    grad, q, v, out = (_by_row(x, documents, heads) for x in (grad_TND, q_TND, v_TMD, out_TND))
    probs = (scores - lse_TN.unflatten(0, (scores.shape[0], -1)).transpose(1, 2)[..., None]).exp()
    d_scores = probs * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    found = (d_scores @ k, d_scores.transpose(-1, -2) @ q, probs.transpose(-1, -2) @ grad)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in found]
    return flat[0], *(x.unflatten(1, (k_TMD.shape[1], -1)).sum(2) for x in flat[1:])
