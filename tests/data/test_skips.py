"""Windows of samples that a run leaves out."""

from hypothesis import given
from hypothesis import strategies as st

from data.order.skips import Skips, merged

WINDOWS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda pair: (pair[0], sum(pair))), max_size=6)


@given(WINDOWS, st.integers(0, 40), st.integers(0, 40))
def test_every_place_is_taken_once_in_order_but_for_the_windows(windows, number, further):
    place = number + further
    out = {place for first, last in windows for place in range(first, last + 1)}
    expected = [where for where in range(place, 200) if where not in out]
    skips = Skips(windows, number, place)
    assert [where for run in skips.runs(range(number, number + 60)) for where in run] == expected[:60]
    assert [skips.place(sample) for sample in range(number, number + 60)] == expected[:60]


@given(WINDOWS)
def test_a_run_that_resumes_reads_on_whatever_windows_it_is_given_later(windows):
    before = Skips(windows)
    place = before.place(25)
    resumed = Skips([*windows, (0, place - 1)] if place else windows, 25, place)  # read before: nothing to leave out
    assert [resumed.place(n) for n in range(25, 80)] == [before.place(n) for n in range(25, 80)]


def test_merged() -> None:
    assert merged([(5, 6), (0, 1), (2, 3), (6, 9)]) == [(0, 3), (5, 9)]
    assert [Skips([(2, 3)]).place(n) for n in range(4)] == [0, 1, 4, 5]
    assert [Skips().place(n) for n in (0, 7)] == [0, 7]
