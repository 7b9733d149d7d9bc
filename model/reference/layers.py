"""Slow, obvious twins of every fast path of the model, for reading and for the tests.

Nothing here is chunked, fused, packed or sorted: documents are cut apart and run one by one, states move token by
token, tokens visit their experts one by one. Everything is differentiable and computes in the type it is given, so
float64 in is float64 throughout. Modules take their parameters as a dictionary under the names of the fast modules.

Shape suffixes: R rows, L length, T = R*L, H hidden, K key heads (of the delta rule), N query heads, M key heads (of
attention), D head dimension, C channels, W taps, E experts, V vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import ModelConfig
from model.reference.rope import rotary_frequency

Weights = dict[str, Tensor]


def under(weights: Weights, prefix: str) -> Weights:
    """The parameters of one sub-module, by their names inside it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def document_spans(ids_L: Tensor) -> list[slice]:
    """The documents of a row: runs of one id."""
    ids = ids_L.tolist()
    starts = [t for t in range(len(ids)) if t == 0 or ids[t] != ids[t - 1]]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) * (1 + w).

    Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, with the gain written as in Gemma and Qwen3-Next.
    """
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * (1 + weight)


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension."""
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + eps)


def causal_conv(x_RLC: Tensor, weight_CW: Tensor, ids_RL: Tensor) -> Tensor:
    """out_t = sum_j w[W-1-j] * x_{t-j} over the j < W for which t-j is still in t's document."""
    taps = weight_CW.shape[1]
    rows = []
    for x_LC, ids_L in zip(x_RLC, ids_RL, strict=True):
        out = []
        for span in document_spans(ids_L):
            for t in range(span.start, span.stop):
                reach = min(taps, t - span.start + 1)
                out.append(sum(weight_CW[:, taps - 1 - j] * x_LC[t - j] for j in range(reach)))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def _delta_rule_of_one_document(q_LD: Tensor, k_LD: Tensor, v_LD: Tensor, g_L: Tensor, beta_L: Tensor) -> Tensor:
    state = v_LD.new_zeros(k_LD.shape[1], v_LD.shape[1])
    out = []
    for q, k, v, g, beta in zip(q_LD, k_LD, v_LD, g_L, beta_L, strict=True):
        state = g.exp() * state
        error = v - state.T @ k
        state = state + beta * torch.outer(k, error)
        out.append(state.T @ q / math.sqrt(q.numel()))
    return torch.stack(out)


def gated_delta_rule(
    q_RLND: Tensor, k_RLND: Tensor, v_RLND: Tensor, g_RLN: Tensor, beta_RLN: Tensor, ids_RL: Tensor
) -> Tensor:
    """The gated delta rule token by token, from a zero state at the start of each document.

        S~_t = exp(g_t) S_{t-1}      S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T      o_t = S_t^T q_t / sqrt(D)

    Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024, eq. 10, with the usual scale of the query.
    """
    rows = []
    for row, ids_L in enumerate(ids_RL):
        heads = []
        for n in range(q_RLND.shape[2]):
            arguments = [x[row, :, n] for x in (q_RLND, k_RLND, v_RLND, g_RLN, beta_RLN)]
            parts = [_delta_rule_of_one_document(*(x[span] for x in arguments)) for span in document_spans(ids_L)]
            heads.append(torch.cat(parts))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows)


def attention(q_RLND: Tensor, k_RLMD: Tensor, v_RLMD: Tensor, ids_RL: Tensor) -> Tensor:
    """softmax(q_t K^T / sqrt(D)) V over the tokens of t's document up to t; query head n reads key head n // (N/M).

    Vaswani et al., "Attention Is All You Need", 2017, eq. 1; grouped heads: Ainslie et al., "GQA", 2023.
    """
    ratio = q_RLND.shape[2] // k_RLMD.shape[2]
    rows = []
    for q_LND, k_LMD, v_LMD, ids_L in zip(q_RLND, k_RLMD, v_RLMD, ids_RL, strict=True):
        heads = []
        for n in range(q_LND.shape[1]):
            q, k, v = q_LND[:, n], k_LMD[:, n // ratio], v_LMD[:, n // ratio]
            out = []
            for span in document_spans(ids_L):
                for t in range(span.start, span.stop):
                    seen = slice(span.start, t + 1)
                    probability = (k[seen] @ q[t] / math.sqrt(q.shape[1])).softmax(dim=0)
                    out.append(probability @ v[seen])
            heads.append(torch.stack(out))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows)


def rotary_table(ids_RL: Tensor, shape: ModelConfig) -> Tensor:
    """cos and sin of p * `rotary_frequency`, float64 [2, T, rotary_dim / 2]; p counts from each document's start.

    Both times 0.1 ln(s) + 1, "YaRN", 2023, equation 22.
    """
    frequencies = [rotary_frequency(i, shape) for i in range(shape.rotary_dim // 2)]
    angles = []
    for ids_L in ids_RL:
        for span in document_spans(ids_L):
            for p in range(span.stop - span.start):
                angles.append([p * frequency for frequency in frequencies])
    angle = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()]) * (0.1 * math.log(shape.yarn_factor) + 1)


def rotate(x_TND: Tensor, table: Tensor) -> Tensor:
    """Turns the complex number x_i + j x_{i+d/2} by its angle, for the d = rotary_dim leading dimensions of a head."""
    half = table.shape[-1]
    cos, sin = table.to(x_TND.dtype)[:, :, None, :]
    turned = torch.complex(x_TND[..., :half], x_TND[..., half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag, x_TND[..., 2 * half :]], dim=-1)


def gated_delta_net(hidden_TH: Tensor, weights: Weights, shape: ModelConfig, ids_RL: Tensor) -> Tensor:
    """One Gated DeltaNet layer, key head by key head: [T, H] -> [T, H].

    q, k, v = SiLU(conv(x W)); beta = sigmoid(b); g = -exp(A_log) softplus(a + dt_bias);
    out = W_o [rms_norm(delta rule) * SiLU(z)]. "Gated Delta Networks", 2024, section 3.4.
    """
    ratio = shape.linear_value_heads // shape.linear_key_heads
    key_dim, value_dim = shape.linear_key_dim, shape.linear_value_dim
    x = hidden_TH.view(*ids_RL.shape, -1)
    in_proj = weights["in_proj.weight"].chunk(shape.linear_key_heads)
    conv = weights["conv_weight"].chunk(shape.linear_key_heads)
    heads = []
    for key_head in range(shape.linear_key_heads):
        sizes = [2 * key_dim + ratio * value_dim, ratio * value_dim, ratio, ratio]
        qkv, z, b, a = (x @ in_proj[key_head].T).split(sizes, dim=-1)
        qkv = F.silu(causal_conv(qkv, conv[key_head], ids_RL))
        q, k = l2_normalise(qkv[..., :key_dim]), l2_normalise(qkv[..., key_dim : 2 * key_dim])
        values, gates = qkv[..., 2 * key_dim :].chunk(ratio, dim=-1), z.chunk(ratio, dim=-1)
        for i in range(ratio):
            value_head = key_head * ratio + i
            step = F.softplus(a[..., i] + weights["dt_bias"][value_head])
            decay, write = -weights["A_log"][value_head].exp() * step, torch.sigmoid(b[..., i])
            # One head: [R, L, ...] -> [R, L, 1, ...].
            queries, keys, values_i, decays, writes = (x[:, :, None] for x in (q, k, values[i], decay, write))
            out = gated_delta_rule(queries, keys, values_i, decays, writes, ids_RL)[:, :, 0]
            heads.append(rms_norm(out, weights["out_norm.weight"], shape.norm_eps) * F.silu(gates[i]))
    return torch.cat(heads, dim=-1).flatten(0, 1) @ weights["out_proj.weight"].T


def gated_attention(hidden_TH: Tensor, weights: Weights, shape: ModelConfig, ids_RL: Tensor, table: Tensor) -> Tensor:
    """One gated attention layer, key/value group by group: [T, H] -> [T, H]; ``table`` is that of `rotary_table`.

    Y = sigmoid(X W_gate) * attention(X), Qiu et al., "Gated Attention for Large Language Models", 2025, eq. 5; or
    attention(X) alone without ``attention_gate``.
    """
    each, dim = shape.attention_heads // shape.key_value_heads, shape.head_dim
    heads = []
    for rows in weights["linear_qkv.weight"].chunk(shape.key_value_heads):
        parts = [(hidden_TH @ part.T)[:, None] for part in rows.split(dim)]
        queries, gates, key, value = parts[:each], parts[each:-2], parts[-2], parts[-1]
        key = rotate(rms_norm(key, weights["k_layernorm.weight"], shape.norm_eps), table)
        for index, query in enumerate(queries):
            query = rotate(rms_norm(query, weights["q_layernorm.weight"], shape.norm_eps), table)
            one_q, one_k, one_v = (part.view(*ids_RL.shape, 1, dim) for part in (query, key, value))
            out = attention(one_q, one_k, one_v, ids_RL)
            heads.append(out.flatten(0, 1) * (torch.sigmoid(gates[index]) if shape.attention_gate else 1))
    return torch.cat(heads, dim=1).flatten(1) @ weights["linear_proj.weight"].T


def route(logits_TE: Tensor, k: int) -> tuple[Tensor, list[list[int]], list[list[Tensor]]]:
    """Scores exp(l_i) / sum_j exp(l_j); each token's k best experts, best first; their scores divided by their sum."""
    scores, chosen, probs = [], [], []
    for logits in logits_TE:
        score = logits.exp() / logits.exp().sum()
        best = sorted(range(logits.numel()), key=score.tolist().__getitem__, reverse=True)[:k]
        scores.append(score)
        chosen.append(best)
        probs.append([score[i] / sum(score[j] for j in best) for i in best])
    return torch.stack(scores), chosen, probs


def swiglu(x: Tensor, gate_and_up: Tensor, down: Tensor) -> Tensor:
    """W_down [SiLU(W_gate x) * W_up x] (Shazeer, "GLU Variants Improve Transformer", 2020), gate rows first."""
    gate, up = (gate_and_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


def experts(
    x_TH: Tensor, chosen: list[list[int]], probs: list[list[Tensor]], weight1: Tensor, weight2: Tensor
) -> Tensor:
    """Each token through each of its experts: sum_k prob_k * swiglu_k(x)."""
    first, second = weight1.flatten(1, 2).unbind(), weight2.unbind()
    out = []
    for x, indices, token_probs in zip(x_TH, chosen, probs, strict=True):
        visits = zip(indices, token_probs, strict=True)
        parts = (prob * swiglu(x, first[index], second[index]) for index, prob in visits)
        out.append(sum(parts, torch.zeros_like(x)))
    return torch.stack(out)


def dense(x_TH: Tensor, weights: Weights) -> Tensor:
    """swiglu(x) for every token; fc1 holds each group's gate row and then its up row."""
    fc1 = weights["linear_fc1.weight"]
    gate_and_up = torch.cat([fc1[0::2], fc1[1::2]])
    return torch.stack([swiglu(x, gate_and_up, weights["linear_fc2.weight"]) for x in x_TH])


def shared_expert(x_TH: Tensor, weights: Weights) -> Tensor:
    """sigmoid(w x) * swiglu(x) for every token."""
    return torch.sigmoid(x_TH @ weights["gate_weight"].T) * dense(x_TH, weights)


def balance_loss(
    scores_TE: Tensor, chosen: list[list[int]], token_weight_T: Tensor, groups: list[int] | None = None
) -> Tensor:
    """E * sum_i f_i P_i: f_i the fraction of the assignments that went to expert i, P_i = sum_t w_t score_{t,i}.

    Qiu et al., "Demons in the Detail", 2025, eq. 2 to 6. Tokens of weight 0 count in neither. With ``groups`` (a
    token's sequence, say) f and P are those of each group, and the losses of the groups are added.
    """
    groups = groups or [0] * len(chosen)
    loss = scores_TE.new_zeros(())
    for group in sorted(set(groups)):
        counted = [t for t in range(len(chosen)) if token_weight_T[t] > 0 and groups[t] == group]
        total = sum(len(chosen[t]) for t in counted)
        for i in range(scores_TE.shape[1]):
            count = sum(chosen[t].count(i) for t in counted)
            loss = loss + count / max(total, 1) * sum(token_weight_T[t] * scores_TE[t, i] for t in counted)
    return scores_TE.shape[1] * loss


def z_loss(logits_TE: Tensor, token_weight_T: Tensor) -> Tensor:
    """sum_t w_t (log sum_i exp(logit_{t,i}))^2. Zoph et al., "ST-MoE", 2022, eq. 5."""
    return sum(weight * logits.exp().sum().log() ** 2 for logits, weight in zip(logits_TE, token_weight_T, strict=True))


def moe(hidden_TH: Tensor, weights: Weights, shape: ModelConfig, token_weight_T: Tensor) -> tuple[Tensor, Tensor]:
    """One mixture-of-experts layer, [T, H] -> [T, H], and its balance loss."""
    scores, chosen, probs = route(hidden_TH @ weights["router.weight"].T, shape.experts_per_token)
    routed = experts(hidden_TH, chosen, probs, weights["experts.weight1"], weights["experts.weight2"])
    shared = shared_expert(hidden_TH, under(weights, "shared_expert.")) if shape.shared_expert_size else 0
    return routed + shared, balance_loss(scores, chosen, token_weight_T)


def cross_entropies(hidden_TH: Tensor, head_VH: Tensor, target_T: Tensor) -> Tensor:
    """-log softmax(head x)[target] of each token, nats, from the full logits."""
    logits = hidden_TH @ head_VH.T
    return logits.logsumexp(dim=-1) - logits[torch.arange(target_T.numel()), target_T]


def layers(
    hidden_TH: Tensor, pattern: str, weights: Weights, shape: ModelConfig, ids_RL: Tensor, table: Tensor, token_weight_T
) -> tuple[Tensor, Tensor]:
    """Residual layers, x + f(norm(x)) for each symbol of the pattern, and the sum of their balance losses."""
    balance = hidden_TH.new_zeros(())
    for index, symbol in enumerate(pattern):
        own = under(weights, f"layers.{index}.")
        norm = own["pre_mlp_layernorm.weight" if symbol in "E-" else "input_layernorm.weight"]
        x = rms_norm(hidden_TH, norm, shape.norm_eps)
        if symbol == "G":
            out = gated_delta_net(x, under(own, "self_attention."), shape, ids_RL)
        elif symbol == "*":
            out = gated_attention(x, under(own, "self_attention."), shape, ids_RL, table)
        elif symbol == "-":
            out = dense(x, under(own, "mlp."))
        else:
            out, loss = moe(x, under(own, "mlp."), shape, token_weight_T)
            balance = balance + loss
        hidden_TH = hidden_TH + out
    return hidden_TH, balance
