"""Formulas of activation memory against the tensors that autograd holds after a forward pass."""

from dataclasses import replace

import pytest
import torch

from model.config import LAYER, ModelConfig, MtpConfig
from model.cost.activations import stage_bytes, used_parts
from model.network import LanguageModel
from model.stack import hybrid_config
from parallel.topology import RECOMPUTABLE
from tests.model.helpers import kept_bytes

ROWS, LENGTH, VOCAB = 2, 128, 512
SHAPE = ModelConfig(
    hidden_size=192,
    attention_heads=8,
    key_value_heads=2,
    head_dim=32,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=48,
    linear_value_dim=64,
    experts=16,
    experts_per_token=3,
    expert_size=96,
    shared_expert_size=64,
    dense_size=320,
    dtype="bfloat16",
)


def measured(shape: ModelConfig, mtp: MtpConfig, recompute: frozenset[str], groups) -> int:
    network = LanguageModel(hybrid_config(shape, mtp, recompute=recompute), VOCAB, groups)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return kept_bytes(network, ROWS, LENGTH)


PLAIN = {"attention_gate": False, "shared_expert_size": 0}


@pytest.mark.parametrize(
    ("pattern", "mtp", "changes", "recompute"),
    [
        ("GGGG", 0, {}, ()),
        ("****", 0, {}, ()),
        ("EEEE", 0, {}, ()),
        ("----", 0, {}, ()),
        ("****", 0, PLAIN, ()),
        ("EEEE", 0, PLAIN, ()),
        ("GEGEGE*E", 2, {}, ()),
        ("*E", 4, {}, ()),
        ("*E", MtpConfig(steps=3, keys="depth"), {}, ()),
        ("*E", MtpConfig(steps=3, keys="depth"), {}, (LAYER,)),
        ("GEGEGE*E", 2, {}, (LAYER,)),
        ("GEGEGE*E", 1, {}, ("deltanet",)),
        ("GEGEGE*E", 1, {}, ("experts",)),
        ("EEEE", 0, {}, ("experts",)),
        ("****", 0, {}, ("attention",)),
        ("GEGEGE*E", 1, {}, RECOMPUTABLE),
    ],
)
def test_the_formula_is_what_autograd_keeps(groups, pattern, mtp, changes, recompute) -> None:
    shape, parts = replace(SHAPE, pattern=pattern, **changes), frozenset(recompute)
    mtp = mtp if isinstance(mtp, MtpConfig) else MtpConfig(steps=mtp)
    tokens = ROWS * LENGTH
    counted = stage_bytes(shape.layers, shape, mtp, VOCAB, LENGTH, tokens, 1, parts, last=True)
    # What the formula leaves out, a few numbers a token and head, is 1 to 4 % at these small widths.
    assert measured(shape, mtp, parts, groups) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("parts", "sent"), [(2, 1.0), (4, 2.84), (8, 5.18), (64, 9.26)])
def test_rows_that_a_token_sends_to_other_parts_of_the_experts(parts: int, sent: float) -> None:
    """Ten of 512 experts: one row for each other part, where one for each expert would be 5, 7.5, 8.75 and 9.84."""
    shape = replace(SHAPE, experts=512, experts_per_token=10)
    used = used_parts(shape, parts)
    assert used * (parts - 1) / parts == pytest.approx(sent, abs=0.005)
    chosen = torch.rand(4000, 512, generator=torch.Generator().manual_seed(0)).topk(10).indices // (512 // parts)
    drawn = torch.zeros(4000, parts).scatter_(1, chosen, 1.0).sum(dim=1)
    # Three standard deviations of a mean of 4,000.
    assert drawn.mean() == pytest.approx(used, abs=3 * float(drawn.std()) / 4000**0.5 + 1e-9)
