"""From a pattern to modules: what each symbol holds, the types of the parameters, megatron-core's configuration."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp

from model.config import MtpConfig, OneProcess
from model.layers.attention import GatedAttention
from model.layers.deltanet import GatedDeltaNet
from model.layers.experts import MixtureOfExperts
from model.layers.norm import GatedRMSNorm, ResidualRMSNorm, ZeroCentredRMSNorm
from model.stack import full_pattern, hybrid_config
from tests.model.helpers import SMALL, ids_from_starts
from tests.model.test_network import VOCAB, micro_batch, random_tokens

MIXTURE = {
    "mlp.experts.weight1",
    "mlp.experts.weight2",
    "mlp.router.weight",
    "mlp.shared_expert.gate_weight",
    "mlp.shared_expert.linear_fc1.weight",
    "mlp.shared_expert.linear_fc2.weight",
    "pre_mlp_layernorm.weight",
}
PARAMETERS = {
    "G": {
        "input_layernorm.weight",
        "self_attention.A_log",
        "self_attention.conv_weight",
        "self_attention.dt_bias",
        "self_attention.in_proj.weight",
        "self_attention.out_norm.weight",
        "self_attention.out_proj.weight",
    },
    "*": {
        "input_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
    },
    "E": MIXTURE,
    "-": {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "pre_mlp_layernorm.weight"},
}
MTP_OWN = {f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")}


def expected_names(pattern: str, steps: int) -> set[str]:
    names = {"embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_norm.weight"}
    places = {f"decoder.layers.{index}": symbol for index, symbol in enumerate(pattern)}
    if steps:
        names |= MTP_OWN
        places |= {f"mtp.layers.0.mtp_model_layer.layers.{index}": symbol for index, symbol in enumerate("*E")}
    return names | {f"{place}.{name}" for place, symbol in places.items() for name in PARAMETERS[symbol]}


@pytest.mark.parametrize(
    ("pattern", "repeats", "steps"),
    [("G", 1, 0), ("*", 1, 0), ("GE*E", 2, 0), ("EG", 1, 2), ("*-", 2, 0), ("G-*E", 1, 1)],
)
def test_parameters_of_a_pattern(build: Callable, pattern: str, repeats: int, steps: int) -> None:
    network = build(replace(SMALL, pattern=pattern, repeats=repeats), MtpConfig(steps=steps))
    names = [name for name, _ in network.named_parameters()]
    assert sorted(names) == sorted(expected_names(pattern * repeats, steps))


def test_modules_are_ours(build: Callable) -> None:
    network = build(replace(SMALL, pattern="G*E"), MtpConfig(steps=2))
    delta, attention, experts = network.decoder.layers
    assert isinstance(delta.self_attention, GatedDeltaNet)
    assert isinstance(attention.self_attention, GatedAttention)
    assert isinstance(experts.mlp, MixtureOfExperts)
    # The trunk's mixtures first, then the MTP layer's; each once.
    assert network.moe_layers() == [experts.mlp, network.mtp.layers[0].mtp_model_layer.layers[1].mlp]
    norms = [module for name, module in network.named_modules() if name.endswith("norm") and list(module.parameters())]
    # Three layers' input norms and the final one; out_norm, q and k norms; the MTP layer's three and its layers' two
    # and q and k norms.
    assert len(norms) == 4 + 3 + 3 + 4
    assert all(isinstance(module, ZeroCentredRMSNorm) for module in norms)
    assert isinstance(delta.self_attention.out_norm, GatedRMSNorm)
    assert sum(type(module) is ResidualRMSNorm for module in norms) == 3 + 2
    assert all(module.eps == SMALL.norm_eps for module in norms)


def test_layers_take_their_residual_from_their_norm(build: Callable) -> None:
    """A residual of zeros from the norm leaves of a layer only its mixer or MLP."""
    network = build(replace(SMALL, pattern="G*E-"), MtpConfig(steps=0), VOCAB)
    outputs: dict[str, list[torch.Tensor]] = {"module": [], "layer": []}
    for layer in network.decoder.layers:
        kind = "self_attention" if isinstance(layer.mlp, IdentityOp) else "mlp"
        norm = layer.input_layernorm if kind == "self_attention" else layer.pre_mlp_layernorm
        norm.register_forward_hook(lambda _, __, out: (out[0], torch.zeros_like(out[1])))
        layer.get_submodule(kind).register_forward_hook(lambda _, __, out: outputs["module"].append(out[0]))
        layer.register_forward_hook(lambda _, __, out: outputs["layer"].append(out[0]))
    ids = ids_from_starts(20, [3])
    network(micro_batch(random_tokens(*ids.shape), ids, 0))
    assert len(outputs["layer"]) == 4
    assert all(map(torch.equal, outputs["layer"], outputs["module"]))


def test_a_bfloat16_model_keeps_what_is_delicate_in_float32(build: Callable) -> None:
    network = build(replace(SMALL, pattern="GE*E", dtype="bfloat16"), MtpConfig(steps=1))
    delicate = ("norm.weight", "A_log", "dt_bias", "router.weight")
    for name, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(delicate) else torch.bfloat16), name


def test_full_pattern() -> None:
    assert full_pattern(replace(SMALL, pattern="GE|*E", repeats=2), MtpConfig(steps=0)) == "GE|*EGE|*E"
    assert full_pattern(replace(SMALL, pattern="GE*E|", repeats=2), MtpConfig(steps=2)) == "GE*E|GE*E/*E/*E"


def test_hybrid_config() -> None:
    shape = replace(SMALL, pattern="GE*E", repeats=3, dtype="bfloat16")
    config = hybrid_config(shape, MtpConfig(steps=2), OneProcess(tensor=2, pipeline=3, expert=3))
    assert (config.num_layers, config.hidden_size, config.kv_channels) == (12, 24, 8)
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (torch.bfloat16, torch.bfloat16, True)
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (2, 3)
    assert (config.expert_model_parallel_size, config.expert_tensor_parallel_size) == (3, 1)
    assert config.sequence_parallel and config.deallocate_pipeline_outputs
    assert (config.mtp_num_layers, config.mtp_use_repeated_layer) == (2, True)
    assert (config.shape, config.mtp) == (shape, MtpConfig(steps=2))
    alone = hybrid_config(shape, MtpConfig(steps=0))
    assert not alone.sequence_parallel and not alone.deallocate_pipeline_outputs
    assert (alone.mtp_num_layers, alone.mtp_use_repeated_layer) == (None, False)
