"""The bound on what an expert takes against a loop that sorts its assignments."""

import math

import pytest
import torch

from model.config import BalanceConfig, MtpConfig
from model.layers.balance import NOTES
from model.layers.capacity import Capacity
from model.layers.experts import MixtureOfExperts
from model.stack import hybrid_config
from tests.model.helpers import SMALL, randomise, routed
from tests.model.test_experts import SUBMODULES, normal

TOKENS, EXPERTS, K = 40, 6, 2


def _drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, experts and token weights; half of the tokens are copies of others, some are padding."""
    generator = torch.Generator().manual_seed(0)
    liked = torch.linspace(0.1, 1.0, EXPERTS)
    chosen = (torch.rand(TOKENS, EXPERTS, generator=generator) * liked).topk(K).indices
    weights = torch.rand(TOKENS, K, generator=generator)
    chosen[TOKENS // 2 :], weights[TOKENS // 2 :] = chosen[: TOKENS // 2], weights[: TOKENS // 2]
    token_weight = torch.full((TOKENS,), 0.1)
    token_weight[[3, 11, 30]] = 0
    return weights, chosen, token_weight


@pytest.mark.parametrize("share", [1.0, 1.3, 5.0])
def test_an_expert_keeps_its_strongest(groups, share: float) -> None:
    weights, chosen, token_weight = _drawn()
    found = Capacity(share, EXPERTS, groups).drop(weights, chosen, routed(token_weight, rows=2))
    expected, limit = chosen.clone(), math.ceil(share * TOKENS * K / EXPERTS)
    for expert in range(EXPERTS):
        own = (chosen == expert).nonzero().tolist()
        own.sort(key=lambda place: (-float(weights[*place] * (token_weight[place[0]] > 0)), place[0]))
        for token, place in own[limit:]:
            expected[token, place] = EXPERTS
    assert torch.equal(found, expected)
    assert bool((found == EXPERTS).any()) == (share < 2)


def test_a_dropped_assignment_adds_nothing_and_is_counted(groups) -> None:
    """In training alone: without gradients, as in an evaluation, nothing is dropped."""
    balance = BalanceConfig(weight=0.0, micro_weight=0.0, capacity=1.0)
    moe = MixtureOfExperts(hybrid_config(SMALL, MtpConfig(), balance=balance), SUBMODULES, groups).double()
    randomise(moe)
    hidden = (normal(TOKENS, SMALL.hidden_size) + 1.0).requires_grad_()
    tokens = routed(torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64))
    weights, kept = moe.router(hidden, tokens)
    dropped = kept == SMALL.experts
    assert 0.05 < dropped.double().mean() < 0.6
    assert moe.router.balance.notes[NOTES.index("dropped")] == pytest.approx(dropped.double().mean())
    moe.shared_expert = None
    together = moe(hidden[:, None], tokens)[0][:, 0]
    without = dropped.all(dim=1)
    assert not together[without].any()
    (grad,) = torch.autograd.grad(weights.sum() * 0 + together.sum(), moe.router.weight)
    assert grad.isfinite().all() and grad.any()
    with torch.no_grad():
        assert torch.equal(moe.router(hidden, tokens)[1] == SMALL.experts, torch.zeros_like(dropped))
        part = [
            sum(
                (
                    moe.experts(hidden[t : t + 1], weights[t, k : k + 1], _one(kept[t, k]), *_alone())
                    for k in range(kept.shape[1])
                    if not dropped[t, k]
                ),
                torch.zeros(1, SMALL.hidden_size, dtype=torch.float64),
            )
            for t in range(TOKENS)
        ]
    assert torch.allclose(together, torch.cat(part), rtol=1e-12, atol=1e-12)


def _one(expert: torch.Tensor) -> torch.Tensor:
    return torch.bincount(expert[None], minlength=SMALL.experts)


def _alone() -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.zeros(1, dtype=torch.int64)
    return first, first[:, None]
