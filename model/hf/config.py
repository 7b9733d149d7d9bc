"""Our settings and the ``config.json`` of a Hugging Face checkpoint (`model.hf.families`), in both directions.

What one side cannot say is an error of its own: nothing is rounded to the nearest thing that it can.
"""

import math
from dataclasses import dataclass
from typing import Any, NoReturn

from model.config import ModelConfig, ModelError
from model.hf.families import FAMILIES, QWEN3_NEXT, TEXT_CONFIG, WRAPPERS, Family

LAYER_TYPES = {"G": "linear_attention", "*": "full_attention"}
YARN_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
YARN_USUAL = {"beta_fast": 32, "beta_slow": 1}  # the constants of YaRN's paper, which some files spell out
MROPE = {"mrope_section", "mrope_interleaved"}  # places of three axes; all are equal where there is text alone
INTERVAL, BALANCE = 4, 0.001  # full_attention_interval and router_aux_loss_coef where they are left out
STATE = {"mamba_ssm_dtype": "float32"}  # how engines keep Gated DeltaNet's state; else in the weights' type
ROPE_DEFAULTS = {"rope_theta": 1e4, "partial_rotary_factor": 0.25}
FP8_FORMAT = {"quant_method": "fp8", "fmt": "e4m3"}
SUPERSEDED = ("quantization_config", "torch_dtype", "rope_scaling")  # keys of an import that an export may contradict


@dataclass(frozen=True)
class Imported:
    """What a config.json says.

    Attributes:
        balance_weight: the coefficient of the load-balancing loss.
        mtp: whether it promises a multi-token-prediction layer.
        wrapped: whether the model is part of one that also sees.
        fp8_block: rows and columns of a weight that share a scale, where weights are stored in FP8.
        half: whether they are stored in float16, in which nothing is trained here.
    """

    model: ModelConfig
    balance_weight: float
    mtp: bool
    family: Family = QWEN3_NEXT
    wrapped: bool = False
    fp8_block: tuple[int, int] | None = None
    half: bool = False


def check_exportable(model: ModelConfig, family: Family = QWEN3_NEXT) -> None:
    """Raises ModelError for a model that an architecture cannot be."""

    def refuse(what: str, mend: str) -> NoReturn:
        raise ModelError(f"{what} has no counterpart in a Hugging Face {family.model_type} checkpoint: {mend}")

    second = family.feed_forward
    if set(model.layers[::2]) - set(LAYER_TYPES) or set(model.layers[1::2]) != {second} or len(model.layers) % 2:
        example = f"G{second}" * 3 + f"*{second}"
        refuse(f"model.pattern={model.pattern!r}", f"each of its blocks is a G or a *, and then {second}, as {example}")
    if not model.attention_gate:
        refuse("model.attention_gate=false", "its attention always has an output gate")
    if second == "E" and not model.shared_expert_size:
        refuse("model.shared_expert_size=0", "its experts always have a shared one beside them")


def interval(kinds: list[str]) -> int | None:
    """n where every n-th block, and no other, has full attention; None where no n says it."""
    for n in range(1, len(kinds) + 2):
        if kinds == [LAYER_TYPES["G" if (i + 1) % n else "*"] for i in range(len(kinds))]:
            return n
    return None


def to_hf(
    model: ModelConfig,
    mtp: bool,
    balance_weight: float,
    max_length: int,
    dtype: str,
    eod_id: int | None,
    family: Family = QWEN3_NEXT,
    carried: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a checked model whose ``vocab_size`` is set (padding rows of the vocabulary included).

    Where blocks follow an interval SGLang needs it too; the others go by ``layer_types``.

    Args:
        carried: the config.json that the model was imported with, whose other keys go on; with a ``text_config``, the
            model becomes part of the one that also sees again.
    """
    kinds = [LAYER_TYPES[symbol] for symbol in model.layers[::2]]
    old = dict(carried or {})
    wrapped = TEXT_CONFIG in old
    old_text = dict(old[TEXT_CONFIG]) if wrapped else old
    values = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        **{theirs: getattr(model, ours) for ours, theirs, _ in family.fields},
        **family.always,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "max_position_embeddings": max_length,
        **_rope_to_hf(model, family, old_text.get("rope_parameters") or {}, wrapped),
        family.mtp_key: int(mtp),
        "bos_token_id": None,
        "eos_token_id": eod_id,
        "pad_token_id": eod_id,
        "use_cache": True,
        "full_attention_interval": interval(kinds),
    }
    if family.feed_forward == "E":
        values["router_aux_loss_coef"] = balance_weight
        values.setdefault("intermediate_size", model.expert_size)  # of dense blocks, of which there are none
    values = {key: value for key, value in values.items() if value is not None}
    usual = {} if family is QWEN3_NEXT else STATE
    text = usual | {key: value for key, value in old_text.items() if key not in SUPERSEDED} | values
    if not wrapped:
        return text
    assert family.wrapper is not None  # only such a family is imported with a text_config
    model_type, architecture = family.wrapper
    text.pop("architectures", None)
    whole = {key: value for key, value in old.items() if key not in SUPERSEDED}
    return whole | {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": dtype,
        "tie_word_embeddings": model.tied_embeddings,
        TEXT_CONFIG: text,
    }


def _rope_to_hf(model: ModelConfig, family: Family, old: dict[str, Any], wrapped: bool) -> dict[str, Any]:
    """RoPE, for Qwen3-Next twice: as ``rope_parameters``, and as the older single keys that SGLang reads.

    Only a model that sees has positions on three axes. Where text stands alone vLLM 0.32 gives its drafts three
    positions a token if these keys are there, and a layer that takes one: on a CPU it writes past the end of them.
    """
    rope: dict[str, Any] = {"rope_theta": model.rope_base, "partial_rotary_factor": model.rotary_fraction}
    scaling = None
    if model.yarn_factor > 1:
        scaling = {
            "rope_type": "yarn",
            "factor": model.yarn_factor,
            "original_max_position_embeddings": model.yarn_original_length,
        }
    parameters = (scaling or {"rope_type": "default"}) | rope
    if family is QWEN3_NEXT:
        return {"rope_parameters": parameters, "rope_scaling": scaling and scaling | rope, **rope}
    if not wrapped:
        return {"rope_parameters": parameters}
    pairs = model.rotary_dim // 2
    sections = old.get("mrope_section")
    if sections is None or sum(sections) != pairs:
        sections = [(pairs + 2 - axis) // 3 for axis in range(3)]
    return {"rope_parameters": parameters | {"mrope_section": sections, "mrope_interleaved": True}}


def _refuse(key: str, value: object, why: str) -> NoReturn:
    raise ModelError(f"config.json's {key}={value!r} cannot be imported: {why}")


def from_hf(config: dict[str, Any], dtype: str | None = None) -> Imported:
    """Our settings for a config.json.

    Args:
        dtype: the type to train in; None: the file's own.
    Raises:
        ModelError: what the model is told to be, and ours cannot be.
    """
    model_type = config.get("model_type")
    family = (WRAPPERS | FAMILIES).get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join([*FAMILIES, *WRAPPERS])
        _refuse("model_type", model_type, f"only {known} have these layers")
    wrapped = model_type in WRAPPERS
    text = config.get(TEXT_CONFIG) if wrapped else config
    if not isinstance(text, dict):
        _refuse(TEXT_CONFIG, text, "it must be the settings of the text model")
    if wrapped and text.get("model_type", family.model_type) != family.model_type:
        _refuse(f"{TEXT_CONFIG}.model_type", text["model_type"], f"the text of a {model_type} is {family.model_type}")
    for key, value in family.always.items():
        given = text.get(key, value)
        if (type(value)() if given is None else given) != value:
            _refuse(key, text[key], f"this model's layers have {value!r}")
    if (depth := _checked(family.mtp_key, text.get(family.mtp_key) or 0, 0)) > 1:
        _refuse(family.mtp_key, depth, "one layer predicts all further tokens")
    pattern, repeats = _pattern(text, family)
    fields = _fields(text, family)
    if wrapped and "tie_word_embeddings" in config:
        fields["tied_embeddings"] = _checked("tie_word_embeddings", config["tie_word_embeddings"], False)
    stored = next((x[key] for x in (text, config) for key in ("dtype", "torch_dtype") if x.get(key)), "float32")
    if stored == "float16" and dtype is None:
        _refuse("dtype", stored, "weights are trained in bfloat16 or float32: say dtype=bfloat16 or dtype=float32")
    if stored not in ("bfloat16", "float32", "float16"):
        _refuse("dtype", stored, "weights are trained in bfloat16 or float32")
    weight = _checked("router_aux_loss_coef", text.get("router_aux_loss_coef", BALANCE) or 0.0, BALANCE)
    return Imported(
        ModelConfig(pattern=pattern, repeats=repeats, dtype=dtype or stored, **fields, **_rope(text)),
        float(weight) if family.feed_forward == "E" else BALANCE,
        depth == 1,
        family,
        wrapped,
        _fp8_block(config.get("quantization_config", text.get("quantization_config"))),
        stored == "float16",
    )


def _checked(key: str, value: Any, like: object) -> Any:
    """A value, if it is of the kind that it has to be: true or false, a whole number, or a number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(like, bool):
        kind, fits = "true or false", isinstance(value, bool)
    elif isinstance(like, int):
        kind, fits = "a whole number", number and isinstance(value, int)
    else:
        kind, fits = "a number", number
    if not fits:
        _refuse(key, value, f"it must be {kind}")
    return value


def _fields(text: dict[str, Any], family: Family) -> dict[str, Any]:
    """Our settings that both sides have."""
    given = {theirs: text.get(theirs, default) for _, theirs, default in family.fields}
    if given["head_dim"] is None:
        width, heads = (_checked(key, given[key], 1) for key in ("hidden_size", "num_attention_heads"))
        given["head_dim"] = width // max(1, heads)
    return {ours: _checked(theirs, given[theirs], default) for ours, theirs, default in family.fields}


def _pattern(text: dict[str, Any], family: Family) -> tuple[str, int]:
    """The layers, as a pattern and how often it is repeated."""
    blocks = _checked("num_hidden_layers", text.get("num_hidden_layers", family.layers), 1)
    if blocks < 1:
        _refuse("num_hidden_layers", blocks, "it must be at least 1")
    every = _checked("full_attention_interval", text.get("full_attention_interval") or INTERVAL, INTERVAL)
    kinds = text.get("layer_types") or [LAYER_TYPES["G" if (i + 1) % every else "*"] for i in range(blocks)]
    known = isinstance(kinds, list) and all(kind in LAYER_TYPES.values() for kind in kinds)
    if not known or len(kinds) != blocks:
        _refuse("layer_types", kinds, f"it must name linear_attention or full_attention for {blocks} blocks")
    mixers = {name: symbol for symbol, name in LAYER_TYPES.items()}
    return _shortest_period("".join(mixers[kind] + family.feed_forward for kind in kinds))


def _fp8_block(quantization: dict[str, Any] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale, of the only kind of quantized weights that is read."""
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        _refuse("quantization_config", quantization, "it must be the settings of a quantization")
    block = quantization.get("weight_block_size") or []
    known = all(quantization.get(key, value) == value for key, value in FP8_FORMAT.items())
    sized = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if "quant_method" not in quantization or not known or not sized:
        kind = quantization.get("quant_method")
        _refuse(
            "quantization_config",
            kind,
            "FP8 (e4m3) in blocks of weight_block_size is read; of others, import the weights that they were made from",
        )
    return block[0], block[1]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Our settings of RoPE; ``rope_scaling``, an older name, counts before ``rope_parameters``, as in transformers."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        _refuse("rope_parameters", rope, "it must be the settings of RoPE, the same for all layers")
    given = {key: rope.get(key, config.get(key, default)) for key, default in ROPE_DEFAULTS.items()}
    base, fraction = (_checked(key, value, 0.0) for key, value in given.items())
    plain = {"rope_base": float(base), "rotary_fraction": fraction}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return plain
    others = {key: value for key, value in rope.items() if value is not None and YARN_USUAL.get(key) != value}
    if kind != "yarn" or set(others) - YARN_KEYS - MROPE:
        _refuse("rope_scaling", rope, "RoPE is plain, or YaRN with its usual constants (factor and original length)")
    if not isinstance(rope.get("factor"), int | float):
        _refuse("rope_scaling", rope, "YaRN needs its factor, by how much it stretches the context")
    length = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    return plain | {"yarn_factor": float(rope["factor"]), "yarn_original_length": length}


def _shortest_period(layers: str) -> tuple[str, int]:
    """A pattern, and how often it is repeated."""
    size = next(n for n in range(2, len(layers) + 1, 2) if layers == layers[:n] * (len(layers) // n))
    return layers[:size], len(layers) // size
