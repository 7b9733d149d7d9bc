"""How near the gradient of an estimated balance loss comes to that of the exact one, on a toy that is hard on purpose.

    python -m tests.bench.balance_estimate          prints the table of RESULTS.md

64 experts, top-4; a step has 8 micro-batches on each of 4 data-parallel ranks, and each of these 32 holds tokens of one
of 8 domains, drawn anew every step. One router layer, driven through the code of a training run: forward and backward
passes in the order of a pipeline stage that holds 1, 2 or 4 micro-batches. The four ranks are parts of one batch here,
which the sum over ranks makes of them anyway. Between steps the router moves by 0.3 % of its norm along its balance
gradient and at random, so that the last step's counts are a little out of date.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from model.balance import RoutedTokens, counting_ahead
from model.config import BalanceConfig, ModelConfig, MtpConfig
from model.router import Router, normalise_rows
from model.stack import hybrid_config
from parallel import groups as process_groups
from parallel.topology import Topology

EXPERTS, TOP_K, HIDDEN = 64, 4, 32
RANKS, MICRO_BATCHES, TOKENS = 4, 8, 128  # TOKENS: of a rank's micro-batch
# Domains lie so far apart, and all of them from zero, where the noise of a token is 1.
DOMAINS, APART, SHARED = 8, 1.0, 0.35
SEEDS, STEPS, MOVE = 8, 6, 0.003
IN_FLIGHT = (1, 2, 4)
MICRO, SYNCHRONISED, RUNNING = "micro", "summed over ranks", "running mean"


@dataclass(frozen=True)
class Nearness:
    """Cosine of a gradient with the exact one, and its length over the exact one's."""

    cosine: float
    ratio: float


def online(in_flight: int) -> str:
    """Name of the online estimate at a pipeline depth."""
    return f"online, {in_flight} in flight"


def draw_step(generator: torch.Generator, domains: Tensor) -> list[Tensor]:
    """The states [ranks * tokens, H] of each micro-batch of a step."""
    chosen = torch.randint(DOMAINS, (MICRO_BATCHES, RANKS), generator=generator)
    noise = torch.randn(MICRO_BATCHES, RANKS, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    return list((domains[chosen][:, :, None] + noise).flatten(1, 2))


def make_router(balance: BalanceConfig, groups) -> Router:
    """A router in float64, of no weights yet."""
    shape = ModelConfig(hidden_size=HIDDEN, experts=EXPERTS, experts_per_token=TOP_K)
    return Router(hybrid_config(shape, MtpConfig(steps=0), balance=balance), groups).double()


def balance_gradient(router: Router, micro_batches: list[Tensor], in_flight: int) -> Tensor:
    """The gradient of the router's weight after a step in the order of a stage that holds so many micro-batches."""
    router.weight.grad, waiting = None, []
    total = MICRO_BATCHES * RANKS * TOKENS
    weight = torch.full((RANKS * TOKENS,), 1 / total, dtype=torch.float64)
    tokens = RoutedTokens(weight, total, first=0, length=TOKENS, rows=RANKS)
    for hidden in micro_batches:
        waiting.append(router(hidden, tokens)[0].sum() * 0)
        if len(waiting) == in_flight:
            waiting.pop(0).backward()
    for loss in waiting:
        loss.backward()
    return router.weight.grad


def running_gradient(weight: Tensor, micro_batches: list[Tensor]) -> Tensor:
    """Algorithm 1 of "Demons in the Detail": counts so far, read in the forward pass (as megatron-core does)."""
    weight = weight.detach().clone().requires_grad_()
    counts, loss = torch.zeros(EXPERTS, dtype=torch.float64), 0.0
    for hidden in micro_batches:
        scores = (hidden @ weight.T).softmax(dim=-1)
        counts += torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        loss = loss + EXPERTS * (counts / counts.sum()) @ scores.mean(dim=0) / MICRO_BATCHES
    return torch.autograd.grad(loss, weight)[0]


def first_step(router: Router, micro_batches: list[Tensor], groups) -> Tensor:
    """The online gradient of a run's first step, which is counted ahead: nothing is known of a last one."""
    router.balance.begin_step(recording=False)
    total = MICRO_BATCHES * RANKS * TOKENS
    tokens = RoutedTokens(torch.ones(RANKS * TOKENS, dtype=torch.float64), total, first=0, length=TOKENS, rows=RANKS)
    with torch.no_grad(), counting_ahead([router.balance], groups.tp_dp_cp):
        for hidden in micro_batches:
            router(hidden, tokens)
    return balance_gradient(router, micro_batches, in_flight=1)


def one_seed(seed: int, groups, note: Callable[[str, bool, Tensor, Tensor], None]) -> None:
    """Follows the routers of each method through the steps; calls note(method, is it the first step, found, exact)."""
    generator = torch.Generator().manual_seed(seed)
    plain = BalanceConfig(weight=1.0, micro_weight=0.0)
    routers = {
        "exact": make_router(plain, groups),
        MICRO: make_router(BalanceConfig(weight=1.0, scope="sequence"), groups),  # a row of the batch is a rank here
        SYNCHRONISED: make_router(BalanceConfig(weight=1.0, scope="micro"), groups),
        **{online(depth): make_router(plain, groups) for depth in IN_FLIGHT},
    }
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = normalise_rows(weight, std=HIDDEN**-0.5)
    domains = APART * torch.randn(DOMAINS, HIDDEN, generator=generator, dtype=torch.float64)
    domains = domains + SHARED * torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
    depth_of = {"exact": MICRO_BATCHES, MICRO: 1, SYNCHRONISED: 1, **{online(depth): depth for depth in IN_FLIGHT}}
    for step in range(STEPS):
        micro_batches, found = draw_step(generator, domains), {}
        for name, router in routers.items():
            with torch.no_grad():
                router.weight.copy_(weight)
            if step == 0 and name in map(online, IN_FLIGHT):
                found[name] = first_step(router, micro_batches, groups)
            else:
                router.balance.begin_step(recording=False)
                found[name] = balance_gradient(router, micro_batches, depth_of[name])
            router.balance.end_step()
        found[RUNNING] = running_gradient(weight, micro_batches)
        exact = found.pop("exact")
        for name, gradient in found.items():
            note(name, step == 0, gradient, exact)
        drift = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        move = drift / drift.norm() - exact / exact.norm()
        weight = weight + MOVE * weight.norm() * move / move.norm()


def measure(groups) -> dict[tuple[str, bool], Nearness]:
    """(method, is it a run's first step) -> means over seeds, and over the later steps."""
    found = defaultdict(list)

    def note(name: str, is_first: bool, gradient: Tensor, exact: Tensor) -> None:
        cosine = torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0).item()
        found[name, is_first].append((cosine, (gradient.norm() / exact.norm()).item()))

    for seed in range(SEEDS):
        one_seed(seed, groups, note)
    return {key: Nearness(*map(fmean, zip(*pairs, strict=True))) for key, pairs in found.items()}


def table(results: dict[tuple[str, bool], Nearness]) -> str:
    """The results in Markdown."""
    lines = [
        "| counts that the gradient reads | first step: cosine, length | later steps: cosine, length |",
        "|---|---|---|",
    ]
    for name in (MICRO, SYNCHRONISED, RUNNING, *map(online, IN_FLIGHT)):
        first, later = results[name, True], results[name, False]
        lines.append(f"| {name} | {first.cosine:.3f}, {first.ratio:.2f} | {later.cosine:.3f}, {later.ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(table(measure(process_groups.lay_out(Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1)))))
    process_groups.stop()


if __name__ == "__main__":
    main()
