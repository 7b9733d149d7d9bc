"""The chunked output head and cross-entropy against the twin with full logits."""

import pytest
import torch

from model.layers import loss
from model.layers.loss import Targets
from model.reference import layers as reference
from tests.model.helpers import FLOAT64_TOLERANCE, assert_close, assert_twins

VOCAB, HIDDEN, CHUNK = 11, 6, 4


def linear_cross_entropy(hidden, head, target, weight, group, **others) -> tuple[torch.Tensor, torch.Tensor]:
    """One prediction step, in small chunks: the sum, and the losses of the tokens."""
    total, losses = loss.linear_cross_entropy([hidden], head, [Targets(target, weight)], group, chunk=CHUNK, **others)
    return total, losses[0]


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Hidden states and head, targets, and weights of which some are zero."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(VOCAB, (tokens,), generator=generator)
    target[:2] = torch.tensor([0, VOCAB - 1])[:tokens]
    weight = torch.rand(tokens, generator=generator, dtype=torch.float64)
    weight[2::3] = 0
    return {"hidden": hidden, "head": head}, target, weight


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1])
def test_weighted_sum_and_gradients(groups, tokens: int) -> None:
    leaves, target, weight = inputs(tokens)
    assert_twins(
        lambda hidden, head: linear_cross_entropy(hidden, head, target, weight, groups.tp)[0],
        lambda hidden, head: (reference.cross_entropies(hidden, head, target) * weight).sum(),
        leaves,
    )


def test_losses_of_the_tokens_have_no_gradient(groups) -> None:
    leaves, target, weight = inputs(9)
    hidden, head = (x.requires_grad_() for x in leaves.values())
    _, losses = linear_cross_entropy(hidden, head, target, weight, groups.tp)
    assert_close(losses, reference.cross_entropies(hidden, head, target), FLOAT64_TOLERANCE, "the losses")
    assert not losses.requires_grad


def test_gradients_follow_the_loss_upstream(groups) -> None:
    """Each prediction step's sum is weighted, and the head is shared by all steps."""
    (leaves, target, weight), (more, other, _) = inputs(9), inputs(10)
    leaves["more"] = more["hidden"]

    def total(entropy, hidden, head, again):
        return 0.3 * entropy(hidden, head, target, weight) - 2 * entropy(again, head, other, torch.ones(10))

    assert_twins(
        lambda *x: total(lambda *y: linear_cross_entropy(*y, groups.tp)[0], *x),
        lambda *x: total(lambda h, w, t, weight: (reference.cross_entropies(h, w, t) * weight).sum(), *x),
        leaves,
    )


def test_only_the_head_learns_when_the_states_are_fixed(groups) -> None:
    leaves, target, weight = inputs(9)
    assert_twins(
        lambda head: linear_cross_entropy(leaves["hidden"], head, target, weight, groups.tp)[0],
        lambda head: (reference.cross_entropies(leaves["hidden"], head, target) * weight).sum(),
        {"head": leaves["head"]},
    )


def test_large_logits_do_not_overflow(groups) -> None:
    leaves, target, weight = inputs(9, torch.float32)
    hidden, head = (leaves["hidden"] * 1000).requires_grad_(), leaves["head"].requires_grad_()
    total, losses = linear_cross_entropy(hidden, head, target, weight.float(), groups.tp)
    total.backward()
    exact = reference.cross_entropies(hidden.double(), head.double(), target)
    assert exact.max() > 1000
    # float32 logits of some thousands carry 2^-24 of themselves, summed over 6 products.
    assert_close(losses.double(), exact, 1e-6, "the losses")
    assert hidden.grad.isfinite().all() and head.grad.isfinite().all()


def test_half_precision_states_give_float32_losses(groups) -> None:
    leaves, target, weight = inputs(9, torch.bfloat16)
    hidden, head = (x.requires_grad_() for x in leaves.values())
    total, losses = linear_cross_entropy(hidden, head, target, weight.float(), groups.tp)
    total.backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    exact = reference.cross_entropies(*wide, target)
    (exact * weight).sum().backward()
    assert losses.dtype == total.dtype == torch.float32
    # The products are rounded to bfloat16: logits up to 8 are off by up to 2^-8 * 8 / 2 = 0.016.
    assert_close(losses.double(), exact, 0.03, "the losses")
    for narrow, leaf in zip((hidden, head), wide, strict=True):
        assert narrow.grad.dtype == torch.bfloat16
        assert_close(narrow.grad.double(), leaf.grad, 0.03, "a gradient")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradients(groups, monkeypatch: pytest.MonkeyPatch, mode) -> None:
    """They would cost twice what the losses cost, and room for a copy of the head."""
    leaves, target, weight = inputs(9)
    hidden, head = (x.requires_grad_() for x in leaves.values())
    expected = reference.cross_entropies(hidden, head, target)
    monkeypatch.setattr(torch, "zeros", lambda *args, **keywords: pytest.fail("room for a gradient"))
    with mode():
        total, losses = linear_cross_entropy(hidden, head, target, weight, groups.tp)
    assert_close(losses, expected, FLOAT64_TOLERANCE, "the losses")
    assert_close(total, (expected * weight).sum(), FLOAT64_TOLERANCE, "the sum")


def test_all_steps_in_one_sum_and_the_head_learns_from_those_it_may(groups) -> None:
    """As one function of all steps: the head's gradient leaves out the steps that it does not learn from."""
    (leaves, target, weight), (more, other, factor) = inputs(9), inputs(10)
    leaves["more"] = more["hidden"]

    def fast(hidden, head, again):
        asked = [Targets(target, weight), Targets(other, 0.3 * factor, head_learns=False)]
        total, losses = loss.linear_cross_entropy([hidden, again[:9]], head, [asked[0], cut(asked[1])], groups.tp)
        assert losses.shape == (2, 9)
        return total

    def cut(asked: Targets) -> Targets:
        return Targets(asked.token_T[:9], asked.weight_T[:9], asked.head_learns)

    def slow(hidden, head, again):
        first = (reference.cross_entropies(hidden, head, target) * weight).sum()
        second = reference.cross_entropies(again[:9], head.detach(), other[:9]) * 0.3 * factor[:9]
        return first + second.sum()

    assert_twins(fast, slow, leaves)


def test_a_single_chunk_of_half_precision_is_summed_in_float32(groups) -> None:
    leaves, target, weight = inputs(CHUNK, torch.bfloat16)
    head = leaves["head"].requires_grad_()
    head.main_grad = main_grad = torch.zeros(VOCAB, HIDDEN)
    total, _ = linear_cross_entropy(leaves["hidden"], head, target, weight.float(), groups.tp, main_grad_VH=main_grad)
    total.backward()
    assert main_grad.abs().max() > 0
    assert not torch.equal(main_grad, main_grad.bfloat16().float()), "the gradient was rounded on its way"
