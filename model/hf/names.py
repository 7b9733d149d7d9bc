"""One table between our parameters and those of a Hugging Face Qwen3-Next checkpoint, read in both directions.

One of their blocks is two layers of ours (token mixer, experts). A rule of the table says what one of our parameters
is over there: another name; its rows in another order, perhaps in several tensors (where ours lie head by head or
unit by unit, so that tensor parallelism is a plain cut); or experts one by one. Values never change, but for the
output norm of Gated DeltaNet, whose gain they store and we its distance from one.

The multi-token-prediction layer has the names under which vLLM and SGLang look for it (``mtp.*``); transformers
itself ignores it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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


def _in_proj_rows(shape: ModelConfig) -> tuple[Tensor, ...]:
    """[q | k | v | z | b | a] of each key head: [q | k | v | z] and [b | a] of each."""
    key, value = _delta_sections(shape)
    heads = torch.arange(_in_proj_size(shape)[0]).view(shape.linear_key_heads, -1)
    return heads[:, : 2 * key + 2 * value].flatten(), heads[:, 2 * key + 2 * value :].flatten()


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


def _gate_up_rows(shape: ModelConfig) -> tuple[Tensor, ...]:
    """(gate, up) of each unit: all gates, all ups."""
    return tuple(torch.arange(2 * shape.shared_expert_size).view(-1, 2).unbind(1))


DELTA_NET = (
    _norm("input_layernorm.weight", "input_layernorm.weight", _hidden),
    Rule(
        "self_attention.in_proj.weight",
        ("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"),
        _in_proj_size,
        _in_proj_rows,
    ),
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
MIXTURE = (
    _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", _hidden),
    Rule("mlp.router.weight", ("mlp.gate.weight",), lambda s: (s.experts, s.hidden_size), float32=True),
    Rule("mlp.shared_expert.gate_weight", ("mlp.shared_expert_gate.weight",), lambda s: (1, s.hidden_size)),
    Rule(
        "mlp.shared_expert.linear_fc1.weight",
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        lambda s: (2 * s.shared_expert_size, s.hidden_size),
        _gate_up_rows,
    ),
    Rule(
        "mlp.shared_expert.linear_fc2.weight",
        ("mlp.shared_expert.down_proj.weight",),
        lambda s: (s.hidden_size, s.shared_expert_size),
    ),
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
MIXERS = {"G": DELTA_NET, "*": ATTENTION}
ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _vocabulary),
    _norm("decoder.final_norm.weight", "model.norm.weight", _hidden),
    Rule("output_layer.weight", ("lm_head.weight",), _vocabulary),
)
MTP_ENDS = (
    _norm("enorm.weight", "pre_fc_norm_embedding.weight", _hidden),
    _norm("hnorm.weight", "pre_fc_norm_hidden.weight", _hidden),
    Rule("eh_proj.weight", ("fc.weight",), lambda s: (s.hidden_size, 2 * s.hidden_size)),
    _norm("final_layernorm.weight", "norm.weight", _hidden),
)


@dataclass(frozen=True)
class Part:
    """One of their tensors: its whole shape, and the rows of it that a piece is about (None: all)."""

    name: str
    shape: tuple[int, ...]
    span: slice | None = None


@dataclass(frozen=True)
class Piece:
    """One of our parameters (or some experts of one), and the tensors that it is over there.

    Attributes:
        ours: name. whole: shape of the whole parameter. shape: of this piece, whose first row is ``first``.
        parts: theirs. rows: see `Rule.rows`.
    """

    ours: str
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    first: int = 0
    rows: tuple[Tensor, ...] | None = field(default=None, compare=False)
    shift: float = 0.0
    float32: bool = False

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """Our numbers as their tensors (or those rows of them), in the order of ``parts``; mostly views."""
        if self.rows is not None:
            tensors = [ours[rows] for rows in self.rows]
        elif len(self.parts) > 1:  # experts: gate and up of each, or each
            tensors = list(ours.flatten(0, len(self.shape) - len(self.parts[0].shape) - 1))
        else:
            tensors = [ours + self.shift if self.shift else ours]
        shapes = [part.shape if part.span is None else (-1, *part.shape[1:]) for part in self.parts]
        return [tensor.reshape(shape) for tensor, shape in zip(tensors, shapes, strict=True)]

    def to_ours(self, theirs: list[Tensor], exact: Tensor | None = None) -> Tensor:
        """Their tensors (those rows of them that ``parts`` say) as our numbers.

        Args:
            exact: what ours was before it was shifted, if that was noted; taken if it leads to what is there.
        """
        if self.shift:
            (stored,) = theirs
            if exact is not None and torch.equal((exact + self.shift).to(stored.dtype), stored):
                return exact
            return stored.float() - self.shift
        flat = torch.cat([tensor.reshape(-1, self.shape[-1]) for tensor in theirs]) if len(theirs) > 1 else theirs[0]
        if self.rows is None:
            return flat.reshape(self.shape)
        flat = flat.reshape(self.shape)
        ours = torch.empty_like(flat)
        ours[torch.cat(self.rows)] = flat
        return ours


def _plain(rule: Rule, shape: ModelConfig, ours: str, theirs: str) -> Piece:
    size = rule.size(shape)
    rows = rule.rows(shape) if rule.rows else None
    counts = [len(part) for part in rows] if rows else [size[0]]
    parts = tuple(
        Part(theirs + name, (count, *[1] * rule.inner, *size[1:]))
        for name, count in zip(rule.theirs, counts, strict=True)
    )
    return Piece(ours + rule.ours, size, size, parts, 0, rows, rule.shift, rule.float32)


def _experts(rule: Rule, shape: ModelConfig, ours: str, theirs: str, stacked: bool, at_once: int) -> Iterator[Piece]:
    """Pieces of ``at_once`` experts each."""
    size, names = rule.size(shape), rule.theirs
    for first in range(0, shape.experts, at_once):
        count = min(at_once, shape.experts - first)
        if stacked:
            whole = (size[0], size[1] * size[2], size[3]) if len(size) == 4 else size
            span = None if count == shape.experts else slice(first, first + count)
            parts: tuple[Part, ...] = (Part(f"{theirs}{EXPERTS}{names[0]}", whole, span),)
        else:
            each = range(first, first + count)
            parts = tuple(Part(f"{theirs}{EXPERTS}{i}.{name}", size[-2:]) for i in each for name in names[1:])
        yield Piece(ours + rule.ours, size, (count, *size[1:]), parts, first)


def layer_pieces(
    rules: tuple[Rule, ...],
    shape: ModelConfig,
    ours: str = "",
    theirs: str = "",
    stacked: bool = False,
    experts_at_once: int | None = None,
) -> Iterator[Piece]:
    """The parameters that some rules are about, under the starts of their names on either side."""
    for rule in rules:
        if ".experts." in rule.ours:
            yield from _experts(rule, shape, ours, theirs, stacked, experts_at_once or shape.experts)
        else:
            yield _plain(rule, shape, ours, theirs)


def pieces(
    shape: ModelConfig, mtp: bool, stacked: Callable[[str], bool], experts_at_once: int | None = None
) -> Iterator[Piece]:
    """Every parameter of a model, in the order of its layers; ``shape.vocab_size`` is set.

    Args:
        mtp: with the multi-token-prediction layer.
        stacked: whether the experts of a layer of theirs, given the start of its names, are one tensor each.
        experts_at_once: experts of one piece; None: all.
    """

    def block(mixer: str, number: int, ours: str, theirs: str) -> Iterator[Piece]:
        yield from layer_pieces(MIXERS[mixer], shape, f"{ours}{number}.", theirs)
        yield from layer_pieces(MIXTURE, shape, f"{ours}{number + 1}.", theirs, stacked(theirs), experts_at_once)

    yield from layer_pieces(ENDS[:1], shape)
    for index, mixer in enumerate(shape.layers[::2]):
        yield from block(mixer, 2 * index, "decoder.layers.", f"model.layers.{index}.")
    yield from layer_pieces(ENDS[1:], shape)
    if mtp:
        yield from layer_pieces(MTP_ENDS, shape, "mtp.layers.0.", "mtp.")
        yield from block("*", 0, "mtp.layers.0.mtp_model_layer.layers.", "mtp.layers.0.")
