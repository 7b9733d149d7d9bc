"""The campaign in short, in the normal run; ``python -m tests.faults --kills 50`` is the long one."""

from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults.campaign import PHASES, Fault, Table, run_through
from tests.faults.harness import start
from tests.faults.injections import InSave, InStep, NoStorage, StaleDirectory
from tests.faults.runs import campaign_config, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_run_survives_kills_a_hang_damage_and_a_stale_directory_bit_for_bit(tmp_path, corpus):
    reference = campaign.make_reference(tmp_path, corpus, 2)
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
