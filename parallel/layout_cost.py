"""What a layout costs each process: bytes of weights, gradients and optimizer, and bytes sent in a step.

Plain functions of sizes, without torch. `tests/parallel/test_layout_cost.py` compares them with what processes
really hold.
"""

from collections.abc import Iterable
from functools import cache
from typing import Protocol

from parallel.topology import Topology

FLOAT32_BYTES = 4
REDUCED, GATHERED = "gradient reduce-scatter", "parameter all-gather"
EXCHANGE, SPREAD = "expert all-to-all", "experts inside NVLink domains"
EMBEDDINGS = "embedding all-reduce"
NUM_MOMENTS = 2
ROUTE_BYTES = 8  # of a probability and a place, in float32
FEWEST_BUCKETS = 8  # of a buffer of gradients, so that all but an eighth of them travels while others are computed


class WeightSize(Protocol):
    """One parameter of the model: its numbers, what cuts it (tensor or expert parallelism, or nothing), its type."""

    @property
    def numel(self) -> int: ...

    @property
    def tensor_parallel(self) -> bool: ...

    @property
    def expert_parallel(self) -> bool: ...

    @property
    def float32(self) -> bool: ...


def held(weight: WeightSize, topology: Topology) -> float:
    """Numbers of a parameter that one process of its pipeline stage holds."""
    if weight.expert_parallel:
        return weight.numel / topology.expert_owners
    return weight.numel / (topology.tensor if weight.tensor_parallel else 1)


def replicas(weight: WeightSize, topology: Topology) -> int:
    """Processes that hold the same part of a parameter, over which its gradient is summed and its optimizer cut.

    Tensor and context ranks route tokens of their own, so experts are spread over them too. Where nothing spreads
    them, they are parameters like the others.
    """
    if spread(weight, topology):
        return topology.expert_replicas
    return topology.data * topology.context


def spread(weight: WeightSize, topology: Topology) -> bool:
    """Whether a parameter is one of experts that are spread over processes, in buffers of their own."""
    return weight.expert_parallel and (topology.expert_owners > 1 or topology.tensor > 1)


def adamw_bytes(wide: bool, halved: bool) -> int:
    """Bytes of AdamW's state of a number: its two moments, and a float32 copy of what is not float32.

    Args:
        wide: whether the parameter is float32. halved: moments in bfloat16, and of the copy the 16 bits that a bfloat16
            weight leaves out; Transformer Engine's AdamW then copies float32 parameters too.
    """
    if halved:
        return FLOAT32_BYTES // 2 * NUM_MOMENTS + (FLOAT32_BYTES if wide else FLOAT32_BYTES // 2)
    return FLOAT32_BYTES * (NUM_MOMENTS + (not wide))


def state_bytes(
    weights: Iterable[WeightSize], topology: Topology, element: int, halved: bool = False
) -> dict[str, float]:
    """Bytes of a process's weights, of their float32 gradients, and of its share of AdamW's state.

    A parameter that is not float32 has a float32 master copy, which is cut like the two moments. Buffers are padded
    to a multiple of the processes that share them; that is not counted.

    Args:
        weights: the parameters of the process's pipeline stages. element: bytes of a number of the model's type.
        halved: see `adamw_bytes`.
    """
    total = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for weight in weights:
        numel = held(weight, topology)
        wide = weight.float32 or element == FLOAT32_BYTES
        total["weights"] += numel * (FLOAT32_BYTES if wide else element)
        total["gradients"] += numel * FLOAT32_BYTES
        total["optimizer"] += numel * adamw_bytes(wide, halved) / replicas(weight, topology)
    return total


@cache
def in_flight(topology: Topology, pipeline_rank: int, microbatches: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each of a process's stages whose activations it holds at once, at all moments that differ.

    megatron-core's schedules: one forward, one backward after a warm-up that is longest on the first process. Of
    interleaved stages as many micro-batches as there are processes pass each, forwards from the first, backwards from
    the last.
    """
    pipeline, virtual = topology.pipeline, topology.virtual
    behind = pipeline - pipeline_rank - 1
    if virtual == 1:
        return ((min(behind + 1, microbatches),),)
    passes = microbatches * virtual
    warm_up = min(2 * behind + (virtual - 1) * pipeline, passes - 1)
    held, moments = [0] * virtual, []
    for done in range(warm_up + min(passes - warm_up, pipeline * virtual)):
        held[done // pipeline % virtual] += 1
        if done >= warm_up:
            moments.append(tuple(held))
            held[virtual - 1 - (done - warm_up) // pipeline % virtual] -= 1
    return tuple(moments)


def bubble(topology: Topology, microbatches: int) -> float:
    """Share of a step in which a process of the pipeline waits, if all stages took equally long."""
    idle = (topology.pipeline - 1) / topology.virtual
    return idle / (microbatches + idle)


def ring_bytes(whole: float, processes: int) -> float:
    """Bytes that a process sends in a gather, a reduce-scatter or an all-to-all of ``whole`` bytes."""
    return whole * (processes - 1) / processes


def gradient_traffic(weights: Iterable[WeightSize], topology: Topology, element: int) -> dict[str, float]:
    """Bytes that a process sends once a step: float32 gradients summed and scattered, then new parameters gathered.

    Those of experts go between fewer and other processes.
    """
    total = dict.fromkeys((kind + way for kind in ("", "expert ") for way in (REDUCED, GATHERED)), 0.0)
    for weight in weights:
        numel, processes = held(weight, topology), replicas(weight, topology)
        kind = "expert " if spread(weight, topology) else ""
        total[kind + REDUCED] += ring_bytes(numel * FLOAT32_BYTES, processes)
        each = FLOAT32_BYTES if weight.float32 else element
        total[kind + GATHERED] += ring_bytes(numel * each, processes)
    return total


def embedding_traffic(numel: int, topology: Topology, pipeline_rank: int) -> float:
    """Bytes that the first or the last process of a pipeline, which both hold the embedding, sends once a step: its
    float32 gradients, summed over the two."""
    at_end = pipeline_rank in (0, topology.pipeline - 1) and topology.pipeline > 1
    return 2 * ring_bytes(numel * FLOAT32_BYTES / topology.tensor, 2) if at_end else 0.0


def expert_traffic(
    rows: float, leaving: float, row_bytes: float, choices: float, topology: Topology, again: int
) -> dict[str, float]:
    """Bytes that a process sends in a mixture's exchanges: rows there and back, in each pass forwards, and backwards;
    and as often, for each choice of an expert, where it belongs, or its gradient.

    Over several NVLink domains all that goes on from where it arrived to the holders inside.

    Args:
        rows: of its tokens, one for each part of the experts that a token uses; every holder of a part of an expert
            gets them. leaving: one for each NVLink domain that it uses. choices: its tokens times the experts of each.
        again: passes forwards beside the first.
    """
    passes, routes = 2 + again, choices * ROUTE_BYTES
    once = (2 * rows * row_bytes + routes) * topology.expert_tensor
    if topology.expert_domains == 1:
        return {EXCHANGE: passes * ring_bytes(once, topology.expert_owners)}
    first = 2 * leaving * row_bytes + routes
    return {
        EXCHANGE: passes * ring_bytes(first, topology.expert_domains),
        SPREAD: passes * ring_bytes(once, topology.nvlink_domain),
    }


def tensor_traffic(states: float, topology: Topology, again: int) -> float:
    """Bytes that a process sends for one layer's pair of cut projections under sequence parallelism.

    Forwards a gather and a scatter of all ``states`` bytes; backwards two gathers and a scatter.
    """
    return (5 + 2 * again) * ring_bytes(states, topology.tensor)


def boundary_traffic(states: float, topology: Topology) -> float:
    """Bytes that a process sends for a gather forwards and a scatter backwards, as at the head, or the reverse."""
    return 2 * ring_bytes(states, topology.tensor)


def pipeline_traffic(states: float, topology: Topology, pipeline_rank: int, ahead: int = 0) -> float:
    """Bytes that a process sends for one micro-batch: states to each next stage, gradients to each previous one.

    Args:
        ahead: passes forwards, through all stages, before the step's own.
    """
    stages = topology.pipeline * topology.virtual
    numbers = [chunk * topology.pipeline + pipeline_rank for chunk in range(topology.virtual)]
    sends = sum((1 + ahead) * (number < stages - 1) + (number > 0) for number in numbers)
    return sends * states / topology.tensor if topology.pipeline > 1 else 0.0
