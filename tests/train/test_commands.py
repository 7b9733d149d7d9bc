"""The command line: what it refuses and with what words, its help, and its exit codes as real processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train import usage
from train.__main__ import compose, run
from train.settings.run import USER_ERRORS, Config, save_config
from train.settings.run_checks import check
from train.settings.tree import settings

ROOT = Path(__file__).parents[2]
RECIPES = "Known: " + ", ".join(usage.recipes())


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Two processes, and runs and caches in the test's directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPROC", "2")


def refused(*arguments: str) -> str:
    with pytest.raises(USER_ERRORS) as caught:
        run(list(arguments))
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("trian", "unknown command 'trian': did you mean train? Known: train, estimate, prepare, evaluate, generate, "),
        ("train -cn tinny", f"unknown recipe 'tinny': did you mean tiny? {RECIPES}"),
        ("train -cn=zzz", f"unknown recipe 'zzz': {RECIPES}"),
        ("train -cn base", f"unknown recipe 'base': {RECIPES}"),
        ("train -cn", f"-cn needs a recipe. {RECIPES}"),
        ("train --multi", "unknown option --multi: use -cn RECIPE, -cd DIR, -m, --cfg job, --dry-run, --help, or"),
        ("train --cfg hydra", "--cfg hydra is not known: --cfg job shows"),
        ("train --cfg", "--cfg needs job"),
        ("train -cd nowhere", "--config-dir nowhere is no directory"),
        ("train -cn ./tiny.yaml", "unknown recipe './tiny.yaml'"),
        ("train -cn optim/wsd", "unknown recipe 'optim/wsd'"),
        ("train ~optim", "~optim: every run has its section optim: optim=CHOICE (cosine, "),
        ("train optim", "optim: every run has its section optim: optim=CHOICE"),
        ("train ~mtp", "~mtp: every run has its section mtp: mtp.SETTING=VALUE changes one of its settings"),
        ("train -m seed=1,x", "seed='x' cannot be used: seed takes a whole number"),
        ("train -m seed=1,2 data.seq_length=3", "data.seq_length=3 is too short"),
        ("train -m seed=shuffle(1,2)", "seed=shuffle(1,2) would be another order in each process"),
        ("train -m optim.lr=interval(0,1)", "optim.lr=interval(0,1) cannot be swept over"),
        ("train run.step=5", "unknown setting run.step=5: did you mean run.steps?"),
        ("train steps=5", "unknown setting steps=5: did you mean run.steps or mtp.steps?"),
        ("train +run.step=5", "unknown setting +run.step=5: did you mean run.steps?"),
        ("train modle=tiny", "unknown setting modle=tiny: did you mean model?"),
        ("train model=tinny", "unknown choice model=tinny: did you mean tiny?"),
        ("train run.steps", "run.steps has no value: write run.steps=..."),
        ("train run.steps=many", "run.steps='many' cannot be used: run.steps takes a whole number"),
        ("train run.steps=1.5", "run.steps=1.5 cannot be used: run.steps takes a whole number"),
        ("train run.steps=[", "run.steps=[ cannot be composed: "),
        ("train run.steps=1,2", "run.steps=1,2 cannot be composed: "),
        (
            "train -cn qwen3_next_80b_a3b",
            "data.corpus must be given: data.corpus=... (directory or URL made by",
        ),
        ("train -cn qwen3_next_80b_a3b data.corpus=/nonexistent", "parallel.world=64 but 2 processes are started"),
        ("train parallel.expert=3", "parallel.expert=3 does not divide model.experts=16"),
        ("train parallel.tensor=4", "2 processes cannot be laid out as parallel.tensor=4"),
        ("train model.pattern=GEGE|GE*E", "parallel.pipeline=1 but model.pattern='GEGE|GE*E' x 1 has 2 stages"),
        ("train data.corpus=/a(b),c", "data.corpus=/a(b),c does not exist"),
        ("train data.seq_length=3", "data.seq_length=3 is too short for mtp.steps=2"),
        ("train balance.weight=-1", "balance.weight=-1.0 would drive loads apart: choose a finite number"),
        ("train balance.mode=exact balance.scope=micro", "balance.mode=exact counts the global batch ahead, and"),
        (
            "train run.dir=s3://bucket/runs",
            "run.dir=s3://bucket/runs is a URL, and a run lives on a file",
        ),
        ("train run.dir=/dev/null", "run.dir=/dev/null cannot be written: /dev/null/tiny: Not a directory"),
        ("prepare", "input must be given: input=..."),
        ("prepare input=x outputs=y", "unknown setting outputs=y: did you mean output?"),
        ("evaluate run.name=nope", "run.name=nope is not a run in runs: it holds none"),
        ("evaluate run=nope", "run.name=nope is not a run in runs: it holds none"),
        ("bench bench.output=/dev/null/x.json", "bench.output=/dev/null/x.json cannot be written: /dev/null: Not a"),
        ("bench bench.output=/dev", "bench.output=/dev cannot be written: /dev is a directory: choose another file"),
        ("bench bench.output=numbers.md", "bench.output=numbers.md is where the page goes: name a file of numbers"),
        ("generate tokens=0", "tokens=0 must be at least 1"),
        ("generate prompt", "'prompt' is not a setting: write key=value"),
    ],
)
def test_mistakes_are_named_in_one_line_before_any_work(arguments, says):
    assert says in refused(*arguments.split(" "))


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_run_without_a_checkpoint_is_refused(command):
    config = compose(["run.name=young"])
    check(config, 2)
    save_config(config)
    with pytest.raises(USER_ERRORS, match=r"run\.name=young has no checkpoint yet"):
        run([command, "run.name=young"])


def test_settings_of_all_types_reach_the_configuration():
    config = compose(
        [
            "-cn",
            "tiny_512e",
            "optim=wsd",
            "+mtp.steps=2",
            "mtp.weight=[[0,0.3],[1000000,0.1]]",
            "mtp.step_weights=[3,1]",
            "run.name=it's a \\'b\\",
            "run.max_time=3",
            "data.corpus=/x/(y),z=1",
            "model.pattern=GE|*E",
            "optim.betas=[0.8,0.9]",
            "parallel.expert=4",
            "wandb.entity=2025_11",
        ]
    )
    assert config.mtp.steps == 2
    assert config.mtp.weight == ((0.0, 0.3), (1e6, 0.1)) and config.mtp.step_weights == (3.0, 1.0)
    assert config.run.name == "it's a \\'b\\"
    assert config.run.max_time == 3.0
    assert config.data.corpus == "/x/(y),z=1"
    assert config.model.pattern == "GE|*E" and config.model.experts == 512
    assert config.optim.schedule == "wsd" and config.optim.betas == (0.8, 0.9)
    assert config.parallel.expert == 4
    assert config.wandb.entity == "2025_11"  # not the number 202511


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_its_groups():
    assert compose([]).run.steps == 160  # the group run=short
    assert compose(["-cn", "tiny_512e"]).run.steps == 100
    assert compose(["-cn", "tiny_512e", "run.steps=5"]).run.steps == 5
    assert compose(["run.steps=5", "run=long"]).run.steps == 5


def test_quotes_and_null_are_read():
    assert compose(["run.name='quoted'"]).run.name == "quoted"
    assert compose(["wandb.entity=null"]).wandb.entity is None
    assert compose(["run.name="]).run.name == "tiny"


@pytest.mark.parametrize("command", usage.CONFIGS)
def test_help_names_every_setting_with_its_meaning(command, capsys):
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    for setting in [*settings(usage.CONFIGS[command]), *(settings(Config) if command == "train" else ())]:
        assert f"\n  {setting.path}=" in text
        assert " ".join(setting.help.split()) in " ".join(text.split())
    assert f"usage: ./launch.sh {command} " in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_of_train_names_recipes_and_groups(capsys):
    run(["train", "-h"])
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in [*usage.recipes(), *usage.groups()])


def test_examples_of_train_compose():
    for example, _ in usage.EXAMPLES["train"]:
        arguments = example.split()[1:]
        compose([argument.partition(",")[0] for argument in arguments] if "-m" in arguments else arguments)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_without_a_command_lists_the_commands(arguments, capsys):
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in usage.CONFIGS)


def python_m_train(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_mistake_in_a_value_is_one_line_and_exit_code_2():
    process = python_m_train("train", "balance.scope=batch")
    out, err = process.communicate(timeout=60)
    message = "error: balance.scope='batch' is not known: choose global, micro or sequence\n"
    assert (process.returncode, out, err) == (2, "", message)


def test_a_mistake_is_one_line_and_exit_code_2_without_torch():
    begin = time.monotonic()
    process = python_m_train("train", "run.step=5")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (2, "", "error: unknown setting run.step=5: did you mean run.steps?\n")
    assert time.monotonic() - begin < 20  # half a second where nothing else runs


def test_help_exits_0():
    process = python_m_train("--help")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and out.startswith("usage: ./launch.sh COMMAND")
