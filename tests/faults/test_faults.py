"""The campaign in short, in the normal run; ``python -m tests.faults --kills 50`` is the long one."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from parallel.engine import DeepSpeedConfig
from tests.faults import campaign, disks
from tests.faults.campaign import PHASES, Fault, Reference, Table, run_through
from tests.faults.harness import start
from tests.faults.injections import InSave, InStep, NoStorage, StaleDirectory
from tests.faults.runs import campaign_config, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Reference:
    """The undisturbed run."""
    return campaign.make_reference(tmp_path_factory.mktemp("reference"), corpus, 2)


def test_a_run_survives_kills_a_hang_damage_and_a_stale_directory_bit_for_bit(tmp_path, corpus, reference):
    faults = [
        Fault("rename", InSave(0, PHASES["rename"], 2, after=False)),
        Fault("hang", InStep(1, 2, "stopped")),
        Fault("stale", StaleDirectory(1), flip=True, ends=False),
    ]
    assert run_through(reference, tmp_path, corpus, "run", faults, seed=0) == ""
    log = (tmp_path / "run_0" / "log").read_text()
    assert "process 1 on " in log and "gives no sign of life" in log
    stacks = list((tmp_path / "run_0" / "logs").glob("hang_*_process_0.txt"))
    assert stacks and "train_step" in stacks[0].read_text()
    assert list((tmp_path / "run_0" / "logs").glob("hang_*_process_0.flight"))
    assert "is damaged" in log  # the flipped bit was found, and an older checkpoint taken
    assert campaign.flips(reference, tmp_path, 12, seed=0) == []


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: ./launch.sh setup deepspeed")
def test_a_killed_run_goes_on_with_the_other_engine_and_back(tmp_path, corpus, reference):
    config = campaign_config(tmp_path, "run", corpus)
    log = config.run.path / "log"
    other = replace(config, engine="deepspeed", deepspeed=DeepSpeedConfig(zero=2))
    assert start(config, 2, log, InStep(0, 5, "killed")).wait() != 0  # after the checkpoint of step 3
    assert start(other, 2, log, InStep(1, 5, "killed")).wait() != 0  # in step 8, after that of step 6
    assert start(config, 2, log).wait() == 0
    found = campaign.by_step(config.run.path)
    assert found.keys() == reference.losses.keys()
    history = map(json.loads, (config.run.path / "history.jsonl").read_text().splitlines())
    turns = [line["changed"].get("engine") for line in history]
    assert turns == [None, ["megatron", "deepspeed"], ["deepspeed", "megatron"]]
    for step, expected in reference.losses.items():
        # float32 sums in another order, and what they tip afterwards.
        assert found[step]["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-6 if step <= 3 else 7e-4), step


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only_for_a_while_costs_nothing(tmp_path, corpus, reference):
    if reason := disks.why_not(tmp_path):
        pytest.skip(reason)
    assert set(disks.spoilt_disks(reference, tmp_path, corpus).values()) == {""}
    full, read_only = ((tmp_path / f"disk_2_{number}" / "log").read_text() for number in range(2))
    assert "No space left on device" in full and "Read-only file system" in read_only


def test_a_storage_that_stays_away_saves_and_exits_with_75(tmp_path, corpus):
    config = campaign_config(tmp_path, "run", corpus, run={"save_every": 0})
    log = config.run.path / "log"
    assert start(config, 2, log, NoStorage(rank=1, step=2)).wait() == 75
    text = log.read_text()
    assert "token expired" in text and "stopped after step 2 of 12" in text
    assert [path.name for path in config.run.checkpoints.iterdir()] == ["step_00000002"]


def test_a_table_blames_every_fault_of_a_run_that_was_lost():
    table = Table()
    table.add(["kill", "hang"])
    table.add(["kill"], "other weights")
    rows = [line.split() for line in table.text().splitlines()]
    assert rows[1:] == [["hang", "1", "1", "0"], ["kill", "2", "1", "1"], ["all", "3", "2", "1"], *rows[4:]]
    assert table.text().endswith("LOST kill: other weights")
