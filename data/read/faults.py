"""Faults of storage: what is tried again, what is counted, and what is broken for good."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from data.errors import CorpusError, one_line

ATTEMPTS = 10
FIRST_PAUSE_S = 0.1  # doubled after each attempt: a storage may be away for almost a minute
# No second look at a file changes these.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class BrokenUnit(CorpusError):
    """A part of a corpus that cannot be read, by name; `data.on_corrupt=skip` goes on without it."""


@dataclass
class Faults:
    """What went wrong while reading and was overcome, since the start of the process."""

    retries: int = 0
    restarts: int = 0
    skipped_tokens: int = 0
    skipped: list[str] = field(default_factory=list)

    def skip(self, message: str) -> None:
        """Lists something that was left out, once."""
        if message not in self.skipped:
            self.skipped.append(message)

    def add(self, other: "Faults") -> None:
        """Counts what another process met."""
        self.retries += other.retries
        self.restarts += other.restarts
        self.skipped_tokens += other.skipped_tokens
        for message in other.skipped:
            self.skip(message)


def retrying[T](what: str, read: Callable[[], T], faults: Faults) -> T:
    """What `read` returns, after up to ATTEMPTS attempts with growing pauses.

    Raises:
        BrokenUnit: it failed every time, or in a way that time does not mend; names `what`.
    """
    pause_s = FIRST_PAUSE_S
    for left in reversed(range(ATTEMPTS)):
        try:
            return read()
        except LASTING as error:
            raise BrokenUnit(f"{what} cannot be read: {one_line(error)}") from error
        except CorpusError:
            raise
        except Exception as error:  # every file system has errors of its own for a connection that broke
            if not left:
                raise BrokenUnit(f"{what} cannot be read after {ATTEMPTS} attempts: {one_line(error)}") from error
        faults.retries += 1
        time.sleep(pause_s)
        pause_s *= 2
    raise AssertionError("the last attempt returns or raises")
