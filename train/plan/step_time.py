"""How long a step takes: arithmetic, what a pipeline waits for, and what travels while nothing is computed.

Arithmetic goes at a share of the peak, but no micro-batch is quicker than a host launches its kernels: cutting
sequences ever smaller stops paying. Bytes go at the bandwidths of data sheets. Hidden are only transfers that the code
starts ahead of arithmetic: rows of experts behind the shared expert, sums of gradients behind the backward pass of the
last micro-batch, new weights behind the forward pass of the next one. All others count whole, also those that tensor
parallelism hides in part. It ranks layouts; how fast one is, only running it tells.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from model.config import LAYER
from model.cost.cost import HEAD, ROUTED, TRAINING_FACTOR, layer_flops, stage_flops
from parallel.layout_cost import EMBEDDINGS, EXCHANGE, FEWEST_BUCKETS, GATHERED, REDUCED, SPREAD
from parallel.topology import NODE, Topology, microbatches
from train.job.footprint import Footprint, counts_ahead, held_symbols, recomputed, stage_numbers, stage_work
from train.job.gpus import GPUS
from train.settings.run import Config

# What each part that is computed again repeats of the forward pass (parts of `model.cost.cost`); norms do not count.
REPEATED = {
    "attention": ("attention_scores",),
    "deltanet": ("deltanet_convolution", "delta_rule"),
    "experts": (ROUTED,),
    "norm": (),
}
# Data sheets: NVLink in one direction, and one network card of 400 Gbit/s for each GPU; bytes a second.
BANDWIDTHS = {"H100": (450e9, 50e9), "H200": (450e9, 50e9), "B200": (900e9, 50e9)}
# Seconds in which a host launches a layer, forwards and backwards: `proxy`, eight layers and the head, takes 35 ms
# whatever the tokens (tests/bench/RESULTS.md, one H200).
LAUNCH_SECONDS = 35e-3 / 8
# Share of a backward pass in a forward and a backward pass.
BACKWARD = (TRAINING_FACTOR - 1) / TRAINING_FACTOR


@dataclass(frozen=True)
class Machine:
    """A GPU and how it is connected; bandwidths are what one GPU sends, bytes a second.

    Attributes:
        memory: bytes. flops: operations a second that the arithmetic of a step reaches.
        launch: seconds in which the host launches a layer's kernels, forwards and backwards.
    """

    name: str
    memory: float
    flops: float
    node_bandwidth: float
    network_bandwidth: float
    per_node: int = NODE
    launch: float = LAUNCH_SECONDS


@dataclass(frozen=True)
class Link:
    """Who takes part in a collective: so many ranks, so far apart, each sending to all others or to its neighbour."""

    processes: int
    apart: int = 1
    to_all: bool = False


# The ranks of a job lie in the order tensor, context, data, pipeline; those of experts in the order of their parts,
# experts, data, pipeline.
LINKS: dict[str, Callable[[Topology], Link]] = {
    EXCHANGE: lambda sizes: (
        Link(sizes.expert_owners, to_all=True)
        if sizes.expert_domains == 1
        else Link(sizes.expert_domains, sizes.nvlink_domain, to_all=True)
    ),
    SPREAD: lambda sizes: Link(sizes.nvlink_domain, to_all=True),
    "tensor gathers and scatters": lambda sizes: Link(sizes.tensor),
    "context exchanges": lambda sizes: Link(sizes.context, sizes.tensor, to_all=True),
    "pipeline sends": lambda sizes: Link(sizes.pipeline, sizes.world // sizes.pipeline),
    EMBEDDINGS: lambda sizes: Link(2, sizes.world - sizes.world // sizes.pipeline),
    REDUCED: lambda sizes: Link(sizes.data * sizes.context, sizes.tensor),
    GATHERED: lambda sizes: Link(sizes.data * sizes.context, sizes.tensor),
    f"expert {REDUCED}": lambda sizes: Link(sizes.expert_replicas, sizes.expert_owners),
    f"expert {GATHERED}": lambda sizes: Link(sizes.expert_replicas, sizes.expert_owners),
}
# Transfers of gradients and of new weights, and the share of a micro-batch that may hide them.
ONCE_A_STEP = {REDUCED: BACKWARD, GATHERED: 1 - BACKWARD}
ONCE_A_STEP |= {f"expert {name}": share for name, share in ONCE_A_STEP.items()}
ONCE_A_STEP[EMBEDDINGS] = 0.0  # once all other gradients are there


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one process.

    Attributes:
        arithmetic: of all its micro-batches, what is computed again included. launching: what a GPU waits for its
        host besides. waiting: for the first and last micro-batches of a pipeline. transfers: by collective, what
        nothing hides.
    """

    arithmetic: float
    launching: float
    waiting: float
    transfers: dict[str, float]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.arithmetic + self.launching + self.waiting + sum(self.transfers.values())


def machine_of(gpu: str, share: float, nvlink_domain: int | None = None) -> Machine:
    """A GPU of `GPUS` whose arithmetic reaches a share of its peak; ``nvlink_domain`` as in `ParallelConfig`."""
    near = nvlink_domain if nvlink_domain and nvlink_domain > 1 else NODE
    return Machine(gpu, GPUS[gpu].memory, GPUS[gpu].peak * share, *BANDWIDTHS[gpu], near)


def step_time(
    config: Config, topology: Topology, vocab_size: int, places: Iterable[Footprint], machine: Machine
) -> StepTime:
    """The step of the slowest of some places of the pipeline, for which the others wait."""
    times = (_at(config, topology, vocab_size, place, machine) for place in places)
    return max(times, key=lambda time: time.seconds)


def transfer_seconds(count: float, link: Link, machine: Machine) -> float:
    """Bytes that each process sends, over its slowest way.

    To all others: those inside the node get theirs while the network carries the rest. Round a ring: all processes of
    a node pass on a part each, so that the network cards of all carry what leaves the node.
    """
    near = min(link.processes, max(1, machine.per_node // link.apart))
    if near == link.processes:
        return count / machine.node_bandwidth
    if link.to_all:
        far = (link.processes - near) / (link.processes - 1)
        return max(count * (1 - far) / machine.node_bandwidth, count * far / machine.network_bandwidth)
    return count / min(machine.node_bandwidth, near * machine.network_bandwidth)


def _arithmetic_seconds(
    config: Config, topology: Topology, vocab_size: int, pipeline_rank: int, machine: Machine
) -> float:
    """Arithmetic of a process's stages, what is computed again included.

    The head is not: its gradients are worked out on the way forward.
    """
    model, length, again = config.model, config.data.seq_length, recomputed(config.parallel)
    numbers = stage_numbers(topology, pipeline_rank)
    once = sum(stage_work(model, config.mtp, vocab_size, length)[number] for number in numbers)
    last = numbers[-1] == len(model.stages) - 1
    no_head = once - (stage_flops("", model, config.mtp, vocab_size, length, last)[HEAD] if last else 0.0)
    repeated = no_head * _passes_again(config, topology)
    if LAYER not in again:
        names = [name for part in again for name in REPEATED[part]]
        layers = Counter(held_symbols(config, topology, pipeline_rank)).items()
        parts = [(layer_flops(symbol, model, length), number) for symbol, number in layers]
        repeated += sum(number * own.get(name, 0.0) for own, number in parts for name in names)
    tokens = config.batch.global_ * length * topology.pipeline / topology.world
    return tokens * (TRAINING_FACTOR * once + repeated) / machine.flops


def _passes_again(config: Config, topology: Topology) -> int:
    """Passes forwards through whole layers beside the first: ahead of a step to count experts, and backwards."""
    return counts_ahead(config, topology) + (LAYER in recomputed(config.parallel))


def _at(config: Config, topology: Topology, vocab_size: int, place: Footprint, machine: Machine) -> StepTime:
    arithmetic = _arithmetic_seconds(config, topology, vocab_size, place.pipeline_rank, machine)
    spent = {name: transfer_seconds(count, LINKS[name](topology), machine) for name, count in place.traffic.items()}
    shared = _shared_seconds(config, topology, place, machine)
    number = microbatches(topology, config.batch.global_, config.batch.micro)
    passes = 1 + (1 - BACKWARD) * _passes_again(config, topology)
    least = number * passes * machine.launch * len(held_symbols(config, topology, place.pipeline_rank))
    launching = max(0.0, least - arithmetic)
    one = (arithmetic + launching) / number
    for name, seconds in spent.items():
        if name in ONCE_A_STEP:
            spent[name] = max(seconds - one * ONCE_A_STEP[name], seconds / FEWEST_BUCKETS)
        elif name == EXCHANGE:  # its leg inside a domain has nothing beside it
            spent[name] = max(0.0, seconds - shared)
    pace = arithmetic + launching + sum(seconds for name, seconds in spent.items() if name not in ONCE_A_STEP)
    return StepTime(arithmetic, launching, pace * place.bubble / (1 - place.bubble), spent)


def _shared_seconds(config: Config, topology: Topology, place: Footprint, machine: Machine) -> float:
    """Arithmetic of the shared experts of a process's stages in a step."""
    each = layer_flops("E", config.model, config.data.seq_length)["shared_expert"]
    tokens = config.batch.global_ * config.data.seq_length * topology.pipeline / topology.world
    experts = held_symbols(config, topology, place.pipeline_rank).count("E")
    passes = TRAINING_FACTOR + _passes_again(config, topology)  # each hides an exchange
    return passes * each * experts * tokens / machine.flops
