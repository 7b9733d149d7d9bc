"""What is computed again in the backward pass changes nothing but how much is kept for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from model.config import LAYER, BalanceConfig, MtpConfig
from model.layers.attention import GatedAttention
from model.layers.deltanet import GatedDeltaNet
from model.layers.experts import Experts
from model.layers.norm import GatedRMSNorm, ResidualRMSNorm, ZeroCentredRMSNorm
from model.layers.recompute import recomputable
from model.network import LanguageModel
from model.stack import Layer
from parallel.topology import RECOMPUTABLE
from tests.model.helpers import FLOAT64_TOLERANCE, SMALL, assert_close, ids_from_starts, noted_balance_loss
from tests.model.test_network import VOCAB, micro_batch, random_tokens

MTP = MtpConfig(steps=2, weight=0.3)
SHAPE = replace(SMALL, pattern="GE*E")
BALANCE = BalanceConfig(weight=0.1, z_weight=0.1)
# The methods that are marked, with their parts.
MARKED = [
    (LAYER, Layer, "compute"),
    ("attention", GatedAttention, "attend"),
    ("deltanet", GatedDeltaNet, "mix"),
    ("experts", Experts, "forward"),
    ("norm", ZeroCentredRMSNorm, "forward"),
    ("norm", ResidualRMSNorm, "forward"),
    ("norm", GatedRMSNorm, "forward"),
]


@contextmanager
def kept_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that the forward pass keeps for the backward pass, by address; held, so that none is used twice."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield storages


def run(network: LanguageModel, parts: set[str]) -> tuple[dict[str, torch.Tensor], int]:
    """Losses and gradients of a packed micro-batch, and the bytes kept for the backward pass."""
    network.config.recompute = frozenset(parts)
    network.zero_grad()
    for balance in network.balances().values():
        balance.begin_step(recording=True)
    ids = ids_from_starts(20, [3, 4, 11], [])
    ids[1, -3:] = -1
    with kept_storages() as storages:
        losses = network(micro_batch(random_tokens(*ids.shape), ids, MTP.steps))
        counted = [balance.seen() for balance in network.balances().values()]
    losses.total.backward()
    noted = [noted_balance_loss(balance) for balance in network.balances().values()]
    again = [balance.seen() for balance in network.balances().values()]
    assert all(map(torch.equal, again, counted)), "experts were counted again in the backward pass"
    notes = torch.stack([balance.notes for balance in network.balances().values()])
    found = {"total": losses.total.detach(), "router losses": torch.stack(noted), "notes": notes.clone()}
    found |= {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    return found, sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    "parts", [{LAYER}, set(RECOMPUTABLE), *({part} for part in RECOMPUTABLE)], ids=lambda parts: "+".join(sorted(parts))
)
def test_losses_and_gradients_stay_and_less_is_kept(build: Callable, parts: set[str]) -> None:
    network = build(SHAPE, MTP, VOCAB, balance=BALANCE)
    expected, everything = run(network, set())
    found, kept = run(network, parts)
    assert kept < everything
    assert expected["router losses"].min() > 0.5
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The same operations; only gradients of a layer that is used twice may be summed in another order.
        assert_close(found[name], value, FLOAT64_TOLERANCE, name)


def test_a_whole_layer_keeps_least(build: Callable) -> None:
    network = build(SHAPE, MTP, VOCAB, balance=BALANCE)
    none, parts, layers = (run(network, chosen)[1] for chosen in (set(), set(RECOMPUTABLE), {LAYER}))
    assert layers < 0.6 * parts < 0.6 * none


def test_nothing_is_recomputed_without_gradients(build: Callable) -> None:
    network = build(SHAPE, MTP, VOCAB, balance=BALANCE)
    network.config.recompute = frozenset({LAYER})
    ids = ids_from_starts(20, [3])
    with torch.no_grad():
        losses = network(micro_batch(random_tokens(*ids.shape), ids, MTP.steps))
    assert not losses.total.requires_grad


def test_every_part_that_can_be_named_is_marked() -> None:
    assert {part for part, *_ in MARKED} == {LAYER, *RECOMPUTABLE}


@pytest.mark.parametrize(("part", "owner", "name"), MARKED)
def test_a_marked_method_runs_twice_where_its_part_is_named(build: Callable, part: str, owner: type, name: str) -> None:
    network = build(SHAPE, MtpConfig(steps=0), VOCAB, balance=BALANCE)
    module = next(module for module in network.modules() if type(module) is owner)
    calls = []
    marked = getattr(owner, name).__wrapped__

    def counted(self, *args):
        calls.append(self is module)
        return marked(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, recomputable(part)(counted))
        counts = []
        for parts in (set(), {part}):
            calls.clear()
            run_without_mtp(network, parts)
            counts.append(sum(calls))
    assert counts == [1, 2]


def run_without_mtp(network: LanguageModel, parts: set[str]) -> None:
    network.config.recompute = frozenset(parts)
    ids = ids_from_starts(20, [3])
    network(micro_batch(random_tokens(*ids.shape), ids, 0)).total.backward()
