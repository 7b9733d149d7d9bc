"""Slow twin of the whole network and its loss. In multi-token prediction every step's keys are laid side by side, and
one mask lies over all of them.

Shape suffixes as in `model.reference.layers`.
"""

import math

import torch
from torch import Tensor

from model.batch import MicroBatch
from model.config import INFERENCE, ModelConfig, MtpConfig
from model.reference.layers import Weights, cross_entropies, dense, layers, moe, rms_norm, rotate, under

Keys = tuple[Tensor, Tensor]  # keys and values of one step, [T, M, D]


def visible(ids_T: Tensor, steps: int) -> Tensor:
    """bool [T, steps * T]: the first step's keys of the same document up to t; of each later step the key at t."""
    index = torch.arange(ids_T.numel())
    first = (ids_T[:, None] == ids_T[None, :]) & (index[:, None] >= index[None, :])
    return torch.cat([first, *[torch.eye(ids_T.numel(), dtype=torch.bool)] * (steps - 1)], dim=1)


def attention(
    hidden_TH: Tensor, weights: Weights, shape: ModelConfig, ids_T: Tensor, table: Tensor, keys: list[Keys]
) -> Tensor:
    """Gated attention [T, H] of one step over the keys of the steps so far; its own are added to ``keys``."""
    each, dim = shape.attention_heads // shape.key_value_heads, shape.head_dim
    rows = weights["linear_qkv.weight"].unflatten(0, (shape.key_value_heads, -1, dim))
    parts = torch.einsum("th,mpdh->tmpd", hidden_TH, rows)
    gates = parts[:, :, each:-2] if shape.attention_gate else None
    query, key = (
        rotate(rms_norm(x.flatten(1, 2), weights[f"{name}_layernorm.weight"], shape.norm_eps), table)
        for name, x in (("q", parts[:, :, :each]), ("k", parts[:, :, -2:-1]))
    )
    keys.append((key, parts[:, :, -1]))
    all_keys, all_values = (torch.cat(x).repeat_interleave(each, dim=1) for x in zip(*keys, strict=True))
    scores = torch.einsum("tnd,snd->nts", query, all_keys) / math.sqrt(dim)
    scores = scores.masked_fill(~visible(ids_T, len(keys)), -torch.inf)
    out = torch.einsum("nts,snd->tnd", scores.softmax(dim=-1), all_values)
    out = out if gates is None else out * torch.sigmoid(gates.flatten(1, 2))
    return out.flatten(1) @ weights["linear_proj.weight"].T


def rows_apart(ids_RL: Tensor) -> Tensor:
    """The document ids of a batch as one row of T, no two rows sharing one."""
    rows = torch.arange(ids_RL.shape[0])[:, None]
    return (ids_RL + 1 + rows * (ids_RL.max() + 2)).flatten()


def multi_token_prediction(
    hidden_TH: Tensor,
    read: list[Tensor],
    weights: Weights,
    shape: ModelConfig,
    mtp: MtpConfig,
    ids_RL: Tensor,
    tables: list[Tensor],
    token_weights: list[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """The states of each step, and the sum of their balance losses.

    h_k = norm(layer(W [norm(embedding of token t+k); norm(h_{k-1})])), DeepSeek-V3 report, 2024, section 2.2, with one
    layer shared by all steps.

    Args:
        read: embeddings of the tokens that each step reads; weights: those of the MTP layer.
        tables: rotary table of each step; token_weights: of the step's balance loss.
    """
    states, balance = [hidden_TH], hidden_TH.new_zeros(())
    keys: list[Keys] = []
    own, eps = under(weights, "mtp_model_layer."), shape.norm_eps
    attending, mixing = under(own, "layers.0."), under(own, "layers.1.")
    for embedding, table, token_weight in zip(read, tables, token_weights, strict=True):
        pair = [
            rms_norm(embedding, weights["enorm.weight"], eps),
            rms_norm(states[-1], weights["hnorm.weight"], eps),
        ]
        mixed = torch.cat(pair, dim=-1) @ weights["eh_proj.weight"].T
        if mtp.keys != INFERENCE:
            keys = []
        normed = rms_norm(mixed, attending["input_layernorm.weight"], eps)
        attention_weights = under(attending, "self_attention.")
        mixed = mixed + attention(normed, attention_weights, shape, rows_apart(ids_RL), table, keys)
        normed = rms_norm(mixed, mixing["pre_mlp_layernorm.weight"], eps)
        if "E" in shape.mtp_layers:
            out, loss = moe(normed, under(mixing, "mlp."), shape, token_weight)
            balance = balance + loss
        else:
            out = dense(normed, under(mixing, "mlp."))
        states.append(rms_norm(mixed + out, weights["final_layernorm.weight"], eps))
    return states[1:], balance


def language_model(
    weights: Weights, batch: MicroBatch, shape: ModelConfig, mtp: MtpConfig, tables: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The states [T, H] that the head reads at each prediction step, and the balance loss of all layers.

    The MTP layer's balance loss is the mean over its steps. With ``mtp.detach`` what it reads is a constant.

    Args:
        tables: rotary table of the trunk and of each MTP step.
    """
    ids, embedding = batch.documents.ids_RL, weights["embedding.word_embeddings.weight"]
    tables = [table.to(embedding.dtype) for table in tables]
    read = [embedding[tokens.flatten()] for tokens in batch.tokens_KRL]
    trunk = (shape, ids, tables[0], batch.token_weights_KT[0])
    hidden, balance = layers(read[0], shape.layers, under(weights, "decoder."), *trunk)
    hidden = rms_norm(hidden, weights["decoder.final_norm.weight"], shape.norm_eps)
    if not mtp.steps:
        return [hidden], balance
    inputs = [x.detach() if mtp.detach else x for x in (hidden, *read[1:])]
    token_weights = list(batch.token_weights_KT[1:] / mtp.steps)
    states, loss = multi_token_prediction(
        inputs[0], inputs[1:], under(weights, "mtp.layers.0."), shape, mtp, ids, tables[1:], token_weights
    )
    return [hidden, *states], balance + loss


def loss(
    weights: Weights,
    batch: MicroBatch,
    shape: ModelConfig,
    mtp: MtpConfig,
    balance_weight: float,
    tables: list[Tensor],
) -> Tensor:
    """What training minimises: next token + sum_k weight_k MTP step k + balance_weight * balance."""
    states, balance = language_model(weights, batch, shape, mtp, tables)
    head = weights["embedding.word_embeddings.weight" if shape.tied_embeddings else "output_layer.weight"]
    heads = [head, *[head.detach() if mtp.detach else head] * mtp.steps]
    means = [
        (cross_entropies(state, own, target) * weight).sum()
        for state, own, target, weight in zip(states, heads, batch.targets_KT, batch.weights_KT, strict=True)
    ]
    shares = [1.0, *mtp.loss_weights(batch.tokens_before)]
    return sum(share * mean for share, mean in zip(shares, means, strict=True)) + balance_weight * balance
