"""Grouped products, row movements and the mixture of experts against a loop over tokens."""

from dataclasses import replace

import pytest
import torch

from model.config import MtpConfig
from model.kernels.backends import column_linear, row_linear
from model.layers.dense import SwiGLUSubmodules
from model.layers.dispatch import Leg, Sizes
from model.layers.experts import Experts, MixtureOfExperts, SharedExpert, fused_moe, grouped_linear
from model.layers.rows import invert, permute, reorder, sum_rows, unpermute
from model.reference import layers as reference
from model.stack import hybrid_config
from parallel.main_grads import with_main_grad
from tests.model.helpers import (
    FLOAT64_TOLERANCE,
    SMALL,
    assert_close,
    assert_module_twin,
    assert_twins,
    noted_balance_loss,
    randomise,
    routed,
    weights_of,
)

SUBMODULES = SwiGLUSubmodules(column_linear, row_linear)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("counts", [[3, 2, 1], [0, 4, 2], [0, 0, 5], [6, 0, 0], [1, 0, 1]])
def test_grouped_linear(counts: list[int]) -> None:
    expert_of = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)).tolist()
    assert_twins(
        lambda x, weight: grouped_linear(x, weight, torch.tensor(counts)),
        lambda x, weight: torch.stack([weight[expert] @ row for row, expert in zip(x, expert_of, strict=True)]),
        {"x": normal(sum(counts), 4), "weight": normal(3, 5, 4, seed=1)},
    )


def test_grouped_linear_of_no_rows_has_a_gradient_of_zero() -> None:
    """A rank may get no token at all; its experts' gradients must be zeros, not what lay in memory."""
    x, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(3, 5, 4, requires_grad=True)
    out = grouped_linear(x, weight, torch.zeros(3, dtype=torch.int64))
    assert out.shape == (0, 5)
    out.sum().backward()
    assert x.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(3, 5, 4))


def test_a_weight_that_is_used_several_times_has_one_sum_and_one_dummy_gradient() -> None:
    """A backward pass hands autograd the weight itself, once; the next one does so again."""
    weight, total, counts = with_main_grad(torch.nn.Parameter(normal(3, 5, 4))), torch.zeros(3, 5, 4), [3, 2, 1]
    x, total = normal(6, 4, seed=1), total.double()
    for passes in (1, 2):
        weight.grad = None
        sum(grouped_linear(x, weight, torch.tensor(counts), total).sum() for _ in range(3)).backward()
        assert torch.equal(weight.grad, weight)
        own = torch.stack([rows.sum(dim=0) for rows in x.split(counts)])[:, None].expand(3, 5, 4)
        assert_close(total, passes * 3 * own, FLOAT64_TOLERANCE, "the sum of gradients")


def test_in_chunks_the_weights_themselves_are_marked_as_added_to_their_sums(groups) -> None:
    """Else megatron-core's hook adds the dummy gradient, which is the weight, to the sum."""
    module = Experts(hybrid_config(SMALL, MtpConfig()), groups).double()
    randomise(module)
    x, counts, source = normal(6, SMALL.hidden_size), torch.tensor([0, 2, 0, 1, 3, 0]), torch.tensor([0, 3, 5, 1, 2, 4])
    arguments = (x, torch.ones(6), counts, source, invert(source)[:, None])
    module(*arguments).square().sum().backward()
    expected = [weight.grad for weight in module.parameters()]
    for weight in module.parameters():
        weight.grad, weight.main_grad = None, torch.zeros_like(weight)
    module(*arguments, 2).square().sum().backward()
    for weight, gradient in zip(module.parameters(), expected, strict=True):
        assert weight.grad_added_to_main_grad
        assert torch.equal(weight.grad, weight)
        assert_close(weight.main_grad, gradient, FLOAT64_TOLERANCE, "the sum of gradients")


def test_permute_and_its_gradient() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    inverse = invert(order)
    assert torch.equal(order[inverse], torch.arange(9))
    assert_twins(
        lambda x: reorder(x, order, inverse),
        lambda x: torch.stack([x[source] for source in order.tolist()]),
        {"x": normal(9, 3)},
    )


@pytest.mark.parametrize(("experts", "k", "shared"), [(6, 2, 6), (5, 4, 6), (3, 3, 6), (40, 4, 6), (6, 2, 0)])
def test_mixture_equals_its_twin(groups, experts: int, k: int, shared: int) -> None:
    """With 40 experts and 24 choices many an expert goes without a token; the last case has no shared expert."""
    shape = replace(SMALL, experts=experts, experts_per_token=k, shared_expert_size=shared)
    moe = MixtureOfExperts(hybrid_config(shape, MtpConfig()), SUBMODULES, groups).double()
    randomise(moe)
    hidden, token_weight = normal(6, shape.hidden_size), torch.tensor([0.5, 0.5, 0.25, 0.0, 0.5, 0.25])
    _, chosen, _ = reference.route(hidden @ moe.router.weight.T, k)
    used = {expert for row in chosen for expert in row}
    assert len(used) < experts or experts < 40

    def slow(x: torch.Tensor, weights: dict) -> torch.Tensor:
        out, balance = reference.moe(x, weights, shape, token_weight)
        slow.balance = balance
        return out

    # Without token weights, the balance loss adds nothing to the gradient; test_router has it.
    assert_module_twin(moe, lambda x: moe(x[:, None])[0][:, 0], slow, hidden)
    moe(hidden[:, None], routed(token_weight.double()))
    assert_close(noted_balance_loss(moe.router.balance), slow.balance, FLOAT64_TOLERANCE, "the balance loss")


def test_experts_without_tokens_get_no_gradient(groups) -> None:
    module = Experts(hybrid_config(SMALL, MtpConfig()), groups).double()
    randomise(module)
    each = torch.arange(5)
    counts = torch.tensor([0, 2, 0, 0, 3, 0])
    module(normal(5, SMALL.hidden_size), torch.ones(5), counts, each, each[:, None]).sum().backward()
    for weight in (module.weight1, module.weight2):
        idle = [not expert.any() for expert in weight.grad]
        assert idle == [True, False, True, True, False, True]


def test_expert_holds_its_gate_and_then_its_up_projection(groups) -> None:
    module = Experts(hybrid_config(SMALL, MtpConfig()), groups).double()
    randomise(module)
    x = normal(1, SMALL.hidden_size)
    gate, up = x[0] @ module.weight1[2, 0].T, x[0] @ module.weight1[2, 1].T
    expected = 0.25 * (module.weight2[2] @ (gate * torch.sigmoid(gate) * up))
    first = torch.zeros(1, dtype=torch.int64)
    out = module(x, torch.tensor([0.25]), torch.tensor([0, 0, 1, 0, 0, 0]), first, first[:, None])
    assert_close(out[0], expected, FLOAT64_TOLERANCE, "the output")


def test_shared_expert_equals_its_twin(groups) -> None:
    module = SharedExpert(hybrid_config(SMALL, MtpConfig()), SUBMODULES, groups).double()
    randomise(module)
    assert_module_twin(
        module, lambda x: module(x[:, None])[:, 0], reference.shared_expert, normal(7, SMALL.hidden_size)
    )


def test_every_token_is_computed_alone(groups) -> None:
    """What a token gets from a mixture does not depend on its neighbours: nothing is dropped, nothing mixed up."""
    moe = MixtureOfExperts(hybrid_config(SMALL, MtpConfig()), SUBMODULES, groups).double()
    randomise(moe)
    hidden = normal(30, 1, SMALL.hidden_size)
    together = moe(hidden)[0]
    alone = torch.cat([moe(hidden[t : t + 1])[0] for t in range(30)])
    assert_close(together, alone, FLOAT64_TOLERANCE, "the output")
    assert weights_of(moe).keys() >= {"router.weight", "experts.weight1", "experts.weight2"}


# Five tokens and what each of them has in its four places: rows of experts 1, 1, 1, 1, 2, 4, 4.
PLACES = torch.tensor([[0, -1, 5, -1], [-1, -1, -1, -1], [1, 4, -1, -1], [-1, 2, -1, 6], [-1, -1, 3, -1]])
SOURCE, COUNTS = torch.tensor([0, 2, 3, 4, 2, 0, 3]), torch.tensor([0, 4, 1, 0, 2, 0])


def test_rows_of_tokens_that_have_unequal_numbers_of_them() -> None:
    def slow(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([sum((x[row] for row in places if row >= 0), 0 * x[0]) for places in PLACES.tolist()])

    assert_twins(lambda x: unpermute(x, SOURCE, PLACES), slow, {"x": normal(7, 3)})
    assert_twins(
        lambda x: permute(x, SOURCE, PLACES),
        lambda x: torch.stack([x[token] for token in SOURCE.tolist()]),
        {"x": normal(5, 3)},
    )
    assert torch.equal(sum_rows(torch.zeros(0, 3), torch.full((2, 4), -1)), torch.zeros(2, 3))


def test_tokens_computed_a_few_at_a_time_are_those_of_all_at_once(groups) -> None:
    """Also their gradients; one chunk holds rows of no expert but one, another none of a token."""
    module = Experts(hybrid_config(SMALL, MtpConfig()), groups).double()
    randomise(module)
    rest = (torch.rand(7, dtype=torch.float64), COUNTS, SOURCE, PLACES)
    assert_module_twin(
        module,
        lambda x: module(x, *rest, 2),
        lambda x, weights: fused_moe(x, weights["weight1"], weights["weight2"], *rest),
        normal(5, SMALL.hidden_size),
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_by_expert_is_that_of_a_sort(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranks, local = 4, 5
    counts_PE = torch.randint(0, 4, (ranks, local), generator=generator)
    leg = object.__new__(Leg)
    leg.received_PE, leg.sizes = counts_PE, Sizes([], [], [], counts_PE.sum(1).tolist())
    expert = torch.arange(local).repeat(ranks).repeat_interleave(counts_PE.flatten())
    there, back = leg.by_expert()
    assert torch.equal(there, expert.argsort(stable=True))
    assert torch.equal(back, invert(there))
