"""Gated DeltaNet: linear attention with a decaying matrix state, updated by the delta rule (`model.layers.delta_rule`).

Shape suffixes: R rows, L length, T = R*L, K key heads, V value heads, D dimension of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import passes_states
from model.documents import Documents
from model.kernels.backends import accelerated
from model.layers.delta_rule import causal_conv, chunk_gated_delta_rule, gated_delta_rule, l2_normalise
from model.layers.gauges import Gauge, note_delta
from model.layers.norm import at_least_float32
from model.layers.recompute import recomputable
from parallel.collectives import earlier_parts, heads_to_sequence, sequence_to_heads


def prepare_part(
    mixed_RLKP: Tensor,
    conv_CW: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    documents: Documents,
    ratio: int,
    key_dim: int,
    value_dim: int,
    before_RWC: Tensor | None,
) -> tuple[Tensor, ...]:
    """What the delta rule reads, from the projection of some key heads: the arguments of `prepare_delta`, with the
    inputs before the first where the rows begin within a sequence."""
    value_width = ratio * value_dim
    qkv, z, b, a = mixed_RLKP.split([2 * key_dim + value_width, value_width, ratio, ratio], dim=-1)
    qkv = F.silu(causal_conv(qkv.flatten(2), conv_CW, documents, before_RWC)).view(qkv.shape)
    q, k, v = qkv.split([key_dim, key_dim, value_width], dim=-1)
    q, k = (l2_normalise(at_least_float32(x)) for x in (q, k))
    v, z = (x.unflatten(-1, (ratio, value_dim)).flatten(2, 3) for x in (v, z))
    beta = at_least_float32(b.flatten(2)).sigmoid()
    g = -A_log.exp() * F.softplus(at_least_float32(a.flatten(2)) + dt_bias)
    return q, k, v, z, g, beta


@accelerated("model.kernels.deltanet")
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
    """What the delta rule reads of whole rows: q, k [R, L, K, D] (normalised), v, z [R, L, V, D], g, beta [R, L, V].

    Args:
        mixed_RLKP: for each key head its query, its key, its ``ratio`` values and their gates z, b and a.
        conv_CW: taps of the channels of q, k and v, head by head.
    """
    return prepare_part(mixed_RLKP, conv_CW, A_log, dt_bias, documents, ratio, key_dim, value_dim, None)


@dataclass
class GatedDeltaNetSubmodules:
    """The parts that a backend chooses."""

    in_proj: Callable[..., nn.Module]
    out_proj: Callable[..., nn.Module]
    out_norm: type


class GatedDeltaNet(MegatronModule):
    """One Gated DeltaNet layer.

    The fused input projection holds, for each key head: query, key, its value heads' values, their output gates z,
    write strengths b and decays a. So a cut into tensor-parallel parts is a plain cut of rows, and heads never move.
    ``A_log`` and ``dt_bias`` are float32 whatever the model's type.
    """

    def __init__(self, config, submodules, layer_number: int, pg_collection, name=None):
        super().__init__(config=config)
        shape = config.shape
        self.layer_number, self.gauge = layer_number, Gauge()
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.key_heads = shape.linear_key_heads // pg_collection.tp.size()
        self.ratio = shape.linear_value_heads // shape.linear_key_heads
        self.key_dim, self.value_dim = shape.linear_key_dim, shape.linear_value_dim
        per_head = 2 * self.key_dim + self.ratio * (2 * self.value_dim + 2)
        self.in_proj = submodules.in_proj(
            config.hidden_size, shape.linear_key_heads * per_head, config, pg_collection.tp
        )
        value_heads = self.key_heads * self.ratio
        self.conv_channels = 2 * self.key_dim + self.ratio * self.value_dim
        self.conv_weight = nn.Parameter(
            torch.empty(self.key_heads * self.conv_channels, shape.conv_kernel, dtype=config.params_dtype)
        )
        self.A_log = nn.Parameter(torch.empty(value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(value_heads, dtype=torch.float32))
        for parameter in (self.conv_weight, self.A_log, self.dt_bias):
            parameter.tensor_model_parallel = True
            parameter.partition_dim = 0
            parameter.partition_stride = 1
        self.out_norm = submodules.out_norm(config, self.value_dim, shape.norm_eps)
        self.out_proj = submodules.out_proj(
            shape.linear_value_heads * self.value_dim, config.hidden_size, config, pg_collection.tp
        )

    def forward(
        self, hidden_states: Tensor, attention_mask=None, *, packed_seq_params: Documents, inference_context=None, **_
    ) -> tuple[Tensor, None]:
        """hidden [T, 1, H] -> [T, 1, H]; other keywords of megatron-core's layer are for softmax attention.

        Keywords as `model.layers.context.LayerContext` says; a cache is a `model.decode.decode.DecodeCache`.
        """
        documents, parts = packed_seq_params, self.cp_group.size()
        rows, length = documents.ids_RL.shape
        mixed, _ = self.in_proj(hidden_states)
        mixed = mixed.view(rows, length, self.key_heads, -1)
        if parts == 1 or inference_context is not None:
            out = self.mix(mixed, documents, slice(None), None, inference_context)
        elif passes_states(self.key_heads, parts):
            out = self.mix(mixed, documents, slice(None), self.cp_group)
        else:
            each = self.key_heads // parts
            own = slice(self.cp_group.rank() * each, (self.cp_group.rank() + 1) * each)
            out = self.mix(heads_to_sequence(mixed, self.cp_group), documents.whole, own)
            out = sequence_to_heads(out, self.cp_group)
        return self.out_proj(out.reshape(rows * length, 1, -1))

    @recomputable("deltanet")
    def mix(self, mixed: Tensor, documents: Documents, heads: slice, group=None, cache=None) -> Tensor:
        """From the projection [R, L, K, ...] of some key heads to their normed and gated outputs [R, L, V, D].

        Args:
            heads: which of this process's key heads these are. group: see `chunk_gated_delta_rule`.
            cache: a `DecodeCache` of the tokens before the rows.
        """
        conv_weight = self.conv_weight.unflatten(0, (self.key_heads, -1))[heads].flatten(0, 1)
        A_log, dt_bias = (x.unflatten(0, (self.key_heads, -1))[heads].flatten() for x in (self.A_log, self.dt_bias))
        common = (mixed, conv_weight, A_log, dt_bias, documents, self.ratio, self.key_dim, self.value_dim)
        if group is None and cache is None:
            q, k, v, z, g, beta = prepare_delta(*common)
            self.note(g, beta, documents)
            return self.out_norm(gated_delta_rule(q, k, v, g, beta, documents), z)
        inputs, taps = mixed[..., : self.conv_channels].flatten(2), conv_weight.shape[1]
        if cache is not None:
            before = cache.inputs_before(self.layer_number, inputs, taps)
            q, k, v, z, g, beta = prepare_part(*common, before)
            return self.out_norm(cache.delta_rule(self.layer_number, q, k, v, g, beta, documents), z)
        q, k, v, z, g, beta = prepare_part(*common, earlier_parts(inputs[:, 1 - taps :], group)[-1])
        self.note(g, beta, documents)
        return self.out_norm(chunk_gated_delta_rule(q, k, v, g, beta, documents, group), z)

    def note(self, g_RLV: Tensor, beta_RLV: Tensor, documents: Documents) -> None:
        """Shows decays and write strengths to the gauge of a sampled step."""
        if self.gauge.listens:
            note_delta(self.gauge, g_RLV, beta_RLV, documents)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None):
        """As megatron-core's default, with the head-wise parameters cut along their heads."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = dict(self.named_parameters(recurse=False))
        sharded.update(
            make_sharded_tensors_for_checkpoint(
                own,
                prefix,
                dict.fromkeys(own, 0),
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        )
        return sharded


def draw_decay(uniform: Tensor) -> Tensor:
    """A_log from numbers uniform in [0, 1): A ~ U(0, 16], as in FLA and Mamba2."""
    return (16 * (1 - uniform)).log()


def draw_time_step_bias(uniform: Tensor) -> Tensor:
    """dt_bias from numbers uniform in [0, 1): softplus(dt_bias) is log-uniform in [1e-3, 0.1] (FLA, Mamba2).

    With A ~ U(0, 16] the decays at the start then spread over (exp(-1.6), 1): heads of short and of long memory.
    """
    step = torch.exp(uniform * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
    return step + torch.log(-torch.expm1(-step))
