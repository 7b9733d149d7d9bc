"""Routing and the balance loss against their twins, and where the loss's gradient goes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model import reference
from model.config import BalanceConfig, MtpConfig
from model.router import Router, normalise_rows, route, z_loss
from model.stack import hybrid_config
from tests.model.helpers import BALANCE, FLOAT64_TOLERANCE, SMALL, assert_close, assert_twins, randomise

TOKENS = 14


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_weights() -> torch.Tensor:
    """Weights of which some are padding's."""
    weight = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight[[2, 3, 13]] = 0
    return weight


@pytest.fixture
def make_router(groups) -> Callable[..., Router]:
    def make(balance: BalanceConfig = BALANCE, **changes) -> Router:
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
    router = make_router(BalanceConfig(weight=0.0, z_weight=0.5))
    hidden = normal(TOKENS, SMALL.hidden_size, seed=5)
    weights, _ = router(hidden, token_weights())
    (weights.sum() * 0).backward()
    found, router.weight.grad = router.weight.grad, None
    (0.5 * reference.z_loss(hidden @ router.weight.T, token_weights())).backward()
    assert_close(found, router.weight.grad, FLOAT64_TOLERANCE, "the gradient of the z-loss")


@pytest.mark.parametrize("k", [2, 5])
def test_balance_loss(make_router: Callable, k: int) -> None:
    router = make_router(experts_per_token=k)

    def fast(logits: torch.Tensor) -> torch.Tensor:
        scores, _, experts = route(logits, k)
        return router.balance_loss(scores, experts, token_weights())

    def slow(logits: torch.Tensor) -> torch.Tensor:
        scores, chosen, _ = reference.route(logits, k)
        return reference.balance_loss(scores, chosen, token_weights())

    assert_twins(fast, slow, {"logits": normal(TOKENS, 6)})


def test_a_balanced_layer_scores_one(make_router: Callable) -> None:
    router = make_router()
    experts = torch.arange(12).view(6, 2) % 6
    scores = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    loss = router.balance_loss(scores, experts, torch.full((6,), 1 / 6))
    # The weights 1/6 are float32.
    assert loss.item() == pytest.approx(1.0, rel=1e-6)


def test_a_collapsed_layer_scores_the_number_of_experts(make_router: Callable) -> None:
    router = make_router()
    scores = torch.eye(6, dtype=torch.float64)[[4] * 8]
    loss = router.balance_loss(scores, torch.full((8, 1), 4), torch.full((8,), 1 / 8))
    assert loss.item() == pytest.approx(6.0, rel=1e-12)


def test_padding_alone_scores_zero(make_router: Callable) -> None:
    router = make_router()
    scores, _, experts = route(normal(TOKENS, 6), 2)
    assert router.balance_loss(scores, experts, torch.zeros(TOKENS)).item() == 0.0


def test_forward_hangs_the_balance_loss_onto_the_weights(make_router: Callable) -> None:
    """The router's gradient is that of the weights' use plus the weight times the loss's, whatever the use."""
    router, hidden = make_router(BalanceConfig(weight=0.25)), normal(TOKENS, SMALL.hidden_size)
    use = normal(TOKENS, SMALL.experts_per_token, seed=1)
    weights, _ = router(hidden, token_weights())
    (found,) = torch.autograd.grad((weights * use).sum(), router.weight)

    weight = router.weight.detach().requires_grad_()
    scores, chosen, shares = reference.route(hidden @ weight.T, SMALL.experts_per_token)
    loss = reference.balance_loss(scores, chosen, token_weights())
    plain = (torch.stack([torch.stack(row) for row in shares]) * use).sum()
    (expected,) = torch.autograd.grad(plain + 0.25 * loss, weight)
    assert_close(found, expected, FLOAT64_TOLERANCE, "the router's gradient")
    assert_close(router.take_losses()[0], loss, FLOAT64_TOLERANCE, "the recorded loss")


def test_take_losses_sums_and_forgets(make_router: Callable) -> None:
    router, hidden = make_router(), normal(TOKENS, SMALL.hidden_size)
    assert router.take_losses()[0].item() == 0.0
    router(hidden, token_weights())
    once = router.take_losses()[0]
    assert once > 0
    for _ in range(3):
        router(hidden, token_weights())
    assert_close(router.take_losses()[0], 3 * once, FLOAT64_TOLERANCE, "the sum of three")
    assert router.take_losses()[0].item() == 0.0


def test_evaluation_records_no_balance_loss(make_router: Callable) -> None:
    router, hidden = make_router(), normal(TOKENS, SMALL.hidden_size)
    with torch.no_grad():
        weights, experts = router(hidden, token_weights())
    same_weights, same_experts = router(hidden, None)
    assert router.take_losses()[0].item() == 0.0
    assert torch.equal(weights, same_weights) and torch.equal(experts, same_experts)


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
