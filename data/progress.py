"""Progress bars: they appear after two seconds, and write fewer lines to a log file than to a terminal."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

DELAY_S = 2.0


def byte_bar(description: str, total: int | None = None, show: bool = True, done: int = 0) -> tqdm:
    """A bar that counts bytes from `done` on; `total=None` where the amount is not known beforehand."""
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        delay=DELAY_S,
        mininterval=_interval_s(),
        disable=not show,
    )


def count_bar(description: str, total: int, show: bool = True) -> tqdm:
    """A bar that counts things."""
    return tqdm(desc=description, total=total, delay=DELAY_S, mininterval=_interval_s(), disable=not show)


@contextmanager
def ticking(bar: tqdm) -> Iterator[tqdm]:
    """Keeps the clock of `bar` moving while foreign code works without calling back."""
    done = threading.Event()

    def tick() -> None:
        pause_s = DELAY_S
        while not done.wait(pause_s):
            bar.refresh()
            pause_s = _interval_s()

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    with bar:
        try:
            yield bar
        finally:
            done.set()
            thread.join()


def _interval_s() -> float:
    return 0.5 if sys.stderr.isatty() else 10.0
