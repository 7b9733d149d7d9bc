"""The tree of a run's settings: checks, description, and the way to config.yaml and back."""

import os
from dataclasses import replace

import pytest
import yaml

from data.errors import CorpusError
from model.config import ModelError
from parallel.topology import ParallelConfig, TopologyError, resolve
from train.__main__ import compose
from train.job.footprint import fewest_processes, held_weights, recomputed
from train.settings import optim
from train.settings.commands import (
    EvaluateConfig,
    GenerateConfig,
    check_evaluate,
    check_generate,
    used_elsewhere,
)
from train.settings.run import Config, RunReference, describe, load_config, save_config
from train.settings.run_checks import check
from train.settings.tree import ConfigError, from_dict, settings, to_dict


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Sound settings, with nothing written outside the test's directory."""
    monkeypatch.chdir(tmp_path)
    return from_dict(Config, {"run": {"name": "one"}})


def changed(config: Config, path: str, value) -> Config:
    values = to_dict(config)
    *sections, last = path.split(".")
    node = values
    for section in sections:
        node = node[section]
    assert last in node
    node[last] = value
    return from_dict(Config, values)


def test_every_setting_has_help_and_there_are_few_of_them():
    found = list(settings(Config))
    assert all(item.help for item in found)
    assert len(found) <= 150  # a budget of the project


def test_round_trip_through_a_dict_and_through_yaml(config):
    config = changed(config, "optim.betas", [0.8, 0.9])
    assert from_dict(Config, to_dict(config)) == config
    assert from_dict(Config, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    ramp = changed(config, "batch.schedule", [[1000, 32], [2000, 64]])
    assert from_dict(Config, yaml.safe_load(yaml.safe_dump(to_dict(ramp)))) == ramp
    assert to_dict(config)["batch"] == {"global": 16, "micro": 8, "schedule": [], "length_schedule": []}


def test_recomputed_parts():
    assert recomputed(ParallelConfig()) == set()
    assert recomputed(ParallelConfig(recompute="full")) == {"layer"}
    assert recomputed(ParallelConfig(recompute="selective")) == {"attention", "deltanet", "experts", "norm"}
    assert recomputed(ParallelConfig(recompute="selective", recompute_modules=("norm",))) == {"norm"}


def test_check_returns_the_layout(config):
    topology = check(config, 2)
    assert (topology.world, topology.data, topology.expert) == (2, 2, 2)
    assert config.run.path.is_dir() and not list(config.run.path.iterdir())


@pytest.mark.parametrize(
    ("path", "value", "error", "says"),
    [
        ("seed", -1, ConfigError, "seed=-1 is no seed: choose a whole number from 0 to"),
        ("run.steps", 0, ConfigError, "run.steps=0 must be at least 1"),
        ("run.log_every", 0, ConfigError, "run.log_every=0 must be at least 1"),
        ("run.detail_every", -1, ConfigError, "run.detail_every=-1 must be at least 0"),
        ("run.profile", [3], ConfigError, "run.profile=[3] are no steps: name the first and the last, as in [20,22]"),
        ("run.profile", [3, 2], ConfigError, "run.profile=[3, 2] are no steps"),
        ("run.alert_minutes", 0.0, ConfigError, "run.alert_minutes=0.0 must be above 0 minutes"),
        ("run.alert_webhook", "NO_SUCH", ConfigError, "run.alert_webhook=NO_SUCH is not in the environment: name the"),
        ("run.save_every", -1, ConfigError, "run.save_every=-1 must be at least 0"),
        ("run.max_time", 0.0, ConfigError, "run.max_time=0.0 must be above 0 minutes"),
        ("run.name", "", ConfigError, "run.name='' cannot name a directory"),
        ("run.name", "../up", ConfigError, "run.name='../up' cannot name a directory"),
        ("optim.lr", 0.0, ConfigError, "optim.lr=0.0 must be a number above 0"),
        ("optim.lr", float("nan"), ConfigError, "optim.lr=nan must be"),
        ("optim.min_lr", 1.0, ConfigError, "optim.min_lr=1.0 must lie between 0 and optim.lr=0.0003"),
        ("optim.schedule", "linear", ConfigError, "optim.schedule='linear' is not known: choose cosine or wsd"),
        ("optim.decay_shape", "cubic", ConfigError, "optim.decay_shape='cubic' is not known"),
        ("optim.decay_fraction", 0.0, ConfigError, "optim.decay_fraction=0.0"),
        ("optim.betas", [0.9, 1.0], ConfigError, "optim.betas=[0.9, 1.0]"),
        ("optim.moments", "half", ConfigError, "optim.moments='half' is not known: choose float32 or bfloat16"),
        ("optim.moments", "bfloat16", ConfigError, "optim.moments=bfloat16 is not for model.dtype=float32: choose"),
        ("optim.eps", float("inf"), ConfigError, "optim.eps=inf must be a number above 0"),
        ("optim.weight_decay", float("nan"), ConfigError, "optim.weight_decay=nan must be a number of at least 0"),
        ("optim.weight_decay", float("inf"), ConfigError, "optim.weight_decay=inf must be a number of at least 0"),
        ("optim.clip", -1.0, ConfigError, "optim.clip=-1.0 must be at least 0.0"),
        ("wandb.mode", "on", ConfigError, "wandb.mode='on' is not known: choose offline, online or disabled"),
        ("model.pattern", "GXE", ModelError, "model.pattern='GXE'"),
        ("model.experts_per_token", 17, ModelError, "model.experts_per_token=17"),
        ("parallel.expert", 3, TopologyError, "parallel.expert=3 does not divide model.experts=16"),
        ("parallel.tensor", 8, TopologyError, "parallel.tensor=8"),
        ("parallel.pipeline", 2, TopologyError, "parallel.pipeline=2 but model.pattern='GEGEGE*E'"),
        ("parallel.world", 4, TopologyError, "parallel.world=4 but 2 processes are started"),
        ("batch.global", 15, TopologyError, "batch.global=15 is not a multiple of batch.micro=8 x 2"),
        ("batch.micro", 0, TopologyError, "batch.micro=0 must be at least 1"),
        ("batch.schedule", [[1000, 24]], TopologyError, "batch.schedule from 1,000 tokens on: batch.global=24 is not"),
        ("batch.schedule", [[2000, 16], [1000, 32]], ConfigError, "batch.schedule=[[2000, 16], [1000, 32]] cannot be"),
        ("batch.length_schedule", [[0, 0]], ConfigError, "batch.length_schedule=[[0, 0]] cannot be followed"),
        ("batch.length_schedule", [[0, 100]], ConfigError, "100, which does not divide data.seq_length=256"),
        ("parallel.recompute", "some", TopologyError, "parallel.recompute='some' is not known: choose none, selective"),
        ("parallel.recompute_modules", ["head"], TopologyError, "parallel.recompute_modules='head' is not known"),
        (
            "run.steps",
            10**17,
            ConfigError,
            "x batch.global=16 x data.seq_length=256 are more than 2^63",
        ),
        ("run.start_timeout", 1e30, ConfigError, "run.start_timeout=1e+30 must be above 0 minutes, and at most 525600"),
        ("data.seq_length", 0, CorpusError, "data.seq_length=0 is too short for mtp.steps=2"),
        ("data.seq_length", 3, CorpusError, "data.seq_length=3 is too short for mtp.steps=2"),
        ("data.corpus", "/nonexistent", CorpusError, "data.corpus=/nonexistent"),
    ],
)
def test_check_refuses_what_cannot_run(config, path, value, error, says):
    with pytest.raises(error) as caught:
        check(changed(config, path, value), 2)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not config.run.path.exists()  # refused before anything is written


def test_check_refuses_a_tensorboard_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr("train.settings.run_checks.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"run\.tensorboard=true needs TensorBoard.*: \./launch\.sh setup tensorboard"
    ):
        check(changed(config, "run.tensorboard", True), 2)


def test_moments_that_nothing_keeps_are_refused(config, monkeypatch):
    narrow = changed(changed(config, "optim.moments", "bfloat16"), "model.dtype", "bfloat16")
    with pytest.raises(
        ConfigError, match=r"optim\.moments=bfloat16 is not for engine=deepspeed: choose engine=megatron"
    ):
        check(changed(narrow, "engine", "deepspeed"), 2)
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs Transformer Engine, which is not installed: ./launch.sh setup te, or"
    ):
        check(narrow, 2)
    monkeypatch.setattr(optim, "find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"optim\.moments=bfloat16 needs a GPU, and there is none"):
        check(narrow, 2)


def test_check_refuses_heads_that_tensor_parallelism_cannot_split(config):
    config = changed(config, "parallel.tensor", 4)  # 4 query heads, but 2 key/value heads
    with pytest.raises(TopologyError, match=r"parallel\.tensor=4 does not divide model\.key_value_heads=2"):
        check(config, 4)


def test_check_refuses_processes_that_the_layout_cannot_use(config):
    with pytest.raises(TopologyError, match="3 processes cannot be laid out"):
        check(changed(config, "parallel.tensor", 2), 3)


def test_check_refuses_a_run_directory_that_is_no_directory(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir=file cannot be written: .*: choose another run\.dir"):
        check(changed(config, "run.dir", "file"), 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_refuses_a_run_directory_without_permission(config, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"run\.dir=locked cannot be written: .*Permission denied"):
        check(changed(config, "run.dir", "locked"), 2)


def test_describe_shows_what_differs_and_what_follows(config):
    config = changed(changed(config, "optim.lr", 0.5), "batch.global", 64)
    lines = describe(config, check(config, 2))
    assert lines == [
        "run.name = one",
        "batch.global = 64",
        "optim.lr = 0.5",
        "processes: 2 = tensor 1 x pipeline 1 x context 1 x data 2; experts over 2",
        "a step: 64 sequences = micro 8 x data 2 x 4 microbatches = 16,384 tokens",
        "the run: 300 steps = 4,915,200 tokens",
    ]


def test_a_saved_configuration_is_found_by_the_name_of_its_run(config):
    check(config, 2)
    save_config(config)
    assert load_config(RunReference(name="one")) == config


def test_a_moved_run_is_found_where_it_is_and_on_any_number_of_processes(config, tmp_path):
    trained = changed(config, "parallel.world", 2)
    check(trained, 2)
    save_config(trained)
    (tmp_path / "runs").rename(tmp_path / "moved")
    loaded = load_config(RunReference(name="one", dir="moved"))
    assert loaded == replace(config, run=replace(config.run, dir="moved"))


def test_an_unknown_run_names_the_known_ones(config):
    with pytest.raises(ConfigError, match=r"run\.name=on is not a run in runs: it holds none"):
        load_config(RunReference(name="on"))
    for name in ("one", "two"):
        run = changed(config, "run.name", name)
        check(run, 2)
        save_config(run)
    with pytest.raises(ConfigError, match=r"run\.name=on is not a run in runs: did you mean one\? Known: one, two"):
        load_config(RunReference(name="on"))


@pytest.mark.parametrize("text", ["run: {stepss: 3}", "run: [", "", "5"])
def test_a_broken_configuration_file_is_named(config, text):
    check(config, 2)
    save_config(config).write_text(text)
    with pytest.raises(ConfigError, match=r"runs/one/config\.yaml cannot be read") as caught:
        load_config(RunReference(name="one"))
    assert "\n" not in str(caught.value)


def test_evaluate_and_generate_refuse_what_they_cannot_do():
    check_evaluate(EvaluateConfig())
    check_generate(GenerateConfig())
    with pytest.raises(ConfigError, match="samples=0 must be at least 1"):
        check_evaluate(EvaluateConfig(samples=0))
    with pytest.raises(ConfigError, match="tokens=0 must be at least 1"):
        check_generate(GenerateConfig(tokens=0))
    for config, says in (
        (GenerateConfig(temperature=1e-45), r"temperature=1e-45 is no temperature to divide by"),
        (GenerateConfig(seed=10**20), r"seed=100000000000000000000 is no seed: choose a whole number from 0 to"),
        (GenerateConfig(prompt="caf\udce9"), "prompt is not UTF-8"),
        (GenerateConfig(prompt_file="nowhere.txt"), "prompt_file=nowhere.txt cannot be read: No such file"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_generate(config)
    with pytest.raises(ConfigError, match=r"output=/dev/null/x\.json cannot be written: .*: choose another file"):
        check_evaluate(EvaluateConfig(output="/dev/null/x.json"))
    with pytest.raises(ConfigError, match=r"temperature=-1\.0 must be at least 0\.0"):
        check_generate(GenerateConfig(temperature=-1.0))


def test_a_run_is_used_elsewhere_on_any_layout_and_any_text(config):
    trained = changed(changed(config, "parallel.pipeline", 2), "model.pattern", "GEGE|GE*E")
    used = used_elsewhere(trained, ["data.corpus=corpora/other", "data.seq_length=64"])
    assert used.parallel == ParallelConfig() and used.model.pattern == "GEGEGE*E"
    assert (used.data.corpus, used.data.seq_length, used.data.vocab_size) == ("corpora/other", 64, 2048)
    piped = used_elsewhere(trained, ["parallel.pipeline=2"])
    assert (piped.parallel.pipeline, piped.model.pattern) == (2, "GEGE|GE*E")
    with pytest.raises(ConfigError, match=r"unknown setting parallel\.tensors=2: did you mean parallel\.tensor"):
        used_elsewhere(trained, ["parallel.tensors=2"])


def test_the_fewest_processes_that_hold_a_model(config):
    whole = fewest_processes(config, 2048, float("inf"), 8)
    assert whole == ParallelConfig(expert=1)
    size = sum(weight.numel for weight in held_weights(config, resolve(whole, config.model, 1), 2048, 0)) * 4
    assert fewest_processes(config, 2048, size, 8) == whole
    assert fewest_processes(config, 2048, 0.99 * size, 8) == ParallelConfig(expert=2)
    assert fewest_processes(config, 2048, 0.01 * size, 2) is None
    dense = changed(config, "model.pattern", "*-")
    size = sum(weight.numel for weight in held_weights(dense, resolve(whole, dense.model, 1), 2048, 0)) * 4
    assert fewest_processes(dense, 2048, 0.9 * size, 2) == ParallelConfig(tensor=2, expert=1)


def test_weights_of_another_run_come_into_a_pipelines_cuts(tmp_path):
    place = f"run.dir={tmp_path}"
    base = compose(["-cn", "qwen3_next_80b_a3b", place, "run.name=base", "model.rope_base=5e6"], planned=True)
    base.run.path.mkdir()
    save_config(base)
    ours = ["-cn", "qwen3_next_80b_a3b_512gpu", place, "run.init=base", "data.corpus=corpora/mine"]
    cut = compose(ours).model
    assert len(cut.stages) == 16 and cut.layers == base.model.layers and cut.rope_base == 5e6
    assert compose([*ours, "parallel.pipeline=1"]).model.stages == (base.model.layers,)
