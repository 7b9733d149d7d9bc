"""Qwen3.5's checkpoints through files: text alone and with what sees, both layouts of experts, FP8, float16."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from model.config import ModelConfig
from tests.train.hf_runs import SHAPE, add_checkpoint, export_run, import_as, make_corpus, make_run, read_all, telling
from train.hub.fp8 import FP8, SCALE, block_scales, dequantize
from train.job.shelf import Shelf
from train.settings.run import Config, save_config
from train.settings.tree import ConfigError

DENSE = replace(SHAPE, pattern="G-G-G-*-", dense_size=80, tied_embeddings=True, dtype="bfloat16")
EXPERTS = replace(SHAPE, linear_value_heads=6, dtype="bfloat16")
BLOCK = (16, 32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Config:
    """A run of one step whose model has experts."""
    return made(tmp_path, corpus, EXPERTS)


def made(directory: Path, corpus: Path, shape: ModelConfig) -> Config:
    """A run with telling weights."""
    config = make_run(directory / "runs", "mine", shape, corpus)
    add_checkpoint(config.run.path, telling(shape))
    return config


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory, by the safetensors library."""
    return {name: x for file in sorted(directory.glob("*.safetensors")) for name, x in load_file(file).items()}


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def as_run(config: Config, path: Path) -> Config:
    """The settings of an imported run, as far as an export asks for them."""
    return replace(config, run=replace(config.run, name=path.name, dir=str(path.parent)))


FORMS = {
    "dense, tied": (DENSE, {}, "Qwen3_5ForCausalLM", []),
    "experts as they are published": (
        EXPERTS,
        {"model_type": "qwen3_5_moe_text"},
        "Qwen3_5MoeForCausalLM",
        ["model"],
    ),
    "all experts packed": (
        EXPERTS,
        {"model_type": "qwen3_5_moe_text", "experts": "stacked"},
        "Qwen3_5MoeForCausalLM",
        ["model", "mtp"],
    ),
    "experts one by one": (
        EXPERTS,
        {"model_type": "qwen3_5_moe_text", "experts": "separate"},
        "Qwen3_5MoeForCausalLM",
        [],
    ),
}


@pytest.mark.parametrize(("shape", "settings", "architecture", "packed"), FORMS.values(), ids=FORMS)
def test_a_round_trip_changes_no_bit_and_transformers_loads_it(
    tmp_path: Path, corpus: Path, shape: ModelConfig, settings: dict, architecture: str, packed: list[str]
) -> None:
    run = made(tmp_path, corpus, shape)
    out = export_run(run, tmp_path / "out", shard_size=2e-4, **settings)
    assert config_of(out)["architectures"] == [architecture]
    stacks = {name.split(".")[0] for name in tensors_of(out) if name.endswith("gate_up_proj")}
    assert sorted(stacks) == packed
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    back = import_as(out, tmp_path, "back")
    assert_same(read_all(Shelf(back / "checkpoints").path(0)), telling(shape))
    again = export_run(as_run(run, back), tmp_path / "again")  # nothing said: as it came
    assert_same(tensors_of(again), tensors_of(out))
    kept = ("layer_types", "rope_parameters", "architectures", "mtp_num_hidden_layers", "tie_word_embeddings")
    assert {key: config_of(again)[key] for key in kept} == {key: config_of(out)[key] for key in kept}


def test_a_head_that_is_called_the_embedding_and_is_another_is_refused(tmp_path: Path, corpus: Path) -> None:
    out = export_run(made(tmp_path, corpus, DENSE), tmp_path / "out")
    tensors = tensors_of(out)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, out / "model.safetensors")
    import_as(out, tmp_path, "repeated")
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        import_as(out, tmp_path, "other")
    assert not (tmp_path / "other").exists()


def wrap(text: Path, directory: Path) -> Path:
    """The same text model inside one that also sees, with settings and tensors that we know nothing of."""
    shutil.copytree(text, directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: x
        for name, x in tensors_of(text).items()
    }
    generator = torch.Generator().manual_seed(0)
    tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.randn(12, 4, generator=generator).bfloat16()
    tensors["model.visual.patch_embed.proj.bias"] = torch.randn(4, generator=generator)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": config_of(text) | {"mamba_ssm_dtype": "float32"},
        "vision_config": {"depth": 1, "hidden_size": 4},
        "image_token_id": 7,
    }
    (directory / "config.json").write_text(json.dumps(config))
    notes = json.loads((directory / "tessera.json").read_text())["exact"]
    notes = {name.replace("model.", "model.language_model.", 1): value for name, value in notes.items()}
    (directory / "tessera.json").write_text(json.dumps({"exact": notes}))
    (directory / "preprocessor_config.json").write_text('{"patch_size": 16}')
    return directory


def test_what_sees_goes_in_and_out_untouched(tmp_path: Path, run: Config) -> None:
    text = export_run(run, tmp_path / "text", model_type="qwen3_5_moe_text")
    source = wrap(text, tmp_path / "source")
    back = import_as(source, tmp_path, "back")
    assert_same(read_all(Shelf(back / "checkpoints").path(0)), telling(EXPERTS))
    out = export_run(as_run(run, back), tmp_path / "out")
    assert_same(tensors_of(out), tensors_of(source))
    for key in ("architectures", "model_type", "vision_config", "image_token_id"):
        assert config_of(out)[key] == config_of(source)[key]
    assert config_of(out)["text_config"]["mamba_ssm_dtype"] == "float32"
    assert (out / "preprocessor_config.json").read_text() == '{"patch_size": 16}'
    alone = export_run(as_run(run, back), tmp_path / "alone", visual=False)
    assert_same(tensors_of(alone), tensors_of(text))
    assert config_of(alone)["model_type"] == "qwen3_5_moe_text" and "vision_config" not in config_of(alone)


def test_what_sees_is_refused_by_name_in_a_type_that_is_not_known(tmp_path: Path, run: Config) -> None:
    source = wrap(export_run(run, tmp_path / "text", model_type="qwen3_5_moe_text"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors") | {"model.visual.places": torch.arange(4)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensors of other types than .*: model.visual.places \(I64\)"):
        import_as(source, tmp_path, "back")
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("setting", ["init", "fork"])
def test_a_run_that_started_from_an_import_carries_the_same(tmp_path: Path, run: Config, setting: str) -> None:
    source = wrap(export_run(run, tmp_path / "text", model_type="qwen3_5_moe_text"), tmp_path / "source")
    back = import_as(source, tmp_path / "runs", "back")
    further = make_run(tmp_path / "runs", "further", EXPERTS, Path(run.data.corpus))
    named = str(back) if setting == "init" else f"{back}@0"
    further = replace(further, run=replace(further.run, **{setting: named}))
    save_config(further)
    add_checkpoint(further.run.path, telling(EXPERTS))
    out = export_run(further, tmp_path / "out")
    assert_same(tensors_of(out), tensors_of(source))
    in_fp8 = export_run(further, tmp_path / "in_fp8", quantize="fp8")
    tower = {name for name in tensors_of(source) if name.startswith("model.visual.")}
    assert all(torch.equal(tensors_of(in_fp8)[name], tensors_of(source)[name]) for name in tower)
    # Loaders quantize every module that is not listed.
    listed = set(config_of(in_fp8)["quantization_config"]["modules_to_not_convert"])
    assert "model.visual.blocks.0.attn.qkv" in listed


def in_fp8(source: Path, directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same checkpoint with its projections in FP8, and what they are when read."""
    shutil.copytree(source, directory)
    tensors, read = tensors_of(source), {}
    for name in [name for name in tensors if "_proj" in name and tensors[name].ndim == 2 and "in_proj_" not in name]:
        weight, scale = block_scales(tensors[name], BLOCK)
        tensors[name], tensors[name + SCALE] = weight, scale
        read[name] = dequantize(weight, scale, BLOCK).bfloat16()
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors")
    config = config_of(source)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory, read


def test_fp8_is_read_into_the_type_of_training(tmp_path: Path, run: Config, capsys) -> None:
    plain = export_run(run, tmp_path / "plain")
    source, read = in_fp8(plain, tmp_path / "fp8")
    assert len(read) > 50
    back = import_as(source, tmp_path, "back")
    assert "FP8 are converted to bfloat16" in capsys.readouterr().out
    out = export_run(as_run(run, back), tmp_path / "out")
    assert "quantization_config" not in config_of(out)
    assert_same(tensors_of(out), tensors_of(plain) | read)
    for name, weight in read.items():
        # e4m3 has three bits after the point: at most 1/16 off, of the block's largest at the small end 2^-9 / 448.
        error = (weight.float() - tensors_of(plain)[name].float()).abs()
        assert (error <= tensors_of(plain)[name].float().abs() / 15 + 1e-4).all(), name


# Sizes are multiples of a block or smaller than one: transformers takes a block to be a whole part of the matrix.
WIDE = replace(
    EXPERTS,
    hidden_size=256,
    expert_size=128,
    shared_expert_size=128,
    linear_value_heads=4,
    linear_key_dim=32,
    linear_value_dim=32,
)


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_an_export_in_fp8_is_what_transformers_and_we_read(tmp_path: Path, corpus: Path, model_type: str) -> None:
    run = made(tmp_path, corpus, WIDE)
    plain = export_run(run, tmp_path / "plain", model_type=model_type, experts="separate")
    out = export_run(run, tmp_path / "out", model_type=model_type, quantize="fp8")
    with pytest.raises(ConfigError, match="experts=stacked is not written in FP8"):
        export_run(run, tmp_path / "stacks", model_type=model_type, quantize="fp8", experts="stacked")
    stored = tensors_of(out)
    in_fp8_now = [name for name, x in stored.items() if x.dtype == torch.float8_e4m3fn]
    assert 2 * len(in_fp8_now) + len(tensors_of(plain)) - len(in_fp8_now) == len(stored)
    assert not [
        name for name in in_fp8_now if any(part in name for part in ("lm_head", "embed", "gate.", "norm", "fc"))
    ]
    config = FineGrainedFP8Config(**config_of(out)["quantization_config"] | {"dequantize": True})
    theirs, report = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=config, dtype="bfloat16", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    back = export_run(as_run(run, import_as(out, tmp_path, "back")), tmp_path / "back_out")
    # The same numbers on both sides: those in FP8 times their scales, those beside them untouched.
    ours = AutoModelForCausalLM.from_pretrained(back, dtype="bfloat16")
    assert_same(*({name: x.bfloat16() for name, x in model.state_dict().items()} for model in (theirs, ours)))
    whole = tensors_of(plain)
    for name in in_fp8_now:
        scale = stored[name + SCALE].amax()
        error = (tensors_of(back)[name].float() - whole[name].float()).abs()
        assert (error <= whole[name].float().abs() / 15 + scale / 400).all(), name


def test_fp8_without_its_scales_is_refused(tmp_path: Path, run: Config) -> None:
    source, read = in_fp8(export_run(run, tmp_path / "plain"), tmp_path / "fp8")
    tensors = tensors_of(source)
    name = sorted(read)[0]
    del tensors[name + SCALE]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConfigError, match=f"1 FP8 tensors have no scales \\({name}"):
        import_as(source, tmp_path, "back")
    assert not (tmp_path / "back").exists()
    config = config_of(source)
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"stored in FP8 .* without weight_block_size they cannot be read"):
        import_as(source, tmp_path, "back")


def test_scales_of_stacks_are_taken_with_their_experts() -> None:
    stack = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0))
    pairs = [block_scales(weight, BLOCK) for weight in stack]
    weight, scale = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    whole = dequantize(weight, scale, BLOCK)
    assert scale.shape == (3, 3, 2) and FP8 == "F8_E4M3"
    for index in range(3):
        assert torch.equal(whole[index], dequantize(weight[index], scale[index], BLOCK))
    assert ((whole - stack).abs() <= stack.abs() / 15 + 1e-2).all()


def test_float16_is_converted_when_a_type_is_named(tmp_path: Path, corpus: Path, capsys) -> None:
    shape = replace(SHAPE, dtype="float32")
    out = export_run(made(tmp_path, corpus, shape), tmp_path / "out")
    tensors = {name: x.half() for name, x in tensors_of(out).items()}
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config_of(out) | {"dtype": "float16"}))
    with pytest.raises(ValueError, match=r"dtype='float16' cannot be imported: .* say dtype=bfloat16 or dtype=float32"):
        import_as(out, tmp_path, "back")
    back = import_as(out, tmp_path, "back", dtype="float32")
    assert "float16 are converted to float32" in capsys.readouterr().out
    embedding = read_all(Shelf(back / "checkpoints").path(0))["embedding.word_embeddings.weight"]
    assert torch.equal(embedding, tensors["model.embed_tokens.weight"].float())


def test_a_model_without_the_settings_of_its_tokenizer_is_exported_with_what_there_is(
    tmp_path: Path, run: Config
) -> None:
    out = export_run(run, tmp_path / "out")
    (out / "tokenizer_config.json").unlink()
    again = export_run(as_run(run, import_as(out, tmp_path, "back")), tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert not (again / "tokenizer_config.json").exists()


def test_a_model_of_another_family_is_refused_by_name(tmp_path: Path, corpus: Path, run: Config) -> None:
    with pytest.raises(ValueError, match=r"model.pattern='GEGEGE\*E' has no counterpart in .* qwen3_5_text checkpoint"):
        export_run(run, tmp_path / "out", model_type="qwen3_5_text")
    assert not (tmp_path / "out").exists()
