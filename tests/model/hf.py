"""transformers' Qwen3-Next with the weights of our modules."""

import torch
from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from model.config import ModelConfig

Weights = dict[str, Tensor]


def rope_parameters(shape: ModelConfig) -> dict:
    """RoPE and YaRN in their terms."""
    plain = {"rope_theta": shape.rope_base, "partial_rotary_factor": shape.rotary_fraction}
    if shape.yarn_factor == 1:
        return {"rope_type": "default", **plain}
    length = shape.yarn_original_length
    return {"rope_type": "yarn", "factor": shape.yarn_factor, "original_max_position_embeddings": length, **plain}


def hf_config(shape: ModelConfig, vocab_size: int) -> Qwen3NextConfig:
    """Its configuration for a pattern of pairs: a token mixer, then experts."""
    assert shape.layers[1::2] == "E" * (len(shape.layers) // 2)
    return Qwen3NextConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=len(shape.layers) // 2,
        layer_types=[{"G": "linear_attention", "*": "full_attention"}[symbol] for symbol in shape.layers[::2]],
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        rope_parameters=rope_parameters(shape),
        linear_num_key_heads=shape.linear_key_heads,
        linear_num_value_heads=shape.linear_value_heads,
        linear_key_head_dim=shape.linear_key_dim,
        linear_value_head_dim=shape.linear_value_dim,
        linear_conv_kernel_dim=shape.conv_kernel,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.expert_size,
        shared_expert_intermediate_size=shape.shared_expert_size,
        norm_topk_prob=True,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


def delta_net_weights(own: Weights, shape: ModelConfig) -> Weights:
    """[q | k | v | z | b | a] per key head becomes [q | k | v | z] and [b | a]; the convolution has all q first."""
    ratio = shape.linear_value_heads // shape.linear_key_heads
    key, value = shape.linear_key_dim, ratio * shape.linear_value_dim
    rows = own["in_proj.weight"].unflatten(0, (shape.linear_key_heads, -1))
    taps = own["conv_weight"].unflatten(0, (shape.linear_key_heads, -1))
    sections = [part.flatten(0, 1) for part in taps.split([key, key, value], dim=1)]
    return {
        "in_proj_qkvz.weight": rows[:, : 2 * key + 2 * value].flatten(0, 1),
        "in_proj_ba.weight": rows[:, 2 * key + 2 * value :].flatten(0, 1),
        "conv1d.weight": torch.cat(sections)[:, None],
        "A_log": own["A_log"],
        "dt_bias": own["dt_bias"],
        "norm.weight": own["out_norm.weight"] + 1,
        "out_proj.weight": own["out_proj.weight"],
    }


def attention_weights(own: Weights, shape: ModelConfig) -> Weights:
    """[queries | gates | key | value] per key head becomes [query | gate] per query head, all keys and all values."""
    each, dim = shape.attention_heads // shape.key_value_heads, shape.head_dim
    rows = own["linear_qkv.weight"].unflatten(0, (shape.key_value_heads, 2 * each + 2, dim))
    query_and_gate = torch.stack([rows[:, :each], rows[:, each : 2 * each]], dim=2)
    return {
        "q_proj.weight": query_and_gate.flatten(0, 3),
        "k_proj.weight": rows[:, -2].flatten(0, 1),
        "v_proj.weight": rows[:, -1].flatten(0, 1),
        "o_proj.weight": own["linear_proj.weight"],
        "q_norm.weight": own["q_layernorm.weight"],
        "k_norm.weight": own["k_layernorm.weight"],
    }


def mixture_weights(own: Weights) -> Weights:
    """The shared expert's (gate, up) pairs of rows are unzipped."""
    gate, up = own["shared_expert.linear_fc1.weight"].unflatten(0, (-1, 2)).unbind(1)
    return {
        "gate.weight": own["router.weight"],
        "experts.gate_up_proj": own["experts.weight1"].flatten(1, 2),
        "experts.down_proj": own["experts.weight2"],
        "shared_expert.gate_proj.weight": gate,
        "shared_expert.up_proj.weight": up,
        "shared_expert.down_proj.weight": own["shared_expert.linear_fc2.weight"],
        "shared_expert_gate.weight": own["shared_expert.gate_weight"],
    }


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def trunk_weights(own: Weights, shape: ModelConfig) -> Weights:
    """The whole trunk; two of our layers are one of theirs."""
    out = {
        "model.embed_tokens.weight": own["embedding.word_embeddings.weight"],
        "model.norm.weight": own["decoder.final_norm.weight"],
        "lm_head.weight": own["output_layer.weight"],
    }
    for index, symbol in enumerate(shape.layers[::2]):
        mixer, experts = (_under(own, f"decoder.layers.{place}.") for place in (2 * index, 2 * index + 1))
        name, convert = {"G": ("linear_attn", delta_net_weights), "*": ("self_attn", attention_weights)}[symbol]
        layer = {f"{name}.{key}": weight for key, weight in convert(_under(mixer, "self_attention."), shape).items()}
        layer |= {f"mlp.{key}": weight for key, weight in mixture_weights(_under(experts, "mlp.")).items()}
        layer["input_layernorm.weight"] = mixer["input_layernorm.weight"]
        layer["post_attention_layernorm.weight"] = experts["pre_mlp_layernorm.weight"]
        out |= {f"model.layers.{index}.{key}": weight for key, weight in layer.items()}
    return out


def load(module: nn.Module, weights: Weights) -> nn.Module:
    """Puts converted weights into a module of theirs; every one of its parameters must be there."""
    module.load_state_dict({name: weight.detach() for name, weight in weights.items()}, strict=True)
    return module.eval()


def causal_lm(own: Weights, shape: ModelConfig, vocab_size: int) -> Qwen3NextForCausalLM:
    """The whole model for a whole model's weights."""
    return load(Qwen3NextForCausalLM(hf_config(shape, vocab_size)), trunk_weights(own, shape))
