"""What bench compares with: the same shape in transformers and in megatron-core as they come, the fastest way that each
offers.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from model.documents import send
from train.settings.run import Config

Step = tuple[Callable[[Tensor], None], list[nn.Parameter]]


def transformers_step(settings: Config, vocab_size: int, device: torch.device) -> Step:
    """Forward and backward pass of transformers' Qwen3-Next on tokens [R, L + 1], and its parameters.

    Grouped matrix products over its experts, SDPA, and fla's kernels where they are installed.
    """
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    shape = settings.model
    implementations: dict[str, Any] = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    config = Qwen3NextConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=len(shape.layers) // 2,
        layer_types=[{"G": "linear_attention", "*": "full_attention"}[symbol] for symbol in shape.layers[::2]],
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": shape.rope_base,
            "partial_rotary_factor": shape.rotary_fraction,
        },
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
        tie_word_embeddings=False,
        use_cache=False,
        **implementations,
    )
    with torch.device("meta"):
        network = Qwen3NextForCausalLM(config).to(getattr(torch, shape.dtype))
    network.to_empty(device=device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, shape.init_std)
        for module in network.modules():
            if "inv_freq" in dict(module.named_buffers(recurse=False)):
                module.inv_freq.copy_(1.0 / shape.rope_base ** (torch.arange(0, 1, 2 / shape.rotary_dim)))

    def step(tokens_RS: Tensor) -> None:
        tokens_RS = send(tokens_RS, device)
        network(input_ids=tokens_RS[:, :-1], labels=tokens_RS[:, :-1]).loss.backward()

    return step, list(network.parameters())


def _megatron_config(settings: Config) -> TransformerConfig:
    """Its grouped linears, all-to-all dispatcher, fused router, permutation, rotary embedding and cross-entropy."""
    shape, dtype = settings.model, getattr(torch, settings.model.dtype)
    return TransformerConfig(
        num_layers=len(shape.layers),
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.attention_heads,
        num_query_groups=shape.key_value_heads,
        kv_channels=shape.head_dim,
        attention_output_gate=shape.attention_gate,
        qk_layernorm=True,
        linear_num_key_heads=shape.linear_key_heads,
        linear_num_value_heads=shape.linear_value_heads,
        linear_key_head_dim=shape.linear_key_dim,
        linear_value_head_dim=shape.linear_value_dim,
        linear_conv_kernel_dim=shape.conv_kernel,
        ffn_hidden_size=shape.expert_size,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.experts_per_token,
        moe_ffn_hidden_size=shape.expert_size,
        moe_shared_expert_intermediate_size=shape.shared_expert_size or None,
        moe_shared_expert_gate=shape.shared_expert_size > 0,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_router_force_load_balancing=settings.balance.forced,
        moe_router_fusion=True,
        moe_grouped_gemm=True,
        moe_permute_fusion=True,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        layernorm_epsilon=shape.norm_eps,
        apply_rope_fusion=True,
        bias_dropout_fusion=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        init_method_std=shape.init_std,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
    )


def megatron_step(settings: Config, vocab_size: int, device: torch.device) -> Step:
    """Forward and backward pass of megatron-core's own hybrid model of Transformer Engine's modules."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    shape = settings.model
    model_parallel_cuda_manual_seed(settings.seed)
    network = HybridModel(
        _megatron_config(settings),
        hybrid_stack_spec,
        vocab_size,
        settings.data.seq_length,
        hybrid_layer_pattern=shape.layers,
        position_embedding_type="rope",
        rotary_percent=shape.rotary_fraction,
        rotary_base=int(shape.rope_base),
    ).to(device)

    def step(tokens_RS: Tensor) -> None:
        tokens_RS = send(tokens_RS, device)
        inputs, labels = tokens_RS[:, :-1].contiguous(), tokens_RS[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
        network(inputs, positions, None, labels=labels).mean().backward()

    return step, list(network.parameters())


PEERS = {"transformers": transformers_step, "megatron-core with Transformer Engine": megatron_step}
PEER_PACKAGES = {transformers_step: "transformers", megatron_step: "transformer_engine"}


def missing(name: str, settings: Config, processes: int) -> str | None:
    """Why a peer cannot be timed here, or None."""
    if processes > 1:
        return "it is timed in one process only"
    package = PEER_PACKAGES[PEERS[name]]
    if find_spec(package) is None:
        return f"{package} is not installed"
    if settings.mtp.steps:
        return "it is timed without multi-token prediction: mtp.steps=0"
    if settings.balance.forced and package == "transformers":
        return "it has no forced routing"
    return None
