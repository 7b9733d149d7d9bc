"""Workers take no more cores than this process may use, and nobody waits long for a thread that hangs."""

import os
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from data.read.workers import ReaderThread, usable_cores


def test_cores_are_those_of_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= usable_cores() <= len(before)


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("200000 100000", 2), ("10000 100000", 1), ("", 4)])
def test_cores_are_those_of_the_control_group(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(Path, "read_text", lambda self: quota)
    assert usable_cores() == cores


def test_a_thread_gives_results_and_errors_in_order() -> None:
    reader = ReaderThread()
    seven, error = reader.submit(lambda: 7), reader.submit(int, "x")
    assert seven.result() == 7
    with pytest.raises(ValueError, match="invalid literal"):
        error.result()
    before = threading.active_count()
    reader.shutdown()
    assert threading.active_count() == before - 1


def test_a_thread_that_hangs_is_left_behind() -> None:
    reader, back = ReaderThread(close_s=0.1), threading.Event()
    hangs, waits = reader.submit(back.wait), reader.submit(lambda: 7)
    start = time.monotonic()
    reader.shutdown(cancel_futures=True)
    assert time.monotonic() - start < 5 and not hangs.done()
    with pytest.raises(CancelledError):
        waits.result()
    back.set()
    assert hangs.result()
