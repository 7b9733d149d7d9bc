"""Windows of the order of samples that a run leaves out, without moving what it has read."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

type Window = tuple[int, int]  # first and last place, both left out


class Skips:
    """Which place of the order each sample of a run is taken from.

    Args:
        windows: places that are left out.
        number, place: a sample of the run, counted from 0, and its place: earlier ones have been read, so that windows
            before it leave nothing out.
    """

    def __init__(self, windows: Iterable[Sequence[int]] = (), number: int = 0, place: int = 0) -> None:
        self.windows: list[Window] = merged(windows)
        # The first sample after each window, and how many places lie behind it that were left out.
        self._numbers, self._left_out = [0], [place - number]
        for first, last in self.windows:
            if last < place:
                continue
            self._numbers.append(max(first, place) - self._left_out[-1])
            self._left_out.append(self._left_out[-1] + last + 1 - max(first, place))

    def place(self, number: int) -> int:
        """The place of a sample of the run, counted from 0, in the order without windows."""
        return number + self._left_out[bisect_right(self._numbers, number) - 1]

    def runs(self, numbers: range) -> list[range]:
        """The places of some samples that follow each other, in order, as the stretches that they make up."""
        found: list[range] = []
        for number in numbers:
            place = self.place(number)
            if found and found[-1].stop == place:
                found[-1] = range(found[-1].start, place + 1)
            else:
                found.append(range(place, place + 1))
        return found


def merged(windows: Iterable[Sequence[int]]) -> list[Window]:
    """The same places in as few windows as possible, in order."""
    found: list[Window] = []
    for first, last in sorted((first, last) for first, last in windows):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return found
