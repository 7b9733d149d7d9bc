"""Counted parameters and operations against built models and torch's counter, and against published figures."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.batch import MicroBatch, count_pairs, count_targets
from model.config import ModelConfig, MtpConfig
from model.cost.cost import (
    TRAINING_FACTOR,
    active_parameters,
    delta_rule,
    forward_flops,
    parameters,
    rule_of_thumb_flops,
    stage_weights,
    total_parameters,
    training_flops,
)
from model.network import LanguageModel
from model.stack import hybrid_config
from tests.model.helpers import SMALL

VOCAB, ROWS, LENGTH = 64, 2, 128  # LENGTH: whole chunks of the delta rule
RECIPES = Path(__file__).parents[2] / "recipes" / "model"
# Which part of the count a parameter belongs to, by a piece of its name; the first that fits.
PARTS = {
    "mtp.": "mtp",
    "embedding.": "embedding",
    "output_layer.": "head",
    "final_norm": "norms",
    "input_layernorm": "norms",
    "pre_mlp_layernorm": "norms",
    "router.": "router",
    "shared_expert.": "shared_expert",
    "experts.": "routed_experts",
    "linear_qkv": "attention",
    "linear_proj": "attention",
    "q_layernorm": "attention",
    "k_layernorm": "attention",
    "mlp.": "dense",
    "self_attention.": "gated_delta_net",
}


def recipe(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))


def part_of(name: str) -> str:
    return next(part for piece, part in PARTS.items() if piece in name)


@pytest.fixture(scope="module")
def on_meta(groups) -> Callable[..., LanguageModel]:
    """Builds a model of any size without its numbers."""

    def make(shape: ModelConfig, mtp: MtpConfig, vocab_size: int) -> LanguageModel:
        with torch.device("meta"):
            return LanguageModel(hybrid_config(shape, mtp), vocab_size, groups)

    return make


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("pattern", "steps"), [("GEGEGE*E", 2), ("G-G-*-", 2), ("*-", 0), ("G-*E", 1), ("*EE", 0)])
@pytest.mark.parametrize("shared", [0, 6])
def test_every_parameter_of_a_built_model_is_counted_in_its_part(
    on_meta: Callable, pattern: str, steps: int, gate: bool, shared: int
) -> None:
    tied = pattern == "G-G-*-"
    shape = replace(
        SMALL,
        pattern=pattern,
        attention_gate=gate,
        shared_expert_size=shared,
        dtype="bfloat16",
        tied_embeddings=tied,
    )
    mtp = MtpConfig(steps=steps)
    built, wide = Counter(), Counter()
    for name, parameter in on_meta(shape, mtp, VOCAB).named_parameters():
        built[part_of(name)] += parameter.numel()
        wide[part_of(name)] += parameter.numel() * (parameter.dtype == torch.float32)
    assert parameters(shape, mtp, VOCAB) == dict(built)
    counted = Counter()
    for weight in stage_weights(shape.layers, shape, mtp, VOCAB, first=True, last=True):
        counted[weight.part] += weight.numel * weight.float32
    assert counted == wide


# Qwen3-Next: 79.67 B in all, 3.253 B of the layers active, 1.65 B in an MTP layer; Qwen3's report: 30.5 B and 32.8 B.
PUBLISHED = {
    "qwen3_next_80b_a3b": (79.674, 3.2526, 1.6505),
    "qwen3_30b_a3b": (30.532, 2.7307, None),
    "qwen3_32b": (32.762, 31.2063, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_large_models_have_their_published_sizes(on_meta: Callable, name: str) -> None:
    shape, (total, active, mtp) = recipe(name), PUBLISHED[name]
    assert total_parameters(shape, shape.vocab_size) / 1e9 == pytest.approx(total, abs=5e-4)
    assert active_parameters(shape) / 1e9 == pytest.approx(active, abs=5e-5)
    steps = MtpConfig(steps=0 if mtp is None else 1)
    counts = parameters(shape, steps, shape.vocab_size)
    if mtp is not None:
        assert counts["mtp"] / 1e9 == pytest.approx(mtp, abs=5e-5)
    built = on_meta(shape, steps, shape.vocab_size)
    assert sum(parameter.numel() for parameter in built.parameters()) == sum(counts.values())


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], *_, **__) -> int:
    """Scores and mixtures of [R, N, L, D] queries with S keys."""
    return 2 * 2 * math.prod(query) * key[2]


def counted_flops(build, shape: ModelConfig, mtp: MtpConfig, length: int = LENGTH, rows: int = ROWS) -> float:
    """Matrix-product operations a token of a forward pass, as torch counts them."""
    network = build(shape, mtp, vocab_size=VOCAB)
    tokens = torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros_like(tokens)
    batch = MicroBatch.build(tokens, documents, count_targets(documents, mtp.steps))
    # The plain implementation of attention is the one whose products torch sees. One kernel is called by name.
    products = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    counting = FlopCounterMode(display=False, custom_mapping=products)
    with sdpa_kernel(SDPBackend.MATH), counting as counter, torch.no_grad():
        network(batch)
    return counter.get_total_flops() / (rows * length)


def test_a_packed_batch_costs_what_its_documents_cost_one_by_one(build) -> None:
    """Torch's counter over each document alone, against the formula over the batch that packs them.

    Whole chunks of the delta rule; what torch does not count, and counts twice, is as in the test of the formulas.
    """
    shape, mtp, lengths = replace(SMALL, pattern="GE*E"), MtpConfig(steps=1), [64, 128, 320]
    ids = torch.repeat_interleave(torch.tensor([3, 4, 9]), torch.tensor(lengths))
    padded = torch.cat([ids, torch.full((129,), -1)])[None]  # a fifth of the row is padding
    tokens, squares = count_pairs(padded).tolist()
    assert (tokens, squares) == (512, sum(length**2 for length in lengths))
    found = sum(counted_flops(build, shape, mtp, length, rows=1) * length for length in lengths)
    queries, dk, dv = shape.attention_heads * shape.head_dim, shape.linear_key_dim, shape.linear_value_dim
    channels = 2 * shape.linear_key_heads * dk + shape.linear_value_heads * dv
    uncounted = 2 * shape.conv_kernel * channels + 64 * (dk + dv) * shape.linear_value_heads
    found += tokens * uncounted - 2 * 2 * queries * squares  # half of two attentions' squares is masked
    formula = tokens * training_flops(shape, mtp, VOCAB, squares / tokens) / TRAINING_FACTOR
    assert formula == pytest.approx(found, rel=0.01)
    whole = tokens * training_flops(shape, mtp, VOCAB, len(padded[0]) - 1) / TRAINING_FACTOR
    assert whole > 1.05 * found  # as if one document filled the row


def test_pairs_are_counted_row_by_row() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 2, 2, 2], [-1, -1, -1, -1, -1]])
    assert count_pairs(documents).tolist() == [8, 9 + 1 + 4 + 4]


PLAIN = {"attention_gate": False, "shared_expert_size": 0}


@pytest.mark.parametrize(
    ("pattern", "mtp", "changes"),
    [
        ("GEGEGE*E", MtpConfig(steps=2), {}),
        ("*E", MtpConfig(steps=0), {}),
        ("GE", MtpConfig(steps=1), {}),
        ("GG**EE", MtpConfig(steps=3), {}),
        ("*E", MtpConfig(steps=3, keys="depth"), {}),
        ("*-", MtpConfig(steps=0), PLAIN),
        ("*E*-", MtpConfig(steps=1), PLAIN),
        ("G-", MtpConfig(steps=0), {"dense_size": 20}),
    ],
    ids=str,
)
def test_the_formulas_count_what_torch_counts(build, pattern: str, mtp: MtpConfig, changes: dict) -> None:
    shape = replace(SMALL, pattern=pattern, **changes)
    found = counted_flops(build, shape, mtp)
    # Torch counts no triangular solve, no elementwise convolution, and all of a masked attention's square.
    queries = shape.attention_heads * shape.head_dim
    attentions = pattern.count("*") + mtp.steps
    dk, dv = shape.linear_key_dim, shape.linear_value_dim
    channels = 2 * shape.linear_key_heads * dk + shape.linear_value_heads * dv
    uncounted = 2 * shape.conv_kernel * channels + 64 * (dk + dv) * shape.linear_value_heads
    expected = sum(forward_flops(shape, mtp, VOCAB, LENGTH).values())
    expected += attentions * 2 * queries * LENGTH - pattern.count("G") * uncounted
    if mtp.steps > 1 and mtp.keys == "inference":
        expected -= 2 * queries  # a mixture of one value is no matrix product
    # The formulas are exact; only the order of float sums differs.
    assert found == pytest.approx(expected, rel=1e-9)


def test_qwen3_next_costs_23_gflop_a_token_at_4k() -> None:
    shape = recipe("qwen3_next_80b_a3b")
    # The usual rule, with the delta rule token by token.
    assert rule_of_thumb_flops(shape, 151936, 4096) / 1e9 == pytest.approx(22.93, abs=0.005)
    # 6 x 3.564 G active matrix parameters + causal attention + the chunked delta rule: 23.2 GFLOP.
    assert training_flops(shape, MtpConfig(steps=0), 151936, 4096) / 1e9 == pytest.approx(23.2, abs=0.1)
    assert training_flops(shape, MtpConfig(steps=1), 151936, 4096) / 1e9 == pytest.approx(25.7, abs=0.2)
    # 32 heads x (6 dk dv + 64 (6 dk + 4 dv) ...): about 5.9 MFLOP, less what a triangular solve spares.
    assert delta_rule(shape) / 1e6 == pytest.approx(5.2, abs=0.8)
    assert TRAINING_FACTOR == 3


@pytest.mark.parametrize(("name", "at_4k", "at_32k"), [("qwen3_30b_a3b", 23.08, 56.90), ("qwen3_32b", 204.79, 294.98)])
def test_without_a_delta_rule_the_usual_rule_is_off_by_the_norms_alone(name: str, at_4k: float, at_32k: float) -> None:
    shape = recipe(name)
    for length, expected in ((4096, at_4k), (32768, at_32k)):
        exact = training_flops(shape, MtpConfig(steps=0), shape.vocab_size, length)
        assert exact / 1e9 == pytest.approx(expected, abs=0.005)
        assert rule_of_thumb_flops(shape, shape.vocab_size, length) == pytest.approx(exact, rel=1e-4)
