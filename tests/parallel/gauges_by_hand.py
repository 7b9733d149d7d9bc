"""Gauges computed by hand in float64, parameter by parameter and token by token, on a model that one process
holds whole.

Shape suffixes: T tokens.
"""

import math
from collections.abc import Iterator
from zlib import crc32

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from model.layers import gauges
from parallel.optimizer_state import OptimizerShard
from train.job.build import Job
from train.job.optim import adamw, decays
from train.watch import metrics

LR, GRAD_NORM = 3e-3, 3.0  # of the step; a norm of three, so that gradients are clipped to a third
CLIPPED = GRAD_NORM + 1e-6  # of which clipping to a norm of one has made one


def whole_places(job: Job) -> dict[int, ShardedTensor]:
    """Where each parameter of this process lies in the whole model, by its identity."""
    states = [entry for chunk in job.chunks for entry in chunk.sharded_state_dict().values()]
    return {id(entry.data): entry for entry in states if isinstance(entry, ShardedTensor)}


@torch.no_grad()
def vary(job: Job) -> None:
    """Makes the weights of any layout less even, the same ones in each: gates off a half, decays and norms of all
    kinds, activations that stand out."""
    places = whole_places(job)
    for parameter in (parameter for chunk in job.chunks for parameter in chunk.parameters()):
        entry = places[id(parameter)]
        noise = torch.randn(
            entry.global_shape, generator=torch.Generator().manual_seed(crc32(entry.key.encode())), dtype=torch.float64
        )
        part = zip(entry.global_offset, parameter.shape, strict=True)
        # Decays would all be none, and choices of experts too sure for the balance to move them.
        scale = 1 if entry.key.endswith(("A_log", "dt_bias", "router.weight")) else 20
        parameter.mul_(scale).add_(0.05 * noise[tuple(slice(first, first + size) for first, size in part)])


class OneStep:
    """An engine as `Gauges` asks of it: AdamW's first step in float64, cut over the processes that hold a parameter.

    Gradients are in each parameter's ``main_grad``, summed over the processes.
    """

    steps = 1

    def __init__(self, job: Job) -> None:
        self._job = job

    def keep_gradients(self, kept: bool) -> None:
        """They stay where they are."""

    def shards(self) -> Iterator[OptimizerShard]:
        groups = self._job.groups
        for name, parameter in (pair for chunk in self._job.chunks for pair in chunk.named_parameters()):
            sharers = groups.expt_dp if ".experts." in name else groups.dp_cp
            start, stop = (parameter.numel() * (sharers.rank() + add) // sharers.size() for add in (0, 1))
            main = parameter.detach().flatten()[start:stop].clone()
            main.grad = parameter.main_grad.flatten()[start:stop] / CLIPPED
            yield OptimizerShard(parameter, main, step(self._job, name, main), start, stop)


def step(job: Job, name: str, main: Tensor) -> dict[str, Tensor]:
    """torch's AdamW takes a step with a tensor; its moments."""
    settings = adamw(job.config.optim)
    decay = settings.weight_decay * decays(name)
    optimizer = torch.optim.AdamW([main], lr=LR, betas=settings.betas, eps=settings.eps, weight_decay=decay)
    optimizer.step()
    return {name: x for name, x in optimizer.state[main].items() if name != "step"}


class Seen:
    """What the layers of a model compute, caught by hooks."""

    def __init__(self, job: Job) -> None:
        self.states: dict[int, Tensor] = {}
        self.inputs: dict[int, tuple] = {}
        self.routed = [
            self._route(moe.router) for moe in job.chunks[0].moe_layers()[: job.config.model.layers.count("E")]
        ]
        for layer in job.chunks[0].decoder.layers:
            layer.register_forward_hook(self._state(layer.layer_number))
            layer.self_attention.register_forward_hook(self._input(layer.layer_number), with_kwargs=True)

    def _route(self, router: nn.Module) -> list:
        """The router, and the tokens that it will have been given."""
        found = [router]
        router.register_forward_hook(lambda module, args, output: found.append(args[0].detach()))
        return found

    def _state(self, number: int):
        return lambda module, args, output: self.states.__setitem__(number, output[0].detach()[:, 0])

    def _input(self, number: int):
        return lambda module, args, kwargs, output: self.inputs.__setitem__(number, (module, args[0].detach(), kwargs))


def explicit_sink(attention: nn.Module, hidden: Tensor, kwargs: dict) -> tuple[float, float, float]:
    """Mean attention on first tokens, mean gate and share of low gates, token by token and head by head."""
    documents = kwargs["packed_seq_params"]
    query, key, _, gate = attention.project(hidden, kwargs["rotary_pos_emb"])
    ids, places, length = documents.ids_RL.flatten(), documents.position_RL.flatten(), documents.ids_RL.shape[1]
    shares = []
    for token in range(len(ids)):
        if ids[token] < 0 or places[token] < gauges.EARLIEST:
            continue
        first = token - int(places[token])
        assert first >= token // length * length
        for head in range(query.shape[1]):
            keys = key[first : token + 1, head * key.shape[1] // query.shape[1]]
            shares.append((keys @ query[token, head] / query.shape[2] ** 0.5).softmax(0)[0].item())
    gates = gate[ids >= 0].sigmoid()
    return sum(shares) / len(shares), gates.mean().item(), (gates < 0.1).double().mean().item()


def explicit_delta(delta: nn.Module, hidden: Tensor, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Decays and write strengths of all tokens that are no padding."""
    mixed = delta.in_proj(hidden)[0].view(len(hidden), delta.key_heads, -1)
    b, a = mixed[..., -2 * delta.ratio :].split(delta.ratio, dim=-1)
    rate = delta.A_log.exp() * nn.functional.softplus(a.flatten(1) + delta.dt_bias)
    valid = kwargs["packed_seq_params"].ids_RL.flatten() >= 0
    return (-rate).exp()[valid], b.flatten(1).sigmoid()[valid]


def massive(hidden_TH: Tensor) -> int:
    """Numbers that are above both limits: `gauges.MASSIVE`, and so many times the median of their token."""
    medians = hidden_TH.abs().median(dim=1, keepdim=True).values
    return int(((hidden_TH.abs() > gauges.MASSIVE) & (hidden_TH.abs() >= gauges.TIMES_MEDIAN * medians)).sum())


def _by_layer(name: str, values: list[float], over=lambda values: sum(values) / len(values)) -> dict[str, float]:
    return {name: over(values), **{metrics.of_layer(name, str(n)): value for n, value in enumerate(values, start=1)}}


@torch.no_grad()
def of_activations(job: Job, seen: Seen, valid_T: Tensor) -> dict[str, float]:
    """Of the trunk's layers, from what was seen of a forward pass over all micro-batches at once."""
    layers = job.config.model.layers
    states = [seen.states[number + 1][valid_T] for number in range(len(layers))]
    tops = [state.abs().max().item() for state in states]
    found = _by_layer(metrics.ACTIVATION_MAX, tops) | {metrics.ACTIVATION_PEAK: max(tops)}
    found |= _by_layer(metrics.MASSIVE_ACTIVATIONS, [massive(state) for state in states], sum)
    attention = [explicit_sink(*seen.inputs[number + 1]) for number, symbol in enumerate(layers) if symbol == "*"]
    for name, values in zip(
        (metrics.ATTENTION_SINK, metrics.GATE_MEAN, metrics.GATE_LOW), zip(*attention, strict=True), strict=True
    ):
        found |= _by_layer(name, values)
    delta = [explicit_delta(*seen.inputs[number + 1]) for number, symbol in enumerate(layers) if symbol == "G"]
    for (least, mean, largest), xs in zip(
        (
            (metrics.DECAY_MIN, metrics.DECAY_MEAN, metrics.DECAY_MAX),
            (metrics.BETA_MIN, metrics.BETA_MEAN, metrics.BETA_MAX),
        ),
        zip(*delta, strict=True),
        strict=True,
    ):
        found |= _by_layer(least, [x.min().item() for x in xs], min)
        found |= _by_layer(mean, [x.mean().item() for x in xs])
        found |= _by_layer(largest, [x.max().item() for x in xs], max)
    return found


@torch.no_grad()
def of_routing(seen: Seen, valid_T: Tensor) -> dict[str, float | list[float]]:
    """Of the trunk's routers, layer by layer."""
    found: dict[str, float | list[float]] = {}
    for number, (router, hidden_TH) in enumerate(seen.routed, start=1):
        scores_TE = (hidden_TH[valid_T] @ router.weight.T).softmax(dim=1)
        experts, tokens = scores_TE.shape[1], len(scores_TE)
        taken = [0] * experts
        for row in scores_TE.tolist():
            for expert in sorted(range(experts), key=lambda one, row=row: -row[one])[: router.k]:
                taken[expert] += 1
        load = [count * experts / (tokens * router.k) for count in taken]
        ordered = sorted(load)
        at = {share: share / 100 * (experts - 1) for share in (10, 50, 90)}  # between two, in proportion
        between = {
            share: ordered[int(x)] + (x % 1) * (ordered[min(int(x) + 1, experts - 1)] - ordered[int(x)])
            for share, x in at.items()
        }
        values = {
            metrics.BALANCE_LOSS: sum(one * p for one, p in zip(load, scores_TE.mean(dim=0).tolist(), strict=True)),
            metrics.MAX_VIOLATION: max(load) - 1,
            metrics.LOAD_VARIATION: math.sqrt(sum((one - 1) ** 2 for one in load) / experts),
            metrics.LOAD_MIN: min(load),
            metrics.LOAD_P10: between[10],
            metrics.LOAD_P50: between[50],
            metrics.LOAD_P90: between[90],
            metrics.DEAD_EXPERTS: float(taken.count(0)),
            metrics.ROUTER_ENTROPY: -(scores_TE * scores_TE.log()).sum().item() / tokens,
            metrics.TOP_K_MASS: scores_TE.sort(descending=True).values[:, : router.k].sum().item() / tokens,
            metrics.EXPERT_LOAD: [round(one, 4) for one in load],
        }
        found |= {metrics.of_layer(name, str(number)): value for name, value in values.items()}
    return found


def group_of(name: str) -> str:
    """What kind of weight a parameter is."""
    parts = name.removesuffix(".weight").split(".")
    if parts[-1].endswith("norm"):
        return "norm"
    if "experts" in parts or "shared_expert" in parts:
        return "experts" if "experts" in parts else "shared_expert"
    return {
        "word_embeddings": "embedding",
        "output_layer": "head",
        "router": "router",
        "eh_proj": "mtp_projection",
        "A_log": "decay",
        "dt_bias": "decay",
        "conv_weight": "deltanet",
        "in_proj": "deltanet",
        "out_proj": "deltanet",
        "linear_qkv": "attention",
        "linear_proj": "attention",
    }[parts[-1]]


@torch.no_grad()
def of_parameters(job: Job) -> dict[str, float]:
    """Of gradients, of what AdamW's first step adds, and of the weights behind it."""
    (chunk,) = job.chunks
    sums: dict[tuple[str, str], list[float]] = {}
    after, gains = {}, {}
    for name, parameter in chunk.named_parameters():
        after[name] = parameter.detach().clone()
        after[name].grad = parameter.main_grad / CLIPPED
        step(job, name, after[name])
        group, size = group_of(name), after[name]
        if group == "norm":  # stored as its distance from one
            size = 1 + size
            gains.setdefault(name.split(".")[-2], []).extend(size.tolist())
        place = "mtp" if name.startswith("mtp.") else name.split(".")[2] if name.startswith("decoder.layers.") else ""
        addends = parameter.main_grad, after[name] - parameter, size
        for key in {(group, ""), (group, place)}:
            row = sums.setdefault(key, [0.0, 0.0, 0.0])
            row[:] = [total + x.square().sum().item() for total, x in zip(row, addends, strict=True)]
    found = {}
    for (group, place), (gradient, update, weight) in sums.items():
        numbers = sorted(int(other) for own, other in sums if own == group and other.isdigit())
        label = [str(1 + numbers.index(int(place)))] if place.isdigit() else [place] if place else []
        found["/".join((metrics.GROUP_GRAD_NORM, group, *label))] = math.sqrt(gradient)
        found["/".join((metrics.UPDATE_TO_WEIGHT, group, *label))] = math.sqrt(update / weight)
    for kind, values in gains.items():
        found |= {f"{metrics.NORM_GAIN_MIN}/{kind}": min(values), f"{metrics.NORM_GAIN_MAX}/{kind}": max(values)}
    for kind, least, largest in (
        ("A_log", metrics.A_LOG_MIN, metrics.A_LOG_MAX),
        ("dt_bias", metrics.DT_BIAS_MIN, metrics.DT_BIAS_MAX),
    ):
        own = [x for name, x in after.items() if name.endswith(kind)]
        found |= _by_layer(least, [x.min().item() for x in own], min)
        found |= _by_layer(largest, [x.max().item() for x in own], max)
    return found
