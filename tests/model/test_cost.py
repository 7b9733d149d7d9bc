"""Counted operations against torch's counter on the real model, and against the published model's figure."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.batch import MicroBatch, count_targets
from model.config import ModelConfig, MtpConfig
from model.cost import TRAINING_FACTOR, delta_rule, forward_flops, training_flops
from tests.model.helpers import SMALL

VOCAB, ROWS, LENGTH = 64, 2, 128  # LENGTH: whole chunks of the delta rule


def counted_flops(build, shape: ModelConfig, mtp: MtpConfig) -> float:
    """Matrix-product operations a token of a forward pass, as torch counts them."""
    network = build(shape, mtp, vocab_size=VOCAB)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros_like(tokens)
    batch = MicroBatch.build(tokens, documents, count_targets(documents, mtp.steps))
    # The plain implementation of attention is the one whose products torch sees.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(batch)
    return counter.get_total_flops() / (ROWS * LENGTH)


@pytest.mark.parametrize("pattern, steps", [("GEGEGE*E", 2), ("*E", 0), ("GE", 1), ("GG**EE", 3)])
def test_the_formulas_count_what_torch_counts(build, pattern: str, steps: int) -> None:
    shape, mtp = replace(SMALL, pattern=pattern), MtpConfig(steps=steps)
    found = counted_flops(build, shape, mtp)
    # Torch counts no triangular solve, no elementwise convolution, and all of a masked attention's square.
    queries = shape.attention_heads * shape.head_dim
    attentions = pattern.count("*") + steps
    dk, dv = shape.linear_key_dim, shape.linear_value_dim
    channels = 2 * shape.linear_key_heads * dk + shape.linear_value_heads * dv
    uncounted = 2 * shape.conv_kernel * channels + 64 * (dk + dv) * shape.linear_value_heads
    expected = sum(forward_flops(shape, mtp, VOCAB, LENGTH).values())
    expected += attentions * 2 * queries * LENGTH - pattern.count("G") * uncounted
    # The formulas are exact; only the order of float sums differs.
    assert found == pytest.approx(expected, rel=1e-9)


def test_qwen3_next_costs_23_gflop_a_token_at_4k() -> None:
    shape = ModelConfig(
        repeats=12,
        hidden_size=2048,
        attention_heads=16,
        key_value_heads=2,
        head_dim=256,
        linear_key_heads=16,
        linear_value_heads=32,
        linear_key_dim=128,
        linear_value_dim=128,
        experts=512,
        experts_per_token=10,
        expert_size=512,
        shared_expert_size=512,
    )
    # 6 x 3.564 G active matrix parameters + causal attention + the chunked delta rule: 23.2 GFLOP.
    assert training_flops(shape, MtpConfig(steps=0), 151936, 4096) / 1e9 == pytest.approx(23.2, abs=0.1)
    assert training_flops(shape, MtpConfig(steps=1), 151936, 4096) / 1e9 == pytest.approx(25.7, abs=0.2)
    # 32 heads x (6 dk dv + 64 (6 dk + 4 dv) ...): about 5.9 MFLOP, less what a triangular solve spares.
    assert delta_rule(shape) / 1e6 == pytest.approx(5.2, abs=0.8)
    assert TRAINING_FACTOR == 3
