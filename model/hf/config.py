"""Our settings and the ``config.json`` of a Hugging Face Qwen3-Next checkpoint, in both directions.

What one side cannot say is an error of its own: nothing is rounded to the nearest thing that it can.
"""

from dataclasses import dataclass

from model.config import ModelConfig, ModelError

MODEL_TYPE = "qwen3_next"
ARCHITECTURE = "Qwen3NextForCausalLM"
# Ours, theirs, and what theirs is where config.json leaves it out (the defaults of transformers' Qwen3NextConfig).
FIELDS = (
    ("vocab_size", "vocab_size", 151936),
    ("hidden_size", "hidden_size", 2048),
    ("attention_heads", "num_attention_heads", 16),
    ("key_value_heads", "num_key_value_heads", 2),
    ("head_dim", "head_dim", 256),
    ("linear_key_heads", "linear_num_key_heads", 16),
    ("linear_value_heads", "linear_num_value_heads", 32),
    ("linear_key_dim", "linear_key_head_dim", 128),
    ("linear_value_dim", "linear_value_head_dim", 128),
    ("conv_kernel", "linear_conv_kernel_dim", 4),
    ("experts", "num_experts", 512),
    ("experts_per_token", "num_experts_per_tok", 10),
    ("expert_size", "moe_intermediate_size", 512),
    ("shared_expert_size", "shared_expert_intermediate_size", 512),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("init_std", "initializer_range", 0.02),
)
# What their architecture leaves open and ours does not.
ALWAYS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LAYER_TYPES = {"G": "linear_attention", "*": "full_attention"}
YARN_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
DEFAULTS = {"num_hidden_layers": 48, "full_attention_interval": 4, "router_aux_loss_coef": 0.001}
ROPE_DEFAULTS = {"rope_theta": 1e4, "partial_rotary_factor": 0.25}


@dataclass(frozen=True)
class Imported:
    """What a config.json says.

    Attributes:
        balance_weight: the coefficient of the load-balancing loss.
        mtp: whether it promises a multi-token-prediction layer.
    """

    model: ModelConfig
    balance_weight: float
    mtp: bool


def check_exportable(model: ModelConfig) -> None:
    """Raises ModelError for a model that Qwen3-Next's architecture cannot be."""

    def refuse(what: str, mend: str) -> None:
        raise ModelError(f"{what} has no counterpart in a Hugging Face {MODEL_TYPE} checkpoint: {mend}")

    if set(model.layers[::2]) - set(LAYER_TYPES) or set(model.layers[1::2]) != {"E"} or len(model.layers) % 2:
        refuse(f"model.pattern={model.pattern!r}", "each of its blocks is a G or a *, and then an E, as in GEGEGE*E")
    if not model.attention_gate:
        refuse("model.attention_gate=false", "its attention always has an output gate")
    if not model.shared_expert_size:
        refuse("model.shared_expert_size=0", "its experts always have a shared one beside them")


def interval(kinds: list[str]) -> int | None:
    """n where every n-th block, and no other, has full attention; None where no n says it."""
    for n in range(1, len(kinds) + 2):
        if kinds == [LAYER_TYPES["G" if (i + 1) % n else "*"] for i in range(len(kinds))]:
            return n
    return None


def to_hf(
    model: ModelConfig, mtp: bool, balance_weight: float, max_length: int, dtype: str, eod_id: int | None
) -> dict:
    """The config.json of a checked model whose ``vocab_size`` is set (padding rows of the vocabulary included).

    RoPE stands in it twice: as ``rope_parameters`` for transformers and vLLM, and as the older single keys that
    SGLang reads. Where blocks follow an interval SGLang needs it too; the others go by ``layer_types``.
    """
    kinds = [LAYER_TYPES[symbol] for symbol in model.layers[::2]]
    rope = {"rope_theta": model.rope_base, "partial_rotary_factor": model.rotary_fraction}
    scaling = None
    if model.yarn_factor > 1:
        scaling = {
            "rope_type": "yarn",
            "factor": model.yarn_factor,
            "original_max_position_embeddings": model.yarn_original_length,
        }
    values = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        **{theirs: getattr(model, ours) for ours, theirs, _ in FIELDS},
        **ALWAYS,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "intermediate_size": model.expert_size,  # of dense blocks, of which there are none
        "max_position_embeddings": max_length,
        "rope_parameters": (scaling or {"rope_type": "default"}) | rope,
        "rope_scaling": scaling and scaling | rope,
        **rope,
        "router_aux_loss_coef": balance_weight,
        "num_nextn_predict_layers": int(mtp),
        "bos_token_id": None,
        "eos_token_id": eod_id,
        "pad_token_id": eod_id,
        "use_cache": True,
    }
    if (every := interval(kinds)) is not None:
        values["full_attention_interval"] = every
    return {key: value for key, value in values.items() if value is not None}


def from_hf(config: dict) -> Imported:
    """Our settings for a config.json.

    Raises:
        ModelError: what the model is told to be, and ours cannot be.
    """

    def refuse(key: str, value, why: str) -> None:
        raise ModelError(f"config.json's {key}={value!r} cannot be imported: {why}")

    if config.get("model_type") != MODEL_TYPE:
        refuse("model_type", config.get("model_type"), f"only {MODEL_TYPE} has these layers")
    for key, value in ALWAYS.items():
        if (config.get(key, value) or type(value)()) != value:
            refuse(key, config[key], f"this model's layers have {value!r}")
    if config.get("quantization_config") is not None:
        refuse("quantization_config", "...", "import the weights that it was made from")
    if (depth := config.get("num_nextn_predict_layers") or 0) > 1:
        refuse("num_nextn_predict_layers", depth, "one layer predicts all further tokens")
    blocks = config.get("num_hidden_layers", DEFAULTS["num_hidden_layers"])
    every = config.get("full_attention_interval", DEFAULTS["full_attention_interval"])
    kinds = config.get("layer_types") or [LAYER_TYPES["G" if (i + 1) % every else "*"] for i in range(blocks)]
    if len(kinds) != blocks or set(kinds) - set(LAYER_TYPES.values()):
        refuse("layer_types", kinds, f"it must name linear_attention or full_attention for {blocks} blocks")
    pattern, repeats = _shortest_period("".join("GE" if kind == LAYER_TYPES["G"] else "*E" for kind in kinds))
    fields = {ours: config.get(theirs, default) for ours, theirs, default in FIELDS}
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["attention_heads"]
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ("bfloat16", "float32"):
        refuse("dtype", dtype, "weights are trained in bfloat16 or float32")
    return Imported(
        ModelConfig(pattern=pattern, repeats=repeats, dtype=dtype, **fields, **_rope(config, refuse)),
        config.get("router_aux_loss_coef", DEFAULTS["router_aux_loss_coef"]),
        depth == 1,
    )


def _rope(config: dict, refuse) -> dict:
    """Our settings of RoPE; ``rope_scaling``, an older name, counts before ``rope_parameters``, as in transformers."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base, fraction = (rope.get(key, config.get(key, default)) for key, default in ROPE_DEFAULTS.items())
    plain = {"rope_base": float(base), "rotary_fraction": fraction}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return plain
    if kind != "yarn" or set(rope) - YARN_KEYS:
        refuse("rope_scaling", rope, "RoPE is plain, or YaRN with its usual constants (factor and original length)")
    length = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    return plain | {"yarn_factor": float(rope["factor"]), "yarn_original_length": length}


def _shortest_period(layers: str) -> tuple[str, int]:
    """A pattern, and how often it is repeated."""
    size = next(n for n in range(2, len(layers) + 1, 2) if layers == layers[:n] * (len(layers) // n))
    return layers[:size], len(layers) // size
