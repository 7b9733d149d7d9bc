"""What one process of a layout holds, sends and computes, from the settings alone: no module is built."""

from collections import Counter
from dataclasses import dataclass
from functools import cache

from model.config import HEAD_CHUNK, INFERENCE, LAYER, ModelConfig, MtpConfig, key_head_copies, passes_states
from model.cost import activations, cost
from model.cost.activations import ELEMENT_BYTES
from parallel import layout_cost
from parallel.topology import RECOMPUTABLE, ParallelConfig, Topology, TopologyError, microbatches, resolve
from train.settings.optim import BFLOAT16
from train.settings.run import Config
from train.settings.tree import ConfigError

COUNT_BYTES = 8  # of the assignments to an expert
VOCAB_MULTIPLE = 64  # rows of the embedding are padded to a multiple of this


@dataclass(frozen=True)
class Footprint:
    """One process of a layout.

    Attributes:
        memory: bytes by what they are for. traffic: bytes sent in a step, by collective.
        balance: each pipeline stage's share of the operations. bubble: share of a step that the pipeline waits.
    """

    pipeline_rank: int
    parameters: int
    memory: dict[str, float]
    traffic: dict[str, float]
    balance: list[float]
    bubble: float


def planned_vocab(config: Config, topology: Topology) -> int:
    """Rows of the embedding before any corpus is opened.

    Raises:
        ConfigError: only the corpus would know. TopologyError: rows that tensor parallelism cannot share.
    """
    size = config.model.vocab_size
    if size is None and config.data.corpus != "embedded":
        raise ConfigError("model.vocab_size=null takes the corpus's, which is not opened here: give model.vocab_size")
    if size is None:
        size = -(-config.data.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if size % topology.tensor:
        raise TopologyError(f"parallel.tensor={topology.tensor} does not divide the vocabulary of {size} rows")
    return size


def recomputed(parallel: ParallelConfig) -> frozenset[str]:
    """The parts of the model that are computed again in the backward pass."""
    parts = {"none": (), "selective": parallel.recompute_modules or RECOMPUTABLE, "full": (LAYER,)}
    return frozenset(parts[parallel.recompute])


def stage_numbers(topology: Topology, pipeline_rank: int) -> list[int]:
    """The pipeline stages that a process holds: every pipeline-th one."""
    return [chunk * topology.pipeline + pipeline_rank for chunk in range(topology.virtual)]


@cache
def stage_work(model: ModelConfig, mtp: MtpConfig, vocab_size: int, seq_length: int) -> tuple[float, ...]:
    """Operations a token of each pipeline stage; head and multi-token prediction are the last one's."""
    last = len(model.stages) - 1
    return tuple(
        sum(cost.stage_flops(symbols, model, mtp, vocab_size, seq_length, number == last).values())
        for number, symbols in enumerate(model.stages)
    )


def held_symbols(config: Config, topology: Topology, pipeline_rank: int) -> str:
    """The layers that a process has a part of, those of each step of multi-token prediction included."""
    numbers = stage_numbers(topology, pipeline_rank)
    last = numbers[-1] == len(config.model.stages) - 1
    return (
        "".join(config.model.stages[number] for number in numbers) + config.model.mtp_layers * config.mtp.steps * last
    )


def held_weights(config: Config, topology: Topology, vocab_size: int, pipeline_rank: int) -> list[cost.ParameterSize]:
    """The whole parameters of the stages that a process has a part of; those alike but for their shape as one."""
    last = len(config.model.stages) - 1
    return [
        weight
        for number in stage_numbers(topology, pipeline_rank)
        for weight in _summed_weights(
            config.model.stages[number], config.model, config.mtp, vocab_size, number == 0, number == last
        )
    ]


@cache
def _summed_weights(
    symbols: str, model: ModelConfig, mtp: MtpConfig, vocab_size: int, first: bool, last: bool
) -> list[cost.ParameterSize]:
    """Those of one stage."""
    sums: Counter[tuple[str, str, bool]] = Counter()
    for weight in cost.stage_weights(symbols, model, mtp, vocab_size, first, last):
        sums[weight.part, weight.cut, weight.float32] += weight.numel
    return [cost.ParameterSize(part, numel, cut, float32) for (part, cut, float32), numel in sums.items()]


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of a checkpoint: every weight in its own type, in float32 beside another one, and AdamW's two moments."""
    model = config.model
    weights = cost.stage_weights(model.layers, model, config.mtp, vocab_size, first=True, last=True)
    wide = layout_cost.FLOAT32_BYTES
    narrow = wide if model.dtype == "float32" else ELEMENT_BYTES[model.dtype] + wide
    return sum(
        weight.numel * ((wide if weight.float32 else narrow) + layout_cost.NUM_MOMENTS * wide) for weight in weights
    )


def fewest_processes(config: Config, vocab_size: int, room: float, most: int) -> ParallelConfig | None:
    """The layout of the fewest processes, up to ``most``, that hold the model's weights in ``room`` bytes each.

    Experts are spread first, which costs the least to exchange; None where even all processes are too few.
    """
    for count in range(1, most + 1):
        for parallel in (ParallelConfig(expert=count), ParallelConfig(tensor=count, expert=1)):
            try:
                topology = resolve(parallel, config.model, count)
            except TopologyError:
                continue
            element = ELEMENT_BYTES[config.model.dtype]
            held = layout_cost.state_bytes(held_weights(config, topology, vocab_size, 0), topology, element)["weights"]
            if held <= room:
                return parallel
    return None


def footprint(config: Config, topology: Topology, vocab_size: int, pipeline_rank: int) -> Footprint:
    """What a process at this place of the pipeline holds at the most, and sends in a step of ``batch.global``."""
    model, element = config.model, ELEMENT_BYTES[config.model.dtype]
    weights = held_weights(config, topology, vocab_size, pipeline_rank)
    steps = microbatches(topology, config.batch.global_, config.batch.micro)
    largest = max([config.batch.global_, *(size for _, size in config.batch.schedule)])
    most = microbatches(topology, largest, config.batch.micro)
    held = layout_cost.state_bytes(weights, topology, element, config.optim.moments == BFLOAT16)
    held["activations"] = _activations(config, topology, vocab_size, pipeline_rank, most)
    held["a layer computed again"] = _recomputed_bytes(config, topology, pipeline_rank)
    held["working space"] = _working_bytes(config, topology, vocab_size, pipeline_rank)
    traffic = layout_cost.gradient_traffic(weights, topology, element)
    if config.mtp.steps or model.tied_embeddings:
        embedding = vocab_size * model.hidden_size
        traffic[layout_cost.EMBEDDINGS] = layout_cost.embedding_traffic(embedding, topology, pipeline_rank)
    traffic |= _layer_traffic(config, topology, pipeline_rank, steps)
    work = stage_work(model, config.mtp, vocab_size, config.data.seq_length)
    return Footprint(
        pipeline_rank=pipeline_rank,
        parameters=round(sum(layout_cost.held(weight, topology) for weight in weights)),
        memory=held,
        traffic={name: count for name, count in traffic.items() if count},
        balance=[flops / sum(work) for flops in work],
        bubble=layout_cost.bubble(topology, steps),
    )


def _could_count_ahead(config: Config, steps: int) -> bool:
    """Whether balance.mode=exact counts so many micro-batches of a step ahead of it."""
    balance = config.balance
    return steps > 1 and "E" in config.model.layers and balance.scope == "global" and balance.weight > 0


def counts_ahead(config: Config, topology: Topology) -> bool:
    """Whether each step is preceded by a forward pass without the head."""
    steps = microbatches(topology, config.batch.global_, config.batch.micro)
    return config.balance.mode == "exact" and _could_count_ahead(config, steps)


def exact_balance(config: Config, topology: Topology, vocab_size: int) -> str | None:
    """What balance.mode=exact costs, in a line; None where there is nothing to count ahead of a step."""
    steps = microbatches(topology, config.batch.global_, config.batch.micro)
    if not _could_count_ahead(config, steps):
        return None
    forward = cost.forward_flops(config.model, config.mtp, vocab_size, config.data.seq_length)
    whole = sum(forward.values())
    share = (whole - forward[cost.HEAD]) / (cost.TRAINING_FACTOR * whole)
    uses = max(stage.count("E") for stage in config.model.stages) * topology.virtual + config.mtp.steps
    kept = 2 * COUNT_BYTES * uses * steps * config.model.experts  # this process's counts, and their sums
    return (
        f"balance.mode=exact: a forward pass without the head ahead of each step, {share:.1%} more operations; "
        f"it keeps {kept / 2**20:.2f} MiB of counts and no activations"
    )


def _tokens(config: Config, topology: Topology) -> float:
    """Tokens of a micro-batch that a process has before tensor parallelism cuts the sequence once more."""
    return config.batch.micro * config.data.seq_length / topology.context


def _experts(config: Config, topology: Topology) -> tuple[int, float, bool]:
    """Parts of an expert's width, rows that arrive for each token from holders of experts, and whether kernels compute.

    A plan is one for GPUs: bfloat16 runs on kernels there.
    """
    travel = "E" in config.model.layers and topology.expert_owners > 1
    arriving = topology.expert_tensor * activations.used_parts(config.model, topology.expert) if travel else 0.0
    return topology.expert_tensor, arriving, config.model.dtype == "bfloat16"


def _activations(config: Config, topology: Topology, vocab_size: int, pipeline_rank: int, steps: int) -> float:
    stages, numbers = config.model.stages, stage_numbers(topology, pipeline_rank)
    each = [
        activations.stage_bytes(
            stages[number],
            config.model,
            config.mtp,
            vocab_size,
            config.data.seq_length,
            _tokens(config, topology),
            topology.tensor,
            recomputed(config.parallel),
            number == len(stages) - 1,
            *_experts(config, topology),
        )
        for number in numbers
    ]
    moments = layout_cost.in_flight(topology, pipeline_rank, steps)
    return max(sum(number * kept for number, kept in zip(held, each, strict=True)) for held in moments)


def _recomputed_bytes(config: Config, topology: Topology, pipeline_rank: int) -> float:
    """What the backward pass brings back of the layer that it is in: the most of any layer of the process.

    The steps of multi-token prediction count as one layer if they are computed again together.
    """
    model, length, parts = config.model, config.data.seq_length, recomputed(config.parallel)
    numbers, sizes = stage_numbers(topology, pipeline_rank), (model, length, topology.tensor)
    kept = [
        [activations.layer_bytes(symbol, *sizes, again, *_experts(config, topology)) for again in (frozenset(), parts)]
        for symbol in set("".join(model.stages[number] for number in numbers))
    ]
    if numbers[-1] == len(model.stages) - 1 and config.mtp.keys == INFERENCE and LAYER in parts:
        steps = (model, config.mtp, length, topology.tensor)
        kept += [[activations.mtp_bytes(*steps, again, *_experts(config, topology)) for again in (frozenset(), parts)]]
    return _tokens(config, topology) * max(whole - part for whole, part in kept)


def _working_bytes(config: Config, topology: Topology, vocab_size: int, pipeline_rank: int) -> float:
    """On kernels that of `working_bytes`; else the head's float32 gradient and a chunk's logits with theirs."""
    last, (parts, arriving, kernels) = pipeline_rank == topology.pipeline - 1, _experts(config, topology)
    if kernels:
        tokens = _tokens(config, topology)
        domains = topology.expert_domains
        passing = activations.used_parts(config.model, domains) if domains > 1 and arriving else 0.0
        sizes = (vocab_size, tokens, topology.tensor, parts, arriving, last, passing)
        return activations.working_bytes(config.model, *sizes)
    if not last:
        return 0.0
    rows = vocab_size / topology.tensor
    return layout_cost.FLOAT32_BYTES * rows * (config.model.hidden_size + 2 * HEAD_CHUNK)


def _layer_traffic(config: Config, topology: Topology, pipeline_rank: int, steps: int) -> dict[str, float]:
    """Bytes sent for all micro-batches of a step by the layers, the head, and between pipeline stages."""
    model, mtp, ahead = config.model, config.mtp, int(counts_ahead(config, topology))
    again = ahead + (LAYER in recomputed(config.parallel))
    tokens = _tokens(config, topology)
    row = model.hidden_size * ELEMENT_BYTES[model.dtype]
    numbers = stage_numbers(topology, pipeline_rank)
    symbols = held_symbols(config, topology, pipeline_rank)
    last = numbers[-1] == len(model.stages) - 1
    cut = sum(symbol != "E" or model.shared_expert_size > 0 for symbol in symbols)
    edges = (1 if numbers[0] == 0 else 0) + (1 + 2 * mtp.steps if last else 0)
    mixtures, exchanged = symbols.count("E"), dict[str, float]()
    if mixtures:
        own = tokens / topology.tensor
        rows, leaving = (own * activations.used_parts(model, n) for n in (topology.expert, topology.expert_domains))
        choices = own * model.experts_per_token
        exchanged = layout_cost.expert_traffic(rows, leaving, row, choices, topology, again)
    sent = {
        **{name: mixtures * count for name, count in exchanged.items()},
        "tensor gathers and scatters": cut * layout_cost.tensor_traffic(tokens * row, topology, again)
        + edges * layout_cost.boundary_traffic(tokens * row, topology),
        "context exchanges": sum(_context_bytes(symbol, config, topology, again) for symbol in symbols),
        "pipeline sends": layout_cost.pipeline_traffic(tokens * row, topology, pipeline_rank, ahead),
    }
    return {name: steps * count for name, count in sent.items()}


def _context_bytes(symbol: str, config: Config, topology: Topology, again: int) -> float:
    """Bytes that a token mixer sends for one micro-batch of a sequence cut over the context-parallel processes."""
    model, parts = config.model, topology.context
    if parts == 1 or symbol not in "G*":
        return 0.0
    exchanged, gathered = context_numbers(symbol, model, config, topology)
    element = ELEMENT_BYTES[model.dtype]
    once = layout_cost.ring_bytes(exchanged * element, parts) + (parts - 1) * gathered
    return (2 + again) * once


def context_numbers(symbol: str, model: ModelConfig, config: Config, topology: Topology) -> tuple[float, float]:
    """Numbers that a mixer exchanges head by head, and bytes that it gathers from every part, in a forward pass."""
    parts, tensor, tokens = topology.context, topology.tensor, _tokens(config, topology)
    if symbol == "*":
        queries, keys = model.attention_heads * model.head_dim, model.key_value_heads * model.head_dim
        copies = key_head_copies(model.key_value_heads // tensor, parts)
        return tokens * (2 * queries + 2 * keys * copies) / tensor, 0.0
    key, value = model.linear_key_heads * model.linear_key_dim, model.linear_value_heads * model.linear_value_dim
    per_token = (2 * key + 3 * value + 2 * model.linear_value_heads) // tensor
    state = model.linear_value_heads * model.linear_key_dim * (model.linear_key_dim + model.linear_value_dim) // tensor
    if passes_states(model.linear_key_heads // tensor, parts):
        return 0.0, config.batch.micro * state * layout_cost.FLOAT32_BYTES
    return tokens * per_token, 0.0
