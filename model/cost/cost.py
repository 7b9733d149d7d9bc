"""What the network costs: its parameters, and the floating-point operations of a token, part by part, from its shape.

Nothing here builds a module or needs torch. Formulas follow the modules: `tests/model/test_cost.py` compares the
parameters with built models, and the operations with torch's own counter.

Only matrix products count as operations (2 a multiply-add), as in every published model-FLOPs utilisation; the
backward pass costs twice the forward pass, and recomputed activations count once. Softmax attention is causal: half
of the square.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import DELTA_CHUNK, INFERENCE, ModelConfig, MtpConfig

TRAINING_FACTOR = 3  # forward + backward over forward alone
TENSOR, EXPERT, WHOLE = "tensor", "expert", "whole"  # the processes that a weight is cut over, if any
EMBEDDING, HEAD, MTP, ROUTED = "embedding", "head", "mtp", "routed_experts"


@dataclass(frozen=True)
class ParameterSize:
    """One parameter: the part that it belongs to, its numbers, what it is cut over, and whether it stays float32."""

    part: str
    numel: int
    cut: str
    float32: bool = False

    @property
    def tensor_parallel(self) -> bool:
        """Whether tensor parallelism cuts it."""
        return self.cut == TENSOR

    @property
    def expert_parallel(self) -> bool:
        """Whether it belongs to experts, which are spread over processes."""
        return self.cut == EXPERT


def _norm(part: str, width: int) -> ParameterSize:
    return ParameterSize(part, width, WHOLE, float32=True)


def layer_weights(symbol: str, shape: ModelConfig) -> list[ParameterSize]:
    """The parameters of one layer of a pattern, its input norm first."""
    hidden = shape.hidden_size
    weights = [_norm("norms", hidden)]
    if symbol == "G":
        key, value = shape.linear_key_heads * shape.linear_key_dim, shape.linear_value_heads * shape.linear_value_dim
        part, heads = "gated_delta_net", shape.linear_value_heads
        return weights + [
            ParameterSize(part, hidden * (2 * key + 2 * value + 2 * heads), TENSOR),
            ParameterSize(part, shape.conv_kernel * (2 * key + value), TENSOR),
            ParameterSize(part, 2 * heads, TENSOR, float32=True),
            _norm(part, shape.linear_value_dim),
            ParameterSize(part, value * hidden, TENSOR),
        ]
    if symbol == "*":
        queries, keys = shape.attention_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
        part = "attention"
        return weights + [
            ParameterSize(part, hidden * (queries * (2 if shape.attention_gate else 1) + 2 * keys), TENSOR),
            _norm(part, 2 * shape.head_dim),
            ParameterSize(part, queries * hidden, TENSOR),
        ]
    if symbol == "-":
        return [*weights, ParameterSize("dense", 3 * hidden * shape.dense_size, TENSOR)]
    weights += [
        ParameterSize("router", shape.experts * hidden, WHOLE, float32=True),
        ParameterSize(ROUTED, 3 * shape.experts * hidden * shape.expert_size, EXPERT),
    ]
    if shape.shared_expert_size:
        weights += [
            ParameterSize("shared_expert", 3 * hidden * shape.shared_expert_size, TENSOR),
            ParameterSize("shared_expert", hidden, WHOLE),
        ]
    return weights


def stage_weights(
    symbols: str, shape: ModelConfig, mtp: MtpConfig, vocab_size: int, first: bool, last: bool
) -> Iterator[ParameterSize]:
    """The parameters of a pipeline stage with these layers: the embedding on the first, head and MTP on the last.

    The last stage of several reads the embeddings of further tokens from a copy of its own if there is an MTP layer.
    """
    hidden = shape.hidden_size
    if first or (last and mtp.steps):
        yield ParameterSize(EMBEDDING, vocab_size * hidden, TENSOR)
    for symbol in symbols:
        yield from layer_weights(symbol, shape)
    if last:
        yield _norm("norms", hidden)
        if not shape.tied_embeddings or not (first or mtp.steps):  # else the embedding of this stage is the head too
            yield ParameterSize(HEAD, vocab_size * hidden, TENSOR)
    if last and mtp.steps:
        yield ParameterSize(MTP, 2 * hidden * hidden, WHOLE)
        yield _norm(MTP, 3 * hidden)
        for symbol in shape.mtp_layers:
            yield from (ParameterSize(MTP, x.numel, x.cut, x.float32) for x in layer_weights(symbol, shape))


def parameters(shape: ModelConfig, mtp: MtpConfig, vocab_size: int) -> dict[str, int]:
    """Numbers in the parameters of each part; their sum is the whole model's."""
    counts: Counter[str] = Counter()
    for weight in stage_weights(shape.layers, shape, mtp, vocab_size, first=True, last=True):
        counts[weight.part] += weight.numel
    return dict(counts)


def total_parameters(shape: ModelConfig, vocab_size: int) -> int:
    """All parameters of the trunk, embedding and head, without an MTP layer."""
    return sum(parameters(shape, MtpConfig(steps=0), vocab_size).values())


def active_parameters(shape: ModelConfig) -> int:
    """The parameters of the trunk's layers that one token meets: k of the routed experts, no embedding, no head."""
    counts = parameters(shape, MtpConfig(steps=0), vocab_size=0)
    routed = counts.pop(ROUTED, 0)
    return sum(counts.values()) + routed // shape.experts * shape.experts_per_token


def delta_rule(shape: ModelConfig) -> float:
    """The chunked delta rule: k k^T and q k^T, two solves, reads and writes of the state, the chunk's own values."""
    dk, dv = shape.linear_key_dim, shape.linear_value_dim
    inside = DELTA_CHUNK * (2 * dk) + DELTA_CHUNK * (dk + dv) / 2 + DELTA_CHUNK * dv
    state = 3 * dk * dv
    return 2 * shape.linear_value_heads * (inside + state)


def layer_flops(symbol: str, shape: ModelConfig, seq_length: float) -> dict[str, float]:
    """Operations a token of one layer's forward pass, by part."""
    hidden = shape.hidden_size
    if symbol == "G":
        key, value = shape.linear_key_heads * shape.linear_key_dim, shape.linear_value_heads * shape.linear_value_dim
        projections = hidden * (2 * key + 2 * value + 2 * shape.linear_value_heads) + value * hidden
        return {
            "deltanet_projections": 2 * projections,
            "deltanet_convolution": 2 * shape.conv_kernel * (2 * key + value),
            "delta_rule": delta_rule(shape),
        }
    if symbol == "*":
        queries, keys = shape.attention_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
        return {
            "attention_projections": 2 * hidden * (2 * queries + 2 * keys),
            "attention_gate": 2 * hidden * queries if shape.attention_gate else 0,
            "attention_scores": 2 * 2 * queries * seq_length / 2,
        }
    if symbol == "-":
        return {"dense": 2 * 3 * hidden * shape.dense_size}
    return {
        "router": 2 * hidden * shape.experts,
        ROUTED: 2 * 3 * hidden * shape.expert_size * shape.experts_per_token,
        "shared_expert": 2 * 3 * hidden * shape.shared_expert_size,
        "shared_expert_gate": 2 * hidden if shape.shared_expert_size else 0,
    }


def chain_flops(shape: ModelConfig, mtp: MtpConfig) -> float:
    """Scores and mixtures of the k - 1 chain keys that step k attends to beside the prefix, a token."""
    keys = mtp.steps * (mtp.steps - 1) / 2 if mtp.keys == INFERENCE else 0
    return 2 * 2 * shape.attention_heads * shape.head_dim * keys


def stage_flops(
    symbols: str, shape: ModelConfig, mtp: MtpConfig, vocab_size: int, seq_length: float, last: bool
) -> dict[str, float]:
    """Operations a token of the forward pass of a pipeline stage, by part; head and MTP are the last one's."""
    flops: defaultdict[str, float] = defaultdict(float)
    for symbol, number in Counter(symbols).items():
        for part, each in layer_flops(symbol, shape, seq_length).items():
            flops[part] += number * each
    if last:
        layers = sum(sum(layer_flops(symbol, shape, seq_length).values()) for symbol in shape.mtp_layers)
        flops[MTP] = mtp.steps * (2 * 2 * shape.hidden_size**2 + layers) + chain_flops(shape, mtp)
        flops[HEAD] = (1 + mtp.steps) * 2 * shape.hidden_size * vocab_size
    return {part: count for part, count in flops.items() if count}


def forward_flops(shape: ModelConfig, mtp: MtpConfig, vocab_size: int, seq_length: float) -> dict[str, float]:
    """Operations a token of one forward pass, by part; their sum times `TRAINING_FACTOR` is the cost of training."""
    return stage_flops(shape.layers, shape, mtp, vocab_size, seq_length, last=True)


def training_flops(shape: ModelConfig, mtp: MtpConfig, vocab_size: int, seq_length: float) -> float:
    """Operations that training on one token takes."""
    return TRAINING_FACTOR * sum(forward_flops(shape, mtp, vocab_size, seq_length).values())


def rule_of_thumb_flops(shape: ModelConfig, vocab_size: int, seq_length: int) -> float:
    """Operations of training on one token by the usual rule: 6 x active parameters and head, and causal attention.

    The delta rule counts as its recurrence (3 products of a state's size); in chunks, as it is computed, it takes
    more. Norms count like matrices, so this is not exact; without MTP.
    """
    attention = shape.layers.count("*") * 6 * seq_length * shape.attention_heads * shape.head_dim
    state = shape.linear_value_heads * shape.linear_key_dim * shape.linear_value_dim
    head = shape.hidden_size * vocab_size
    return 6 * (active_parameters(shape) + head) + attention + shape.layers.count("G") * 6 * 3 * state
