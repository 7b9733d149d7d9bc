"""What a sampled step (run.detail_every) says of every layer and group of parameters: all of it in two reductions.

Activations are noted by the layers themselves (`model.layers.gauges`). Gradients, updates and weights are read from
the optimizer's own parts after its step, each number by the one process that has it, so nothing is gathered for it.

Shape suffixes: L layers of the trunk, P places of parameters (the trunk's layers, the MTP layer, outside), G groups.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor

from model.layers.gauges import MAXIMA, SUMS
from parallel.collectives import max_over_all, sum_over_all
from parallel.engine import Engine
from parallel.optimizer_state import OptimizerShard
from parallel.stages import sharded_weights
from train.job.build import Job
from train.job.optim import adamw, decays
from train.watch import metrics
from train.watch.catalog import NORMS

# Group of parameters -> what their names hold; the first that fits.
GROUPS = {
    "norm": ("norm.weight", "enorm.weight"),
    "embedding": ("embedding.",),
    "head": ("output_layer.",),
    "decay": ("A_log", "dt_bias"),
    "router": ("router.",),
    "experts": (".experts.",),
    "shared_expert": (".shared_expert.",),
    "mtp_projection": ("eh_proj.",),
    "attention": ("linear_qkv.", "linear_proj."),
    "deltanet": ("in_proj.", "out_proj.", "conv_weight"),
    "dense": ("linear_fc",),
}
SYMBOLS = {"layer": "G*E-", "attention": "*", "deltanet": "G"}  # layers that have a kind of gauge
OF_LAYERS = [(kind, name) for kind, names in SUMS.items() for name in names]
TOPS_OF_LAYERS = [(kind, name) for kind, names in MAXIMA.items() for name in names]
# Largest A_log and dt_bias of a layer, and the least ones negated, so that all are maxima.
TOPS_OF_DECAY = ("A_log", "minus A_log", "dt_bias", "minus dt_bias")
GRADIENT, UPDATE, WEIGHT = range(3)  # sums of squares


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Attributes:
        group, place: numbers of its group and of its place. kind: the norm's or the decay's name, else empty.
        counts: whether this process's copy stands for it in sums.
    """

    name: str
    group: int
    place: int
    kind: str
    counts: bool


class Gauges:
    """The gauges of a run's sampled steps.

    Args:
        engine: the run's; its optimizer has taken a step before `values` is called.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self._own = {where: gauge for chunk in job.chunks for where, gauge in chunk.gauges().items()}
        self._layers = job.config.model.layers
        entries = nested_values(sharded_weights(job.chunks, {"dp_cp_group": job.groups.dp_cp}))
        found = [entry for entry in entries if isinstance(entry, ShardedTensor)]
        self._places = {id(entry.data): self._place(entry) for entry in found if entry.data.requires_grad}

    def begin_step(self, sampled: bool) -> None:
        """Before a step: whether its layers note what they compute, and its gradients are kept."""
        self._engine.keep_gradients(sampled)
        for gauge in self._own.values():
            gauge.begin(sampled)

    def values(self, lr: float, grad_norm: float) -> dict[str, metrics.Value]:
        """What a sampled step says, the same on every process; called after its optimizer's step (two reductions).

        Args:
            lr: the step's learning rate. grad_norm: of the whole gradient before clipping.
        """
        layer_sums, layer_tops = self._activations()
        parts, decay_tops, norm_tops = self._parameters(lr)
        sums = sum_over_all(torch.cat([layer_sums.flatten(), parts.flatten()])).cpu()
        tops = max_over_all(torch.cat([x.flatten() for x in (layer_tops, decay_tops, norm_tops)])).cpu()
        layer_sums, parts = _split(sums, layer_sums, parts)
        layer_tops, decay_tops, norm_tops = _split(tops, layer_tops, decay_tops, norm_tops)
        clip = self._job.config.optim.clip
        clipped = max(1.0, (grad_norm + 1e-6) / clip) if clip > 0 else 1.0  # as megatron-core clips
        return {
            **self._of_activations(layer_sums, layer_tops),
            **self._of_decay(decay_tops),
            **_of_norms(norm_tops),
            **_of_groups(parts, clipped),
        }

    def _place(self, entry: ShardedTensor) -> Place:
        key = entry.key
        group = next(number for number, names in enumerate(GROUPS.values()) if any(name in key for name in names))
        place = len(self._layers) + (not key.startswith("mtp."))
        if key.startswith("decoder.layers."):
            place = int(key.split(".")[2])
        kind = key.removesuffix(".weight").rpartition(".")[2]
        return Place(key, group, place, kind, tuple(entry.replica_id[:2]) == (0, 0))

    def _activations(self) -> tuple[Tensor, Tensor]:
        """What this process's layers have noted: sums [OF_LAYERS, L] and maxima [TOPS_OF_LAYERS, L]."""
        size, device = len(self._layers), self._job.device
        sums = torch.zeros(len(OF_LAYERS), size, dtype=torch.float64, device=device)
        tops = torch.full((len(TOPS_OF_LAYERS), size), -math.inf, dtype=torch.float64, device=device)
        for (place, kind), gauge in self._own.items():
            for name, value in gauge.sums.items():
                sums[OF_LAYERS.index((kind, name)), place] = value
            for name, value in gauge.maxima.items():
                tops[TOPS_OF_LAYERS.index((kind, name)), place] = value
        return sums, tops

    def _parameters(self, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of this process's parts of the parameters: sums of squares [3, G, P], maxima of decays [4, L] and norms."""
        device, size = self._job.device, len(self._layers)
        parts = torch.zeros(3, len(GROUPS), size + 2, dtype=torch.float64, device=device)
        decay = torch.full((len(TOPS_OF_DECAY), size), -math.inf, dtype=torch.float64, device=device)
        norms = torch.full((2, len(NORMS)), -math.inf, dtype=torch.float64, device=device)
        settings, steps = adamw(self._job.config.optim), self._engine.steps
        for shard in self._engine.shards():
            where = self._places[id(shard.parameter)]
            if where.counts and shard.main.numel():
                squares = shard.squares(settings, lr, steps, decays(where.name), float(where.kind in NORMS))
                parts[:, where.group, where.place] += squares.to(device)
            if where.kind in ("A_log", "dt_bias"):
                row = TOPS_OF_DECAY.index(where.kind)
                _raise(decay[row : row + 2, where.place], shard)
            elif where.kind in NORMS:
                _raise(norms[:, NORMS.index(where.kind)], shard)
        return parts, decay, norms

    def _by_layer(self, name: str, kind: str, row: Tensor, over: str = "mean") -> dict[str, metrics.Value]:
        """A metric over the layers that have it, and of each."""
        own = [value for value, symbol in zip(row.tolist(), self._layers, strict=True) if symbol in SYMBOLS[kind]]
        if not own:
            return {}
        whole = {"mean": sum(own) / len(own), "sum": sum(own), "max": max(own), "min": min(own)}[over]
        return {name: whole, **{metrics.of_layer(name, str(each)): value for each, value in enumerate(own, start=1)}}

    def _of_activations(self, sums: Tensor, tops: Tensor) -> dict[str, metrics.Value]:
        of = dict(zip(OF_LAYERS, sums, strict=True))
        top = dict(zip(TOPS_OF_LAYERS, tops, strict=True))
        values = self._by_layer(metrics.ACTIVATION_MAX, "layer", top["layer", "activation"])
        values[metrics.ACTIVATION_PEAK] = float(top["layer", "activation"].max())
        values |= self._by_layer(metrics.MASSIVE_ACTIVATIONS, "layer", of["layer", "massive"], "sum")
        queries = of["attention", "queries"]
        if queries.any():  # no document may be that long
            sink = of["attention", "sink"] / queries.clamp(min=1)
            values |= self._by_layer(metrics.ATTENTION_SINK, "attention", sink)
        if self._job.config.model.attention_gate:
            gates = of["attention", "gates"].clamp(min=1)
            values |= self._by_layer(metrics.GATE_MEAN, "attention", of["attention", "gate"] / gates)
            values |= self._by_layer(metrics.GATE_LOW, "attention", of["attention", "low_gates"] / gates)
        writes = of["deltanet", "writes"].clamp(min=1)
        for what, (least, mean, largest) in (
            ("decay", (metrics.DECAY_MIN, metrics.DECAY_MEAN, metrics.DECAY_MAX)),
            ("beta", (metrics.BETA_MIN, metrics.BETA_MEAN, metrics.BETA_MAX)),
        ):
            values |= self._by_layer(least, "deltanet", -top["deltanet", f"minus_{what}"], "min")
            values |= self._by_layer(mean, "deltanet", of["deltanet", what] / writes)
            values |= self._by_layer(largest, "deltanet", top["deltanet", what], "max")
        return values

    def _of_decay(self, tops: Tensor) -> dict[str, metrics.Value]:
        largest, least = tops[0::2], -tops[1::2]
        values: dict[str, metrics.Value] = {}
        for row, names in enumerate(
            ((metrics.A_LOG_MIN, metrics.A_LOG_MAX), (metrics.DT_BIAS_MIN, metrics.DT_BIAS_MAX))
        ):
            values |= self._by_layer(names[0], "deltanet", least[row], "min")
            values |= self._by_layer(names[1], "deltanet", largest[row], "max")
        return values


def _raise(tops_2: Tensor, shard: OptimizerShard) -> None:
    """Raises a pair of maxima, of numbers and of the same negated, by a part of a parameter."""
    if shard.main.numel():
        found = torch.stack([shard.main.max(), -shard.main.min()]).to(tops_2)
        tops_2.copy_(torch.maximum(tops_2, found))


def _of_norms(tops: Tensor) -> dict[str, metrics.Value]:
    """1 + weight, at least and at most, of the norms that the model has."""
    values: dict[str, metrics.Value] = {}
    for kind, largest, least in zip(NORMS, *tops.tolist(), strict=True):
        if math.isfinite(largest):
            values[f"{metrics.NORM_GAIN_MIN}/{kind}"] = 1 - least
            values[f"{metrics.NORM_GAIN_MAX}/{kind}"] = 1 + largest
    return values


def _of_groups(parts: Tensor, clipped: float) -> dict[str, metrics.Value]:
    """Gradient norms and update-to-weight ratios of groups, over all places and in each layer."""
    values: dict[str, metrics.Value] = {}
    for group, part in zip(GROUPS, parts.transpose(0, 1), strict=True):
        for where, squares in _named(part):
            gradient, update, weight = squares.sqrt().tolist()
            if gradient:
                values["/".join((metrics.GROUP_GRAD_NORM, group, *where))] = gradient * clipped
            if weight:
                values["/".join((metrics.UPDATE_TO_WEIGHT, group, *where))] = update / weight
    return values


def _named(part: Tensor) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """A group's sums [3, P] over all places, then of each layer that has such parameters, by its name."""
    yield (), part.sum(dim=1)
    used = part[:, :-1].any(dim=0).tolist()
    *trunk, mtp = used
    numbers = [place for place, has in enumerate(trunk) if has]
    for number, place in enumerate(numbers, start=1):
        yield (str(number),), part[:, place]
    if mtp:
        yield ("mtp",), part[:, -2]


def _split(flat: Tensor, *like: Tensor) -> list[Tensor]:
    """A flat tensor in parts of given shapes."""
    parts = flat.split([x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]
