"""Sweeps, recipes of the user's own, and what interpolation sees."""

from pathlib import Path

import pytest
import yaml

from train import front
from train.__main__ import compose, run
from train.arguments import read
from train.settings.run import USER_ERRORS
from train.settings.tree import ConfigError


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Two processes, and runs and recipes in the test's directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPROC", "2")


@pytest.fixture
def started(monkeypatch):
    """The command lines of the runs that `train` would start; each ends with the next of the codes, else 0."""
    lines, codes = [], []

    def launch(command: str, arguments: list[str], processes: int, prepare: object, run: object) -> int:
        lines.append(compose(arguments))
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(front, "launch", launch)
    lines.append(codes)
    return lines


def swept(started: list, *arguments: str, codes: tuple[int, ...] = ()) -> tuple[int, list]:
    started[0].extend(codes)
    code = run(["train", "-m", *arguments])
    return code, started[1:]


def test_a_sweep_is_a_run_for_each_combination_the_last_setting_fastest(started, capsys):
    code, configs = swept(started, "seed=1,2", "optim.lr=1e-3,2e-3", "run.steps=5")
    assert code == 0
    assert [(c.seed, c.optim.lr, c.run.steps) for c in configs] == [
        (1, 1e-3, 5),
        (1, 2e-3, 5),
        (2, 1e-3, 5),
        (2, 2e-3, 5),
    ]
    assert configs[0].run.name == "tiny_seed=1_optim.lr=0.001"
    assert len({c.run.name for c in configs}) == 4
    assert "2 of 4: seed=1_optim.lr=0.002" in capsys.readouterr().out


def test_runs_of_a_sweep_keep_names_that_differ(started):
    _, configs = swept(started, "seed=1,2", "run.name=exp_${seed}")
    assert [c.run.name for c in configs] == ["exp_1", "exp_2"]


def test_groups_and_texts_sweep_too_and_make_names_of_directories(started):
    _, configs = swept(started, "optim=cosine,wsd", "data.cache=a/b,c", "run.name=one")
    assert [(c.optim.schedule, c.data.cache) for c in configs] == [
        ("cosine", "a/b"),
        ("cosine", "c"),
        ("wsd", "a/b"),
        ("wsd", "c"),
    ]
    assert configs[0].run.name == "one_optim=cosine_data.cache=a-b"


def test_a_sweep_without_choices_is_one_run_of_its_own_name(started):
    _, configs = swept(started, "seed=3", "data.cache=a(b")  # the second is no value that Hydra reads
    assert [(c.run.name, c.seed, c.data.cache) for c in configs] == [("tiny", 3, "a(b")]


@pytest.mark.parametrize(("codes", "runs", "code"), [((1, 0), 3, 1), ((130,), 1, 130), ((0, 75), 2, 75)])
def test_a_run_that_fails_lets_the_next_start_and_one_that_was_stopped_ends_the_sweep(started, codes, runs, code):
    got, configs = swept(started, "seed=1,2,3", codes=codes)
    assert (got, len(configs)) == (code, runs)


def test_a_job_of_a_slurm_array_does_the_run_of_its_number(started, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    _, configs = swept(started, "seed=1,2", "optim.lr=1e-3,2e-3")
    assert [(c.seed, c.optim.lr) for c in configs] == [(2, 1e-3)]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    with pytest.raises(ConfigError, match="4 is none of a sweep of 4 runs: use sbatch --array=0-3"):
        run(["train", "-m", "seed=1,2", "optim.lr=1e-3,2e-3"])


def test_every_run_of_a_sweep_is_composed_before_one_starts(started):
    with pytest.raises(USER_ERRORS, match="seed='x' cannot be used"):
        run(["train", "-m", "seed=1,x"])
    assert started == [[]]


def test_interpolation_sees_settings_that_no_file_names():
    assert compose(["run.name=exp_${seed}_${mtp.steps}_${balance.weight}"]).run.name == "exp_1234_2_0.001"
    assert compose(["data.cache=${run.name}", "seed=5"]).data.cache == "tiny"


def test_whole_numbers_may_be_written_as_powers_of_ten():
    config = compose(["run.steps=1e6", "batch.schedule=[[1e12,32]]"])
    assert (config.run.steps, config.batch.schedule) == (1_000_000, ((10**12, 32),))
    assert type(config.run.steps) is int


def test_a_list_of_variables_needs_no_quotes():
    given = "run.environment=[NCCL_IB_HCA=mlx5_0, NCCL_DEBUG=INFO]"
    assert compose([given]).run.environment == ("NCCL_IB_HCA=mlx5_0", "NCCL_DEBUG=INFO")
    quoted = "run.environment=['NCCL_DEBUG_SUBSYS=INIT,COLL']"
    assert compose([quoted]).run.environment == ("NCCL_DEBUG_SUBSYS=INIT,COLL",)
    assert compose(["parallel.recompute_modules=[norm]"]).parallel.recompute_modules == ("norm",)


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder of a user: a recipe that takes groups of theirs and of ours, one in a sub-folder, one named as ours."""
    files = {
        "mine/exp.yaml": "defaults: [base, override optim: own, override model: tiny_512e, _self_]\nseed: 7\n",
        "mine/optim/own.yaml": "lr: 0.125\n",
        "mine/deep/er.yaml": "defaults: [base, _self_]\nseed: 8\n",
        "mine/tiny.yaml": "defaults: [base, _self_]\nseed: 9\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "mine"


@pytest.mark.parametrize("where", ["mine/exp", "mine/exp.yaml", "./mine/exp.yaml"])
def test_a_recipe_may_be_a_path(own, where):
    config = compose(["-cn", where])
    assert (config.seed, config.optim.lr, config.model.experts, config.run.name) == (7, 0.125, 512, "exp")


def test_a_folder_of_recipes_and_groups_goes_before_ours(own):
    assert compose(["-cd", "mine", "-cn", "exp"]).seed == 7
    assert compose([f"--config-dir={own}", "--config-name=deep/er"]).seed == 8
    assert compose(["-cd", "mine"]).seed == 9
    assert compose(["-cd", "mine", "-cn", "tiny_512e", "optim=own"]).optim.lr == 0.125
    with pytest.raises(ConfigError, match="unknown recipe 'exq': did you mean exp"):
        compose(["-cd", "mine", "-cn", "exq"])


def test_a_recipe_with_a_value_for_a_section_is_refused(own):
    (own / "flat.yaml").write_text("defaults: [base, _self_]\nrun: 5\n")
    with pytest.raises(ConfigError, match=r"run.* is a section|cannot be composed"):
        compose(["-cn", "mine/flat"])


def test_workers_get_the_same_command_line():
    line = read(["-cd", ".", "-cn=tiny", "-m", "seed=1"])
    assert read(line.arguments) == read(["--config-dir=.", "--config-name", "tiny", "seed=1"])


def test_cfg_shows_what_a_command_line_comes_to(capsys):
    assert run(["train", "-cn", "qwen3_next_80b_a3b", "seed=3", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["run"]["name"]) == (3, "qwen3_next_80b_a3b")
    assert not Path("runs").exists()
