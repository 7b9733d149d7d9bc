"""Gated DeltaNet: the chunked delta rule, the convolution and the whole layer against their twins."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from model.config import MtpConfig
from model.documents import Documents
from model.kernels.backends import column_linear, row_linear
from model.layers.delta_rule import causal_conv, chunk_gated_delta_rule, l2_normalise
from model.layers.deltanet import GatedDeltaNet, GatedDeltaNetSubmodules, draw_decay, draw_time_step_bias
from model.layers.norm import GatedRMSNorm
from model.reference import layers as reference
from model.stack import hybrid_config
from tests.model.helpers import (
    FLOAT64_TOLERANCE,
    SMALL,
    assert_close,
    assert_module_twin,
    assert_twins,
    ids_from_starts,
    randomise,
)

# Where documents start in a row of 29 tokens solved in chunks of 8.
STARTS = {
    "one document": [],
    "at the edges": [8, 16, 24],
    "just before the edges": [7, 15, 23],
    "just after the edges": [9, 17, 25],
    "inside one chunk": [3, 5],
    "over several chunks": [2, 26],
    "one token before, at and after an edge": [7, 8, 9, 10],
    "one token at the end": [28],
    "one token each": range(1, 29),
}


def delta_rule_inputs(rows: int, length: int, heads: int = 2, dim: int = 5, value_dim: int = 3) -> dict:
    """Unit keys and queries, decays between 0.1 and 1, write strengths in (0, 1), all float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(rows, length, heads, *shape, generator=generator, dtype=torch.float64)

    return {
        "q": l2_normalise(normal(dim)),
        "k": l2_normalise(normal(dim)),
        "v": normal(value_dim),
        "g": -0.5 * normal().abs(),
        "beta": normal().sigmoid(),
    }


def assert_delta_rule_twin(ids: torch.Tensor, chunk: int) -> None:
    assert_twins(
        lambda *inputs: chunk_gated_delta_rule(*inputs, Documents.from_ids(ids), chunk=chunk),
        lambda *inputs: reference.gated_delta_rule(*inputs, ids),
        delta_rule_inputs(*ids.shape),
    )


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
def test_chunked_delta_rule_with_documents(starts: list[int]) -> None:
    # The second row has other borders: rows must not share masks.
    assert_delta_rule_twin(ids_from_starts(29, starts, [11]), chunk=8)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 23])
def test_chunked_delta_rule_at_every_kind_of_length(length: int) -> None:
    assert_delta_rule_twin(ids_from_starts(length, []), chunk=8)


def test_chunked_delta_rule_of_a_single_token() -> None:
    ids = ids_from_starts(1, [])
    inputs = delta_rule_inputs(1, 1).values()
    out = chunk_gated_delta_rule(*inputs, Documents.from_ids(ids), chunk=8)
    assert_close(out, reference.gated_delta_rule(*inputs, ids), FLOAT64_TOLERANCE, "the output")


def test_chunked_delta_rule_with_the_default_chunk() -> None:
    ids = ids_from_starts(150, [63, 64, 65, 127, 128, 140])
    assert_twins(
        lambda *inputs: chunk_gated_delta_rule(*inputs, Documents.from_ids(ids)),
        lambda *inputs: reference.gated_delta_rule(*inputs, ids),
        delta_rule_inputs(*ids.shape),
    )


def test_padding_behaves_as_a_document_of_its_own() -> None:
    ids = ids_from_starts(20, [9])
    ids[0, 13:] = -1
    assert_delta_rule_twin(ids, chunk=8)


def test_chunked_delta_rule_survives_total_forgetting() -> None:
    """exp(-1000) is zero: neither the decays nor their gradients may become nan."""
    inputs = delta_rule_inputs(1, 20)
    inputs["g"][:, 3::4] = -1000.0
    leaves = [x.float().requires_grad_() for x in inputs.values()]
    out = chunk_gated_delta_rule(*leaves, Documents.from_ids(ids_from_starts(20, [10])), chunk=8)
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    exact = reference.gated_delta_rule(*inputs.values(), ids_from_starts(20, [10]))
    # Differences of cumulated decays of size 5000 are known to 5e-4 in float32, and so are the factors exp() of them.
    assert_close(out.double(), exact, 1e-3, "the output")


def test_chunked_delta_rule_computes_half_precision_in_float32() -> None:
    inputs = [x.bfloat16() for x in delta_rule_inputs(1, 150).values()]
    ids = ids_from_starts(150, [70])
    wide = chunk_gated_delta_rule(*(x.float() for x in inputs), Documents.from_ids(ids))
    narrow = chunk_gated_delta_rule(*inputs, Documents.from_ids(ids))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("starts", [[], [1, 2, 3, 7, 11], range(1, 13)])
def test_convolution(taps: int, starts: list[int]) -> None:
    ids = ids_from_starts(13, starts, [5])
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 13, 3, generator=generator, dtype=torch.float64),
        "weight": torch.randn(3, taps, generator=generator, dtype=torch.float64),
    }
    assert_twins(
        lambda x, weight: causal_conv(x, weight, Documents.from_ids(ids)),
        lambda x, weight: reference.causal_conv(x, weight, ids),
        inputs,
    )


def test_l2_normalise_keeps_a_zero_vector() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    unit = l2_normalise(x)
    # eps = 1e-6 inside the root takes 2e-8 off a vector of length 5.
    assert torch.allclose(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64), atol=1e-7)
    unit.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_layer_equals_its_twin(groups, ratio: int) -> None:
    shape = replace(SMALL, linear_value_heads=2 * ratio)
    submodules = GatedDeltaNetSubmodules(column_linear, row_linear, GatedRMSNorm)
    layer = GatedDeltaNet(hybrid_config(shape, MtpConfig()), submodules, 1, groups).double()
    randomise(layer)
    ids = ids_from_starts(70, [1, 30, 63, 64], [65])
    documents = Documents.from_ids(ids)
    hidden = torch.randn(140, shape.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_module_twin(
        layer,
        lambda x: layer(x[:, None], packed_seq_params=documents)[0][:, 0],
        lambda x, weights: reference.gated_delta_net(x, weights, shape, ids),
        hidden,
    )


def test_decays_start_in_the_usual_ranges() -> None:
    """A in (0, 16] and softplus(dt_bias) in [1e-3, 0.1], at the ends of the uniform numbers too (FLA, Mamba2)."""
    uniform = torch.cat(
        [torch.tensor([0.0, 1 - 2**-24]), torch.rand(10000, generator=torch.Generator().manual_seed(0))]
    )
    decay, step = draw_decay(uniform).exp(), F.softplus(draw_time_step_bias(uniform))
    assert draw_decay(uniform).isfinite().all()
    # The ends are met to float32's relative precision through a logarithm: 1e-5 is ample.
    assert decay.min() > 0 and decay.max() <= 16 * (1 + 1e-5)
    assert step.min() >= 1e-3 * (1 - 1e-5) and step.max() <= 0.1 * (1 + 1e-5)
    # 10000 draws: means of U(0, 16) and of the logarithm's U are known to 0.6 % of their ranges; 3 % is five sigma.
    assert abs(decay.mean() - 8) < 0.03 * 16
    assert abs(step.log10().mean() + 2) < 0.03 * 2
