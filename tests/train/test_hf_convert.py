"""Export and import through files: every bit comes back, from any layout, and what is wrong is refused as a whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from model.config import ModelConfig
from tests.train.hf_runs import (
    SHAPE,
    VOCAB,
    add_checkpoint,
    export_run,
    import_as,
    make_corpus,
    make_run,
    read_all,
    telling,
)
from train.__main__ import run as command
from train.job.shelf import Shelf
from train.settings.run import Config
from train.settings.tree import ConfigError

ODD_SHAPES = {
    "as many value as key heads": replace(SHAPE, linear_value_heads=2, attention_heads=6, key_value_heads=6),
    "four value heads a key head, head_dim 256, bfloat16": replace(
        SHAPE, linear_value_heads=8, head_dim=256, pattern="*EGE", dtype="bfloat16"
    ),
    "512 experts": replace(SHAPE, experts=512, expert_size=8, hidden_size=16, pattern="GE", dtype="bfloat16"),
    "YaRN, an odd number of experts": replace(
        SHAPE, experts=9, head_dim=64, yarn_factor=4.0, yarn_original_length=1000, repeats=2, pattern="GE|*E"
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Config:
    """A run of one step."""
    config = make_run(tmp_path / "runs", "mine", SHAPE, corpus)
    add_checkpoint(config.run.path, telling(SHAPE))
    return config


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("experts", ["separate", "stacked"])
@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_a_round_trip_changes_no_bit(tmp_path: Path, corpus: Path, shape: ModelConfig, experts: str) -> None:
    run, weights = make_run(tmp_path, "mine", shape, corpus, mtp=3), telling(shape)
    add_checkpoint(run.run.path, weights)
    out = export_run(run, tmp_path / "out", experts=experts, shard_size=1e-4)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    # The safetensors library itself reads what was written.
    assert index == {name: file.name for file in files for name in load_file(file)}
    back = import_as(out, tmp_path, "back")
    assert_same(read_all(Shelf(back / "checkpoints").path(0)), weights)
    assert not list(tmp_path.glob("**/*.partial"))


def test_a_type_is_asked_for_and_weights_kept_in_float32_stay_so(tmp_path: Path, run: Config) -> None:
    out = export_run(run, tmp_path / "out", dtype="bfloat16")
    tensors = load_file(out / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.linear_attn.A_log"].dtype == tensors["mtp.norm.weight"].dtype == torch.float32
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {
        name: x if x.dim() < 2 or name.endswith("router.weight") else x.bfloat16() for name, x in telling(SHAPE).items()
    }
    assert_same(read_all(Shelf(import_as(out, tmp_path, "back") / "checkpoints").path(0)), expected)


def test_the_tokenizer_comes_along_and_takes_a_chat(tmp_path: Path, run: Config) -> None:
    out = export_run(run, tmp_path / "out", max_length=99)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 0, 99)
    text = "the lazy fox"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    assert chat == f"user: {text}\nassistant:"
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["max_position_embeddings"], config["vocab_size"]) == (0, 99, VOCAB)
    # An imported run has no corpus: its own tokenizer goes out again, byte for byte.
    back = import_as(out, tmp_path, "back")
    again = export_run(replace(run, run=replace(run.run, name="back", dir=str(back.parent))), tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_a_run_whose_checkpoint_is_not_its_model_is_not_exported(tmp_path: Path, run: Config) -> None:
    weights = telling(SHAPE)
    del weights["decoder.layers.3.mlp.experts.weight2"]
    weights["decoder.layers.8.surplus"] = torch.zeros(1)
    weights["mtp.layers.0.hnorm.weight"] = torch.zeros(3)
    add_checkpoint(run.run.path, weights, step=2)
    with pytest.raises(ConfigError) as refusal:
        export_run(run, tmp_path / "out")
    assert "1 missing: decoder.layers.3.mlp.experts.weight2; 1 not known: decoder.layers.8.surplus" in str(
        refusal.value
    )
    assert "1 of another shape: mtp.layers.0.hnorm.weight [3] instead of [64]" in str(refusal.value)
    weights = telling(SHAPE)
    weights["decoder.layers.3.mlp.experts.weight2"][5, 0, 0] = torch.nan
    weights["output_layer.weight"][1, 1] = torch.inf
    add_checkpoint(run.run.path, weights, step=3)
    with pytest.raises(ConfigError) as refusal:
        export_run(run, tmp_path / "out")
    broken = "lm_head.weight, model.layers.1.mlp.experts.5.down_proj.weight"
    assert str(refusal.value).startswith("2 tensors in ")
    assert sorted(str(refusal.value).rpartition(": ")[2].split(", ")) == broken.split(", ")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    export_run(run, tmp_path / "out", step=1)


def without(tensors: dict, name: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != name}


EXPERT = "mtp.layers.0.mlp.experts.7.up_proj.weight"
BROKEN_SETS = {
    "missing": (lambda x: without(x, EXPERT), f"1 missing: {EXPERT}"),
    "surplus": (lambda x: x | {"model.layers.4.extra": torch.ones(1)}, "1 not known: model.layers.4.extra"),
    "misshapen": (
        lambda x: x | {EXPERT: torch.ones(3, 4)},
        f"1 of another shape: {EXPERT} [3, 4] instead of [32, 64]",
    ),
    "not finite": (lambda x: x | {EXPERT: x[EXPERT] / 0}, "1 tensors in "),
    "of a strange type": (
        lambda x: x | {EXPERT: x[EXPERT].to(torch.int8)},
        f"F32, BF16, F16, F8_E4M3: {EXPERT} (I8)",
    ),
}


@pytest.mark.parametrize(("change", "complaint"), BROKEN_SETS.values(), ids=BROKEN_SETS)
def test_a_broken_set_is_refused_and_leaves_nothing(tmp_path: Path, run: Config, change, complaint: str) -> None:
    out = export_run(run, tmp_path / "out")
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors")
    with pytest.raises(ConfigError) as refusal:
        import_as(out, tmp_path / "new", "back")
    assert (complaint in str(refusal.value) and EXPERT in str(refusal.value)) or "extra" in complaint
    assert not list((tmp_path / "new").glob("*"))


def test_a_promised_mtp_layer_is_there_or_left_out_on_purpose(tmp_path: Path, run: Config) -> None:
    """transformers keeps the promise in config.json, and loses the layer."""
    out = export_run(run, tmp_path / "out")
    trunk = {name: x for name, x in load_file(out / "model.safetensors").items() if not name.startswith("mtp.")}
    save_file(trunk, out / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing: mtp.pre_fc_norm_embedding.weight.* mtp=false"):
        import_as(out, tmp_path, "back")
    found = read_all(Shelf(import_as(out, tmp_path, "back", mtp=False) / "checkpoints").path(0))
    assert_same(found, telling(SHAPE, mtp=False))


def damage(out: Path, how: str) -> None:
    file = out / "model.safetensors"
    index = out / "model.safetensors.index.json"
    if how == "pickles":
        file.rename(out / "pytorch_model.bin")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif how == "outside":
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    elif how == "absent":
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    elif how == "config":
        (out / "config.json").write_text("{")
    elif how == "notes":
        (out / "tessera.json").write_text('{"exact": {"model.layers.0.linear_attn.norm.weight": "ab"}}')
    elif how == "tokenizer":
        (out / "tokenizer.json").write_text("{")
    elif how in ("overlap", "twice"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        another = header["model.embed_tokens.weight"]["data_offsets"]
        header["lm_head.weight"]["data_offsets"] = another if how == "twice" else [0, 10**9]
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("pickles", "holds neither model.safetensors nor model.safetensors.index.json; pytorch_model.bin are pickles"),
        ("truncated", "model.safetensors is not a whole safetensors file"),
        ("header", "is not a whole safetensors file: its header claims"),
        ("overlap", "is not a whole safetensors file: lm_head.weight lies outside it"),
        ("twice", "is not a whole safetensors file: lm_head.weight lies where model.embed_tokens.weight is"),
        ("notes", "tessera.json cannot be read: exact must hold a list of numbers by name"),
        ("tokenizer", "tokenizer.json cannot be read: "),
        ("outside", "names files outside its directory: "),
        ("absent", "lacks files that model.safetensors.index.json names: model-00001-of-00002.safetensors"),
        ("config", "config.json cannot be read"),
    ],
)
def test_damaged_files_are_refused_with_one_line(tmp_path: Path, run: Config, how: str, complaint: str) -> None:
    out = export_run(run, tmp_path / "out")
    damage(out, how)
    with pytest.raises(ConfigError) as refusal:
        import_as(out, tmp_path / "new", "back")
    assert complaint in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list((tmp_path / "new").glob("*"))


def test_the_commands_and_the_mistakes_that_they_refuse(tmp_path: Path, run: Config, capsys) -> None:
    place, out = f"run.dir={run.run.dir}", tmp_path / "out"
    assert command(["export", "run=mine", place, f"out={out}"]) == 0
    assert command(["import", f"hf={out}", "run=back", place]) == 0
    assert f"train run.init={Path(run.run.dir) / 'back'} " in capsys.readouterr().out  # which is not looked for in runs
    for arguments, complaint in (
        (["export", "run=mine", place], "out must be given: out=... (directory to make"),
        (["export", "run=mine", place, f"out={out}"], f"out={out} exists already"),
        (["export", "run=none", place, "out=x"], "run.name=none is not a run in"),
        (["export", "run=mine", place, "out=x", "dtype=int8"], "dtype='int8' is not known: choose bfloat16 or float32"),
        (["export", "run=mine", place, "out=x", "experts=many"], "experts='many' is not known"),
        (
            ["export", "run=mine", place, "out=x", "step=7"],
            "step=7 is not among the checkpoints of run.name=mine: choose one of 1",
        ),
        (["export", "run=mine", place, "out=x", "shard_size=0"], "shard_size=0.0 must be above 0"),
        (["import", f"hf={tmp_path}/none", "run=other", place], f"hf={tmp_path}/none is not a directory"),
        (["import", f"hf={out}", "run=back", place], "run.name=back exists in"),
        (["import", f"hf={out}", "run.name=short", place, "seq_length=1"], "seq_length=1 must be at least"),
        (["import", f"hf={out}", "run.name=a/b", place], "run.name='a/b' cannot name a directory"),
        (["train", "run.name=back", place, "model.vocab_size=320"], "run.name=back holds imported weights"),
        (["train", "run.init=none", place], "run.init=none is not a run in"),
        (["train", "run.init=", place], "run.init is empty: name a run"),
        (["train", "run.fork=none@3", place], "run.fork=none@3 is not a run in"),
        (["train", "run.fork=back", place], "run.fork=back names no checkpoint: write NAME@STEP"),
        (["train", "run.init=back", place, "model.experts=16"], "model.experts gives 16, but run.init=back has 8"),
        (["evaluate", "run=back", place], "data.corpus is empty"),
    ):
        with pytest.raises(ValueError) as refusal:
            command(arguments)
        assert str(refusal.value).startswith(complaint), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]
