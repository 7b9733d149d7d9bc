"""Alerts: each rule, told of once, to whom."""

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from train.settings.run import Config, RunConfig
from train.watch import hang
from train.watch.alerts import Alert, Alerts
from train.watch.hang import Watchdog


class Hears:
    """A tracker that keeps what it is alerted of."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def alert(self, title: str, text: str) -> None:
        self.heard.append(f"{title}: {text}")


def usual(**others: float) -> dict[str, float]:
    speed = {"tokens_per_second": 1000.0, "tflops": 100.0}
    return {"loss": 3.0, "lm_loss": 3.0, "grad_norm": 1.0, "max_violation": 0.4} | speed | others


def told_of(*steps: dict[str, float], now=lambda: 0.0) -> list[str]:
    hears = Hears()
    alerts = Alerts(Config(), hears, checkpoint_gb=2.5, now=now)
    for step, values in enumerate(steps, start=1):
        alerts.look(step, values)
    return hears.heard


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"loss": math.nan}, "non-finite: step 13: loss is not finite: the step was skipped"),
        ({"grad_norm": math.inf}, "non-finite: step 13: grad_norm is not finite"),
        ({"lm_loss/max": 4.0}, "spike: step 13: lm_loss reached 4.000, usually 3.000: if it stays, resume before it"),
        ({"max_violation": 1.5}, "balance: step 13: max_violation rose to 1.50, usually 0.40"),
        ({"skipped_steps": 1.0}, "skipped: step 13: 1 bad steps were skipped so far: runs/logs/bad_steps.jsonl has"),
        ({"disk_free_gb": 4.0, "disk_gb": 100.0}, "disk: step 13: 4.0 GB are left on the disk of"),
    ],
)
def test_each_rule(odd: dict[str, float], says: str) -> None:
    before = [usual(disk_free_gb=50.0, disk_gb=100.0)] * 12
    assert told_of(*before) == []
    # It goes on for three steps and is told of once; it comes back and is told of again.
    (heard,) = told_of(*before, *[usual(**odd)] * 3)
    assert heard.startswith(says)
    assert len(told_of(*before, usual(**odd), usual(), usual(**odd))) == 2, "it came back"
    hours = iter(range(100))
    later = told_of(*before, *[usual(**odd)] * 3, now=lambda: 3600.0 * next(hours))
    assert len(later) == (1 if "skipped_steps" in odd else 3)  # one step is skipped once


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (
            {"tokens_per_second": 600.0, "tflops": 60.0, "slowest_process": 3.0},
            "throughput: step 15: 600 tokens/s; 60% of the usual operations a second, 3 logged steps on: process 3",
        ),
        (
            {"dead_experts": 2.4},
            "collapse: step 15: 2 of a layer's 16 experts took no token, a mean over layers, 3 log",
        ),
    ],
)
def test_what_must_go_on_to_be_told_of(odd: dict[str, float], says: str) -> None:
    before = [usual()] * 12
    (heard,) = told_of(*before, *[usual(**odd)] * 4)
    assert heard.startswith(says)
    # A sampled step takes its time; routers that begin to learn leave an expert out now and then.
    assert told_of(*before, *[usual(**odd), usual(**odd), usual()] * 4) == []
    # Longer sequences have fewer tokens a second and as many operations, and one expert of some layers is no collapse.
    assert told_of(*before, *[usual(tokens_per_second=100.0, dead_experts=1.9)] * 4) == []


def test_an_expert_is_dead_that_takes_no_token_on_three_sampled_steps() -> None:
    def sampled(**loads: list[float]) -> dict[str, float]:
        return usual(**{f"expert_load/{layer}": load for layer, load in loads.items()})

    first, other = sampled(**{"1": [0.0, 2.0, 0.0], "mtp": [1.0, 0.0, 2.0]}), sampled(**{"1": [1.0, 0.0, 2.0]})
    assert told_of(first, usual(), first, other, usual(), first) == []
    second = sampled(**{"1": [1.0, 2.0, 0.0], "mtp": [1.0, 0.0, 2.0]})
    (heard,) = told_of(first, usual(), first, second, usual())
    assert heard.startswith(
        "dead experts: step 4: experts that took no token on 3 sampled steps in a row: layer 1: 2; "
    )
    assert "layer mtp: 1: raise balance.weight" in heard


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict]]]:
    """A server's URL, and what it was sent."""
    sent: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret", sent
    server.shutdown()
    server.server_close()


def wait_until(true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_webhook_hears_and_one_that_fails_stops_nothing(webhook, monkeypatch, capsys) -> None:
    url, sent = webhook
    monkeypatch.setenv("HOOK", url)
    hears = Hears()
    alerts = Alerts(Config(run=RunConfig(name="one", alert_webhook="HOOK")), hears)
    alerts.tell(7, Alert("sink", "there is one", "mend it"))
    wait_until(lambda: sent)
    assert sent == [{"text": "one, step 7: there is one: mend it", "run": "one", "step": 7, "alert": "sink"}]
    monkeypatch.setenv("HOOK", "http://127.0.0.1:9/secret")
    alerts.tell(8, Alert("spike", "there is one", "mend it"))
    said = []
    wait_until(lambda: said.append(capsys.readouterr().err) or "".join(said))
    assert "".join(said) == "warning: the webhook of run.alert_webhook=HOOK took no alert: URLError\n"
    assert len(hears.heard) == 2


class Board:
    """The notes of one process alone."""

    rank = 0

    def put(self, note: dict) -> None:
        pass

    def notes(self) -> list[dict]:
        return []


def test_no_step_for_a_while_is_told_of_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hang, "Board", Board)
    monkeypatch.setattr(hang, "LOOK_S", 0.05)
    hears = Hears()
    watchdog = Watchdog(tmp_path, 10, 5, idle_minutes=0.2 / 60)
    watchdog.on_idle = Alerts(Config(), hears).idle
    watchdog.beat(1, "training")
    time.sleep(0.4)
    assert hears.heard == []  # the first step may take long
    watchdog.stepping()
    watchdog.beat(2, "training")
    wait_until(lambda: hears.heard)
    time.sleep(0.3)
    watchdog.close()
    (heard,) = hears.heard
    assert heard.startswith("idle: step 2: no step has ended for 0.0 minutes: kill -QUIT a process for its stacks;")


def test_processes_that_all_wait_for_a_storage_are_told_of_and_do_not_hang(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hang, "Board", Board)
    reports: list[float] = []
    monkeypatch.setattr(Watchdog, "_report", lambda self, still: reports.append(still))
    hears = Hears()
    watchdog = Watchdog(tmp_path, 10, 0.3 / 60, idle_minutes=0.2 / 60)
    watchdog.on_idle = Alerts(Config(), hears).idle
    watchdog.stepping()
    watchdog.beat(2, "reading")
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        watchdog.met()
        time.sleep(0.02)
    assert not reports and len(hears.heard) == 1
    wait_until(lambda: reports)
    watchdog.close()
