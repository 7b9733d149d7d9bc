"""The routers of a run: counted ahead of a step where that is needed, and what a logged step says of them."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from model.batch import MicroBatch
from model.init import rows_as_drawn
from model.layers.balance import NOTES, Balance, counting_ahead, load_fractions
from model.layers.forecast import histogram
from parallel.collectives import max_over_all, sum_over, sum_over_all
from parallel.stages import run_schedule
from train.job.build import Job
from train.watch import metrics

PERCENTILES = {0: metrics.LOAD_MIN, 10: metrics.LOAD_P10, 50: metrics.LOAD_P50, 90: metrics.LOAD_P90}


def balances(job: Job) -> dict[int, Balance]:
    """The balances of this process, by their place among the mixtures of the whole model."""
    return {place: balance for chunk in job.chunks for place, balance in chunk.balances().items()}


def begin_step(job: Job, batches: list[MicroBatch], recording: bool) -> None:
    """Before a step: counts its experts ahead if they must be known before they can be counted on the way.

    One micro-batch is counted in its own forward pass. With several, balance.mode=exact counts all ahead, and so does
    the first step of a run, which has no last step to learn from; else their loads are forecast from their tokens.
    """
    own, settings = balances(job), job.config.balance
    several = len(batches) > 1 and settings.scope == "global" and settings.weight > 0
    histogram_MB = histograms(job, batches) if several and settings.mode == "online" else None
    for balance in own.values():
        balance.begin_step(recording, histogram_MB)
    if several and (settings.mode == "exact" or not _has_counts(job, own)):
        count_ahead(job, batches)


def histograms(job: Job, batches: list[MicroBatch]) -> Tensor:
    """int64 [M, B]: what each micro-batch of the step holds over all ranks, by bucket of tokens."""
    own = [histogram(batch.tokens_KRL[0], batch.token_weights_KT[0] > 0) for batch in batches]
    return sum_over(torch.stack(own), job.groups.dp_cp)


def _has_counts(job: Job, own: dict[int, Balance]) -> bool:
    """Whether the counts of a last step are known, in this process's memory or from a checkpoint."""
    if not job.routing.has_counts:
        counted = sum((balance.counts.sum() for balance in own.values()), torch.zeros((), device=job.device))
        job.routing.has_counts = bool(max_over_all(counted))
    return job.routing.has_counts


@torch.no_grad()
def count_ahead(job: Job, batches: list[MicroBatch]) -> None:
    """Runs the forward passes of a step, without head and losses, and counts every router's experts."""
    only_routing = [replace(batch, predict=False) for batch in batches]
    with counting_ahead(balances(job).values(), job.groups.tp_dp_cp):
        run_schedule(job.chunks, only_routing, job.microbatch_tokens, forward_only=True)


@torch.no_grad()
def loads_as_drawn(job: Job, batches: list[MicroBatch]) -> list["LayerLoad"]:
    """Loads of a new run's first batch, had its routers' rows not been made equally long: one more forward pass.

    Only the routers differ, and what follows from them in later layers. Nothing is left of it but the numbers.
    """
    own = balances(job).values()
    for balance in own:
        balance.begin_step(recording=False)
    with ExitStack() as stack:
        for chunk in job.chunks:
            stack.enter_context(rows_as_drawn(chunk, chunk.sharded_state_dict(), job.config.seed))
        count_ahead(job, batches)
    return layer_loads(job)


def end_step(job: Job) -> None:
    """After the optimizer's step."""
    for balance in balances(job).values():
        balance.end_step()


@dataclass(frozen=True)
class LayerLoad:
    """What a step did with one router, over the whole global batch.

    Attributes:
        counts: [uses, E] assignments. mean_scores: [uses, E], P of each use over the number of uses.
        notes: the rest, by the names in `NOTES`.
    """

    counts: Tensor
    mean_scores: Tensor
    notes: dict[str, float]

    def load(self) -> Tensor:
        """[E], each expert's over the uses; 1.0: an even share."""
        return self.counts.sum(dim=0) / self.counts.sum().clamp(min=1) * self.counts.shape[1]

    def spread(self) -> dict[str, float]:
        """How uneven the loads are, by name."""
        load = self.load()
        return {
            metrics.MAX_VIOLATION: load.max().item() - 1.0,
            metrics.LOAD_VARIATION: load.std(correction=0).item(),
        }

    def statistics(self) -> dict[str, float]:
        """The numbers of a logged step, by their names."""
        experts, load = self.counts.shape[1], self.load()
        at = torch.quantile(load, torch.tensor([share / 100 for share in PERCENTILES], dtype=load.dtype))
        return {
            metrics.BALANCE_LOSS: experts * (load_fractions(self.counts) * self.mean_scores).sum().item(),
            metrics.BALANCE_LOSS_MICRO: self.notes["local_loss"],
            metrics.Z_LOSS: self.notes["z_loss"],
            **self.spread(),
            metrics.MAX_VIOLATION_MICRO: self.notes["local_violation"],
            **dict(zip(PERCENTILES.values(), at.tolist(), strict=True)),
            metrics.DEAD_EXPERTS: float((load == 0).sum()),
            metrics.ROUTER_ENTROPY: self.notes["entropy"],
            metrics.TOP_K_MASS: self.notes["top_k_mass"],
        }


def layer_loads(job: Job) -> list[LayerLoad]:
    """The loads of every mixture of the model, the MTP layer's last, the same on every process (one reduction)."""
    own, model = balances(job), job.config.model
    uses = [1] * model.layers.count("E") + [job.config.mtp.steps] * (job.config.mtp.steps > 0)
    sizes = [(each, model.experts) for each in uses]
    counted_here = job.groups.tp_dp_cp.rank() == 0  # counts are sums over this group already
    parts = []
    for place, (each, experts) in enumerate(sizes):
        part = torch.zeros(2 * each * experts + len(NOTES), dtype=torch.float64, device=job.device)
        if place in own:
            balance = own[place]
            parts_of = (balance.seen() * counted_here, balance.mean_scores, balance.notes)
            part = torch.cat([x.flatten().double() for x in parts_of])
        parts.append(part)
    if not parts:
        return []
    whole = sum_over_all(torch.cat(parts)).cpu().split([part.numel() for part in parts])
    found = []
    for part, size in zip(whole, sizes, strict=True):
        counts, mean_scores, notes = part.split([size[0] * size[1]] * 2 + [len(NOTES)])
        notes = dict(zip(NOTES, notes.tolist(), strict=True))
        found.append(LayerLoad(counts.view(size), mean_scores.view(size), notes))
    return found


def layer_names(job: Job) -> list[str]:
    """A name for each mixture of the model: numbers from 1 in the trunk, then mtp."""
    trunk = range(1, 1 + job.config.model.layers.count("E"))
    return [*map(str, trunk), *["mtp"] * (job.config.mtp.steps > 0)]


def spread_as_drawn(job: Job, batches: list[MicroBatch]) -> dict[str, float]:
    """`loads_as_drawn` as metrics: means over the layers, and by layer; none where routers are not new or not used."""
    if job.config.run.init or job.config.balance.forced:
        return {}
    rows = [load.spread() for load in loads_as_drawn(job, batches)]
    values = {metrics.as_drawn(name): fmean(row[name] for row in rows) for name in (rows[0] if rows else ())}
    for layer, row in zip(layer_names(job), rows, strict=True):
        values |= {metrics.of_layer(metrics.as_drawn(name), layer): value for name, value in row.items()}
    return values


def spread_line(values: Mapping[str, Any]) -> str:
    """The first step's metrics of the routers' start, in a line for a person."""

    def loads(name_of: Callable[[str], str]) -> str:
        fullest, variation = values[name_of(metrics.MAX_VIOLATION)] + 1, values[name_of(metrics.LOAD_VARIATION)]
        return f"fullest {fullest:.2f} x an even share, coefficient of variation {variation:.2f}"

    return (
        f"expert load of the first batch, mean over layers: {loads(str)}; with router rows as drawn, not of equal "
        f"norm: {loads(metrics.as_drawn)}"
    )


def routing_metrics(job: Job, loads: list[LayerLoad]) -> dict[str, float]:
    """What a logged step says of the routers, from `layer_loads`: each number's mean over the layers."""
    rows = [load.statistics() for load in loads]
    values = {}
    for name in rows[0] if rows else (metrics.BALANCE_LOSS, metrics.BALANCE_LOSS_MICRO, metrics.Z_LOSS):
        values[name] = fmean(row[name] for row in rows) if rows else 0.0
    if job.config.balance.forced:
        values[metrics.FORCED_ROUTING] = 1.0
    if job.config.balance.capacity is not None and loads:
        values[metrics.DROPPED_SHARE] = fmean(load.notes["dropped"] for load in loads)
    return values


def detailed_metrics(job: Job, loads: list[LayerLoad]) -> dict[str, metrics.Value]:
    """What a sampled step also says: the same by layer, and the load of every expert."""
    values: dict[str, metrics.Value] = {}
    for layer, load in zip(layer_names(job), loads, strict=True):
        row = load.statistics()
        values |= {metrics.of_layer(name, layer): value for name, value in row.items() if name != metrics.Z_LOSS}
        values[metrics.of_layer(metrics.EXPERT_LOAD, layer)] = [round(x, 4) for x in load.load().tolist()]
    return values


def router_loss(job: Job, values: dict[str, float]) -> float:
    """The routers' part of the loss that is minimised, from `routing_metrics`."""
    settings, layers = job.config.balance, job.config.model.layers.count("E") + (job.config.mtp.steps > 0)
    whole, local = values[metrics.BALANCE_LOSS], values[metrics.BALANCE_LOSS_MICRO]
    balance = whole + settings.micro_weight * local if settings.scope == "global" else local
    return layers * (settings.weight * balance + settings.z_weight * values[metrics.Z_LOSS])
