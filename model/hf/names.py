"""One table between our parameters and those of a Hugging Face checkpoint, read in both directions.

One of their blocks is two layers of ours (token mixer; experts or dense SwiGLU). A rule of the table says what one of
our parameters is over there: another name; its rows in another order, perhaps in several tensors (where ours lie head
by head or unit by unit, so that tensor parallelism is a plain cut); or experts one by one. Values never change, but for
the output norm of Gated DeltaNet, whose gain they store and we its distance from one.

Qwen3-Next and its successors Qwen3.5 and 3.6 differ in the input projection of Gated DeltaNet, in what stands before
the names of the trunk, and in whether the experts are one tensor: `model.hf.families` says which has what.

The multi-token-prediction layer has the names under which vLLM and SGLang look for it (``mtp.*``); transformers
itself ignores it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig

Rows = Callable[[ModelConfig], tuple[Tensor, ...]]
EXPERTS = "mlp.experts."  # what the names of routed experts have in common, over there


@dataclass(frozen=True)
class Rule:
    """One of our parameters of a layer.

    Attributes:
        ours: its name. theirs: the name of each tensor that it is over there.
        size: its shape.
        rows: for each of theirs, which of our rows it holds, in its order; None: all of them as they are.
        inner: dimensions of one that theirs has after the rows.
        shift: what theirs has more than ours.
        float32: kept in float32 whatever the model's type.
    """

    ours: str
    theirs: tuple[str, ...]
    size: Callable[[ModelConfig], tuple[int, ...]]
    rows: Rows | None = None
    inner: int = 0
    shift: float = 0.0
    float32: bool = False


def _norm(ours: str, theirs: str, width: Callable[[ModelConfig], int], shift: float = 0.0) -> Rule:
    return Rule(ours, (theirs,), lambda shape: (width(shape),), shift=shift, float32=True)


def _vocabulary(shape: ModelConfig) -> tuple[int, int]:
    assert shape.vocab_size is not None  # a model that exists has its rows
    return shape.vocab_size, shape.hidden_size


def _hidden(shape: ModelConfig) -> int:
    return shape.hidden_size


def _delta_sections(shape: ModelConfig) -> tuple[int, int]:
    """Rows of a query or a key, and of the values, that one key head of Gated DeltaNet has."""
    return shape.linear_key_dim, shape.linear_value_heads // shape.linear_key_heads * shape.linear_value_dim


def _in_proj_size(shape: ModelConfig) -> tuple[int, int]:
    key, value = _delta_sections(shape)
    ratio = shape.linear_value_heads // shape.linear_key_heads
    return shape.linear_key_heads * (2 * key + 2 * value + 2 * ratio), shape.hidden_size


def _in_proj_heads(shape: ModelConfig) -> Tensor:
    """Our rows, [q | k | v | z | b | a] of each key head: one row a head."""
    return torch.arange(_in_proj_size(shape)[0]).view(shape.linear_key_heads, -1)


def _fused_in_proj_rows(shape: ModelConfig) -> tuple[Tensor, ...]:
    """Qwen3-Next: [q | k | v | z] of each key head, and [b | a] of each."""
    key, value = _delta_sections(shape)
    heads = _in_proj_heads(shape)
    return heads[:, : 2 * key + 2 * value].flatten(), heads[:, 2 * key + 2 * value :].flatten()


def _flat_in_proj_rows(shape: ModelConfig) -> tuple[Tensor, ...]:
    """Qwen3.5: all q, all k, all v as one; all z; all b; all a."""
    key, value = _delta_sections(shape)
    ratio = shape.linear_value_heads // shape.linear_key_heads
    q, k, v, z, b, a = (
        part.flatten() for part in _in_proj_heads(shape).split([key, key, value, value, ratio, ratio], dim=1)
    )
    return torch.cat([q, k, v]), z, b, a


def _conv_size(shape: ModelConfig) -> tuple[int, int]:
    key, value = _delta_sections(shape)
    return shape.linear_key_heads * (2 * key + value), shape.conv_kernel


def _conv_rows(shape: ModelConfig) -> tuple[Tensor, ...]:
    """[q | k | v] of each key head: all q, all k, all v."""
    key, value = _delta_sections(shape)
    heads = torch.arange(_conv_size(shape)[0]).view(shape.linear_key_heads, -1)
    return (torch.cat([part.flatten() for part in heads.split([key, key, value], dim=1)]),)


def _qkv_size(shape: ModelConfig) -> tuple[int, int]:
    return 2 * (shape.attention_heads + shape.key_value_heads) * shape.head_dim, shape.hidden_size


def _qkv_rows(shape: ModelConfig) -> tuple[Tensor, ...]:
    """[queries | gates | key | value] of each key head: [query | gate] of each query head, all keys, all values."""
    each = shape.attention_heads // shape.key_value_heads
    groups = torch.arange(_qkv_size(shape)[0]).view(shape.key_value_heads, 2 * each + 2, shape.head_dim)
    query_and_gate = torch.stack([groups[:, :each], groups[:, each : 2 * each]], dim=2)
    return query_and_gate.flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()


def _gate_up(width: int) -> tuple[Tensor, ...]:
    """(gate, up) of each unit: all gates, all ups."""
    return tuple(torch.arange(2 * width).view(-1, 2).unbind(1))


def _swiglu(ours: str, theirs: str, width: Callable[[ModelConfig], int]) -> tuple[Rule, Rule]:
    """The projections of a SwiGLU under the starts of their names."""
    return (
        Rule(
            f"{ours}linear_fc1.weight",
            (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
            lambda shape: (2 * width(shape), shape.hidden_size),
            lambda shape: _gate_up(width(shape)),
        ),
        Rule(
            f"{ours}linear_fc2.weight",
            (f"{theirs}down_proj.weight",),
            lambda shape: (shape.hidden_size, width(shape)),
        ),
    )


IN_PROJ = "self_attention.in_proj.weight"
FUSED_IN_PROJ = Rule(
    IN_PROJ,
    ("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"),
    _in_proj_size,
    _fused_in_proj_rows,
)
FLAT_IN_PROJ = Rule(
    IN_PROJ,
    tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")),
    _in_proj_size,
    _flat_in_proj_rows,
)
DELTA_NET = (
    _norm("input_layernorm.weight", "input_layernorm.weight", _hidden),
    FUSED_IN_PROJ,
    Rule("self_attention.conv_weight", ("linear_attn.conv1d.weight",), _conv_size, _conv_rows, inner=1),
    Rule("self_attention.A_log", ("linear_attn.A_log",), lambda s: (s.linear_value_heads,), float32=True),
    Rule("self_attention.dt_bias", ("linear_attn.dt_bias",), lambda s: (s.linear_value_heads,), float32=True),
    _norm("self_attention.out_norm.weight", "linear_attn.norm.weight", lambda s: s.linear_value_dim, shift=1.0),
    Rule(
        "self_attention.out_proj.weight",
        ("linear_attn.out_proj.weight",),
        lambda s: (s.hidden_size, s.linear_value_heads * s.linear_value_dim),
    ),
)
ATTENTION = (
    _norm("input_layernorm.weight", "input_layernorm.weight", _hidden),
    Rule(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        _qkv_size,
        _qkv_rows,
    ),
    _norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", lambda s: s.head_dim),
    _norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", lambda s: s.head_dim),
    Rule(
        "self_attention.linear_proj.weight",
        ("self_attn.o_proj.weight",),
        lambda s: (s.hidden_size, s.attention_heads * s.head_dim),
    ),
)
MOE = (
    _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", _hidden),
    Rule("mlp.router.weight", ("mlp.gate.weight",), lambda s: (s.experts, s.hidden_size), float32=True),
    Rule("mlp.shared_expert.gate_weight", ("mlp.shared_expert_gate.weight",), lambda s: (1, s.hidden_size)),
    *_swiglu("mlp.shared_expert.", "mlp.shared_expert.", lambda s: s.shared_expert_size),
    # Stacked, theirs; one by one, the names of an expert's tensors. Ours have gate and up as a dimension of their own.
    Rule(
        "mlp.experts.weight1",
        ("gate_up_proj", "gate_proj.weight", "up_proj.weight"),
        lambda s: (s.experts, 2, s.expert_size, s.hidden_size),
    ),
    Rule(
        "mlp.experts.weight2",
        ("down_proj", "down_proj.weight"),
        lambda s: (s.experts, s.hidden_size, s.expert_size),
    ),
)
DENSE = (
    _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", _hidden),
    *_swiglu("mlp.", "mlp.", lambda s: s.dense_size),
)
MIXERS = {"G": DELTA_NET, "*": ATTENTION}
FEED_FORWARD = {"E": MOE, "-": DENSE}
EMBEDDING = Rule("embedding.word_embeddings.weight", ("embed_tokens.weight",), _vocabulary)
FINAL_NORM = _norm("decoder.final_norm.weight", "norm.weight", _hidden)
HEAD = Rule("output_layer.weight", ("lm_head.weight",), _vocabulary)
MTP_ENDS = (
    _norm("enorm.weight", "pre_fc_norm_embedding.weight", _hidden),
    _norm("hnorm.weight", "pre_fc_norm_hidden.weight", _hidden),
    Rule("eh_proj.weight", ("fc.weight",), lambda s: (s.hidden_size, 2 * s.hidden_size)),
    _norm("final_layernorm.weight", "norm.weight", _hidden),
)
