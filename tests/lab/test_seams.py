"""What the lab varies that no setting does: each seam changes what its name says, on a few numbers."""

from types import SimpleNamespace

import pytest
import torch

from model import init
from model.config import ModelConfig
from model.layers import balance, norm, router
from tests.lab.one import Unchecked
from tests.lab.seams import SEAMS
from train import loop, training
from train.job import build
from train.settings.run import Config
from train.watch import gauges

CHANGED = (
    *((build, "decays"), (gauges, "decays"), (gauges, "_of_norms"), (init, "rules"), (balance, "load_fractions")),
    *((router, "router_logits"), (router, "route")),
    *((kind, "forward") for kind in (norm.ZeroCentredRMSNorm, norm.HeadNorm, norm.ResidualRMSNorm, norm.GatedRMSNorm)),
)
SMALL = SimpleNamespace(shape=ModelConfig(), num_layers=4)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a seam changes is put back after a test."""
    for owner, name in CHANGED:
        monkeypatch.setattr(owner, name, vars(owner)[name])


def drawn(name: str, *shape: int) -> torch.Tensor:
    rule = init._rule_for(name, init.rules(SMALL))
    return rule(shape, torch.Generator().manual_seed(0))


def test_norms_are_not_decayed_and_all_else_is() -> None:
    names = {"decoder.layers.0.input_layernorm.weight", "decoder.layers.0.self_attention.q_layernorm.weight"}
    names |= {
        "decoder.final_norm.weight",
        "mtp.layers.0.enorm.weight",
        "decoder.layers.0.self_attention.out_norm.weight",
    }
    assert all(map(build.decays, names))
    SEAMS["undecayed_norms"]()
    assert not any(map(build.decays, names)) and not any(map(gauges.decays, names))
    assert build.decays("decoder.layers.1.mlp.experts.weight1") and not build.decays("decoder.layers.0.A_log")


def test_plain_norms_begin_with_the_same_gain_and_have_it_as_their_weight() -> None:
    config, x = SimpleNamespace(sequence_parallel=False, recompute=frozenset()), torch.randn(3, 8)
    kinds = {
        norm.ZeroCentredRMSNorm: (x,),
        norm.ResidualRMSNorm: (x,),
        norm.GatedRMSNorm: (x, x.flip(0)),
        norm.HeadNorm: (x,),
    }

    def outputs() -> list[torch.Tensor]:
        modules = [kind(config, 8, 1e-6) for kind in kinds]
        for module in modules:
            module.weight.data = drawn("x_layernorm.weight", 8)
        found = [module(*given) for module, given in zip(modules, kinds.values(), strict=True)]
        return [*(each[0] if isinstance(each, tuple) else each for each in found), modules[-1]()]

    before = outputs()
    SEAMS["plain_norms"]()
    assert drawn("final_norm.weight", 8).eq(1).all() and drawn("x_layernorm.weight", 8).eq(1).all()
    assert all(torch.equal(one, other) for one, other in zip(before, outputs(), strict=True))
    tops = torch.full((2, len(gauges.NORMS)), 0.0)
    tops[:, 0] = torch.tensor([1.5, -0.5])  # the largest weight, and the least negated
    assert list(gauges._of_norms(tops).values())[:2] == [0.5, 1.5]


def test_router_rows_are_as_drawn() -> None:
    norms = drawn("mlp.router.weight", 16, 64).norm(dim=1)
    assert norms.std() < 1e-6
    SEAMS["router_as_drawn"]()
    assert drawn("mlp.router.weight", 16, 64).norm(dim=1).std() > 1e-3
    assert drawn("mlp.router.weight", 16, 64).std() == pytest.approx(SMALL.shape.init_std, rel=0.1)


def test_the_router_rounds_to_bfloat16() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(16, 8)
    exact = router.router_logits(hidden, weight)
    SEAMS["router_bfloat16"]()
    logits = router.router_logits(hidden, weight)
    scores, weights, experts = router.route(logits, 4)
    for found in (logits, scores, weights):
        assert torch.equal(found, found.bfloat16().float()) and found.dtype == torch.float32
    # 8 bits in each factor of 8 products, and in the sum.
    assert not torch.equal(logits, exact) and torch.allclose(logits, exact, atol=0.1)
    assert experts.shape == (5, 4)
    assert balance.load_fractions(torch.tensor([257, 1])).tolist() == [256 / 257, 1 / 257]


def test_what_a_run_of_the_lab_replaces_is_there() -> None:
    with Unchecked(Config(), torch.device("cpu")) as kernels:
        kernels.require_right(show=True)
    assert "Kernels" in vars(loop) and "evaluation" in vars(training) and "save" in vars(training.Training)
