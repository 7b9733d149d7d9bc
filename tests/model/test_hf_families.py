"""Qwen3.5's families: our model computes what transformers' classes compute, names and shapes are theirs, and an
interleaved projection is its flat parts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

from model.batch import MicroBatch, count_targets
from model.config import ModelConfig, MtpConfig
from model.hf import config as hf_config
from model.hf.families import QWEN3_5, QWEN3_5_MOE, Family
from model.hf.pieces import pieces
from model.init import initialise
from model.network import LanguageModel
from tests.model import hf as as_theirs
from tests.model.test_hf_parity import SHAPE as PARITY

TOKENS, VOCAB = 512, 96
SHAPE = replace(
    PARITY, vocab_size=VOCAB, experts=8, experts_per_token=2, expert_size=24, shared_expert_size=40, dense_size=80
)
CLASSES = {
    QWEN3_5.model_type: (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    QWEN3_5_MOE.model_type: (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}
DENSE, EXPERTS = "G-G-G-*-", "GEGEGE*E"
# Value heads a key head, as the published sizes have them, and the head tied to the embedding as in the small ones.
MODELS = {
    "0.8B: as many value as key heads, tied": (
        QWEN3_5,
        {"pattern": DENSE, "linear_value_heads": 2, "tied_embeddings": True},
    ),
    "4B: two, tied": (QWEN3_5, {"pattern": DENSE, "tied_embeddings": True}),
    "27B: three": (QWEN3_5, {"pattern": DENSE, "linear_value_heads": 6}),
    "35B-A3B: two": (QWEN3_5_MOE, {"pattern": EXPERTS}),
    "122B-A10B: four": (QWEN3_5_MOE, {"pattern": EXPERTS, "linear_value_heads": 8}),
}


def their_config(family: Family, shape: ModelConfig):
    """transformers' configuration of a model of ours."""
    values = hf_config.to_hf(shape, False, 0.001, 4096, "float32", None, family)
    return CLASSES[family.model_type][0](**values, attn_implementation="eager")


@torch.no_grad()
def as_drawn(network: LanguageModel) -> LanguageModel:
    """The weights that training starts from, with norms off one and logits of a real model's size.

    Weights that are wilder still make heads of Gated DeltaNet whose output nearly vanishes, and their norm enlarges
    the rounding of float32 on both sides until nothing can be compared.
    """
    initialise(network, network.sharded_state_dict(), seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif parameter.ndim > 1 and "conv" not in name:
            parameter.mul_(5.0)
    return network


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_logits_are_those_of_transformers(build: Callable, family: Family, changes: dict) -> None:
    shape = replace(SHAPE, **changes)
    network = as_drawn(build(shape, MtpConfig(steps=0), VOCAB))
    other = CLASSES[family.model_type][1](their_config(family, shape))
    weights = as_theirs.theirs(
        dict(network.named_parameters()), list(pieces(shape, False, lambda layer: family.packed, family=family))
    )
    if shape.tied_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    as_theirs.load(other, weights)
    tokens = torch.randint(VOCAB, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    ids = torch.zeros_like(tokens)
    (state,) = network.predictions(MicroBatch.build(tokens, ids, count_targets(ids, 0)))
    logits, expected = network.logits(state).view(1, TOKENS, VOCAB), other(tokens[:, :-1]).logits
    assert expected.std() >= 0.3
    # Rounding of 1e-6 a module grows through eight layers and their norms.
    assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_names_and_shapes_are_those_of_transformers(family: Family, changes: dict) -> None:
    shape = replace(SHAPE, **changes)
    with torch.device("meta"):
        expected = CLASSES[family.model_type][1](their_config(family, shape)).state_dict()
    if shape.tied_embeddings:
        expected.pop("lm_head.weight")
    parts = [part for piece in pieces(shape, False, lambda layer: family.packed, family=family) for part in piece.parts]
    assert {part.name: part.shape for part in parts} == {name: tuple(x.shape) for name, x in expected.items()}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_every_number_of_a_model_with_mtp_comes_back(
    build: Callable, family: Family, changes: dict, wrapped: bool
) -> None:
    shape = replace(SHAPE, **changes)
    ours = dict(build(shape, MtpConfig(steps=2), VOCAB).named_parameters())
    every = list(pieces(shape, True, lambda layer: layer.startswith("model"), family=family, wrapped=wrapped))
    assert {piece.ours for piece in every} == set(ours)
    start = "model.language_model." if wrapped else "model."
    names = [part.name for piece in every for part in piece.parts]
    assert all(name.startswith((start, "lm_head.", "mtp.")) for name in names) and len(names) == len(set(names))
    with torch.no_grad():
        for piece in every:
            weight = ours[piece.ours].detach()
            assert torch.equal(piece.to_ours(piece.to_theirs(weight), exact=weight if piece.shift else None), weight)
