"""The source of each sample is a formula: exact shares, no replay, no sample of a source left out or taken twice."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.mixture import BLOCK_SAMPLES, Mixture

WEIGHTS = st.lists(st.sampled_from([0.0, 0.001, 0.1, 0.3, 0.5, 1.0, 7.0]), min_size=3, max_size=3).filter(sum)


@settings(deadline=None, max_examples=30)
@given(first=WEIGHTS, second=WEIGHTS, border=st.integers(1, 3 * BLOCK_SAMPLES))
def test_every_sample_of_a_source_is_taken_once_and_in_its_stage(first, second, border: int) -> None:
    mixture = Mixture([(0, first), (border, second)], seed=3)
    stop = border + 2 * BLOCK_SAMPLES  # after whole blocks of the second stage, which has no end
    taken = [mixture.place(index) for index in range(stop)]
    for source in range(3):
        assert sorted(own for found, own in taken if found == source) == list(range(mixture.counts(stop)[source]))
    before = Counter(source for source, _ in taken[:border])
    assert [before[source] for source in range(3)] == mixture.counts(border)


@given(weights=WEIGHTS, number=st.integers(0, 10**12))
def test_shares_are_exact_in_the_long_run(weights, number: int) -> None:
    counts = Mixture([(0, weights)], seed=0).counts(number)
    assert sum(counts) == number
    # Rounding one source after the other moves the last of three by less than two samples, however long the run.
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - number * weight / sum(weights)) < 2 + 1e-15 * number


def test_twin_that_counts_one_sample_after_the_other() -> None:
    mixture = Mixture([(0, [2.0, 1.0]), (1500, [1.0, 3.0])], seed=5)
    places = sorted(mixture.place(index) for index in range(1500))
    # Thirds by hand: source 0 has floor(2 n / 3) of the first n.
    steps = [(0, 2 * n // 3) if 2 * (n + 1) // 3 > 2 * n // 3 else (1, n - 2 * n // 3) for n in range(1500)]
    assert places == sorted(steps)
    assert mixture.counts(1500) == [1000, 500]
    assert mixture.counts(1500 + 4000) == [2000, 3500]


def test_sources_follow_no_rhythm() -> None:
    mixture = Mixture([(0, [1.0, 1.0])], seed=1)
    sources = [mixture.place(index)[0] for index in range(BLOCK_SAMPLES)]
    runs = [len(list(group)) for _, group in itertools.groupby(sources)]
    assert sum(sources) == BLOCK_SAMPLES // 2
    # Fair coins have runs of 2 on average; turn and turn about would have 1.
    assert 1.7 < len(sources) / len(runs) < 2.3
    other = Mixture([(0, [1.0, 1.0])], seed=2)
    assert sources != [other.place(index)[0] for index in range(BLOCK_SAMPLES)]


def test_a_source_with_no_weight_is_never_read() -> None:
    mixture = Mixture([(0, [0.0, 1.0, 0.0])], seed=1)
    assert {mixture.place(index)[0] for index in range(3000)} == {1}


@pytest.mark.parametrize("index", [10**9, 10**15])
def test_far_samples_are_placed_at_once(index: int) -> None:
    source, own = Mixture([(0, [0.7, 0.2, 0.1])], seed=1).place(index)
    assert abs(own - index * (0.7, 0.2, 0.1)[source]) < BLOCK_SAMPLES
