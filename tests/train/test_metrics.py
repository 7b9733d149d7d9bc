"""metrics.jsonl and the console line."""

import json
import math
import time
import tracemalloc

import pytest

from tests.train.logs import read_metrics
from train.watch.every_step import EveryStep
from train.watch.metrics import MetricsLog, console_line, duration, last_entries, mtp_loss


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, start_step, steps):
    log = MetricsLog(path, start_step)
    for step in steps:
        log.log(step, {"loss": step / 3})
    log.close()


def test_a_step_is_one_json_object_with_all_digits(path):
    log = MetricsLog(path, 0)
    value = math.pi / 3
    log.log(10, {"tokens": 4096, "loss": value, mtp_loss(1): 2.5})
    lines = path.read_text().splitlines()  # before close: written through
    assert lines == [f'{{"step": 10, "tokens": 4096, "loss": {value!r}, "mtp_loss/1": 2.5}}']
    assert json.loads(lines[0])["loss"] == value


def test_what_is_not_finite_becomes_null(path):
    MetricsLog(path, 0).log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    assert read_metrics(path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}]
    assert "NaN" not in path.read_text()


def test_resuming_cuts_off_what_lies_beyond_the_checkpoint(path):
    write(path, 0, [10, 20, 30])
    before = path.read_bytes().splitlines(keepends=True)
    write(path, 20, [30, 40])
    after = path.read_bytes().splitlines(keepends=True)
    assert after[:3] == before  # the cut keeps the other lines byte for byte
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20, 30, 40]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_an_empty_log(path):
    write(path, 0, [10, 20])
    write(path, 0, [1])
    assert [entry["step"] for entry in read_metrics(path)] == [1]


def test_a_line_torn_off_by_a_crash_is_dropped(path):
    write(path, 0, [10, 20])
    with path.open("a") as file:
        file.write('{"step": 30, "lo')
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20]
    write(path, 20, [30])
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20, 30]


@pytest.mark.parametrize("junk", [b"\0" * 300_000, b'{"step": 25, "lo\n', b"\xff\xfe\n", b"[1]\n", b"\n"])
def test_what_a_crash_leaves_in_the_log_stops_nothing(path, junk):
    """A file system may leave blocks of zeros, or the end of a line, where power was lost."""
    write(path, 0, [10, 20])
    with path.open("ab") as file:
        file.write(junk)
    write(path, 20, [30])
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20, 30]
    with path.open("ab") as file:
        file.write(junk + b'\n{"step": 40}\n')
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20, 30, 40]
    assert [entry["step"] for entry in last_entries(path)] == [40, 30, 20, 10]
    write(path, 30, [35])
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20, 30, 35]


@pytest.mark.parametrize("steps", [1, 2, 3, 700, 5000])
def test_a_log_is_cut_at_any_place(path, steps):
    """Lines before, in and behind the blocks that are read from the end."""
    write(path, 0, range(1, 5001))
    lines = path.read_bytes().splitlines(keepends=True)
    write(path, steps, [])
    assert path.read_bytes() == b"".join(lines[:steps])


def test_a_long_log_is_taken_up_at_once_and_in_little_memory(path):
    """100,000 logged steps of 2 KB: the whole file would be 0.2 GB, and as objects several times that."""
    values = json.dumps({f"metric/{number}": number / 3 for number in range(50)})[1:]
    with path.open("w") as file:
        file.writelines(f'{{"step": {step}, {values}\n' for step in range(1, 100_001))
    tracemalloc.start()
    begin = time.perf_counter()
    MetricsLog(path, 99_500).close()
    seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 2 and peak < 10e6
    assert next(last_entries(path))["step"] == 99_500


def test_console_line():
    values = {"loss": 7.62415, "lm_loss": 6.9, "mtp_loss/1": 7.0, "lr": 1e-3, "tokens_per_second": 8123.4}
    assert (
        console_line(10, 300, values, 100.2)
        == "step  10/300  loss 7.6242  lm_loss 6.9000  lr 1.00e-03  8.1k tokens/s  ETA 1m40s"
    )
    assert console_line(5, 5, {"heldout_lm_loss": 1.0}, 0) == "step 5/5  heldout_lm_loss 1.0000  ETA 0s"


def test_every_step_leaves_its_trace(path):
    waits: dict[str, list[float]] = {}
    every, log = EveryStep(1.0, waits), MetricsLog(path, 0)
    for loss, norm in ((3.0, 0.5), (9.0, 4.0), (float("nan"), float("inf")), (2.0, 1.0)):
        every.add(loss, norm)
    log.log(4, every.take())
    (entry,) = read_metrics(path)
    assert entry["every_step/lm_loss"] == [3.0, 9.0, None, 2.0]
    assert entry["every_step/grad_norm"] == [0.5, 4.0, None, 1.0]
    assert [entry[f"lm_loss/{name}"] for name in ("min", "mean", "max")] == [2.0, pytest.approx(14 / 3), 9.0]
    assert [entry[f"grad_norm/{name}"] for name in ("min", "mean", "max")] == [0.5, pytest.approx(5.5 / 3), 4.0]
    assert entry["clipped_steps"] == 2
    assert "grad_norm 0.50..1.83..4.00  ETA" in console_line(4, 9, entry, 1.0)
    every.add(1.0, 0.25)
    assert every.take()["every_step/lm_loss"] == [1.0]
    assert EveryStep(0.0, {}).take()["clipped_steps"] == 0
    every.add(1.0, 2.0)
    kept = json.loads(json.dumps(waits))  # as a checkpoint does; a run goes on with it
    resumed = EveryStep(1.0, kept)
    resumed.add(5.0, 0.5)
    assert (resumed.take()["every_step/lm_loss"], resumed.take()["every_step/lm_loss"]) == ([1.0, 5.0], [])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (100, "1m40s"), (3600 * 3 + 300, "3h05m"), (86400 * 2.3, "2d07h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_full_disk_ends_no_run(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.log(1, {"loss": 1.0})
    whole, log._file = log._file, open("/dev/full", "a")  # noqa: SIM115 (no space left, each time)
    for step in (2, 3):
        log.log(step, {"loss": 1.0})
    log.close()
    whole.close()
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1]
