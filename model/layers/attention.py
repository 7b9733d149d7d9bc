"""Gated softmax attention: grouped queries, q/k norm, partial rotary embedding, elementwise sigmoid output gate.

Y = sigmoid(X W_gate) * softmax(Q K^T / sqrt(D)) V, then the output projection (Qiu et al., "Gated Attention for Large
Language Models", 2025, variant G1 elementwise).
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import key_head_copies
from model.documents import Documents, attention_mask
from model.kernels.backends import accelerated
from model.layers.chain import chain_attention
from model.layers.context import LayerCache
from model.layers.gauges import Gauge, note_gates, note_sink
from model.layers.norm import at_least_float32
from model.layers.recompute import recomputable
from model.layers.rope import apply_rotary
from parallel.collectives import heads_to_sequence, sequence_to_heads


@dataclass
class GatedAttentionSubmodules:
    """The parts that a backend chooses."""

    linear_qkv: Callable[..., nn.Module]
    linear_proj: Callable[..., nn.Module]
    norm: type


@accelerated("model.kernels.attention")
def prepare_heads(mixed_TGSD: Tensor, q_norm, k_norm, table: Tensor, each: int, gates: int) -> tuple[Tensor, ...]:
    """Query [T, N, D] and key [T, M, D], normed and rotated, value [T, M, D] and gate [T, N, D] (or [T, 0, D]).

    Args:
        mixed_TGSD: for each key/value head its ``each`` query heads, their ``gates``, the key and the value.
        q_norm, k_norm: norms over a head (`HeadNorm`). table: that of `rotary_table`.
    """
    query, gate, key, value = mixed_TGSD.split([each, gates, 1, 1], dim=2)
    query = apply_rotary(q_norm(query.flatten(1, 2)), table)
    key = apply_rotary(k_norm(key.flatten(1, 2)), table)
    return query, key, value.flatten(1, 2), gate.flatten(1, 2)


@accelerated("model.kernels.attention")
def gate_heads(x_TND: Tensor, gate_TND: Tensor) -> Tensor:
    """x * sigmoid(gate). The gate saturates: its sigmoid is taken in float32, as in megatron-core."""
    return x_TND * at_least_float32(gate_TND).sigmoid().to(x_TND.dtype)


@accelerated("model.kernels.attention")
def packed_attention(q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document; N query heads share M <= N key heads in order. Returns [T, N, D]."""
    rows, length = documents.ids_RL.shape
    q, k, v = (x.view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (q_TND, k_TMD, v_TMD))
    mask = attention_mask(documents)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2).reshape(q_TND.shape)


def context_attention(
    attend: Callable, q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents: Documents, group
) -> Tensor:
    """``attend(q, k, v, documents)`` of rows whose parts lie on the processes of ``group``.

    Each process takes whole rows of some heads, so that all have the same work and kernels see whole rows (Jacobs et
    al., "DeepSpeed Ulysses", 2023). Key heads that are fewer than the processes are repeated for those who share one.
    """
    rows, length = documents.ids_RL.shape
    copies = key_head_copies(k_TMD.shape[1], group.size())
    repeated = (x if copies == 1 else x.repeat_interleave(copies, dim=1) for x in (k_TMD, v_TMD))
    parts = (x.view(rows, length, *x.shape[1:]) for x in (q_TND, *repeated))
    q, k, v = (heads_to_sequence(x, group).flatten(0, 1) for x in parts)
    out = attend(q, k, v, documents.whole)
    return sequence_to_heads(out.unflatten(0, (rows, -1)), group).flatten(0, 1)


class GatedAttention(MegatronModule):
    """One gated attention layer.

    The fused projection holds, for each key/value head: its query heads, their gates, the key, the value. So a cut
    into tensor-parallel parts is a plain cut of rows, as in megatron-core's own attention. Without
    ``attention_gate`` there are no gate rows, and nothing is gated.
    """

    def __init__(
        self, config, submodules, layer_number: int, pg_collection, pp_layer_offset: int | None = None, name=None
    ):
        super().__init__(config=config)
        shape = config.shape
        self.layer_number, self.gauge = layer_number, Gauge()
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.groups = shape.key_value_heads // pg_collection.tp.size()
        self.queries_per_group = shape.attention_heads // shape.key_value_heads
        self.head_dim = shape.head_dim
        self.gates_per_group = self.queries_per_group if shape.attention_gate else 0
        rows = shape.key_value_heads * (self.queries_per_group + self.gates_per_group + 2) * shape.head_dim
        self.linear_qkv = submodules.linear_qkv(config.hidden_size, rows, config, pg_collection.tp)
        self.q_layernorm = submodules.norm(config, shape.head_dim, shape.norm_eps)
        self.k_layernorm = submodules.norm(config, shape.head_dim, shape.norm_eps)
        self.linear_proj = submodules.linear_proj(
            shape.attention_heads * shape.head_dim, config.hidden_size, config, pg_collection.tp
        )

    def project(self, hidden_T1H: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query [T, N, D], key and value [T, M, D] (normed and rotated), and gate [T, N, D]; no gate: [T, 0, D]."""
        mixed, _ = self.linear_qkv(hidden_T1H)
        each, gates = self.queries_per_group, self.gates_per_group
        mixed = mixed.view(-1, self.groups, each + gates + 2, self.head_dim)
        return prepare_heads(mixed, self.q_layernorm, self.k_layernorm, rotary, each, gates)

    @recomputable("attention")
    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, *chain: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(D)) V: [T, N, D]; ``chain``: the keys and values of `chain_attention`."""
        if chain:
            keys, values = chain
            return chain_attention(query, key, value, keys, values, documents)
        if self.gauge.listens:
            note_sink(self.gauge, query, key, documents)
        return packed_attention(query, key, value, documents)

    def over_context(self, core: Callable, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        """``core(query, key, value, documents)`` where this process has all the keys that it needs: [T, N, D]."""
        if self.cp_group.size() == 1:
            return core(query, key, value, documents)
        return context_attention(core, query, key, value, documents, self.cp_group)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask=None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: Documents,
        inference_context: LayerCache | None = None,
        **_,
    ) -> tuple[Tensor, None]:
        """hidden [T, 1, H] -> [T, 1, H]; other keywords of megatron-core's layer are for its own attentions.

        Keywords as `model.layers.context.LayerContext` says; without a cache the keys are those of these tokens.
        """
        query, key, value, gate = self.project(hidden_states, rotary_pos_emb)
        if inference_context is None:
            mixed = self.over_context(self.attend, query, key, value, packed_seq_params)
        else:
            mixed = inference_context.attend(self, query, key, value, packed_seq_params)
        if self.gates_per_group:
            if self.gauge.listens:
                note_gates(self.gauge, gate, packed_seq_params)
            mixed = gate_heads(mixed, gate)
        return self.linear_proj(mixed.flatten(1)[:, None])
