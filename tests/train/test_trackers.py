"""Who hears of the metrics, and what Weights & Biases may and may not do."""

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import wandb

from tests.train.logs import read_metrics
from tests.train.wandb_files import history, records
from train.settings.run import Config
from train.settings.tree import ConfigError, from_dict
from train.watch.heatmap import CELL, RAMP
from train.watch.trackers import (
    ConsoleTracker,
    NullTracker,
    TensorBoardTracker,
    WandbTracker,
    _run_id,
    build_trackers,
    check_login,
)


@pytest.fixture
def config(tmp_path):
    config = from_dict(Config, {"run": {"name": "one", "dir": str(tmp_path), "steps": 100}})
    config.run.path.mkdir()
    return config


@pytest.fixture
def logged_out(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # forgets a login of this process
    yield
    wandb.teardown()


def with_mode(config: Config, mode: str) -> Config:
    return from_dict(Config, {"run": {"name": "one", "dir": config.run.dir}, "wandb": {"mode": mode}})


def test_only_rank_zero_says_anything(config, capsys):
    tracker = build_trackers(config, rank=1, start_step=0)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert isinstance(tracker, NullTracker)
    assert capsys.readouterr().out == "" and not list(config.run.path.iterdir())


def test_rank_zero_writes_the_log_the_console_and_wandb_offline(config, capsys):
    tracker = build_trackers(config, rank=0, start_step=0)
    tracker.log(10, {"loss": 1.5})
    tracker.close()
    captured = capsys.readouterr()
    assert captured.out.startswith("step  10/100  loss 1.5000  ETA ")
    assert captured.out.count("\n") == 1 and captured.err == ""
    assert read_metrics(config.run.path / "metrics.jsonl") == [{"step": 10, "loss": 1.5}]
    assert len(list(config.run.path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_a_resumed_run_is_one_run_at_wandb_and_redone_steps_are_kept(config):
    for step, loss in ((1, 1.0), (2, 2.0), (2, 2.5)):  # the second one crashed before it had saved
        tracker = WandbTracker(config)
        tracker.log(step, {"loss": loss, "max_violation/1": 0.5, "every_step/lm_loss": [loss]})
        tracker.close()
    ids = {path.stem for path in config.run.path.glob("wandb/offline-run-*/*.wandb")}
    assert ids == {"run-" + (config.run.path / "wandb" / "run_id.txt").read_text().split()[0]}
    logged = [(entry["step"], entry["loss"], entry["max_violation/1"]) for entry in history(config.run.path)]
    assert logged == [(1, 1.0, 0.5), (2, 2.0, 0.5), (2, 2.5, 0.5)]


def test_a_step_that_is_done_again_in_one_process_is_kept(config):
    tracker = WandbTracker(config)
    for step, loss in ((1, 1.0), (2, 2.0), (1, 1.5)):
        tracker.log(step, {"loss": loss})
    tracker.alert("sink", "step 2: look at it")
    tracker.close()
    assert [entry["loss"] for entry in history(config.run.path)] == [1.0, 2.0, 1.5]
    (path,) = config.run.path.glob("wandb/offline-run-*/*.wandb")
    assert [record.alert.text for record in records(path) if record.alert.title] == ["step 2: look at it"]


class Board:
    """What TensorBoard's writer was told of, instead of it."""

    def __init__(self, path: str, purge_step: int, flush_secs: int) -> None:
        self.told: list[tuple] = [(Path(path).name, purge_step)]
        Board.last = self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "full":
            raise OSError("No space left on device")
        self.told.append((name, value, step))

    def add_image(self, name: str, pixels, step: int, dataformats: str) -> None:
        self.told.append((name, pixels.shape[2], step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.told.append((name, text, step))

    def close(self) -> None:
        self.told.append(("closed",))


def board_config(config: Config) -> Config:
    run = {"name": "one", "dir": config.run.dir, "tensorboard": True}
    return from_dict(Config, {"run": run, "wandb": {"mode": "disabled"}})


LOADS = {"expert_load/1": [1.0, 0.5], "expert_load/2": [2.0, 0.0]}


def test_tensorboard_is_told_what_is_logged(config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    tracker = build_trackers(board_config(config), rank=0, start_step=7)
    tracker.log(8, {"loss": 1.5, **LOADS, "every_step/lm_loss": [1.0]})
    tracker.alert("sink", "look at it")
    tracker.log(9, {"full": 1.0})
    tracker.log(10, {"loss": 1.0})
    tracker.close()
    expected = [("tensorboard", 8), ("loss", 1.5, 8), ("expert_load", 3, 8), ("alerts/sink", "look at it", 8)]
    assert Board.last.told == expected
    assert "warning: no more for TensorBoard (No space left on device)" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(config.run.path / "metrics.jsonl")] == [8, 9, 10]


def test_tensorboard_reads_back_what_was_logged_once_for_each_step(config):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, losses in ((0, (1.0, 2.0, 3.0)), (1, (2.5,))):  # the first start has crashed after a save of step 1
        tracker = TensorBoardTracker(config, start)
        for step, loss in enumerate(losses, start=start + 1):
            tracker.log(step, {"loss": loss, **LOADS})
        tracker.close()
    events = EventAccumulator(str(config.run.path / "tensorboard")).Reload()
    assert [(x.step, x.value) for x in events.Scalars("loss")] == [(1, 1.0), (2, 2.5)]
    assert [x.step for x in events.Images("expert_load")] == [1, 2]


def test_loads_of_experts_are_an_image(config):
    Image = pytest.importorskip("PIL.Image", reason="needs the extra dashboard")
    tracker = WandbTracker(config)
    tracker.log(1, {"expert_load/10": [1.0, 8.0], "expert_load/2": [0.0, 1.0], "every_step/lm_loss": [1.0]})
    tracker.close()
    (logged,) = history(config.run.path)
    assert (logged["expert_load/width"], logged["expert_load/height"]) == (2 * CELL, 2 * CELL)
    (file,) = config.run.path.glob("wandb/offline-run-*/files/" + logged["expert_load/path"])
    image = Image.open(file)
    assert image.getpixel((0, 0)) == tuple(map(int, RAMP[0])), "layer 2 stands above layer 10; its first expert is dead"
    assert image.getpixel((CELL, CELL)) == tuple(map(int, RAMP[-1])), "eight even shares"


def test_a_copied_or_broken_run_gets_an_id_of_its_own(tmp_path):
    path = tmp_path / "wandb" / "run_id.txt"
    first = _run_id(path, "one")
    assert _run_id(path, "one") == first
    other = _run_id(path, "a copy")
    assert other != first and _run_id(path, "a copy") == other
    path.write_text("")  # a crash while it was written
    assert len(_run_id(path, "one")) == 12


def test_disabled_leaves_no_trace_of_wandb(config, capsys):
    tracker = build_trackers(with_mode(config, "disabled"), rank=0, start_step=0)
    tracker.log(10, {"loss": 1.5})
    tracker.close()
    assert [path.name for path in config.run.path.iterdir()] == ["metrics.jsonl"]


def test_online_without_a_login_is_refused(config, logged_out):
    online = with_mode(config, "online")
    with pytest.raises(ConfigError, match=r"wandb\.mode=online cannot start .*wandb login.*offline"):
        check_login(online.wandb)
    with pytest.raises(ConfigError, match=r"wandb\.mode=online cannot start"):
        build_trackers(online, rank=0, start_step=0)
    check_login(config.wandb)  # offline needs no login


def test_offline_wandb_that_cannot_start_does_not_stop_the_run(config, capsys):
    bad = from_dict(Config, {"run": {"name": "one", "dir": config.run.dir}, "wandb": {"project": "a/b"}})
    tracker = build_trackers(bad, rank=0, start_step=0)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: no W&B for 5 minutes (") and captured.err.count("\n") == 1
    assert read_metrics(config.run.path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_wandb_that_breaks_on_the_way_does_not_stop_the_run_and_comes_back(config, capsys):
    now = [0.0]
    tracker = WandbTracker(config, clock=lambda: now[0])
    tracker.log(1, {"loss": 1.0})
    background = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
    assert background
    for child in background:
        child.kill()
    psutil.wait_procs(background, timeout=10)
    for step in range(2, 1000):
        tracker.log(step, {"loss": 1.0})
    assert capsys.readouterr().err.count("warning: no W&B for 5 minutes (") == 1
    now[0] = 301.0
    tracker.log(1000, {"loss": 4.0})
    tracker.close()
    assert history(config.run.path)[-1]["loss"] == 4.0
    assert capsys.readouterr().err == ""


def test_the_console_extrapolates_the_mean_speed(capsys):
    times = iter([100.0, 120.0])
    tracker = ConsoleTracker(start_step=50, steps=100, clock=lambda: next(times))
    tracker.log(60, {"loss": 1.0})  # 10 steps in 20 s: 40 more take 80 s
    assert capsys.readouterr().out == "step  60/100  loss 1.0000  ETA 1m20s\n"
