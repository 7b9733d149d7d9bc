"""What the modules are made of (``model.backend``), and which of them multiply in FP8 (``model.fp8``).

The modules, their order and the names in a checkpoint are the same with every backend: a run goes on with another one.
"""

from dataclasses import replace
from importlib.util import find_spec

from model.config import FP8_ALIGNED, Layout, ModelConfig, ModelError

BACKENDS = ("torch", "te")
# How Transformer Engine scales what it rounds to 8 bits, as megatron-core names it: format, recipe. Blocks have scales
# of their own (1 x 128 numbers of activations and gradients, 128 x 128 of weights); else a tensor has one, of its own
# largest number. Scales of the step before (delayed) are not offered: on an H200 they gave this model wrong gradients.
FP8 = {"block": ("e4m3", "blockwise"), "current": ("hybrid", "tensorwise")}
FP8_CHOICES = ("off", *FP8)
# The linear layers that are Transformer Engine's, all of whose products, forwards and backwards, FP8 rounds to 8 bits.
# Every other parameter stays as it is: routers, gates, norms, convolutions, decays, eh_proj of the MTP layer and the
# head, whose logits the loss is taken of (DeepSeek-V3 report, 2024, section 3.3.1, keeps the same in high precision);
# and the experts. The shared one is narrow: at a width of 512 its products are no faster in FP8 than in bfloat16
# (tests/bench/RESULTS.md). Of the routed ones Transformer Engine's grouped product takes 64 a call and their numbers of
# rows from the host (2.20), and NVIDIA's own tuning of Qwen3.5-35B-A3B on H100 (Megatron-Bridge, pull request 5098)
# kept them in bfloat16.
TE_LINEARS = {
    "linear_qkv": "attention: queries, gates, keys, values",
    "linear_proj": "attention: output",
    "in_proj": "Gated DeltaNet: queries, keys, values, output gates; write strengths b and decays a stay bfloat16",
    "out_proj": "Gated DeltaNet: output",
    "linear_fc1": "dense layer: gate and up",
    "linear_fc2": "dense layer: down",
}


def on_torch(model: ModelConfig) -> ModelConfig:
    """The same model of torch's parts, which every machine has."""
    return replace(model, backend="torch", fp8="off")


def check_backend(model: ModelConfig) -> None:
    """Raises ModelError for a backend that cannot be built."""
    for name, value, known in (("backend", model.backend, BACKENDS), ("fp8", model.fp8, FP8_CHOICES)):
        if value not in known:
            raise ModelError(f"model.{name}={value!r} is not known: choose {', '.join(known[:-1])} or {known[-1]}")
    if model.fp8 == "off":
        return
    if model.backend != "te":
        raise ModelError(f"model.fp8={model.fp8} is Transformer Engine's: set model.backend=te, or model.fp8=off")
    if model.dtype != "bfloat16":
        raise ModelError(
            f"model.fp8={model.fp8} rounds products of bfloat16 and model.dtype={model.dtype}: set "
            f"model.dtype=bfloat16, or model.fp8=off"
        )


def linear_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Columns and rows, [in, out], of the weights of `TE_LINEARS` that a model has."""
    hidden, sizes = model.hidden_size, {}
    if "*" in model.layers:
        each = model.attention_heads // model.key_value_heads
        wide = each * (2 if model.attention_gate else 1) + 2
        sizes["linear_qkv"] = (hidden, model.key_value_heads * wide * model.head_dim)
        sizes["linear_proj"] = (model.attention_heads * model.head_dim, hidden)
    if "G" in model.layers:
        ratio = model.linear_value_heads // model.linear_key_heads
        per_head = 2 * model.linear_key_dim + ratio * (2 * model.linear_value_dim + 2)
        sizes["in_proj"] = (hidden, model.linear_key_heads * per_head)
        sizes["out_proj"] = (model.linear_value_heads * model.linear_value_dim, hidden)
    if "-" in model.layers:
        sizes |= {"linear_fc1": (hidden, 2 * model.dense_size), "linear_fc2": (model.dense_size, hidden)}
    return sizes


def check_fp8_sizes(model: ModelConfig, layout: Layout, tokens: int) -> None:
    """Raises ModelError for sizes that FP8 products do not take.

    Args:
        tokens: of a micro-batch on a process.
    """
    if model.fp8 == "off":
        return
    cut = {"linear_qkv": (1, layout.tensor), "in_proj": (1, layout.tensor), "linear_fc1": (1, layout.tensor)}
    for name, sizes in linear_sizes(model).items():
        columns, rows = cut.get(name, (layout.tensor, 1))
        for size in (sizes[0] // columns, sizes[1] // rows):
            if size % FP8_ALIGNED:
                raise ModelError(
                    f"model.fp8={model.fp8} multiplies {FP8_ALIGNED} rows and columns at once, and {name} ("
                    f"{TE_LINEARS[name].split(';')[0]}) has {size} on a process: choose widths and heads that give a "
                    f"multiple of {FP8_ALIGNED}, or model.fp8=off"
                )
    if tokens % FP8_ALIGNED:
        raise ModelError(
            f"model.fp8={model.fp8} multiplies {FP8_ALIGNED} tokens at once, and batch.micro x data.seq_length gives a "
            f"process {tokens}: choose a multiple of {FP8_ALIGNED}, or model.fp8=off"
        )


def require_backend(model: ModelConfig) -> None:
    """Raises ModelError where what a backend is made of is not installed, or has no GPU to run on."""
    if model.backend != "te":
        return
    if find_spec("transformer_engine") is None:
        raise ModelError(
            "model.backend=te needs Transformer Engine, which is not installed: ./launch.sh setup te, or "
            "model.backend=torch"
        )
    import torch  # takes seconds, which a mistake in the settings should not wait for

    if not torch.cuda.is_available():
        raise ModelError("model.backend=te needs a GPU, and there is none: choose model.backend=torch")
