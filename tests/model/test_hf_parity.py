"""Our modules compute what transformers' Qwen3-Next computes, in float32 and through the conversion of the weights."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from model.batch import MicroBatch, count_targets
from model.config import ModelConfig, MtpConfig
from model.documents import Documents
from model.hf.names import ATTENTION, DELTA_NET, MOE
from model.kernels.backends import column_linear, row_linear
from model.layers.attention import GatedAttention, GatedAttentionSubmodules
from model.layers.deltanet import GatedDeltaNet, GatedDeltaNetSubmodules
from model.layers.dense import SwiGLUSubmodules
from model.layers.experts import MixtureOfExperts
from model.layers.norm import GatedRMSNorm, ZeroCentredRMSNorm
from model.layers.rope import rotary_table
from model.stack import hybrid_config
from tests.model import hf as as_theirs
from tests.model.helpers import ids_from_starts, randomise

TOKENS, VOCAB = 130, 64
SHAPE = ModelConfig(
    hidden_size=64,
    attention_heads=4,
    key_value_heads=2,
    head_dim=32,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=16,
    linear_value_dim=24,
    experts=16,
    experts_per_token=4,
    expert_size=32,
    shared_expert_size=48,
)
# Outputs whose largest values are about one: float32 rounding leaves either side within 5e-6 of the exact result
# (Gated DeltaNet's norm enlarges it where a head's output is small), a wrong layout shows as 0.1 or more.
MODULE_TOLERANCE = 1e-5


def hidden_states() -> torch.Tensor:
    return torch.randn(TOKENS, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))


def assert_parity(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.shape == expected.shape
    assert expected.std() > 0.1, "a small output would agree too easily"
    assert (ours - expected).abs().max() <= MODULE_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1, 2])
def test_gated_delta_net(groups, ratio: int) -> None:
    shape = replace(SHAPE, linear_value_heads=2 * ratio)
    submodules = GatedDeltaNetSubmodules(column_linear, row_linear, GatedRMSNorm)
    layer = GatedDeltaNet(hybrid_config(shape, MtpConfig()), submodules, 1, groups)
    randomise(layer)
    layer.out_proj.weight.mul_(0.25)
    config = as_theirs.config(shape)
    other = as_theirs.load(
        theirs.Qwen3NextGatedDeltaNet(config, 0),
        as_theirs.layer_weights(layer, DELTA_NET, shape, "self_attention.", "linear_attn."),
    )
    hidden = hidden_states()
    documents = Documents.from_ids(ids_from_starts(TOKENS, []))
    assert_parity(layer(hidden[:, None], packed_seq_params=documents)[0][:, 0], other(hidden[None])[0])


@pytest.mark.parametrize(("factor", "length"), [(1.0, None), (4.0, 262144), (64.0, 4096), (1.5, 100)])
def test_rotary_angles(factor: float, length: int | None) -> None:
    shape = replace(SHAPE, head_dim=256, rope_base=1e7, yarn_factor=factor, yarn_original_length=length)
    position = torch.cat([torch.arange(300), torch.arange(0, 2**20, 9973)])[None]
    cos, sin = theirs.Qwen3NextRotaryEmbedding(as_theirs.config(shape))(torch.zeros(1), position)
    # A frequency that is rounded otherwise by 2^-24 turns position 2^20 by 2^-4 more: compared relative to that.
    tolerance = 1e-6 + 2 * position[0, :, None] * 2.0**-24
    for ours, expected in zip(rotary_table(position, shape), (cos[0], sin[0]), strict=True):
        assert ((ours - expected).abs() <= tolerance).all()


@torch.no_grad()
@pytest.mark.parametrize("yarn", [1.0, 4.0])
@pytest.mark.parametrize("ratio", [1, 2])
def test_gated_attention(groups, ratio: int, yarn: float) -> None:
    shape = replace(SHAPE, attention_heads=2 * ratio, yarn_factor=yarn, yarn_original_length=64)
    submodules = GatedAttentionSubmodules(column_linear, row_linear, ZeroCentredRMSNorm)
    layer = GatedAttention(hybrid_config(shape, MtpConfig()), submodules, 1, groups)
    randomise(layer)
    config = as_theirs.config(shape)
    other = as_theirs.load(
        theirs.Qwen3NextAttention(config, 0),
        as_theirs.layer_weights(layer, ATTENTION, shape, "self_attention.", "self_attn."),
    )
    hidden = hidden_states()
    documents = Documents.from_ids(ids_from_starts(TOKENS, []))
    table = rotary_table(documents.position_RL, shape)
    ours = layer(hidden[:, None], rotary_pos_emb=table, packed_seq_params=documents)[0][:, 0]
    angles = theirs.Qwen3NextRotaryEmbedding(config)(hidden[None], torch.arange(TOKENS)[None])
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None]
    assert_parity(ours, other(hidden[None], angles, mask)[0][0])


@torch.no_grad()
def test_mixture_of_experts(groups) -> None:
    moe = MixtureOfExperts(hybrid_config(SHAPE, MtpConfig()), SwiGLUSubmodules(column_linear, row_linear), groups)
    randomise(moe)
    other = theirs.Qwen3NextSparseMoeBlock(as_theirs.config(SHAPE))
    as_theirs.load(other, as_theirs.layer_weights(moe, MOE, SHAPE, "mlp.", "mlp."))
    hidden = hidden_states()
    weights, experts = moe.router(hidden, None)
    _, their_weights, their_experts = other.gate(hidden)
    assert torch.equal(experts, their_experts)
    assert (weights - their_weights).abs().max() <= MODULE_TOLERANCE
    assert_parity(moe(hidden[:, None])[0][:, 0], other(hidden[None])[0])


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["GEGEGE*E", "*EGE"])
def test_logits_of_the_whole_trunk(build: Callable, pattern: str) -> None:
    shape = replace(SHAPE, pattern=pattern)
    network = build(shape, MtpConfig(steps=0), VOCAB)
    other = as_theirs.causal_lm(network, shape, VOCAB)
    tokens = torch.randint(VOCAB, (2, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    ids = torch.zeros_like(tokens)
    (state,) = network.predictions(MicroBatch.build(tokens, ids, count_targets(ids, 0)))
    logits, expected = network.logits(state).view(2, TOKENS, VOCAB), other(tokens[:, :-1]).logits
    assert expected.std() >= 0.5
    # Rounding of 1e-6 a module grows through eight layers and their norms.
    assert (logits - expected).abs().max() <= 1e-4
