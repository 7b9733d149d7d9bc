"""From a pattern string to megatron-core specs, and from our settings to megatron-core's configuration.

The one place that names megatron-core's configuration fields and assembles its layers from our modules.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from model.backend import FP8
from model.config import LAYER, BalanceConfig, Layout, ModelConfig, MtpConfig, OneProcess
from model.kernels.backends import LINEARS, Linears, ReplicatedLinear
from model.layers.attention import GatedAttention, GatedAttentionSubmodules
from model.layers.deltanet import GatedDeltaNet, GatedDeltaNetSubmodules
from model.layers.dense import Dense, SwiGLUSubmodules
from model.layers.experts import MixtureOfExperts
from model.layers.gauges import Gauge, note_activations
from model.layers.mtp import MtpLayer
from model.layers.norm import GatedRMSNorm, HeadNorm, ResidualRMSNorm, ZeroCentredRMSNorm
from model.layers.recompute import recomputable

PARAMS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# What megatron-core is told whatever the model and the layout.
ALWAYS = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": True,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_router_load_balancing_type": "none",
    # Losses arrive divided by their counts over the whole global batch: gradients are plain sums.
    "calculate_per_token_loss": True,
    # Every parameter is drawn from its own seed by `model.init`: construction draws and copies nothing.
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "init_model_with_meta_device": True,
}


@dataclass(kw_only=True)
class HybridConfig(TransformerConfig):
    """megatron-core's configuration, carrying the settings of ours that it has no field for."""

    shape: ModelConfig
    mtp: MtpConfig
    balance: BalanceConfig
    recompute: frozenset[str] = frozenset()  # parts computed again in the backward pass (`model.layers.recompute`)


@dataclass
class MtpSubmodules:
    """The parts of the multi-token-prediction layer."""

    norm: type
    eh_proj: type
    stack: type


class Layer(TransformerLayer):
    """megatron-core's layer, which can be computed again in the backward pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gauge = Gauge()

    def forward(self, hidden_states: Tensor, **others) -> tuple[Tensor, None]:
        # A cache brings in tensors of other calls, whose gradients a second computation of this layer would lose.
        if others["inference_context"] is not None:
            return super().forward(hidden_states, **others)
        out, context = self.compute(hidden_states, others)
        if self.gauge.listens:
            note_activations(self.gauge, out, others["padding_mask"].weight_T > 0)
        return out, context

    @recomputable(LAYER)
    def compute(self, hidden_states: Tensor, others: dict) -> tuple[Tensor, None]:
        """megatron-core's forward pass."""
        return super().forward(hidden_states, **others)


class Stack(HybridStack):
    """megatron-core's stack of layers with our final norm (its own is hard-wired to Transformer Engine's)."""

    def __init__(self, config, submodules, *args, post_process: bool = True, **kwargs):
        super().__init__(config, submodules, *args, post_layer_norm=False, post_process=post_process, **kwargs)
        self.post_layer_norm = post_process
        if post_process:
            self.final_norm = ZeroCentredRMSNorm(config, config.hidden_size, config.layernorm_epsilon)


def full_pattern(shape: ModelConfig, mtp: MtpConfig) -> str:
    """The pattern as megatron-core reads it: trunk stages cut by ``|``, then one ``/`` part for each MTP step."""
    return "|".join(shape.stages) + f"/{shape.mtp_layers}" * mtp.steps


def hybrid_config(
    shape: ModelConfig,
    mtp: MtpConfig,
    layout: Layout = OneProcess(),  # noqa: B008
    recompute: Iterable[str] = (),
    balance: BalanceConfig = BalanceConfig(),  # noqa: B008
) -> HybridConfig:
    """megatron-core's configuration of the model for a layout.

    Args:
        layout: `parallel.topology.Topology`, or one process. recompute: parts of the model that are computed again in
            the backward pass.
    """
    dtype = PARAMS_DTYPES[shape.dtype]
    fp8, fp8_recipe = FP8.get(shape.fp8, (None, "delayed"))  # megatron-core's default, which nothing asks without FP8
    return HybridConfig(
        shape=shape,
        mtp=mtp,
        balance=balance,
        recompute=frozenset(recompute),
        num_layers=len(shape.layers),
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.attention_heads,
        num_query_groups=shape.key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.expert_size,
        layernorm_epsilon=shape.norm_eps,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.experts_per_token,
        moe_ffn_hidden_size=shape.expert_size,
        mtp_num_layers=mtp.steps or None,
        mtp_use_repeated_layer=mtp.steps > 0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8=fp8,
        fp8_recipe=fp8_recipe,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.tensor > 1,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        # Of two interleaved processes each is both neighbours of the other: a batch of transfers would mix them up.
        overlap_p2p_comm=layout.virtual > 1,
        batch_p2p_comm=layout.virtual == 1,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        deallocate_pipeline_outputs=layout.pipeline > 1,
        **ALWAYS,
    )


def stack_spec(backend: str = "torch") -> ModuleSpec:
    """The spec of the trunk (and of the MTP layer inside it), whose linear layers are a backend's."""
    linears = LINEARS[backend]

    def layer(**parts) -> ModuleSpec:
        return ModuleSpec(module=Layer, submodules=TransformerLayerSubmodules(**parts))

    def mixer(module, submodules) -> ModuleSpec:
        return layer(
            input_layernorm=ResidualRMSNorm,
            self_attention=ModuleSpec(module=module, submodules=submodules),
            self_attn_bda=get_bias_dropout_add,
        )

    def feed_forward(mlp, own: Linears) -> ModuleSpec:
        return layer(
            pre_mlp_layernorm=ResidualRMSNorm,
            mlp=mlp.builder(SwiGLUSubmodules(own.column, own.row)),
            mlp_bda=get_bias_dropout_add,
        )

    attention = GatedAttentionSubmodules(linears.column, linears.row, HeadNorm)
    delta = GatedDeltaNetSubmodules(linears.heads, linears.row, GatedRMSNorm)
    mtp = ModuleSpec(module=MtpLayer, submodules=MtpSubmodules(ZeroCentredRMSNorm, ReplicatedLinear, Stack))
    return ModuleSpec(
        module=Stack,
        submodules=HybridStackSubmodules(
            gdn_layer=mixer(GatedDeltaNet, delta),
            attention_layer=mixer(GatedAttention, attention),
            mlp_layer=feed_forward(Dense, linears),
            moe_layer=feed_forward(MixtureOfExperts, LINEARS["torch"]),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[mtp])
            ),
        ),
    )
