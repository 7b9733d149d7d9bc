"""Layouts for a number of GPUs: what fits into their memory, ranked by the predicted time of a step.

The time is arithmetic over peak rate times an efficiency, plus bytes over bandwidth with nothing overlapped. It ranks
layouts; how fast the best one is, only running it tells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from model.config import LAYER, ModelError, check_kernels, check_model
from model.cost.cost import ROUTED, TRAINING_FACTOR, forward_flops
from parallel.topology import RECOMPUTE_POLICIES, Topology, TopologyError, check_length, divisors, microbatches, resolve
from train.job.footprint import Footprint, footprint, planned_vocab, recomputed
from train.job.gpus import GPUS
from train.plan.estimate import Budget
from train.settings.run import Config
from train.settings.tree import ConfigError

GB = 1e9
FIT = 0.9  # share of the memory that a layout may take; the rest is for the allocator, libraries and transfers
# What each part that is computed again repeats of the forward pass (parts of `model.cost.cost`); norms do not count.
REPEATED = {
    "attention": ("attention_scores",),
    "deltanet": ("deltanet_convolution", "delta_rule"),
    "experts": (ROUTED,),
    "norm": (),
}
# Collectives by the processes that take part, counted in steps of neighbours: who is near talks inside a node.
WIDTHS = {
    "expert all-to-all": lambda sizes: sizes.expert_owners,
    "tensor gathers and scatters": lambda sizes: sizes.tensor,
    "context exchanges": lambda sizes: sizes.tensor * sizes.context,
    "gradient reduce-scatter": lambda sizes: sizes.world // sizes.pipeline,
    "parameter all-gather": lambda sizes: sizes.world // sizes.pipeline,
    "pipeline sends": lambda sizes: sizes.world,
}


@dataclass(frozen=True)
class Machine:
    """A GPU and how it is connected; bandwidths are what one GPU sends, bytes a second.

    Attributes:
        memory: bytes. flops: operations a second that the arithmetic of a step reaches.
    """

    name: str
    memory: float
    flops: float
    node_bandwidth: float
    network_bandwidth: float
    per_node: int = 8


# Data sheets: NVLink in one direction, and one network card of 400 Gbit/s for each GPU.
BANDWIDTHS = {"H100": (450e9, 50e9), "H200": (450e9, 50e9), "B200": (900e9, 50e9)}


@dataclass(frozen=True)
class Proposal:
    """A layout as the settings that make it, its fullest process in bytes, and a step in seconds."""

    config: Config
    topology: Topology
    memory: float
    arithmetic: float
    transfers: float

    @property
    def seconds(self) -> float:
        """Predicted time of a step."""
        return self.arithmetic + self.transfers

    def settings(self) -> str:
        """The settings, as they are written on a command line."""
        parallel, model = self.config.parallel, self.config.model
        named = {
            "parallel.tensor": parallel.tensor,
            "parallel.pipeline": parallel.pipeline,
            "parallel.context": parallel.context,
            "parallel.expert": parallel.expert,
            "parallel.recompute": parallel.recompute,
            "batch.micro": self.config.batch.micro,
        }
        if parallel.pipeline > 1:
            named |= {"model.pattern": f"'{model.pattern}'", "model.repeats": model.repeats}
        return " ".join(f"{key}={value}" for key, value in named.items())


def propose(config: Config, world: int, machine: Machine, most: int = 5) -> list[Proposal]:
    """The fastest layouts of a model on ``world`` GPUs, fastest first; the settings of ``parallel`` are free.

    Raises:
        ConfigError: none fits into the memory.
    """
    found, least = [], float("inf")
    for candidate, topology in candidates(config, world, machine):
        proposal = predict(candidate, topology, machine)
        least = min(least, proposal.memory)
        if proposal.memory <= FIT * machine.memory:
            found.append(proposal)
    if not found:
        needs = f"the least takes {least / GB:.0f} GB each" if least < float("inf") else "batch.global suits none"
        raise ConfigError(
            f"no layout of {world} {machine.name} fits into {FIT:.0%} of {machine.memory / GB:.0f} GB ({needs}): take "
            f"more GPUs, or a smaller data.seq_length or batch.global"
        )
    return sorted(found, key=lambda proposal: proposal.seconds)[:most]


def proposals(config: Config, budget: Budget) -> list[str]:
    """Lines of the layouts proposed for ``parallel.world`` GPUs of the budget's kind.

    Raises:
        ConfigError: no number of GPUs, or none that suffices.
    """
    check_model(config.model, config.mtp)
    world = config.parallel.world
    if world is None or world < 1:
        raise ConfigError(f"parallel.world={world}: estimate.propose needs the number of GPUs, as in parallel.world=64")
    gpu = GPUS[budget.gpu]
    machine = Machine(budget.gpu, gpu.memory, gpu.peak * budget.mfu, *BANDWIDTHS[budget.gpu])
    return proposal_lines(propose(config, world, machine, budget.propose), machine)


def cuts(config: Config, stages: int) -> Config | None:
    """The same layers in so many equal stages, or None where whole patterns do not make them."""
    model = config.model
    layers, repeats = model.pattern.replace("|", ""), model.repeats
    if stages == 1:
        return replace(config, model=replace(model, pattern=layers))
    if repeats % stages:
        return None
    return replace(config, model=replace(model, pattern=layers * (repeats // stages) + "|", repeats=stages))


def candidates(config: Config, world: int, machine: Machine) -> Iterator[tuple[Config, Topology]]:
    """Every layout that the checks let pass: tensor and context parallelism inside a node, powers of two."""
    near = [size for size in divisors(world) if size <= machine.per_node]
    stages = [(size, virtual) for size in divisors(world) for virtual in (1, 2, 4) if size > 1 or virtual == 1]
    micros = [size for size in (1, 2, 4, 8, 16) if size <= config.batch.global_]
    for (pipeline, virtual), tensor, context in product(stages, near, near):
        cut = cuts(config, pipeline * virtual)
        if cut is None or tensor * context > machine.per_node:
            continue
        routing = world // pipeline
        for expert in divisors(routing):
            for micro, policy in product(micros, RECOMPUTE_POLICIES):
                sizes: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
                parallel = replace(cut.parallel, **sizes, recompute=policy, world=world)
                candidate = replace(cut, parallel=parallel, batch=replace(cut.batch, micro=micro))
                topology = valid(candidate, world)
                if topology is not None:
                    yield candidate, topology


def valid(config: Config, world: int) -> Topology | None:
    """The layout, or None where it cannot be built."""
    try:
        topology = resolve(config.parallel, config.model, world)
        check_length(topology, config.data.seq_length, config.model)
        check_kernels(config.model, topology)
        microbatches(topology, config.batch.global_, config.batch.micro)
        planned_vocab(config, topology)
    except (TopologyError, ModelError):
        return None
    return topology


def predict(config: Config, topology: Topology, machine: Machine) -> Proposal:
    """Memory and time of a layout: those of the first and last processes of a pipeline, which hold most."""
    vocab = planned_vocab(config, topology)
    ends = [footprint(config, topology, vocab, rank) for rank in sorted({0, topology.pipeline - 1})]
    memory = max(sum(end.memory.values()) for end in ends)
    transfers = max(_transfer_seconds(end, topology, machine) for end in ends)
    return Proposal(config, topology, memory, _compute_seconds(config, topology, vocab, ends[0], machine), transfers)


def _compute_seconds(config: Config, topology: Topology, vocab: int, end: Footprint, machine: Machine) -> float:
    """Arithmetic of the slowest pipeline process, recomputation included, stretched by the pipeline's bubble."""
    parts = forward_flops(config.model, config.mtp, vocab, config.data.seq_length)
    again = recomputed(config.parallel)
    names = parts if LAYER in again else [name for part in again for name in REPEATED[part]]
    repeated = sum(parts.get(name, 0.0) for name in names)
    tokens = config.batch.global_ * config.data.seq_length
    flops = tokens * (TRAINING_FACTOR * sum(parts.values()) + repeated) / topology.world
    held = [sum(end.balance[rank :: topology.pipeline]) for rank in range(topology.pipeline)]
    return flops * max(held) * topology.pipeline / machine.flops / (1 - end.bubble)


def _transfer_seconds(end: Footprint, topology: Topology, machine: Machine) -> float:
    """Bytes of each collective over the bandwidth of its farthest link."""
    seconds = 0.0
    for name, count in end.traffic.items():
        inside = WIDTHS[name](topology) <= machine.per_node
        seconds += count / (machine.node_bandwidth if inside else machine.network_bandwidth)
    return seconds


def proposal_lines(proposals: list[Proposal], machine: Machine) -> list[str]:
    """Lines for a person: one layout each, with the settings that make it."""
    tokens = proposals[0].config.batch.global_ * proposals[0].config.data.seq_length
    lines = [f"{proposals[0].topology.world} {machine.name}: predicted step, its transfers, memory a GPU, settings"]
    for proposal in proposals:
        rate = tokens / proposal.seconds / proposal.topology.world
        lines.append(
            f"{proposal.seconds:7.2f} s  {proposal.transfers:6.2f} s  {proposal.memory / GB:6.1f} GB  "
            f"{rate:8,.0f} tokens/s/GPU  {proposal.settings()}"
        )
    return lines
