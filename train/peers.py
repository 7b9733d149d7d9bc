"""What bench compares with: the same shape in transformers, the fastest way it offers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.documents import send


def transformers_step(
    shape: ModelConfig, vocab_size: int, device: torch.device
) -> tuple[Callable[[Tensor], None], list[nn.Parameter]]:
    """Forward and backward pass of transformers' Qwen3-Next on tokens [R, L + 1], and its parameters.

    Grouped matrix products over its experts, SDPA, and fla's kernels where they are installed.
    """
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

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
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
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
