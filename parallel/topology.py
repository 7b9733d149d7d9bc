"""Which process holds what: the sizes of each kind of parallelism, checked against the model and the batch.

A job has ``world`` processes = tensor x pipeline x context x data. A pattern of v x pipeline stages is interleaved: a
process holds v stages, every pipeline-th one. Experts are spread over ``expert`` x ``expert_tensor`` of the
processes of a pipeline stage, whole or in parts; ``expert=auto`` takes the largest size that divides both the experts
and those processes.
"""

import math
import os
from dataclasses import dataclass
from typing import Annotated, Protocol

NODE = 8  # processes of a machine, where no job is started whose launcher says so
EXPERT_ALIGNED = 8  # columns of an expert in bfloat16: 16 bytes
RECOMPUTE_POLICIES = ("none", "selective", "full")
# Parts of a layer without its dense projections; `model.layers.recompute` knows them by the same names.
RECOMPUTABLE = ("attention", "deltanet", "experts", "norm")


class TopologyError(ValueError):
    """A layout that cannot be built; the message names the sizes that clash, why, and the nearest valid values."""


class Shape(Protocol):
    """What a layout depends on of a model; `model.config.ModelConfig` has it."""

    @property
    def pattern(self) -> str: ...

    @property
    def repeats(self) -> int: ...

    @property
    def layers(self) -> str: ...

    @property
    def stages(self) -> tuple[str, ...]: ...

    @property
    def attention_heads(self) -> int: ...

    @property
    def key_value_heads(self) -> int: ...

    @property
    def linear_key_heads(self) -> int: ...

    @property
    def dense_size(self) -> int: ...

    @property
    def experts(self) -> int: ...

    @property
    def expert_size(self) -> int: ...

    @property
    def conv_kernel(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shared_expert_size(self) -> int: ...


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of each kind of parallelism; what is left of the processes is data parallel."""

    tensor: Annotated[int, "processes that share each layer's heads and columns"] = 1
    pipeline: Annotated[int, "processes that share the layers; the pattern has as many stages, or a multiple"] = 1
    context: Annotated[int, "processes that share each sequence"] = 1
    expert: Annotated[int | str, "processes that share a layer's experts, or auto"] = "auto"
    expert_tensor: Annotated[int, "processes that share each expert's width"] = 1
    nvlink_domain: Annotated[
        int | None,
        "processes that reach one another by NVLink: a token of experts beyond crosses the network once for each such "
        "domain; null: those of a machine; 1: once for each process",
    ] = None
    recompute: Annotated[str, "what the backward pass computes again to save memory: none, selective or full"] = "none"
    recompute_modules: Annotated[
        tuple[str, ...],
        "selective: which of attention, deltanet, experts and norm; empty: all of them",
    ] = ()
    bucket: Annotated[
        int,
        "numbers of a bucket of gradients or weights, which travels while others are computed; at least",
    ] = 40_000_000
    bucket_share: Annotated[
        int, "numbers of each data-parallel rank's share of a bucket, at least, unless a large buffer had fewer than 8"
    ] = 1_000_000
    world: Annotated[int | None, "processes of the whole job; null takes what is started"] = None


@dataclass(frozen=True)
class Topology:
    """A checked layout: every size as a plain number."""

    world: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    data: int
    virtual: int = 1  # pipeline stages of one process
    expert_tensor: int = 1
    nvlink_domain: int = NODE  # processes that lie next to one another and exchange without the network

    @property
    def expert_owners(self) -> int:
        """Processes that hold a layer's experts between them."""
        return self.expert * self.expert_tensor

    @property
    def expert_replicas(self) -> int:
        """Processes that hold the same part of the same experts."""
        return self.world // self.pipeline // self.expert_owners

    @property
    def expert_domains(self) -> int:
        """NVLink domains over which a layer's experts spread evenly, so that rows travel in two steps; 1: in one."""
        inside = self.nvlink_domain
        even = inside > 1 and self.expert_owners % inside == 0 and inside % self.expert_tensor == 0
        return self.expert_owners // inside if even else 1

    def _exchange(self) -> str:
        inside, holders = self.nvlink_domain, self.expert_owners
        if self.expert_domains > 1:
            return f" in {self.expert_domains} NVLink domains: a token's row crosses the network once for each"
        if self.world > inside > 1 and inside % holders:
            return f", unevenly over NVLink domains of {inside}: a token's row crosses the network for each process"
        return ""

    def __str__(self) -> str:
        stages = f" ({self.virtual} stages each)" if self.virtual > 1 else ""
        parts = f", each in {self.expert_tensor} parts" if self.expert_tensor > 1 else ""
        return (
            f"{self.world} = tensor {self.tensor} x pipeline {self.pipeline}{stages} x context {self.context} x data "
            f"{self.data}; experts over {self.expert_owners}{parts}{self._exchange()}"
        )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of ``number`` around ``wanted``, for an error message."""
    near = sorted(divisors(number), key=lambda size: abs(size - wanted))[:3]
    return " or ".join(str(size) for size in sorted(near))


def processes_of_a_machine(world: int) -> int:
    """As the launcher says in a job of so many processes; of a job that is only planned, those of most machines."""
    started = os.environ.get("WORLD_SIZE") == str(world)
    return int(os.environ.get("LOCAL_WORLD_SIZE", NODE)) if started else NODE


def _require_divides(size: int, setting: str, number: int, what: str) -> None:
    if size < 1 or number % size:
        raise TopologyError(
            f"{setting}={size} does not divide {what}={number}: choose {nearest_divisors(number, size)}"
        )


def _require_known(value: str, setting: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise TopologyError(f"{setting}={value!r} is not known: choose {', '.join(choices[:-1])} or {choices[-1]}")


def resolve(parallel: ParallelConfig, model: Shape, world: int) -> Topology:
    """The layout of ``world`` processes for a model.

    Raises:
        TopologyError: sizes that do not fit the processes, the heads, the experts or the pattern.
    """
    if parallel.world not in (None, world):
        raise TopologyError(
            f"parallel.world={parallel.world} but {world} processes are started: start {parallel.world}, on several "
            "machines if need be (sbatch -N, or NNODES; NPROC is of each), or set parallel.world=null"
        )
    for name in ("tensor", "pipeline", "context", "expert_tensor", "bucket", "bucket_share"):
        size = getattr(parallel, name)
        if size < 1:
            raise TopologyError(f"parallel.{name}={size} must be at least 1")
    domain = processes_of_a_machine(world) if parallel.nvlink_domain is None else parallel.nvlink_domain
    if domain < 1:
        raise TopologyError(f"parallel.nvlink_domain={domain} must be at least 1, or null")
    _require_known(parallel.recompute, "parallel.recompute", RECOMPUTE_POLICIES)
    for part in parallel.recompute_modules:
        _require_known(part, "parallel.recompute_modules", RECOMPUTABLE)
    layout = parallel.tensor * parallel.pipeline * parallel.context
    if world % layout:
        raise TopologyError(
            f"{world} processes cannot be laid out as parallel.tensor={parallel.tensor} x parallel.pipeline="
            f"{parallel.pipeline} x parallel.context={parallel.context} = {layout} each: start a multiple of {layout} "
            f"(NPROC={max(layout, world // layout * layout)})"
        )
    shared = ["attention_heads", "key_value_heads", "shared_expert_size"]
    shared += ["linear_key_heads"] * ("G" in model.layers) + ["dense_size"] * ("-" in model.layers)
    for name in shared:
        _require_divides(parallel.tensor, "parallel.tensor", getattr(model, name), f"model.{name}")
    _check_context(parallel, model)
    stages = len(model.stages)
    if stages % parallel.pipeline or (parallel.pipeline == 1 and stages > 1):
        many = f" (or a multiple of {parallel.pipeline} stages, which are interleaved)" if parallel.pipeline > 1 else ""
        raise TopologyError(
            f"parallel.pipeline={parallel.pipeline} but model.pattern={model.pattern!r} x {model.repeats} has {stages} "
            f"stage{'s' if stages > 1 else ''}: cut the layers with {parallel.pipeline - 1} '|'{many}, or choose "
            f"parallel.pipeline={stages}"
        )
    data, virtual = world // layout, stages // parallel.pipeline
    expert = _spread_experts(parallel, model, world // parallel.pipeline)
    sizes = (parallel.tensor, parallel.pipeline, parallel.context, expert, data, virtual, parallel.expert_tensor)
    return Topology(world, *sizes, domain)


def _check_context(parallel: ParallelConfig, model: Shape) -> None:
    """Whole attention heads are shared out among the parts of a sequence, key heads repeated as often as needed."""
    heads, keys = model.attention_heads // parallel.tensor, model.key_value_heads // parallel.tensor
    if heads % math.lcm(keys, parallel.context):
        valid = [size for size in divisors(heads) if heads % math.lcm(keys, size) == 0]
        raise TopologyError(
            f"parallel.context={parallel.context} cannot share out model.attention_heads={model.attention_heads} and "
            f"model.key_value_heads={model.key_value_heads} with parallel.tensor={parallel.tensor}: choose "
            f"{' or '.join(map(str, valid))}"
        )


def _spread_experts(parallel: ParallelConfig, model: Shape, routing: int) -> int:
    """Processes that share a layer's experts, of the ``routing`` ones of a pipeline stage.

    Tensor and context ranks of a stage route tokens of their own, so experts spread over them as well.
    """
    expert, parts = parallel.expert, parallel.expert_tensor
    _require_divides(parts, "parallel.expert_tensor", model.expert_size, "model.expert_size")
    _require_divides(parts, "parallel.expert_tensor", routing, "the processes of a pipeline stage")
    if parts > 1 and model.dtype == "bfloat16" and model.expert_size // parts % EXPERT_ALIGNED:
        raise TopologyError(
            f"parallel.expert_tensor={parts} leaves {model.expert_size // parts} columns of model.expert_size="
            f"{model.expert_size}, and the kernels of model.dtype=bfloat16 need a multiple of {EXPERT_ALIGNED}"
        )
    if expert == "auto":
        expert = math.gcd(routing // parts, model.experts)
    if not isinstance(expert, int):
        raise TopologyError(f"parallel.expert={expert!r} is not known: choose a number of processes or auto")
    _require_divides(expert, "parallel.expert", model.experts, "model.experts")
    holders = "processes" if parts == 1 else "groups of parallel.expert_tensor processes"
    _require_divides(expert, "parallel.expert", routing // parts, f"the {holders} of a pipeline stage")
    return expert


def check_length(topology: Topology, seq_length: int, model: Shape) -> None:
    """Raises TopologyError where the processes of context and tensor parallelism cannot cut a sequence evenly, or cut
    it so small that a convolution reaches past the part before."""
    each = topology.tensor * topology.context
    if seq_length % each:
        raise TopologyError(
            f"data.seq_length={seq_length} cannot be cut by parallel.context={topology.context} x parallel.tensor="
            f"{topology.tensor} = {each}: choose data.seq_length={-(-seq_length // each) * each}"
        )
    reach = model.conv_kernel - 1
    if topology.context > 1 and "G" in model.layers and seq_length // topology.context < reach:
        raise TopologyError(
            f"data.seq_length={seq_length} leaves {seq_length // topology.context} tokens to each of parallel.context="
            f"{topology.context} processes, and model.conv_kernel={model.conv_kernel} reaches {reach} tokens back: "
            f"choose data.seq_length={each * -(-reach * topology.context // each)} or more"
        )


def microbatches(topology: Topology, global_batch: int, micro_batch: int) -> int:
    """Microbatches each data-parallel rank runs a step: global = micro x data x microbatches.

    Raises:
        TopologyError: the global batch cannot be divided so, or not into as many as interleaved stages need.
    """
    if global_batch < 1 or micro_batch < 1:
        raise TopologyError(f"batch.global={global_batch} and batch.micro={micro_batch} must be at least 1")
    each = micro_batch * topology.data
    if global_batch % each:
        valid = max(each, round(global_batch / each) * each)
        share, rest = divmod(global_batch, topology.data)
        smaller = "" if rest else f", a batch.micro that divides {share}"
        raise TopologyError(
            f"batch.global={global_batch} is not a multiple of batch.micro={micro_batch} x {topology.data} "
            f"data-parallel processes = {each}: choose batch.global={valid}{smaller}, or fewer processes (NPROC)"
        )
    number = global_batch // each
    if topology.virtual > 1 and number % topology.pipeline:
        valid = max(1, round(number / topology.pipeline)) * topology.pipeline * each
        raise TopologyError(
            f"batch.global={global_batch} makes {number} microbatches, which {topology.virtual} interleaved stages a "
            f"process need to be a multiple of parallel.pipeline={topology.pipeline}: choose batch.global={valid}, "
            f"another batch.micro, or {topology.pipeline} stages in model.pattern"
        )
    return number
