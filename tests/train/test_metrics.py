"""metrics.jsonl and the console line."""

import json
import math

import pytest

from train.watch.metrics import MetricsLog, console_line, duration, mtp_loss, read_metrics


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


def test_console_line():
    values = {"loss": 7.62415, "lm_loss": 6.9, "mtp_loss/1": 7.0, "lr": 1e-3, "tokens_per_second": 8123.4}
    assert (
        console_line(10, 300, values, 100.2)
        == "step  10/300  loss 7.6242  lm_loss 6.9000  lr 1.00e-03  8.1k tokens/s  ETA 1m40s"
    )
    assert console_line(5, 5, {"heldout_lm_loss": 1.0}, 0) == "step 5/5  heldout_lm_loss 1.0000  ETA 0s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (100, "1m40s"), (3600 * 3 + 300, "3h05m"), (86400 * 2.3, "2d07h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
