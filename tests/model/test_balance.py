"""The balance loss against its twin over the whole batch, whatever is known of it when the gradient passes by."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.config import BalanceConfig, MtpConfig
from model.layers.balance import NOTES, counting_ahead
from model.layers.forecast import Forecast, histogram
from model.layers.router import Router
from model.reference import balance as reference_balance
from model.reference import layers as reference
from model.stack import hybrid_config
from tests.model.helpers import (
    FLOAT64_TOLERANCE,
    SMALL,
    assert_close,
    noted_balance_loss,
    randomise,
    routed,
)

TOKENS, WEIGHT = 12, 0.25
GLOBAL = BalanceConfig(weight=WEIGHT, micro_weight=0.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_weights(seed: int = 3) -> torch.Tensor:
    """Weights of which some are padding's."""
    weight = torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[[2, 3, 11]] = 0
    return weight


@pytest.fixture
def make_router(groups) -> Callable[..., Router]:
    def make(balance: BalanceConfig = GLOBAL, **changes) -> Router:
        config = hybrid_config(replace(SMALL, **changes), MtpConfig(), balance=balance)
        router = Router(config, groups).double()
        randomise(router)
        return router

    return make


def twin_gradient(router: Router, parts: list, units: list | None = None) -> torch.Tensor:
    """The gradient of the router's weight by the twin's loss over all parts (hidden, token weights) together."""
    weight = router.weight.detach().clone().requires_grad_()
    hidden, token_weight = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    scores, chosen, _ = reference.route(hidden @ weight.T, router.k)
    (gradient,) = torch.autograd.grad(reference.balance_loss(scores, chosen, token_weight, units), weight)
    return gradient


def gradient(router: Router, backward: Callable[[], None]) -> torch.Tensor:
    router.weight.grad = None
    backward()
    return router.weight.grad


def hang(router: Router, hidden: torch.Tensor, tokens) -> torch.Tensor:
    """A loss that takes nothing of the weights, so that only what hangs on them has a gradient."""
    return router(hidden, tokens)[0].sum() * 0


@pytest.mark.parametrize("k", [2, 5])
def test_a_single_micro_batch(make_router: Callable, k: int) -> None:
    router, hidden, weight = make_router(experts_per_token=k), normal(TOKENS, SMALL.hidden_size), token_weights()
    found = gradient(router, lambda: hang(router, hidden, routed(weight)).backward())
    assert_close(found, WEIGHT * twin_gradient(router, [(hidden, weight)]), FLOAT64_TOLERANCE, "the gradient")
    scores, chosen, _ = reference.route(hidden @ router.weight.T, k)
    expected = reference.balance_loss(scores, chosen, weight)
    assert_close(noted_balance_loss(router.balance), expected, FLOAT64_TOLERANCE, "the loss")


def test_the_hidden_states_get_their_gradient_too(make_router: Callable) -> None:
    """Whatever use is made of the weights, the loss's gradient adds to it."""
    router, weight = make_router(), token_weights()
    hidden, use = normal(TOKENS, SMALL.hidden_size).requires_grad_(), normal(TOKENS, SMALL.experts_per_token, seed=1)
    (found,) = torch.autograd.grad((router(hidden, routed(weight))[0] * use).sum(), hidden)
    scores, chosen, shares = reference.route(hidden @ router.weight.T, router.k)
    plain = (torch.stack([torch.stack(row) for row in shares]) * use).sum()
    (expected,) = torch.autograd.grad(plain + WEIGHT * reference.balance_loss(scores, chosen, weight), hidden)
    assert_close(found, expected, FLOAT64_TOLERANCE, "the gradient")


def micro_batches(count: int, shift: float = 0.0) -> list:
    """Parts of a global batch that differ: each leans in a direction of its own."""
    return [
        (normal(TOKENS, SMALL.hidden_size, seed=10 + m) + shift + 3 * normal(SMALL.hidden_size, seed=20 + m), weight)
        for m, weight in enumerate(map(token_weights, range(count)))
    ]


def total_of(parts: list) -> int:
    return sum(int((weight > 0).sum()) for _, weight in parts)


def all_forwards_first(router: Router, parts: list) -> None:
    total = total_of(parts)
    for loss in [hang(router, hidden, routed(weight, total)) for hidden, weight in parts]:
        loss.backward()


def test_all_forwards_before_all_backwards_are_exact(make_router: Callable) -> None:
    router, parts = make_router(), micro_batches(4)
    found = gradient(router, lambda: all_forwards_first(router, parts))
    assert_close(found, WEIGHT * twin_gradient(router, parts), FLOAT64_TOLERANCE, "the gradient")


def test_counting_ahead_is_exact_in_any_order(make_router: Callable, groups) -> None:
    router, parts = make_router(), micro_batches(4)
    router.balance.begin_step(recording=True)
    with torch.no_grad(), counting_ahead([router.balance], groups.tp_dp_cp):
        for hidden, weight in parts:
            router(hidden, routed(weight, total_of(parts)))
    found = gradient(router, lambda: one_forward_one_backward(router, parts, 1))
    assert_close(found, WEIGHT * twin_gradient(router, parts), FLOAT64_TOLERANCE, "the gradient")
    assert not router.balance.counts.any(), "the step may still be refused"
    router.balance.end_step()
    assert router.balance.counts.sum() == router.k * total_of(parts), "what was counted ahead was counted again"


def one_forward_one_backward(router: Router, parts: list, in_flight: int) -> None:
    """The order of a pipeline stage that holds so many micro-batches."""
    waiting = []
    for hidden, weight in parts:
        waiting.append(hang(router, hidden, routed(weight, total_of(parts))))
        if len(waiting) == in_flight:
            waiting.pop(0).backward()
    for loss in waiting:
        loss.backward()


def counts_of(router: Router, hidden: torch.Tensor, token_weight: torch.Tensor) -> torch.Tensor:
    _, chosen, _ = reference.route(hidden @ router.weight.T, router.k)
    counts = torch.zeros(router.num_experts, dtype=torch.float64)
    for t in (token_weight > 0).nonzero()[:, 0].tolist():
        counts[chosen[t]] += 1
    return counts


def tokens_of(parts: list, seed: int) -> list[list[int]]:
    """Ids for the valid tokens of each micro-batch, which prefers a few."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(90 * m, 90 * m + 200, (int((weight > 0).sum()),), generator=generator).tolist()
        for m, (_, weight) in enumerate(parts)
    ]


def histogram_of(tokens: list[list[int]]) -> torch.Tensor:
    return torch.stack([histogram(torch.tensor(row), torch.ones(len(row), dtype=torch.bool)) for row in tokens])


def past_steps(router: Router) -> list[tuple[list[list[int]], torch.Tensor]]:
    """Lets the router go through two steps; returns each micro-batch's tokens and counts."""
    history = []
    for step in (1, 2):
        parts = micro_batches(3, shift=0.5 * step)
        tokens = tokens_of(parts, seed=step)
        router.balance.begin_step(recording=False, histogram_MB=histogram_of(tokens))
        all_forwards_first(router, parts)
        router.balance.end_step()
        history.append((tokens, torch.stack([counts_of(router, *part) for part in parts])))
    return history


@pytest.mark.parametrize("in_flight", [1, 2, 4, 6])
@pytest.mark.parametrize("first", [True, False])
def test_the_online_estimate_equals_its_twin(make_router: Callable, in_flight: int, first: bool) -> None:
    """With and without steps before it; six micro-batches, the fourth of which is padding and all unequal."""
    router, parts = make_router(), micro_batches(6)
    parts[3][1].zero_()
    history = [] if first else past_steps(router)
    last = router.balance.counts[0].double()
    assert bool(last.any()) is not first
    tokens = tokens_of(parts, seed=3)
    router.balance.begin_step(recording=False, histogram_MB=histogram_of(tokens))
    found = gradient(router, lambda: one_forward_one_backward(router, parts, in_flight))

    expected_ME = reference_balance.forecast(history, tokens, last)
    counts_ME = torch.stack([counts_of(router, *part) for part in parts])
    shares = reference_balance.online_fractions(counts_ME, expected_ME, in_flight)
    weight = router.weight.detach().requires_grad_()
    loss = 0.0
    for (hidden, token_weight), share in zip(parts, shares, strict=True):
        scores, _, _ = reference.route(hidden @ weight.T, router.k)
        loss = loss + router.num_experts * (share @ (token_weight @ scores))
    (expected,) = torch.autograd.grad(WEIGHT * loss, weight)
    # Two ways of solving least squares whose ridge is a thirtieth of the mean square: 1e-13 was seen.
    assert_close(found, expected, FLOAT64_TOLERANCE, "the gradient")
    exact = WEIGHT * twin_gradient(router, parts)
    off = ((found - exact).norm() / exact.norm()).item()
    assert off < FLOAT64_TOLERANCE if in_flight == len(parts) else off > 1e-3


def test_a_forecast_learns_what_kinds_of_text_ask(make_router: Callable) -> None:
    """Two kinds of text with tokens and experts of their own: once seen, a step's order of them is foretold."""
    forecast, kinds = Forecast(1, 4), torch.tensor([[90, 10, 0, 0], [0, 0, 30, 70]])
    text = histogram_of([list(range(25)), list(range(500, 525))])
    plain = forecast.counts(text, kinds.sum(dim=0, keepdim=True))
    assert_close(plain[0], kinds.sum(dim=0).expand(2, 4) / 2.0, FLOAT64_TOLERANCE, "what is known of no text")
    for _ in range(8):
        forecast.learn(text, kinds[None])
    order = [1, 0, 0, 1, 1]
    found = forecast.counts(text[order], kinds.sum(dim=0, keepdim=True) * 2.5)[0]
    # The ridge keeps about a twentieth of the way back to the mean of both kinds.
    assert_close(found, kinds[order].double(), 0.1, "the forecast")


def test_the_micro_term_and_scope(make_router: Callable) -> None:
    parts = micro_batches(3)
    each = [twin_gradient(make_router(), [part]) for part in parts]
    together = twin_gradient(make_router(), parts)
    for settings, expected in (
        (BalanceConfig(weight=WEIGHT, scope="micro"), WEIGHT * sum(each)),
        (BalanceConfig(weight=WEIGHT, micro_weight=0.5), WEIGHT * (together + 0.5 * sum(each))),
    ):
        router = make_router(settings)
        found = gradient(router, lambda router=router: all_forwards_first(router, parts))
        assert_close(found, expected, FLOAT64_TOLERANCE, settings.scope)
    assert (together - sum(each)).abs().max() > 0.05 * together.abs().max(), "the scopes do not differ here"


def test_the_sequence_scope(make_router: Callable) -> None:
    rows, units = 3, [t // 4 for t in range(TOKENS)]
    router, (part,) = make_router(BalanceConfig(weight=WEIGHT, scope="sequence")), micro_batches(1)
    found = gradient(router, lambda: hang(router, part[0], routed(part[1], rows=rows)).backward())
    assert_close(found, WEIGHT * twin_gradient(router, [part], units), FLOAT64_TOLERANCE, "the gradient")
    scores, chosen, _ = reference.route(part[0] @ router.weight.T, router.k)
    local = router.balance.notes[NOTES.index("local_loss")]
    assert_close(local, reference.balance_loss(scores, chosen, part[1], units), FLOAT64_TOLERANCE, "the noted loss")


def test_uses_are_counted_apart(make_router: Callable) -> None:
    """As the MTP layer's: each use has a loss of its own, and token weights divided by the number of uses."""
    router, parts = make_router(), micro_batches(2)
    router.balance.set_uses(2)
    tokens = [routed(weight / 2, int((weight > 0).sum()), use=use) for use, (_, weight) in enumerate(parts)]
    router.double()

    def backward() -> None:
        losses = [hang(router, hidden, own) for (hidden, _), own in zip(parts, tokens, strict=True)]
        sum(losses).backward()

    found = gradient(router, backward)
    expected = sum(twin_gradient(router, [part]) for part in parts) / 2
    assert_close(found, WEIGHT * expected, FLOAT64_TOLERANCE, "the gradient")


def test_what_is_noted(make_router: Callable) -> None:
    router, (hidden, weight) = make_router(), micro_batches(1)[0]
    router(hidden, routed(weight))
    notes = dict(zip(NOTES, router.balance.notes.tolist(), strict=True))
    logits = hidden @ router.weight.T
    scores, chosen, _ = reference.route(logits, router.k)
    counts = torch.zeros(router.num_experts)
    for t in (weight > 0).nonzero()[:, 0].tolist():
        counts[chosen[t]] += 1
    expected = {
        "local_loss": reference.balance_loss(scores, chosen, weight),
        "local_violation": weight.sum() * (counts.max() / counts.mean() - 1),
        "z_loss": reference.z_loss(logits, weight),
        "entropy": sum(-w * sum(s * s.log() for s in row) for w, row in zip(weight, scores, strict=True)),
        "top_k_mass": sum(w * scores[t, chosen[t]].sum() for t, w in enumerate(weight)),
        "dropped": torch.zeros(()),
    }
    assert notes == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-6)


def test_evaluation_counts_nothing(make_router: Callable) -> None:
    router, hidden = make_router(), normal(TOKENS, SMALL.hidden_size)
    with torch.no_grad():
        weights, experts = router(hidden, routed(token_weights()))
    same_weights, same_experts = router(hidden, None)
    router.balance.end_step()
    assert not router.balance.counts.any() and not router.balance.notes.any()
    assert torch.equal(weights, same_weights) and torch.equal(experts, same_experts)


def test_padding_alone_scores_zero(make_router: Callable) -> None:
    router, hidden = make_router(), normal(TOKENS, SMALL.hidden_size)
    padding = routed(torch.zeros(TOKENS, dtype=torch.float64))
    assert not gradient(router, lambda: hang(router, hidden, padding).backward()).any()
    assert noted_balance_loss(router.balance).item() == 0.0


def test_the_bias_moves_against_the_load(make_router: Callable) -> None:
    router = make_router(BalanceConfig(weight=0.0, micro_weight=0.0, bias_rate=0.125))
    assert "balance.bias" in router.state_dict() and "balance.counts" in router.state_dict()
    hidden, violations = normal(200, SMALL.hidden_size) + 2 * normal(SMALL.hidden_size, seed=1), []
    for _ in range(30):
        router.balance.begin_step(recording=False)
        router(hidden, routed(torch.full((200,), 1 / 200, dtype=torch.float64)))
        before = router.balance.bias.clone()
        router.balance.end_step()
        load = router.balance.counts[0].double()
        violations.append((load.max() / load.mean() - 1).item())
        moved = router.balance.bias - before
        assert torch.equal(moved.sign(), (load.mean() - load).sign())
        assert_close(
            moved[moved != 0].abs(), torch.full_like(moved[moved != 0], router.balance.bias_rate), 1e-6, "the step"
        )
        router.balance.bias_rate *= 0.9
    assert violations[-1] < 0.3 * violations[0]


def test_a_balanced_layer_scores_one_and_a_collapsed_one_the_number_of_experts() -> None:
    """By the twin, which the tests above hold the router to."""
    even = [[i % 6, (i + 1) % 6] for i in range(0, 12, 2)]
    scores = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    weight = torch.full((6,), 1 / 6, dtype=torch.float64)
    assert reference.balance_loss(scores, even, weight).item() == pytest.approx(1.0, rel=1e-12)
    collapsed = torch.eye(6, dtype=torch.float64)[[4] * 6]
    assert reference.balance_loss(collapsed, [[4]] * 6, weight).item() == pytest.approx(6.0, rel=1e-12)
