"""Faults of storage: what is tried again, what is counted, and what is broken for good."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from data.errors import CorpusError, StorageError
from data.secrets import one_line

ATTEMPTS = 10
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0  # doubled after each attempt
PATIENCE_S = 60.0  # where no setting says how long a storage may be away
# No second look at a file changes these; PermissionError is another where a token may have expired.
LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
WRONG = (ValueError, EOFError)  # an answer came, and is not what was asked for


class BrokenUnit(CorpusError):
    """A part of a corpus that cannot be read, by name; `data.on_corrupt=skip` goes on without it."""


@dataclass
class Faults:
    """What went wrong while reading and was overcome, since the start of the process.

    Attributes:
        patience_s: seconds for which a storage that is away is asked again.
    """

    retries: int = 0
    restarts: int = 0
    skipped_tokens: int = 0
    skipped: list[str] = field(default_factory=list)
    patience_s: float = PATIENCE_S

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


def retrying[T](what: str, read: Callable[[], T], faults: Faults, renew: Callable[[], None] | None = None) -> T:
    """What `read` returns, after attempts with growing pauses.

    A storage that does not answer is asked for `faults.patience_s` seconds. What comes but is wrong (too short, say) is
    asked for ATTEMPTS times.

    Args:
        renew: makes a storage forget credentials that it has refused, where there may be newer ones.
    Raises:
        BrokenUnit: it is not there, or wrong each time; names `what`.
        StorageError: the storage stayed away.
    """
    began, pause_s, attempts = time.monotonic(), FIRST_PAUSE_S, 0
    while True:
        attempts += 1
        try:
            return read()
        except CorpusError:
            raise
        except Exception as error:  # every file system has errors of its own for a connection that broke
            refused = isinstance(error, PermissionError)
            if isinstance(error, LASTING) or (refused and renew is None):
                raise BrokenUnit(f"{what} cannot be read: {one_line(error)}") from error
            if isinstance(error, WRONG) and attempts >= ATTEMPTS:
                raise BrokenUnit(f"{what} cannot be read after {attempts} attempts: {one_line(error)}") from error
            if not isinstance(error, WRONG) and time.monotonic() - began + pause_s > faults.patience_s:
                raise StorageError(f"{what} cannot be read for {faults.patience_s:.0f} s: {one_line(error)}") from error
            if refused and renew is not None:
                renew()
        faults.retries += 1
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
