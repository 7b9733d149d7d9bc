"""The model types of Hugging Face that our network is: Qwen3-Next, Qwen3.5 (and 3.6) dense, Qwen3.5 (and 3.6) MoE.

Their trunks compute the same; names, config.json and the order of some rows differ. A checkpoint of Qwen3.5 comes in
two forms: text alone, or inside a model that also sees, whose config.json holds that of the text as ``text_config`` and
whose trunk stands one level deeper. Fields and their defaults are those of transformers' configurations (5.23).
This needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig

TEXT_CONFIG = "text_config"  # of a model that also sees
Field = tuple[str, str, Any]  # ours, theirs, and what theirs is where config.json leaves it out


@dataclass(frozen=True)
class Family:
    """One of their model types.

    Attributes:
        model_type: of config.json, or of its ``text_config``. architecture: the class that loads it.
        wrapper: model type and class of the model around it that also sees; None: there is none.
        feed_forward: symbol of the second layer of every block.
        flat_in_proj: whether the input projection of Gated DeltaNet is four plain matrices instead of two by heads.
        packed: whether published files hold the experts of a trunk layer as one tensor each.
        fields: settings that both sides have.
        always: what the architecture leaves open and our layers do not.
        mtp_key: how config.json counts multi-token-prediction layers.
        layers: blocks of the trunk where config.json leaves them out.
    """

    model_type: str
    architecture: str
    wrapper: tuple[str, str] | None
    feed_forward: str
    flat_in_proj: bool
    packed: bool
    fields: tuple[Field, ...]
    always: Mapping[str, Any]
    mtp_key: str
    layers: int

    def trunk(self, wrapped: bool) -> str:
        """What stands before the names of the trunk."""
        return "model.language_model." if wrapped else "model."


def _fields(width: int, vocabulary: int, value_heads: int, key_value_heads: int) -> tuple[Field, ...]:
    return (
        ("vocab_size", "vocab_size", vocabulary),
        ("hidden_size", "hidden_size", width),
        ("attention_heads", "num_attention_heads", 16),
        ("key_value_heads", "num_key_value_heads", key_value_heads),
        ("head_dim", "head_dim", 256),
        ("linear_key_heads", "linear_num_key_heads", 16),
        ("linear_value_heads", "linear_num_value_heads", value_heads),
        ("linear_key_dim", "linear_key_head_dim", 128),
        ("linear_value_dim", "linear_value_head_dim", 128),
        ("conv_kernel", "linear_conv_kernel_dim", 4),
        ("norm_eps", "rms_norm_eps", 1e-6),
        ("init_std", "initializer_range", 0.02),
        ("tied_embeddings", "tie_word_embeddings", False),
    )


def _experts(number: int, per_token: int) -> tuple[Field, ...]:
    return (
        ("experts", "num_experts", number),
        ("experts_per_token", "num_experts_per_tok", per_token),
        ("expert_size", "moe_intermediate_size", 512),
        ("shared_expert_size", "shared_expert_intermediate_size", 512),
    )


PLAIN = {"hidden_act": "silu", "attention_bias": False}
GATED = PLAIN | {"attn_output_gate": True, "mtp_use_dedicated_embeddings": False}
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    None,
    "E",
    False,
    False,
    _fields(2048, 151936, 32, 2) + _experts(512, 10),
    PLAIN | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "num_nextn_predict_layers",
    48,
)
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "-",
    True,
    False,
    _fields(4096, 248320, 32, 4) + (("dense_size", "intermediate_size", 12288),),
    GATED,
    "mtp_num_hidden_layers",
    32,
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    "E",
    True,
    True,
    _fields(2048, 248320, 32, 2) + _experts(256, 8),
    GATED,
    "mtp_num_hidden_layers",
    40,
)
FAMILIES = {family.model_type: family for family in (QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE)}
WRAPPERS = {family.wrapper[0]: family for family in FAMILIES.values() if family.wrapper}


def family_of(model: ModelConfig) -> Family:
    """What a model is exported as unless something else is asked for: Qwen3-Next with experts, Qwen3.5 without."""
    return QWEN3_NEXT if "E" in model.layers else QWEN3_5
