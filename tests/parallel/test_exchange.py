"""Rows that travel to experts and back: how many, what becomes of them, and what happens meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.layers import dispatch
from model.layers.experts import WIDTH_DIM, MixtureOfExperts
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
EXPERTS = 8
# Experts that tokens choose from, and what counts as uneven: above, experts compute a few tokens at a time.
OWN = dispatch.UNEVEN
LOADS = {("even", EXPERTS): OWN, ("collapsed, at once", EXPERTS // 2): 2.0, ("collapsed, in chunks", EXPERTS // 2): OWN}
# Where rows belong and the rows themselves travel to the experts, and results back; the halves of the shared expert lie
# in between.
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


def events_of(parallel: ParallelConfig) -> dict[str, list[str]]:
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


@contextmanager
def _routed(moe: MixtureOfExperts, favoured: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights [T, K] and experts [T, K] that the router is made to give: of the first ``favoured`` experts."""
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    k = moe.router.k
    chosen = torch.stack([torch.randperm(favoured, generator=generator)[:k] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, k, generator=generator, dtype=torch.float64).requires_grad_()
    with patch.object(moe.router, "forward", lambda *_: (weights, chosen)):
        yield weights, chosen


def _build(parallel: ParallelConfig) -> MixtureOfExperts:
    """A mixture in float64, without a shared expert."""
    (chunk,) = fill(build_tiny(tiny_config(parallel=parallel)))
    moe = chunk.moe_layers()[0].double()
    moe.shared_expert = None
    return moe


def _whole(part: torch.Tensor, dim: int) -> torch.Tensor:
    """A weight of all experts, from the parts of both ranks."""
    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part.detach())
    return torch.cat(parts, dim).requires_grad_()


def _against_a_loop(parallel: ParallelConfig, favoured: int, uneven: float) -> dict[str, float]:
    """Largest differences of results and gradients from experts that one process holds; and rows sent, by right."""
    moe = _build(parallel)
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (TOKENS, 1, moe.config.hidden_size)
    hidden, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_()
    experts, sent, real = moe.experts, [], dist.all_to_all_single

    def exchange(out, x, *args, **others):
        sent.append(x.shape)
        return real(out, x, *args, **others)

    with (
        _routed(moe, favoured) as (weights, chosen),
        patch.object(dispatch, "UNEVEN", uneven),
        patch.object(dist, "all_to_all_single", exchange),
        patch("model.layers.experts.checkpoint", wraps=checkpoint) as again,
    ):
        out, _ = moe(hidden)
        rows, chunks = sent[1][0], again.call_count
        out.backward(grad)
        fullest, moe.fullest = moe.fullest, 0.0
        with torch.no_grad():
            moe(hidden)
    dim = WIDTH_DIM if parallel.expert_tensor > 1 else 0
    up, down = _whole(experts.weight1, dim), _whole(experts.weight2, dim)
    x, probs = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    gate, raised = torch.einsum("tkgfh,th->gtkf", up[chosen], x[:, 0])
    expected = torch.einsum("tk,tkhf,tkf->th", probs, down[chosen], F.silu(gate) * raised)
    expected.backward(grad[:, 0])
    pairs = [(out[:, 0], expected), (hidden.grad, x.grad), (weights.grad, probs.grad)]
    for own, whole in ((experts.weight1, up), (experts.weight2, down)):
        dist.all_reduce(whole.grad)
        pairs.append((own.grad, whole.grad.chunk(2, dim)[dist.get_rank()]))
    names = ("out", "x", "weights", "up", "down")
    found = {name: float((a - b).detach().abs().max()) for name, (a, b) in zip(names, pairs, strict=True)}
    places = {(token, expert // experts.local) for token, row in enumerate(chosen.tolist()) for expert in row}
    return found | {
        "rows": rows,
        "by right": len(places) * experts.etp_group.size(),
        "fullest": fullest,
        "fullest of an evaluation": moe.fullest,
        "chunks": chunks,
    }


def _refusal(parallel: ParallelConfig) -> str:
    """What a rank says where the first one has no memory for what would arrive at it."""
    moe = _build(parallel)
    room = 2**62 if dist.get_rank() else 1000
    with (
        _routed(moe, moe.router.k),
        patch.object(dispatch, "free_bytes", lambda _: room),
        patch.object(dist, "all_to_all_single", side_effect=AssertionError("a row was sent")),
        pytest.raises(RuntimeError) as error,
    ):
        moe(torch.zeros(TOKENS, 1, moe.config.hidden_size, dtype=torch.float64))
    return str(error.value)


def _all_events() -> dict[str, dict]:
    process_groups.start(torch.device("cpu"))
    found = {}
    for name, parallel in LAYOUTS.items():
        found[name] = events_of(parallel)
        leave_layout()
        for (kind, favoured), uneven in LOADS.items():
            found[name][kind] = _against_a_loop(parallel, favoured, uneven)
            leave_layout()
    found["refused"] = _refusal(LAYOUTS["EP2"])
    leave_layout()
    return found


@pytest.fixture(scope="module")
def events() -> list[dict[str, dict]]:
    return run_ranks(_all_events, 2)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("kind", "favoured"), LOADS)
def test_experts_over_ranks_are_those_of_a_loop(events, name: str, kind: str, favoured: int) -> None:
    """Each token is sent once to each part of the experts, whatever the load: even, or all on the first rank."""
    for rank, found in enumerate(rank[name][kind] for rank in events):
        # Sums of a few dozen float64 terms of order one, in another order.
        assert max(found[part] for part in ("out", "x", "weights", "up", "down")) < 1e-12
        assert found["rows"] == found["by right"]
        spread = LAYOUTS[name].expert_tensor == 1
        assert found["fullest"] == (2.0 if spread and favoured < EXPERTS else pytest.approx(1, abs=0.5))
        assert found["fullest of an evaluation"] == 0
        # As many as there are even shares, where the rows arrive.
        assert found["chunks"] == (2 if spread and kind.endswith("in chunks") and rank == 0 else 0)


def test_what_does_not_fit_is_refused_by_all_before_a_row_is_sent(events) -> None:
    """Only the first rank has no memory; the second one has, and nothing would arrive there."""
    texts = {rank["refused"] for rank in events}
    (text,) = texts
    assert text.startswith(
        "experts are too unevenly used: rank 0 of 2 that share a layer's experts would compute 2.0 x"
    )
    assert "no row was sent" in text and "balance.weight" in text and "batch.micro" in text


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
