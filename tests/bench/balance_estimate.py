"""How near the gradient of an estimated balance loss comes to that of the exact one, on a toy that is hard on purpose.

    python -m tests.bench.balance_estimate          prints the table of RESULTS.md

64 experts, top-4; a step has 8 micro-batches on each of 4 data-parallel ranks, and each of these 32 holds tokens of one
of 14 domains, drawn anew every step. Domains prefer tokens of their own out of one vocabulary, and a state is the
embedding of its token with noise. One router layer, driven through the code of a training run: forward and backward
passes in the order of a pipeline stage that holds 1, 2 or 4 micro-batches. The four ranks are parts of one batch here,
which the sum over ranks makes of them anyway. Between steps the router moves by 0.3 % of its norm along its balance
gradient and at random, so that what past steps taught is a little out of date.

The domains were chosen so that what does not depend on our estimate reads as in an earlier toy of the same sizes, whose
states were not made of tokens (`GIVEN`).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import BalanceConfig, ModelConfig, MtpConfig
from model.layers.balance import RoutedTokens, counting_ahead
from model.layers.forecast import histogram
from model.layers.router import Router, normalise_rows
from model.stack import hybrid_config
from parallel import groups as process_groups
from parallel.topology import Topology

EXPERTS, TOP_K, HIDDEN, ROW_NORM = 64, 4, 48, 0.7
RANKS, MICRO_BATCHES, TOKENS = 4, 8, 128  # TOKENS: of a rank's micro-batch
# Standard deviations: of a domain's preferences (logits of tokens), and of a state's noise where an embedding's is 1.
VOCAB, DOMAINS, APART, NOISE = 512, 14, 3.0, 0.3
SEEDS, STEPS, MOVE = 8, 6, 0.003
IN_FLIGHT = (1, 2, 4)
MICRO, SYNCHRONISED = "micro-batch of one rank", "micro-batch, summed over ranks"
BLIND = "online, 1 in flight, blind to tokens"


@dataclass(frozen=True)
class Nearness:
    """Cosine of a gradient with the exact one, and its length over the exact one's."""

    cosine: float
    ratio: float


def online(in_flight: int) -> str:
    """Name of the online estimate at a pipeline depth."""
    return f"online, {in_flight} in flight"


def so_far(in_flight: int) -> str:
    """Name of the running mean of what has been counted at a pipeline depth."""
    return f"counts so far, {in_flight} in flight"


ESTIMATES = (BLIND, *map(online, IN_FLIGHT))
# Cosine and length over the exact gradient's in the earlier toy; two lengths were not noted there.
GIVEN = {
    MICRO: (0.72, 5.1),
    SYNCHRONISED: (0.87, 1.75),
    so_far(1): (0.933, 1.20),
    so_far(2): (0.965, None),
    so_far(4): (0.988, None),
}


class Text:
    """Domains of a vocabulary, and what a router is shown of their tokens."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.embedding_VH = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
        preferences = APART * torch.randn(DOMAINS, VOCAB, generator=generator)
        self.share_DV = (preferences - torch.arange(1.0, VOCAB + 1).log()).softmax(dim=1)  # over Zipf's law

    def draw_step(self) -> tuple[list[Tensor], Tensor]:
        """The states [ranks * tokens, H] of each micro-batch of a step, and the histograms of their tokens."""
        chosen = torch.randint(DOMAINS, (MICRO_BATCHES * RANKS,), generator=self.generator)
        ids = torch.multinomial(self.share_DV[chosen], TOKENS, replacement=True, generator=self.generator)
        ids = ids.view(MICRO_BATCHES, RANKS * TOKENS)
        noise = torch.randn(*ids.shape, HIDDEN, generator=self.generator, dtype=torch.float64)
        every = torch.ones(RANKS * TOKENS, dtype=torch.bool)
        return list(self.embedding_VH[ids] + NOISE * noise), torch.stack([histogram(row, every) for row in ids])


def one_bucket(histogram_MB: Tensor) -> Tensor:
    """As if all tokens were alike: what is left of a forecast is a moving average of the steps before."""
    alike_MB = torch.zeros_like(histogram_MB)
    alike_MB[:, 0] = histogram_MB.sum(dim=1)
    return alike_MB


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


def running_gradient(weight: Tensor, micro_batches: list[Tensor], in_flight: int) -> Tensor:
    """Of counts so far, read in the backward pass.

    With one in flight: Algorithm 1 of "Demons in the Detail", which megatron-core follows.
    """
    weight = weight.detach().clone().requires_grad_()
    all_scores = [(hidden @ weight.T).softmax(dim=-1) for hidden in micro_batches]
    counts = [torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=EXPERTS) for scores in all_scores]
    loss = 0.0
    for m, scores in enumerate(all_scores):
        seen = sum(counts[: m + in_flight]).double()
        loss = loss + EXPERTS * (seen / seen.sum()) @ scores.mean(dim=0) / MICRO_BATCHES
    return torch.autograd.grad(loss, weight)[0]


def first_step(router: Router, micro_batches: list[Tensor], groups) -> Tensor:
    """The online gradient of a run's first step, which is counted ahead: nothing is known of a last one."""
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
    depth_of = {"exact": MICRO_BATCHES, MICRO: 1, SYNCHRONISED: 1, BLIND: 1, **{online(p): p for p in IN_FLIGHT}}
    routers = {
        "exact": make_router(plain, groups),
        MICRO: make_router(BalanceConfig(weight=1.0, scope="sequence"), groups),  # a row of the batch is a rank here
        SYNCHRONISED: make_router(BalanceConfig(weight=1.0, scope="micro"), groups),
        **{name: make_router(plain, groups) for name in ESTIMATES},
    }
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
    weight, text = normalise_rows(weight, std=ROW_NORM * HIDDEN**-0.5), Text(generator)
    for step in range(STEPS):
        (micro_batches, histogram_MB), found = text.draw_step(), {}
        told = dict.fromkeys(map(online, IN_FLIGHT), histogram_MB) | {BLIND: one_bucket(histogram_MB)}
        for name, router in routers.items():
            with torch.no_grad():
                router.weight.copy_(weight)
            router.balance.begin_step(recording=False, histogram_MB=told.get(name))
            if step == 0 and name in told:
                found[name] = first_step(router, micro_batches, groups)
            else:
                found[name] = balance_gradient(router, micro_batches, depth_of[name])
            router.balance.end_step()
        found |= {so_far(depth): running_gradient(weight, micro_batches, depth) for depth in IN_FLIGHT}
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
        "| counts that the gradient reads | earlier toy | first step | later steps |",
        "|---|---|---|---|",
    ]
    for name in (MICRO, SYNCHRONISED, *map(so_far, IN_FLIGHT), *ESTIMATES):
        given = ", ".join(f"{number:g}" for number in GIVEN.get(name, ()) if number)
        first, later = results[name, True], results[name, False]
        means = f"{first.cosine:.3f}, {first.ratio:.2f} | {later.cosine:.3f}, {later.ratio:.2f}"
        lines.append(f"| {name} | {given} | {means} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(table(measure(process_groups.lay_out(Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1)))))
    process_groups.stop()


if __name__ == "__main__":
    main()
