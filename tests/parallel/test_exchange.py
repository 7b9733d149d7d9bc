"""What happens while rows travel to experts and back: launches and waits around the two halves of the shared expert."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from model.layers.experts import MixtureOfExperts
from parallel import groups as process_groups
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.parallel.tiny import build_tiny, fill, leave_layout, tiny_config

TOKENS = 12
LAYOUTS = {
    "EP2": ParallelConfig(expert=2),
    "TP2xEP2": ParallelConfig(tensor=2, expert=2),
    "TP2, each expert in 2 parts": ParallelConfig(tensor=2, expert=1, expert_tensor=2),
    "EP2, experts recomputed": ParallelConfig(expert=2, recompute="selective"),
}
# Rows and their shares travel to the experts, and results back; the halves of the shared expert lie in between.
FORWARD = ["launch", "launch", "first half", "wait", "wait", "launch", "second half", "wait"]
BACKWARD = ["launch", "second half's gradient", "wait", "experts' gradient", "launch", "launch"]
BACKWARD += ["first half's gradient", "wait", "wait"]


class _Noted:
    """Work whose wait is noted."""

    def __init__(self, work: dist.Work, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def _note(moe: MixtureOfExperts, events: list[str]) -> None:
    halves = {"first half": moe.shared_expert.linear_fc1, "second half": moe.shared_expert.linear_fc2}
    for name, linear in halves.items():
        linear.register_forward_hook(lambda *_, name=name: events.append(name))
        linear.weight.register_hook(lambda _, name=name: events.append(f"{name}'s gradient"))
    moe.experts.weight1.register_hook(lambda _: events.append("experts' gradient"))


def _events(parallel: ParallelConfig) -> dict[str, list[str]]:
    """What one mixture does, in order; forwards and backwards, without gradients, recomputed, with little to learn."""
    (chunk,) = fill(build_tiny(tiny_config(parallel=parallel)))
    moe = chunk.moe_layers()[0]
    events: list[str] = []
    _note(moe, events)
    real = dist.all_to_all_single

    def launch(*args, **others):
        events.append("launch")
        return _Noted(real(*args, **others), events)

    def take() -> list[str]:
        taken, events[:] = list(events), []
        return taken

    generator = torch.Generator().manual_seed(dist.get_rank())
    hidden = torch.randn(TOKENS, 1, chunk.config.hidden_size, generator=generator).requires_grad_()
    found = {}
    with patch.object(dist, "all_to_all_single", launch):
        out, _ = moe(hidden)
        found["forward"] = take()
        out.square().sum().backward()
        found["backward"] = take()
        expected, hidden.grad = hidden.grad, None
        with torch.no_grad():
            assert torch.equal(moe(hidden)[0], out)
        found["no gradients"] = take()
        again = checkpoint(lambda x: moe(x)[0], hidden, use_reentrant=True)
        again.square().sum().backward()
        found["recomputed"] = take()
        assert torch.equal(again, out)
        assert torch.equal(hidden.grad, expected)
        moe.shared_expert.requires_grad_(False)
        moe(hidden.detach())[0].sum().backward()
        found["frozen"] = take()
    return found


def _all_events() -> dict[str, dict[str, list[str]]]:
    process_groups.start(torch.device("cpu"))
    found = {}
    for name, parallel in LAYOUTS.items():
        found[name] = _events(parallel)
        leave_layout()
    return found


@pytest.fixture(scope="module")
def events() -> list[dict[str, dict[str, list[str]]]]:
    return run_ranks(_all_events, 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_shared_expert_is_computed_while_rows_travel(events, name: str) -> None:
    for found in (rank[name] for rank in events):
        assert found["forward"] == found["no gradients"] == FORWARD
        assert found["backward"] == BACKWARD
        assert found["recomputed"] == FORWARD + FORWARD + BACKWARD


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_needs_no_gradient_is_left_out_on_every_rank(events, name: str) -> None:
    """With a frozen shared expert and inputs that are given, only results and shares have gradients that travel."""
    back = ["launch", "wait", "experts' gradient", "launch", "wait"]
    assert [rank[name]["frozen"] for rank in events] == [FORWARD + back] * 2
