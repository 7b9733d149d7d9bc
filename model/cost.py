"""What a token costs: floating-point operations of the forward pass by part, counted from the model's shape.

Only matrix products count (2 operations a multiply-add), as in every published model-FLOPs utilisation; the backward
pass costs twice the forward pass, and recomputed activations count once. Softmax attention is causal: half of the
square. Formulas follow the modules; `tests/model/test_cost.py` holds them against torch's own counter.
"""

from model.config import ModelConfig, MtpConfig
from model.deltanet import CHUNK
from model.mtp import MTP_PATTERN

TRAINING_FACTOR = 3  # forward + backward over forward alone


def gated_delta_net(shape: ModelConfig) -> float:
    """One Gated DeltaNet layer: projections, convolution, and the delta rule in its chunked form."""
    key = shape.linear_key_heads * shape.linear_key_dim
    value = shape.linear_value_heads * shape.linear_value_dim
    projections = shape.hidden_size * (2 * key + 2 * value + 2 * shape.linear_value_heads) + value * shape.hidden_size
    convolution = shape.conv_kernel * (2 * key + value)
    return 2 * (projections + convolution) + delta_rule(shape)


def delta_rule(shape: ModelConfig) -> float:
    """The chunked delta rule: k k^T and q k^T, two solves, reads and writes of the state, the chunk's own values."""
    dk, dv = shape.linear_key_dim, shape.linear_value_dim
    inside = CHUNK * (2 * dk) + CHUNK * (dk + dv) / 2 + CHUNK * dv
    state = 3 * dk * dv
    return 2 * shape.linear_value_heads * (inside + state)


def gated_attention(shape: ModelConfig, seq_length: int) -> float:
    """One gated attention layer: query, gate, key, value and output projections, and causal attention."""
    queries = shape.attention_heads * shape.head_dim
    keys = shape.key_value_heads * shape.head_dim
    projections = shape.hidden_size * (2 * queries + 2 * keys) + queries * shape.hidden_size
    return 2 * projections + 2 * 2 * queries * seq_length / 2


def mixture_of_experts(shape: ModelConfig) -> float:
    """One mixture-of-experts layer: router, the routed experts that a token uses, the shared expert and its gate."""
    routed = 3 * shape.hidden_size * shape.expert_size * shape.experts_per_token
    shared = 3 * shape.hidden_size * shape.shared_expert_size + shape.hidden_size
    return 2 * (shape.hidden_size * shape.experts + routed + shared)


def forward_flops(shape: ModelConfig, mtp: MtpConfig, vocab_size: int, seq_length: int) -> dict[str, float]:
    """Operations a token of one forward pass, by part; their sum times `TRAINING_FACTOR` is the cost of training."""
    each = {
        "G": gated_delta_net(shape),
        "*": gated_attention(shape, seq_length),
        "E": mixture_of_experts(shape),
    }
    head = 2 * shape.hidden_size * vocab_size
    mtp_step = 2 * 2 * shape.hidden_size * shape.hidden_size + sum(each[symbol] for symbol in MTP_PATTERN)
    return {
        "gated_delta_net": each["G"] * shape.layers.count("G"),
        "gated_attention": each["*"] * shape.layers.count("*"),
        "experts": each["E"] * shape.layers.count("E"),
        "mtp": mtp_step * mtp.steps,
        "head": head * (1 + mtp.steps),
    }


def training_flops(shape: ModelConfig, mtp: MtpConfig, vocab_size: int, seq_length: int) -> float:
    """Operations that training on one token takes."""
    return TRAINING_FACTOR * sum(forward_flops(shape, mtp, vocab_size, seq_length).values())
