"""config.json of Hugging Face's Qwen3-Next, from our settings and back, and as transformers reads and writes it."""

import json
from dataclasses import replace

import pytest
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from model.config import ModelConfig, ModelError
from model.hf import config as hf_config
from model.hf.families import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT, Family

# Keys of published files that transformers' configurations have no field for.
UNREAD = ("attn_output_gate", "mtp_use_dedicated_embeddings")
SHAPE = ModelConfig(vocab_size=96, rope_base=5e5, rotary_fraction=0.5, norm_eps=1e-5, init_std=0.01, dtype="bfloat16")
MODELS = {
    "3:1": SHAPE,
    "3:1, twelve times": replace(SHAPE, repeats=12),
    "attention first": replace(SHAPE, pattern="*EGE", repeats=2),
    "attention alone": replace(SHAPE, pattern="*E"),
    "Gated DeltaNet alone": replace(SHAPE, pattern="GE", repeats=3, dtype="float32"),
    "no interval says it": replace(SHAPE, pattern="GE*E*EGE*E"),
    "YaRN": replace(SHAPE, yarn_factor=4.0, yarn_original_length=262144),
}


def exported(model: ModelConfig, mtp: bool = True) -> dict:
    return json.loads(json.dumps(hf_config.to_hf(model, mtp, 0.002, 1024, model.dtype, 7)))


def same(ours: ModelConfig, other: ModelConfig) -> bool:
    """But for how the layers are spelled."""
    return replace(ours, pattern="", repeats=1) == replace(other, pattern="", repeats=1) and ours.layers == other.layers


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_settings_come_back(model: ModelConfig) -> None:
    imported = hf_config.from_hf(exported(model))
    assert same(imported.model, model)
    assert (imported.balance_weight, imported.mtp) == (0.002, True)
    assert not hf_config.from_hf(exported(model, mtp=False)).mtp


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_transformers_reads_and_writes_the_same(model: ModelConfig, tmp_path) -> None:
    theirs = Qwen3NextConfig(**exported(model))
    assert len(theirs.layer_types) == theirs.num_hidden_layers == len(model.layers) // 2
    assert (theirs.rope_parameters["rope_theta"], theirs.rope_parameters["partial_rotary_factor"]) == (5e5, 0.5)
    assert theirs.rope_parameters.get("factor", 1.0) == model.yarn_factor
    theirs.save_pretrained(tmp_path)
    imported = hf_config.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert same(imported.model, model)
    assert (imported.balance_weight, imported.mtp) == (0.002, True)


@pytest.mark.parametrize(
    ("family", "config"),
    [(QWEN3_NEXT, Qwen3NextConfig), (QWEN3_5, Qwen3_5TextConfig), (QWEN3_5_MOE, Qwen3_5MoeTextConfig)],
)
def test_what_is_left_out_is_what_transformers_takes(family: Family, config: type) -> None:
    theirs = config()
    imported = hf_config.from_hf({"model_type": family.model_type})
    for ours, name, default in family.fields:
        assert getattr(theirs, name) == default == getattr(imported.model, ours)
    plain = {name: value for name, value in family.always.items() if name not in UNREAD}
    assert {name: getattr(theirs, name) for name in plain} == plain
    block = f"G{family.feed_forward}" * 3 + f"*{family.feed_forward}"
    assert imported.model.layers == block * (theirs.num_hidden_layers // 4)
    if family.feed_forward == "E":
        assert imported.balance_weight == theirs.router_aux_loss_coef
    rope = theirs.rope_parameters
    assert (imported.model.rope_base, imported.model.rotary_fraction) == (
        rope["rope_theta"],
        rope["partial_rotary_factor"],
    )


def test_the_older_spelling_of_rope() -> None:
    """config.json of Qwen3-Next-80B-A3B-Instruct, with the YaRN that its model card recommends for 1M tokens."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    older = {"model_type": "qwen3_next", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_scaling": scaling}
    model = hf_config.from_hf(older).model
    assert (model.rope_base, model.rotary_fraction) == (1e7, 0.25)
    assert (model.yarn_factor, model.yarn_original_length) == (4.0, 262144)


def test_usual_constants_of_yarn_may_be_spelled_out() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "beta_fast": 32}
    model = hf_config.from_hf({"model_type": "qwen3_next", "rope_scaling": scaling | {"beta_slow": 1}}).model
    assert (model.yarn_factor, model.yarn_original_length) == (2.0, 512)


def test_no_balance_loss_is_a_weight_of_zero() -> None:
    assert hf_config.from_hf({"model_type": "qwen3_next", "router_aux_loss_coef": None}).balance_weight == 0


def test_half_precision_is_imported_as_what_is_asked_for() -> None:
    half = {"model_type": "qwen3_next", "dtype": "float16"}
    imported = hf_config.from_hf(half, "float32")
    assert imported.half and imported.model.dtype == "float32"


DENSE = replace(SHAPE, pattern="G-G-G-*-", dense_size=80, tied_embeddings=True)
FAMILY_MODELS = {"dense": (QWEN3_5, DENSE), "experts": (QWEN3_5_MOE, replace(SHAPE, repeats=2))}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("family", "model"), FAMILY_MODELS.values(), ids=FAMILY_MODELS)
def test_what_is_not_known_goes_on_and_the_text_model_returns_to_its_place(
    family: Family, model: ModelConfig, wrapped: bool
) -> None:
    text = hf_config.to_hf(model, True, 0.002, 1024, model.dtype, 7, family) | {"mamba_ssm_dtype": "float32"}
    old = text
    if wrapped:
        assert family.wrapper
        old = {"model_type": family.wrapper[0], "vision_config": {"depth": 3}, "text_config": text, "image_token_id": 9}
    imported = hf_config.from_hf(json.loads(json.dumps(old)))
    assert (imported.family, imported.wrapped, imported.mtp) == (family, wrapped, True)
    assert same(imported.model, model)
    longer = replace(model, yarn_factor=2.0, yarn_original_length=1024)
    new = hf_config.to_hf(longer, False, 0.002, 2048, "float32", None, family, old)
    inner = new["text_config"] if wrapped else new
    assert inner["mamba_ssm_dtype"] == "float32" and inner["max_position_embeddings"] == 2048
    assert inner["mtp_num_hidden_layers"] == 0 and inner["rope_parameters"]["rope_type"] == "yarn"
    assert ("mrope_section" in inner["rope_parameters"]) == wrapped, "three axes only where there is more than text"
    if wrapped:
        assert (new["vision_config"], new["image_token_id"]) == ({"depth": 3}, 9)
        assert new["tie_word_embeddings"] == model.tied_embeddings
    assert same(hf_config.from_hf(new).model, replace(longer, dtype="float32"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "config.json's model_type='llama' cannot be imported: only qwen3_next, qwen3_5_text"),
        ({"hidden_act": "gelu"}, "config.json's hidden_act='gelu' cannot be imported"),
        ({"mlp_only_layers": [0]}, "config.json's mlp_only_layers=[0] cannot"),
        ({"norm_topk_prob": False}, "config.json's norm_topk_prob=False cannot"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "config.json's quantization_config='gptq' cannot be imported",
        ),
        (
            {"quantization_config": {}},
            "config.json's quantization_config=None cannot be imported: FP8 (e4m3) in blocks",
        ),
        ({"num_nextn_predict_layers": 2}, "config.json's num_nextn_predict_layers=2 cannot"),
        (
            {"layer_types": ["full_attention"]},
            "config.json's layer_types=['full_attention'] cannot be imported: it",
        ),
        ({"dtype": "float16"}, "config.json's dtype='float16' cannot"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e6}}},
            "config.json's rope_parameters={'full_attention': {",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "config.json's rope_scaling={'rope_type': 'linear'"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "config.json's rope_scaling={'rope_type': 'yarn'} cannot be imported: Y",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 64}},
            "config.json's rope_scaling={'rope_type': 'yarn', 'factor': 2.0, 'beta_fast': 64} cannot",
        ),
    ],
)
def test_what_our_layers_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ModelError) as refusal:
        hf_config.from_hf({"model_type": "qwen3_next", **changes})
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' cannot be imported: it must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size=64.0 cannot"),
        ({"vocab_size": None}, "vocab_size=None cannot"),
        ({"hidden_size": None, "head_dim": None}, "hidden_size=None cannot"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny' cannot be imported: it must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan cannot"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' cannot be imported: it must be true or false"),
        ({"num_experts": True}, "num_experts=True cannot"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 cannot be imported: it must be at least 1"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers='4' cannot"),
        ({"num_hidden_layers": 1, "layer_types": [["a"]]}, "layer_types=[['a']] cannot"),
        ({"layer_types": 7}, "layer_types=7 cannot"),
        ({"full_attention_interval": "4"}, "full_attention_interval='4' cannot"),
        ({"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers='one' cannot"),
        ({"router_aux_loss_coef": "much"}, "router_aux_loss_coef='much' cannot"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] cannot"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta='big' cannot"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8' cannot"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": ["a", 2]}}, "quantization_config='fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}}, "quantization_config='fp8'"),
        ({"model_type": ["qwen3_5_text"]}, "model_type=['qwen3_5_text'] cannot"),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_moe"}}, "text_config.model_type='qwen3_moe'"),
        ({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_text"}}, "text_config.model_type='qwen3"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ModelError) as refusal:
        hf_config.from_hf({"model_type": "qwen3_next", **changes})
    assert str(refusal.value).startswith(f"config.json's {message}") and "\n" not in str(refusal.value)


def test_engines_are_told_to_keep_the_state_in_float32() -> None:
    """vLLM keeps it in the weights' type unless the file says so; a file that says otherwise keeps its word."""
    (family, model), *_ = FAMILY_MODELS.values()
    arguments = (model, True, 0.002, 1024, model.dtype, 7, family)
    assert hf_config.to_hf(*arguments)["mamba_ssm_dtype"] == "float32"
    assert hf_config.to_hf(*arguments, {"mamba_ssm_dtype": "bfloat16"})["mamba_ssm_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "*-"}, "model.pattern='*-' has no counterpart in a Hugging Face qwen3_next checkpoint: each of"),
        ({"pattern": "GE*"}, "model.pattern='GE*' has"),
        ({"pattern": "EG"}, "model.pattern='EG' has"),
        ({"pattern": "GGEE"}, "model.pattern='GGEE' has"),
        ({"attention_gate": False}, "model.attention_gate=false has"),
        ({"shared_expert_size": 0}, "model.shared_expert_size=0 has"),
    ],
)
def test_what_their_layers_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ModelError) as refusal:
        hf_config.check_exportable(replace(SHAPE, **changes))
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)
    hf_config.check_exportable(replace(SHAPE, pattern="GE|*E"))
