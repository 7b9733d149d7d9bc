"""Gated DeltaNet: linear attention with a decaying matrix state, updated by the delta rule.

Per value head, with state S [dk, dv], decay alpha_t = exp(g_t) and write strength beta_t (Yang, Kautz, Hatamizadeh,
"Gated Delta Networks", 2024, eq. 10):

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(dk)

Shape suffixes: R rows, L length, C chunk length, T = R*L, K key heads, V value heads, D dimension of a head.
"""

import math
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from model.documents import Documents
from model.norm import at_least_float32

CHUNK = 64


@dataclass
class GatedDeltaNetSubmodules:
    """The parts that a backend chooses."""

    in_proj: type
    out_proj: type
    out_norm: type


def causal_conv(x_RLC: Tensor, weight_CW: Tensor, documents: Documents) -> Tensor:
    """Depthwise causal convolution over time that starts anew at each document: out_t = sum_j w[W-1-j] x_{t-j}."""
    taps = weight_CW.shape[1]
    out = x_RLC * weight_CW[:, taps - 1]
    for distance in range(1, taps):
        shifted = F.pad(x_RLC, (0, 0, distance, 0))[:, : x_RLC.shape[1]]
        inside = documents.same_document(distance)[..., None]
        out = out + torch.where(inside, shifted, 0) * weight_CW[:, taps - 1 - distance]
    return out


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def chunk_gated_delta_rule(
    q_RLVD: Tensor, k_RLVD: Tensor, v_RLVD: Tensor, g_RLV: Tensor, beta_RLV: Tensor, ids_RL: Tensor, chunk: int = CHUNK
) -> Tensor:
    """The gated delta rule in its chunked (WY) form, with a fresh state for each document.

    Inside a chunk the recurrence is a unit lower-triangular system; only the state crosses chunks. Document borders
    enter as masks on three things: the pairs inside a chunk, the tokens that still see the incoming state, and what
    of a chunk reaches the outgoing state.

    Args:
        q_RLVD, k_RLVD: queries and keys, L2-normalised, one per value head; v_RLVD: values.
        g_RLV: log of the decay, <= 0; beta_RLV: write strength in (0, 1).
        ids_RL: document of each token, non-decreasing along a row.
        chunk: tokens solved together.
    Returns:
        [R, L, V, Dv], of v's type; computed in float32 (float64 for float64 inputs).
    """
    length = q_RLVD.shape[1]
    pad = -length % chunk
    # [R, L, V, D] -> [R, V, n, C, D] with zero keys and strengths in the padding, which therefore writes nothing.
    q, k, v = (
        F.pad(at_least_float32(x), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
        for x in (q_RLVD, k_RLVD, v_RLVD)
    )
    g, beta = (
        F.pad(at_least_float32(x), (0, 0, 0, pad)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2)
        for x in (g_RLV, beta_RLV)
    )
    ids = torch.cat([ids_RL, ids_RL[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (-1, chunk))[:, None]
    q = q * q.shape[-1] ** -0.5

    total = g.cumsum(-1)
    same = (ids[..., :, None] == ids[..., None, :]).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~same, -torch.inf).exp()
    # The incoming state belongs to the document of the token just before the chunk.
    before = torch.cat([ids[:, :, :1, 0], ids[:, :, :-1, -1]], dim=2)
    from_state = torch.where(ids == before[..., None], total.exp(), 0)[..., None]

    strict = (k @ k.transpose(-1, -2) * decay * beta[..., None]).tril(-1)
    system = strict + torch.eye(chunk, dtype=strict.dtype, device=strict.device)
    right = torch.cat([v, k * from_state], dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    value, reader = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    within = q @ k.transpose(-1, -2) * decay
    writer = (k * decay[..., -1, :, None]).transpose(-1, -2)
    q_state, keep = q * from_state, from_state[..., -1:, :]

    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    out = []
    for n in range(q.shape[2]):
        update = value[:, :, n] - reader[:, :, n] @ state
        out.append(q_state[:, :, n] @ state + within[:, :, n] @ update)
        state = keep[:, :, n] * state + writer[:, :, n] @ update
    return torch.stack(out, dim=2).flatten(2, 3)[:, :, :length].transpose(1, 2).to(v_RLVD.dtype)


class GatedDeltaNet(MegatronModule):
    """One Gated DeltaNet layer.

    The fused input projection holds, for each key head: query, key, its value heads' values, their output gates z,
    write strengths b and decays a. So a cut into tensor-parallel parts is a plain cut of rows, and heads never move.
    ``A_log`` and ``dt_bias`` are float32 whatever the model's type.
    """

    def __init__(self, config, submodules, layer_number: int, pg_collection, name=None):
        super().__init__(config=config)
        shape = config.shape
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
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
        self, hidden_states: Tensor, attention_mask=None, *, packed_seq_params: Documents, **_
    ) -> tuple[Tensor, None]:
        """hidden [T, 1, H] -> [T, 1, H]; other keywords of megatron-core's layer are for softmax attention."""
        documents = packed_seq_params
        rows, length = documents.ids_RL.shape
        mixed, _ = self.in_proj(hidden_states)
        mixed = mixed.view(rows, length, self.key_heads, -1)
        value_width = self.ratio * self.value_dim
        qkv, z, b, a = mixed.split([self.conv_channels, value_width, self.ratio, self.ratio], dim=-1)
        qkv = F.silu(causal_conv(qkv.flatten(2), self.conv_weight, documents)).view(qkv.shape)
        q, k, v = qkv.split([self.key_dim, self.key_dim, value_width], dim=-1)
        q, k = (l2_normalise(at_least_float32(x)).repeat_interleave(self.ratio, dim=2) for x in (q, k))
        v, z = (x.unflatten(-1, (self.ratio, self.value_dim)).flatten(2, 3) for x in (v, z))
        beta = at_least_float32(b.flatten(2)).sigmoid()
        g = -self.A_log.exp() * F.softplus(at_least_float32(a.flatten(2)) + self.dt_bias)
        out = chunk_gated_delta_rule(q, k, v, g, beta, documents.ids_RL)
        return self.out_proj(self.out_norm(out, z).reshape(rows * length, 1, -1))

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
