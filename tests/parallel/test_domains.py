"""Experts over several NVLink domains: four processes in two of them compute what a loop does and send fewer rows."""

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.config import MtpConfig
from model.kernels.backends import column_linear, row_linear
from model.layers import dispatch
from model.layers.dense import SwiGLUSubmodules
from model.layers.experts import WIDTH_DIM, MixtureOfExperts
from model.stack import hybrid_config
from parallel import groups as process_groups
from parallel.alone import as_first_of
from parallel.domains import ExpertDomains, require_alike
from parallel.topology import ParallelConfig, TopologyError, resolve
from tests.dist import run_ranks
from tests.model.helpers import randomise
from tests.parallel.test_exchange import events_of
from tests.parallel.tiny import MODEL, PIPELINED, build_tiny, fill, leave_layout, tiny_config
from train.job.build import Job
from train.watch import metrics
from train.watch.resources import resource_metrics

TOKENS, EXPERTS, K = 12, 16, 4
WORLD, SIZE = 4, 2  # processes, and those of a domain
LAYOUTS = {
    "EP4": ParallelConfig(expert=4, nvlink_domain=SIZE),
    "EP2, each expert in 2 parts": ParallelConfig(expert=2, expert_tensor=2, nvlink_domain=SIZE),
    "EP4, experts recomputed": ParallelConfig(expert=4, nvlink_domain=SIZE, recompute="selective"),
}
# Experts that tokens choose from, the share of assignments that is dropped, and what counts as uneven.
LOADS = {
    "even": ((0, EXPERTS), 0.0, math.inf),
    "some dropped": ((0, EXPERTS), 0.3, math.inf),
    "all in one domain": ((EXPERTS // 2, EXPERTS), 0.0, math.inf),
    "all on one rank": ((EXPERTS // 2, EXPERTS // 2 + EXPERTS // WORLD), 0.0, math.inf),
    "all on one rank, in chunks": ((EXPERTS // 2, EXPERTS // 2 + EXPERTS // WORLD), 0.0, dispatch.UNEVEN),
    "all dropped but one process's": ((0, EXPERTS), 1.0, math.inf),
}
# What travels: where rows belong, the rows, to the next holder both again, results of the second leg and of the first.
FORWARD = ["launch", "launch", "first half", "wait", "launch", "wait", "launch", "wait", "wait"]
FORWARD += ["launch", "wait", "launch", "second half", "wait"]
BACKWARD = [
    "launch",
    "second half's gradient",
    "wait",
    "launch",
    "wait",
    "experts' gradient",
    "launch",
    "launch",
    "wait",
]
BACKWARD += ["launch", "wait", "launch", "first half's gradient", "wait", "wait"]
# Recomputation is another way through the experts alone.
CASES = [(name, load) for name in LAYOUTS for load in LOADS if "recomputed" not in name or load == "some dropped"]


def _build(parallel: ParallelConfig) -> tuple[Job, MixtureOfExperts]:
    """A mixture in float64, without a shared expert, and the job that it is of."""
    job = build_tiny(tiny_config(replace(MODEL, pattern="E", experts=EXPERTS, experts_per_token=K), parallel))
    (chunk,) = fill(job)
    moe = chunk.moe_layers()[0].double()
    moe.shared_expert = None
    return job, moe


@contextmanager
def _routed(moe: MixtureOfExperts, load: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights [T, K] and experts [T, K] that the router is made to give."""
    (first, end), dropped, uneven = LOADS[load]
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    chosen = torch.stack([first + torch.randperm(end - first, generator=generator)[:K] for _ in range(TOKENS)])
    lost = torch.rand(TOKENS, K, generator=generator) < dropped * (dropped < 1 or dist.get_rank() > 0)
    chosen = chosen.masked_fill(lost, EXPERTS)
    weights = torch.rand(TOKENS, K, generator=generator, dtype=torch.float64).requires_grad_()
    with (
        patch.object(moe.router, "forward", lambda *_: (weights, chosen)),
        patch.object(moe.router, "capacity", object()),
        patch.object(dispatch, "UNEVEN", uneven),
    ):
        yield weights, chosen


def _whole(part: torch.Tensor, experts: int, parts: int) -> torch.Tensor:
    """A weight of all experts, from the parts of all ranks."""
    every = [torch.empty_like(part) for _ in range(WORLD)]
    dist.all_gather(every, part.detach())
    owners = [torch.cat(every[first : first + parts], WIDTH_DIM) for first in range(0, WORLD, parts)]
    return torch.cat(owners).requires_grad_()


def _computed(moe: MixtureOfExperts, load: str) -> dict:
    """Results and gradients of a mixture, and the rows that left for the other domain and come back."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (TOKENS, 1, moe.config.hidden_size)
    hidden, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_()
    experts, crossed, real = moe.experts, [], dist.all_to_all_single
    experts.zero_grad()

    def exchange(out, x, received, sent, group, **others):
        if x.shape[1] == shape[-1]:
            ranks, own = dist.get_process_group_ranks(group), dist.get_rank() // SIZE
            crossed.append(sum(size for size, rank in zip(sent, ranks, strict=True) if rank // SIZE != own))
        return real(out, x, received, sent, group=group, **others)

    moe.network_rows = moe.sent_tokens = 0
    with (
        _routed(moe, load) as (weights, chosen),
        patch.object(dist, "all_to_all_single", exchange),
        patch("model.layers.experts.checkpoint", wraps=checkpoint) as again,
    ):
        out, _ = moe(hidden)
        forward = sum(crossed)
        out.backward(grad)
    assert moe.sent_tokens == TOKENS
    return {
        "values": [out[:, 0], hidden.grad[:, 0], weights.grad, experts.weight1.grad, experts.weight2.grad],
        "inputs": (hidden, grad, weights, chosen),
        "crossed": forward,
        "crossed back": sum(crossed) - forward,
        "counted": moe.network_rows,
        "chunks": again.call_count,
        "fullest": moe.fullest,
    }


def _by_a_loop(moe: MixtureOfExperts, parts: int, inputs: tuple) -> list[torch.Tensor]:
    """The same values from experts that one process holds."""
    hidden, grad, weights, chosen = inputs
    up, down = (_whole(weight, EXPERTS, parts) for weight in (moe.experts.weight1, moe.experts.weight2))
    x, probs = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    there = chosen.clamp(max=EXPERTS - 1)
    gate, raised = torch.einsum("tkgfh,th->gtkf", up[there], x[:, 0])
    out = torch.einsum("tk,tkhf,tkf->th", probs * (chosen < EXPERTS), down[there], F.silu(gate) * raised)
    out.backward(grad[:, 0])
    found, rank = [out, x.grad[:, 0], probs.grad], dist.get_rank()
    for whole in (up, down):
        dist.all_reduce(whole.grad)
        owner = whole.grad.chunk(WORLD // parts)[rank // parts]
        found.append(owner.chunk(parts, WIDTH_DIM)[rank % parts])
    return found


def _difference(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(these, those, strict=True))


@contextmanager
def _one_leg(moe: MixtureOfExperts) -> Iterator[None]:
    with patch.object(moe, "domains", replace(moe.domains, inside=None, across=None)):
        yield


def _compared(moe: MixtureOfExperts, parts: int, load: str) -> dict[str, float]:
    two, again = _computed(moe, load), _computed(moe, load)
    with _one_leg(moe):
        one = _computed(moe, load)
    chosen, own = two["inputs"][-1].tolist(), dist.get_rank() // SIZE
    ranks = [{expert // (EXPERTS // WORLD * parts) for expert in row if expert < EXPERTS} for row in chosen]
    domains = [{rank * parts // SIZE for rank in row} - {own} for row in ranks]
    beyond = [rank for row in ranks for rank in row if rank * parts // SIZE != own]
    return {
        "from a loop": _difference(two["values"], _by_a_loop(moe, parts, two["inputs"])),
        "from one leg": _difference(two["values"], one["values"]),
        "from itself": _difference(two["values"], again["values"]),
        "by right": (sum(map(len, domains)), parts * len(beyond)),
        "crossed": (two["counted"], one["counted"]),
        "moved": (two["crossed"], two["crossed back"], one["crossed"], one["crossed back"]),
        "chunks": two["chunks"],
        "fullest": (two["fullest"], one["fullest"]),
    }


def _refusal(moe: MixtureOfExperts) -> str:
    """What a rank says where the third one, to which all tokens go, has no memory."""
    with (
        _routed(moe, "all on one rank, in chunks"),
        patch.object(dispatch, "free_bytes", lambda _: 1000 if dist.get_rank() == 2 else 2**62),
        patch.object(dist, "all_to_all_single", side_effect=AssertionError("a row was sent")),
        pytest.raises(RuntimeError) as error,
    ):
        moe(torch.zeros(TOKENS, 1, moe.config.hidden_size, dtype=torch.float64))
    return str(error.value)


def _shown(job: Job, moe: MixtureOfExperts) -> tuple[int, list[dict[str, float]]]:
    """Rows of this process that crossed the network, and what is logged of them, at once and when nothing followed."""
    with _one_leg(moe):  # more than one a token
        crossed = _computed(moe, "even")["counted"]
    with patch("train.watch.resources.shutil.disk_usage", lambda _, whole=shutil.disk_usage: whole("/")):
        return crossed, [resource_metrics(job, {}) for _ in range(2)]


def _all() -> dict[str, dict]:
    process_groups.start(torch.device("cpu"))
    found = {}
    for name, parallel in LAYOUTS.items():
        job, moe = _build(parallel)
        found[name] = {load: _compared(moe, parallel.expert_tensor, load) for layout, load in CASES if layout == name}
        if name == "EP4":
            found["shown"] = _shown(job, moe)
            found["refused"] = [_refusal(moe)]
            with _one_leg(moe):
                found["refused"].append(_refusal(moe))
        leave_layout()
    topology = resolve(LAYOUTS["EP4"], MODEL, WORLD)
    require_alike(topology, torch.device("cpu"))
    with pytest.raises(TopologyError, match="start 2 and 4 processes each: start as many on all"):
        other = replace(topology, nvlink_domain=2 if dist.get_rank() else 4)
        require_alike(other, torch.device("cpu"))
    found["events"] = events_of(LAYOUTS["EP4"])
    leave_layout()
    found["one leg"] = {}
    for size in (1, WORLD):
        domains: ExpertDomains = _build(ParallelConfig(expert=4, nvlink_domain=size))[1].domains
        found["one leg"][size] = (domains.inside, domains.across, domains.number_P)
        leave_layout()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict]]:
    return run_ranks(_all, WORLD)


@pytest.mark.parametrize(("name", "load"), CASES)
def test_experts_over_domains_are_those_of_a_loop(ranks, name: str, load: str) -> None:
    """And those of one exchange among all; a token's row crosses the network once for each domain, there and back."""
    for rank, found in enumerate(rank[name][load] for rank in ranks):
        # Sums of a few dozen float64 terms of order one, in another order.
        assert max(found["from a loop"], found["from one leg"]) < 1e-12
        assert found["from itself"] == 0
        assert found["crossed"] == found["by right"]
        assert found["fullest"][0] == found["fullest"][1]
        parts = LAYOUTS[name].expert_tensor
        if LAYOUTS[name].recompute == "none":  # as many chunks as there are even shares, where the rows arrive
            holds = rank // parts == WORLD // 2 // parts
            assert found["chunks"] == (WORLD // parts if holds and load.endswith("in chunks") else 0)
        if load == "even":
            assert 0 < found["crossed"][0] < found["crossed"][1]
    for way in (0, 2):  # in two legs, in one
        # Results return, and gradients go both ways: what left a domain in one pass enters it in the other.
        counted = sum(rank[name][load]["crossed"][way // 2] for rank in ranks)
        assert [sum(rank[name][load]["moved"][way + turn] for rank in ranks) for turn in (0, 1)] == [2 * counted] * 2


def test_the_shared_expert_is_computed_while_rows_are_on_the_network(ranks) -> None:
    """All ranks start and wait in the same order, which is turned round on the way back."""
    for found in (rank["events"] for rank in ranks):
        assert found["forward"] == found["no gradients"] == FORWARD
        assert found["backward"] == BACKWARD
        assert found["recomputed"] == FORWARD + FORWARD + BACKWARD


def test_what_does_not_fit_in_two_legs_is_refused_by_all_before_a_row_is_sent(ranks) -> None:
    (texts,) = {tuple(rank["refused"]) for rank in ranks}
    needs = []
    for text in texts:
        assert text.startswith("experts are too unevenly used: rank 2 of 4") and "no row was sent" in text
        assert f"up to {WORLD * TOKENS} rows" in text
        needs.append(float(re.search(r"up to (\S+) GB", text)[1]) * 1e9)
    # The tokens of half of the ranks pass through its memory first; three digits are told.
    passing = TOKENS * WORLD / SIZE * dispatch.ROW_BUFFERS * MODEL.hidden_size * 8
    assert needs[0] - needs[1] == pytest.approx(passing, abs=0.005 * needs[0])


def test_rows_that_cross_the_network_are_logged_for_each_token(ranks) -> None:
    most = max(crossed for crossed, _ in (rank["shown"] for rank in ranks))
    for _, (first, second) in (rank["shown"] for rank in ranks):
        assert first[metrics.EXPERT_NETWORK_ROWS] == most / TOKENS > 1
        assert metrics.EXPERT_NETWORK_ROWS not in second


def test_one_process_of_many_in_several_domains_goes_without_the_others() -> None:
    """As `bench.as_first_of` has it: what arrives is made up of what it sends, in both legs."""
    with as_first_of(8, torch.device("cpu")):
        parallel = ParallelConfig(expert=8, nvlink_domain=SIZE)
        groups = process_groups.lay_out(resolve(parallel, MODEL, 8))
        moe = MixtureOfExperts(hybrid_config(MODEL, MtpConfig()), SwiGLUSubmodules(column_linear, row_linear), groups)
        randomise(moe)
        hidden = torch.randn(TOKENS, 1, MODEL.hidden_size, requires_grad=True)
        out, _ = moe(hidden)
        out.sum().backward()
        process_groups.stop()
    assert (groups.expert_domains.inside.size(), groups.expert_domains.across.size()) == (2, 4)
    assert out.isfinite().all() and hidden.grad.isfinite().all() and moe.experts.weight1.grad.any()


@pytest.mark.parametrize("rank", [0, 6, 13])
def test_holders_of_a_layers_experts_lie_next_to_one_another(rank: int) -> None:
    """As `parallel.domains` takes for granted of megatron-core's order of ranks."""
    parallel = ParallelConfig(tensor=2, pipeline=2, expert=2, expert_tensor=2, nvlink_domain=2)
    process_groups.start_fake(rank, 16)
    groups = process_groups.lay_out(resolve(parallel, PIPELINED, 16))
    holders, domains = dist.get_process_group_ranks(groups.tp_ep), groups.expert_domains
    inside, across = (dist.get_process_group_ranks(group) for group in (domains.inside, domains.across))
    place = (groups.ep.rank(), groups.expt_tp.rank())
    process_groups.stop()
    first = rank // 4 * 4
    assert holders == list(range(first, first + 4)) and place == (rank % 4 // 2, rank % 2)
    assert inside == [rank // 2 * 2, rank // 2 * 2 + 1] and across == [first + rank % 2, first + rank % 2 + 2]
    assert domains.number_P == (first // 2,) * 2 + (first // 2 + 1,) * 2


def test_a_domain_of_one_process_or_of_all_takes_one_leg(ranks) -> None:
    for rank in ranks:
        assert rank["one leg"] == {1: (None, None, (0, 1, 2, 3)), WORLD: (None, None, (0, 0, 0, 0))}
