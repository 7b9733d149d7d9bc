"""The campaign in short, in the normal run; ``python -m tests.faults --kills 50`` is the long one."""

import random
import signal
import time
from pathlib import Path

import pytest

from data.errors import StorageError
from data.loader import Loader
from tests.faults import campaign
from tests.faults.campaign import PHASES, Fault, Table, run_through
from tests.faults.harness import start
from tests.faults.injections import InSave, InStep, StaleDirectory
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


class NoStorage:
    """The storage of one rank is away from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, rank: int) -> None:
        if rank != 1:
            return
        real = Loader.poll

        def poll(loader: Loader, seconds: float):
            if loader.step == self.step:
                time.sleep(1)  # the others wait meanwhile
                raise StorageError("s3://corpus cannot be read for 1800 s: token expired")
            return real(loader, seconds)

        Loader.poll = poll


def test_a_storage_that_stays_away_saves_and_exits_with_75(tmp_path, corpus):
    config = campaign_config(tmp_path, "run", corpus, run={"save_every": 0})
    log = config.run.path / "log"
    assert start(config, 2, log, NoStorage(2)).wait() == 75
    text = log.read_text()
    assert "token expired" in text and "stopped after step 2 of 12" in text
    assert [path.name for path in config.run.checkpoints.iterdir()] == ["step_00000002"]


def test_signals_stop_a_run_that_goes_on_as_if_nothing_had_happened(tmp_path, corpus):
    config = campaign_config(tmp_path, "run", corpus, run={"save_every": 0, "max_time": 0.0001})
    log = config.run.path / "log"
    assert start(config, 2, log).wait() == 75  # the time was up after its first step
    assert "stopped after step 1 of 12" in log.read_text()
    begun = start(campaign_config(tmp_path, "run", corpus, run={"save_every": 0, "steps": 10**6}), 2, log)
    while "step  3/" not in log.read_text() and "step       3/" not in log.read_text():
        time.sleep(0.05)
    begun.process.terminate()
    assert begun.wait() == 75
    assert signal.SIGTERM and "starting after step 1" in log.read_text()


def test_a_table_blames_every_fault_of_a_run_that_was_lost():
    table = Table()
    table.add(["kill", "hang"])
    table.add(["kill"], "other weights")
    assert table.text().splitlines()[1:] == [
        "hang       1         1     0",
        "kill       2         1     1",
        "all        3         2     1",
        "LOST kill: other weights",
    ]
    assert (
        campaign.random_kills(9, 2, random.Random(0))[8].name == campaign.random_kills(9, 2, random.Random(0))[0].name
    )
