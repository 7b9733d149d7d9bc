"""The table between our parameters and those of Hugging Face's Qwen3-Next: names, shapes, every number's way back."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3NextForCausalLM

from model.config import ModelConfig, MtpConfig
from model.hf import names
from model.hf import pieces as hf
from tests.model import hf as as_theirs

# Widths that are all different, so that no two can be mistaken for each other.
SHAPE = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    attention_heads=4,
    key_value_heads=2,
    head_dim=48,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=16,
    linear_value_dim=24,
    experts=8,
    experts_per_token=2,
    expert_size=20,
    shared_expert_size=40,
)
ODD_SHAPES = {
    "as many value as key heads, small heads": {
        "linear_value_heads": 2,
        "head_dim": 32,
        "attention_heads": 6,
        "key_value_heads": 6,
    },
    "four value heads a key head, large heads": {
        "linear_value_heads": 8,
        "head_dim": 256,
        "pattern": "*EGE",
        "repeats": 2,
    },
    "512 experts": {"experts": 512, "expert_size": 4, "hidden_size": 16, "attention_heads": 5, "key_value_heads": 1},
    "one key head, five taps": {
        "linear_key_heads": 1,
        "linear_value_heads": 2,
        "conv_kernel": 5,
        "experts": 9,
        "head_dim": 128,
    },
}


def never(layer: str) -> bool:
    return False


def always(layer: str) -> bool:
    return True


def numbers(shape: tuple[int, ...], seed: int, float32: bool) -> torch.Tensor:
    """Numbers of every size, tiny ones too."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator) * 10 ** (6 * torch.rand(shape, generator=generator) - 6)
    return drawn if float32 else drawn.bfloat16()


@pytest.mark.parametrize("stacked", [never, always, lambda layer: layer.startswith("mtp")])
@pytest.mark.parametrize("changes", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_every_number_comes_back(changes: dict, stacked: Callable) -> None:
    shape = replace(SHAPE, **changes)
    pieces = list(hf.pieces(shape, mtp=True, stacked=stacked))
    ours = {x.ours: numbers(x.whole, seed, x.float32) for seed, x in enumerate(pieces)}
    theirs = as_theirs.theirs(ours, pieces)
    assert len(theirs) == sum(len(piece.parts) for piece in pieces)
    back: dict[str, torch.Tensor] = {}
    for piece in hf.pieces(shape, mtp=True, stacked=stacked, experts_at_once=3):
        parts = [theirs[part.name] if part.span is None else theirs[part.name][part.span] for part in piece.parts]
        tensor = piece.to_ours(parts, exact=ours[piece.ours] if piece.shift else None)
        assert tensor.shape == piece.shape
        rest = back.get(piece.ours, tensor[:0])
        assert len(rest) == piece.first
        back[piece.ours] = torch.cat([rest, tensor])
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name


def test_a_noted_norm_counts_only_for_what_it_led_to() -> None:
    (piece,) = (x for x in hf.layer_pieces(names.DELTA_NET, SHAPE) if x.shift)
    exact = torch.full(piece.shape, 1e-9)
    (stored,) = piece.to_theirs(exact)
    assert torch.equal(piece.to_ours([stored], exact), exact)
    assert torch.equal(piece.to_ours([stored]), torch.zeros_like(exact))
    changed = stored + 0.5
    assert torch.equal(piece.to_ours([changed], exact), torch.full_like(exact, 0.5))


@pytest.mark.parametrize("pattern", ["GEGEGE*E", "*EGE"])
def test_names_and_shapes_are_those_of_transformers(pattern: str) -> None:
    shape = replace(SHAPE, pattern=pattern)
    with torch.device("meta"):
        expected = Qwen3NextForCausalLM(as_theirs.config(shape, shape.vocab_size)).state_dict()
    parts = [part for piece in hf.pieces(shape, mtp=False, stacked=always) for part in piece.parts]
    assert {part.name: part.shape for part in parts} == {name: tuple(x.shape) for name, x in expected.items()}


def test_names_shapes_and_types_are_those_of_our_model(build: Callable) -> None:
    shape = replace(SHAPE, dtype="bfloat16")
    network = build(shape, MtpConfig(steps=3), SHAPE.vocab_size)
    expected = {name: (tuple(x.shape), x.dtype == torch.float32) for name, x in network.named_parameters()}
    pieces = hf.pieces(shape, mtp=True, stacked=never)
    assert {piece.ours: (piece.whole, piece.float32) for piece in pieces} == expected


# What SGLang's loader looks for (0.5.23, srt/models/qwen3_next.py and qwen3_next_mtp.py): the names that it takes from
# a checkpoint, before it renames them, and the shapes of the parameters that it puts them into, for SHAPE. vLLM's
# qwen3_next.py and qwen3_next_mtp.py (0.32) take the same.
NORMS = {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
SGLANG_LINEAR = {
    "linear_attn.in_proj_qkvz.weight": (2 * (16 + 16 + 2 * 24 + 2 * 24), 64),
    "linear_attn.in_proj_ba.weight": (8, 64),
    "linear_attn.conv1d.weight": (32 + 32 + 96, 1, 4),
    "linear_attn.A_log": (4,),
    "linear_attn.dt_bias": (4,),
    "linear_attn.norm.weight": (24,),
    "linear_attn.out_proj.weight": (64, 96),
}
SGLANG_FULL = {
    "self_attn.q_proj.weight": (2 * 4 * 48, 64),
    "self_attn.k_proj.weight": (96, 64),
    "self_attn.v_proj.weight": (96, 64),
    "self_attn.o_proj.weight": (64, 192),
    "self_attn.q_norm.weight": (48,),
    "self_attn.k_norm.weight": (48,),
}
SGLANG_MIXTURE = {
    "mlp.gate.weight": (8, 64),
    "mlp.shared_expert.gate_proj.weight": (40, 64),
    "mlp.shared_expert.up_proj.weight": (40, 64),
    "mlp.shared_expert.down_proj.weight": (64, 40),
    "mlp.shared_expert_gate.weight": (1, 64),
}
SGLANG_EXPERT = {"gate_proj.weight": (20, 64), "up_proj.weight": (20, 64), "down_proj.weight": (64, 20)}
SGLANG_ENDS = {
    "model.embed_tokens.weight": (96, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
    "mtp.fc.weight": (64, 128),
    "mtp.pre_fc_norm_embedding.weight": (64,),
    "mtp.pre_fc_norm_hidden.weight": (64,),
    "mtp.norm.weight": (64,),
}


def sglang_wants() -> dict[str, tuple[int, ...]]:
    experts = {f"mlp.experts.{i}.{name}": shape for i in range(SHAPE.experts) for name, shape in SGLANG_EXPERT.items()}
    layers = {f"model.layers.{i}.": SGLANG_LINEAR for i in range(3)}
    layers |= {"model.layers.3.": SGLANG_FULL, "mtp.layers.0.": SGLANG_FULL}
    return SGLANG_ENDS | {
        prefix + name: shape
        for prefix, mixer in layers.items()
        for name, shape in (NORMS | mixer | SGLANG_MIXTURE | experts).items()
    }


def test_every_exported_name_and_shape_is_one_that_sglang_looks_for() -> None:
    parts = [part for piece in hf.pieces(SHAPE, mtp=True, stacked=never) for part in piece.parts]
    assert {part.name: part.shape for part in parts} == sglang_wants()
