"""Routing against its twin, the z-loss, biased and forced choices; `test_balance` has the balance loss."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.config import BalanceConfig, MtpConfig
from model.layers.router import Router, normalise_rows, route, steered_route, z_loss
from model.reference import layers as reference
from model.stack import hybrid_config
from tests.model.helpers import FLOAT64_TOLERANCE, SMALL, assert_close, assert_twins, randomise, routed

TOKENS = 14
PLAIN = BalanceConfig()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_weights() -> torch.Tensor:
    """Weights of which some are padding's."""
    weight = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight[[2, 3, 13]] = 0
    return weight


@pytest.fixture
def make_router(groups) -> Callable[..., Router]:
    def make(balance: BalanceConfig = PLAIN, **changes) -> Router:
        config = hybrid_config(replace(SMALL, **changes), MtpConfig(), balance=balance)
        router = Router(config, groups).double()
        randomise(router)
        return router

    return make


@pytest.mark.parametrize("k", [1, 2, 6])
def test_route(k: int) -> None:
    logits = normal(TOKENS, 6)
    scores, weights, experts = route(logits, k)
    slow_scores, chosen, shares = reference.route(logits, k)
    assert experts.tolist() == chosen
    assert_close(scores, slow_scores, FLOAT64_TOLERANCE, "the scores")
    assert_close(weights, torch.tensor(shares, dtype=torch.float64), FLOAT64_TOLERANCE, "the weights")
    # k numbers that were divided by their sum.
    assert_close(weights.sum(dim=1), torch.ones(TOKENS, dtype=torch.float64), 1e-14, "the sum of the weights")


def test_gradient_of_the_weights() -> None:
    assert_twins(
        lambda logits: route(logits, 3)[1],
        lambda logits: torch.stack([torch.stack(row) for row in reference.route(logits, 3)[2]]),
        {"logits": normal(TOKENS, 6)},
    )


def test_z_loss() -> None:
    assert_twins(
        lambda logits: z_loss(logits, token_weights()),
        lambda logits: reference.z_loss(logits, token_weights()),
        {"logits": 3 * normal(TOKENS, 6)},
    )


def test_forward_hangs_the_z_loss_onto_the_weights(make_router: Callable) -> None:
    router = make_router(BalanceConfig(weight=0.0, micro_weight=0.0, z_weight=0.5))
    hidden = normal(TOKENS, SMALL.hidden_size, seed=5)
    weights, _ = router(hidden, routed(token_weights()))
    (weights.sum() * 0).backward()
    found, router.weight.grad = router.weight.grad, None
    (0.5 * reference.z_loss(hidden @ router.weight.T, token_weights())).backward()
    assert_close(found, router.weight.grad, FLOAT64_TOLERANCE, "the gradient of the z-loss")


def test_scores_are_computed_in_float32(groups) -> None:
    router = Router(hybrid_config(replace(SMALL, dtype="bfloat16"), MtpConfig()), groups)
    randomise(router)
    hidden = normal(TOKENS, SMALL.hidden_size).bfloat16()
    weights, experts = router(hidden, None)
    assert router.weight.dtype == weights.dtype == torch.float32
    _, chosen, shares = reference.route(hidden.double() @ router.weight.double().T, SMALL.experts_per_token)
    assert experts.tolist() == chosen
    # float32 products of 24 terms; bfloat16 would be off by 1e-3 and more.
    assert_close(weights.double(), torch.tensor(shares, dtype=torch.float64), 1e-6, "the weights")


def test_normalised_rows_have_one_norm() -> None:
    weight = normal(512, 64).float() * torch.logspace(-2, 2, 512)[:, None]
    norms = normalise_rows(weight, std=0.02).norm(dim=1)
    # std * sqrt(64) = 0.16; a float32 norm of 64 terms is good to 1e-6 of itself.
    assert torch.allclose(norms, torch.full((512,), 0.16), rtol=1e-6, atol=0)
    cosines = (normalise_rows(weight, 0.02) * weight).sum(dim=1) / (norms * weight.norm(dim=1))
    assert torch.allclose(cosines, torch.ones(512), atol=1e-6)


def test_a_bias_chooses_experts_but_does_not_weigh_them() -> None:
    logits, bias = normal(TOKENS, 6), torch.tensor([0.0, 0.3, -1.0, 0.0, 0.1, 0.0], dtype=torch.float64)
    scores, weights, experts = steered_route(logits, 2, bias)
    for token in range(TOKENS):
        best = sorted(range(6), key=lambda i, token=token: -(scores[token, i] + bias[i]).item())[:2]
        assert experts[token].tolist() == best
        expected = scores[token, best] / scores[token, best].sum()
        assert_close(weights[token], expected, FLOAT64_TOLERANCE, "the weights")
    assert not torch.equal(experts, route(logits, 2)[2]), "the bias changed no choice"


@pytest.mark.parametrize(("tokens", "experts", "k"), [(32, 8, 3), (7, 5, 2)])
def test_forced_routing_is_even_and_keeps_the_gradient(tokens: int, experts: int, k: int) -> None:
    logits = normal(tokens, experts).requires_grad_()
    scores, weights, chosen = steered_route(logits, k, None)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    assert counts.max() - counts.min() <= (1 if tokens * k % experts else 0)
    assert all(len(set(row)) == k for row in chosen.tolist())
    taken = scores.gather(1, chosen)
    assert_close(weights, taken / taken.sum(dim=1, keepdim=True), FLOAT64_TOLERANCE, "the weights")
    weights[:, 0].sum().backward()
    assert logits.grad.abs().max() > 1e-3
