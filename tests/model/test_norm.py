"""Zero-centred RMSNorm and its gated form against their twin."""

import torch
from torch.nn import functional as F

from model.config import MtpConfig
from model.layers.norm import (
    GatedRMSNorm,
    ResidualRMSNorm,
    ZeroCentredRMSNorm,
    at_least_float32,
    gated_rms_norm,
    rms_norm_with_residual,
    zero_centred_rms_norm,
)
from model.reference import layers as reference
from model.stack import hybrid_config
from tests.model.helpers import SMALL, assert_twins


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_zero_centred_norm() -> None:
    assert_twins(
        lambda x, weight: zero_centred_rms_norm(x, weight, 1e-2),
        lambda x, weight: reference.rms_norm(x, weight, 1e-2),
        {"x": normal(5, 3, 7), "weight": normal(7, seed=1)},
    )


def test_norm_with_residual() -> None:
    x, weight = normal(5, 3, 7), normal(7, seed=1)
    assert_twins(
        lambda x, weight: torch.cat(rms_norm_with_residual(x, weight, 1e-2), dim=-1),
        lambda x, weight: torch.cat([reference.rms_norm(x, weight, 1e-2), x], dim=-1),
        {"x": x, "weight": weight},
    )
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_with_residual(x, weight, 1e-2), leaves)


def test_gated_norm_gates_after_the_norm() -> None:
    assert_twins(
        lambda x, gate, weight: gated_rms_norm(x, gate, weight, 1e-2),
        lambda x, gate, weight: reference.rms_norm(x, weight, 1e-2) * gate * torch.sigmoid(gate),
        {"x": normal(5, 3, 7), "gate": normal(5, 3, 7, seed=1), "weight": normal(7, seed=2)},
    )


def test_weight_zero_is_gain_one() -> None:
    out = zero_centred_rms_norm(normal(4, 64), torch.zeros(64), eps=0.0)
    # Exact but for float64 rounding.
    assert torch.allclose(out.square().mean(dim=-1), torch.ones(4, dtype=torch.float64), rtol=1e-12)


def test_half_precision_rounds_once_at_the_end() -> None:
    x, gate, weight = normal(9, 32).bfloat16(), normal(9, 32, seed=1).bfloat16(), normal(32, seed=2).float()
    plain = reference.rms_norm(x.float(), weight, 1e-6)
    # Where two roads to float32 differ in the last bit, rounding to bfloat16 may differ by one step, 2^-8 of a value.
    assert torch.allclose(zero_centred_rms_norm(x, weight, 1e-6).float(), plain.bfloat16().float(), rtol=2**-8, atol=0)
    gated = (plain * F.silu(gate.float())).bfloat16().float()
    assert torch.allclose(gated_rms_norm(x, gate, weight, 1e-6).float(), gated, rtol=2**-8, atol=0)


def test_modules_hold_a_float32_weight() -> None:
    config = hybrid_config(SMALL, MtpConfig())
    x, gate = normal(3, 8), normal(3, 8, seed=1)
    for kind in (ZeroCentredRMSNorm, ResidualRMSNorm, GatedRMSNorm):
        module = kind(config, 8, 1e-3)
        assert module.weight.dtype == torch.float32
        torch.nn.init.normal_(module.weight)
        expected = reference.rms_norm(x, module.weight.double(), 1e-3)
        gated = kind is GatedRMSNorm
        out = module(x, gate) if gated else module(x)
        if kind is ResidualRMSNorm:
            out, residual = out
            assert torch.equal(residual, x)
        # float64 all the way; the weight is exact in both.
        assert torch.allclose(out, expected * F.silu(gate) if gated else expected, rtol=1e-12)


def test_at_least_float32() -> None:
    wider = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    for given, wide in wider.items():
        assert at_least_float32(torch.ones(2, dtype=given)).dtype == wide
