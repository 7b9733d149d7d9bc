"""What the forward pass keeps for the backward pass: bytes a token of each kind of layer, from the model's shape.

There are two tables: that of the plain modules, and that of the GPU's kernels (``kernels=True``: bfloat16), which keep
what their ``save_for_backward`` names and compute the rest again.

The formulas sum the tensors that the torch backend's modules save; `tests/model/test_activations.py` compares them
with what autograd really holds. They leave out what does not grow with a width (indices, masks of tokens).
"""

import math
from functools import partial

from model.config import DELTA_CHUNK, INFERENCE, KERNEL_HEAD_CHUNK, LAYER, ModelConfig, MtpConfig

FLOAT32_BYTES = 4
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def used_parts(shape: ModelConfig, parts: int) -> float:
    """Of so many equal parts of a layer's experts, in how many a token has an expert, if it uses all alike."""
    none = math.comb(shape.experts - shape.experts // parts, shape.experts_per_token)
    return parts * (1 - none / math.comb(shape.experts, shape.experts_per_token))


def _norm(width: int, element: int, recompute: frozenset[str]) -> float:
    """The input in float32 and the normed input; only the input where the norm is computed again."""
    return width * (element if "norm" in recompute else 2 * FLOAT32_BYTES)


def _delta_net(shape: ModelConfig, element: int, recompute: frozenset[str]) -> float:
    key, heads = shape.linear_key_heads * shape.linear_key_dim, shape.linear_value_heads
    wide_key, value = heads * shape.linear_key_dim, heads * shape.linear_value_dim
    if "deltanet" in recompute:
        return element * (2 * key + 2 * value + 2 * heads + value)
    convolution = 5 * element * (2 * key + value)  # its input, three shifted copies, the input of SiLU
    normalised = 2 * FLOAT32_BYTES * key
    # In float32: queries, keys and values in chunks, what is solved and read; pairs inside a chunk; a state a chunk.
    inside = 10 * wide_key + 7 * value + 6 * heads * DELTA_CHUNK
    state = wide_key * shape.linear_value_dim / DELTA_CHUNK
    gated = 3 * element * value
    return convolution + normalised + FLOAT32_BYTES * (inside + state) + gated


def _attention(shape: ModelConfig, seq_length: int, element: int, recompute: frozenset[str]) -> tuple[float, float]:
    """What tensor parallelism cuts, and what it does not: the mask of packed documents, a number for each pair."""
    queries, keys = shape.attention_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    # Projections, normed and turned queries and keys, values, and the output.
    kept = _norm(queries + keys, element, recompute) + element * (3 * queries + 3 * keys)
    if shape.attention_gate:
        cast = FLOAT32_BYTES if element < FLOAT32_BYTES else 0
        kept += queries * (3 * element + cast)
    return kept, 0 if "attention" in recompute else element * seq_length


def _moe(shape: ModelConfig, element: int, recompute: frozenset[str], expert_tensor: int, arriving: float) -> float:
    shared = shape.shared_expert_size
    if "experts" in recompute:
        routed = element * arriving * shape.hidden_size
    else:  # a token's rows as experts read them: all holders of an expert's parts do
        routed = element * shape.experts_per_token * (expert_tensor * shape.hidden_size + 5 * shape.expert_size)
    scores = 2 * FLOAT32_BYTES * shape.experts + FLOAT32_BYTES * shape.hidden_size
    return scores + routed + (element * shape.hidden_size + 4 * element * shared) * (shared > 0)


def _kernel_layer(symbol: str, shape: ModelConfig, recompute: frozenset[str], arriving: float) -> float:
    """Of the kernels: the norm's input, the normed states that projections read, and what each kernel keeps."""
    element, hidden = ELEMENT_BYTES[shape.dtype], shape.hidden_size
    kept: float = 2 * hidden
    if symbol == "G":
        key, value = shape.linear_key_heads * shape.linear_key_dim, shape.linear_value_heads * shape.linear_value_dim
        heads = shape.linear_value_heads
        kept += 2 * key + 2 * value + 2 * heads + value  # the projection, and what the last one reads
        if "deltanet" not in recompute:  # the rule's inputs and solved chunks; its output and gate for the norm
            kept += 2 * key + value + 4 * heads + heads * DELTA_CHUNK + 2 * value
    elif symbol == "*":
        queries, keys = shape.attention_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
        gates = queries * shape.attention_gate
        # The projection, heads normed and turned, the output, and, gated, the gate and what the last projection reads.
        kept += (queries + gates + 2 * keys) + (queries + 2 * keys) + queries + 2 * gates
    elif symbol == "-":
        kept += 3 * shape.dense_size
    else:
        rows = shape.experts_per_token
        kept += 3 * shape.shared_expert_size + hidden * (shape.shared_expert_size > 0)
        kept += hidden * arriving
        kept += 0 if "experts" in recompute else rows * 2 * shape.expert_size
        return element * kept + FLOAT32_BYTES * shape.experts
    return element * kept


def working_bytes(shape: ModelConfig, vocab_size: int, tokens: float, tensor: int, expert_tensor: int,
                  arriving: float, last: bool, passing: float = 0.0) -> float:  # fmt: skip
    """Most bytes that kernels work with beside what is kept: in the head, or in the backward pass of a mixture.

    The head: its float32 gradient and a chunk's logits, which become their gradient in place. A mixture: for each row
    the gradient of its result, and four widths of an expert; of rows that travel also gradients as they arrive and as
    they leave, and once those that pass through on their way to another holder of experts (``passing`` for each token).
    """
    element = ELEMENT_BYTES[shape.dtype]
    computed = shape.experts_per_token * (expert_tensor * shape.hidden_size + 4 * shape.expert_size)
    width = computed + (2 * arriving + passing) * shape.hidden_size
    mixture = element * tokens / tensor * width if "E" in shape.layers else 0.0
    head = vocab_size / tensor * (FLOAT32_BYTES * shape.hidden_size + element * min(tokens, KERNEL_HEAD_CHUNK))
    return max(mixture, head if last else 0.0)


def layer_bytes(
    symbol: str,
    shape: ModelConfig,
    seq_length: int,
    tensor: int,
    recompute: frozenset[str],
    expert_tensor: int = 1,
    arriving: float = 0,
    kernels: bool = False,
) -> float:
    """Bytes that one layer keeps for each token of this process's part of the sequence.

    Args:
        seq_length: tokens of a whole sequence. tensor: tensor-parallel processes.
        recompute: parts that are computed again, or {LAYER}. expert_tensor: processes that share an expert's width.
        arriving: rows that arrive for each token where other processes hold experts too (`used_parts`, for each that
            shares an expert's width). kernels: whether GPU kernels compute.
    """
    element, hidden = ELEMENT_BYTES[shape.dtype], shape.hidden_size
    if LAYER in recompute:
        return element * hidden / tensor
    if kernels:
        return _kernel_layer(symbol, shape, recompute, arriving) / tensor
    kept, whole = _norm(hidden, element, recompute), 0.0
    if symbol == "G":
        kept += element * hidden + _delta_net(shape, element, recompute)
    elif symbol == "*":
        attention, whole = _attention(shape, seq_length, element, recompute)
        kept += element * hidden + attention
    elif symbol == "-":
        kept += element * hidden + 4 * element * shape.dense_size
    else:
        # The router reads a float32 copy; only a shared expert reads the normed input itself.
        reads = element * hidden if shape.shared_expert_size and element < FLOAT32_BYTES else 0
        kept += reads + _moe(shape, element, recompute, expert_tensor, arriving)
    return kept / tensor + whole


def mtp_bytes(
    shape: ModelConfig,
    mtp: MtpConfig,
    seq_length: int,
    tensor: int,
    recompute: frozenset[str],
    expert_tensor: int = 1,
    arriving: float = 0,
    kernels: bool = False,
) -> float:
    """Bytes that all multi-token-prediction steps keep for each token; arguments as of `layer_bytes`.

    Under the keys of inference all steps are computed again together, from the embeddings that they read.
    """
    element, hidden = ELEMENT_BYTES[shape.dtype], shape.hidden_size
    chained = mtp.keys == INFERENCE
    if chained and LAYER in recompute:
        return mtp.steps * element * hidden / tensor
    each = (
        layer_bytes(symbol, shape, seq_length, tensor, recompute, expert_tensor, arriving, kernels)
        for symbol in shape.mtp_layers
    )
    step = sum(each)
    step += (3 * _norm(hidden, element, recompute) + 2 * element * hidden) / tensor
    if not chained or mtp.steps < 2:
        return mtp.steps * step
    # Later steps keep no mask, and step k a copy of the keys and values of the k - 2 steps between it and the first.
    mask = 0.0 if kernels else _attention(shape, seq_length, element, recompute)[1]
    copies = (mtp.steps - 1) * (mtp.steps - 2) * element * shape.key_value_heads * shape.head_dim
    return mtp.steps * step - (mtp.steps - 1) * mask + copies / tensor


def stage_bytes(
    symbols: str,
    shape: ModelConfig,
    mtp: MtpConfig,
    vocab_size: int,
    seq_length: int,
    tokens: float,
    tensor: int,
    recompute: frozenset[str],
    last: bool,
    expert_tensor: int = 1,
    arriving: float = 0,
    kernels: bool = False,
) -> float:
    """Bytes that a pipeline stage keeps for one micro-batch of ``tokens`` tokens on this process.

    On the last stage the head keeps the gradients of its states and, in float32, of its own weights.
    """
    element, hidden = ELEMENT_BYTES[shape.dtype], shape.hidden_size
    each = partial(
        layer_bytes,
        shape=shape,
        seq_length=seq_length,
        tensor=tensor,
        recompute=recompute,
        expert_tensor=expert_tensor,
        arriving=arriving,
        kernels=kernels,
    )
    kept = sum(each(symbol) for symbol in symbols)
    if not last:
        return kept * tokens
    kept += _norm(hidden, element, recompute) / tensor
    kept += mtp_bytes(shape, mtp, seq_length, tensor, recompute, expert_tensor, arriving, kernels)
    kept += (1 + mtp.steps) * element * hidden
    return kept * tokens + FLOAT32_BYTES * vocab_size * hidden / tensor
