"""Packing loses nothing, repeats only the shared token, and keeps every boundary."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.order.packing import Sample, best_fit, num_samples, overlaps, pack, pad, sample_span
from data.read.units import Piece


def pack_all(documents: list[np.ndarray], seq_length: int) -> list[Sample]:
    ends = np.cumsum([len(document) for document in documents])
    return [
        pack([Piece(documents[d][lo:hi]) for d, lo, hi in overlaps(ends, *sample_span(index, seq_length))])
        for index in range(num_samples(int(ends[-1]), seq_length))
    ]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), seq_length=st.integers(1, 25))
def test_samples_laid_end_to_end_are_the_stream(lengths: list[int], seq_length: int) -> None:
    num_tokens = sum(lengths)
    # Token t of the stream is the number t, so that each tells where it came from.
    documents = np.split(np.arange(num_tokens), np.cumsum(lengths)[:-1])
    document_of = np.repeat(np.arange(len(lengths)), lengths)

    samples = pack_all(documents, seq_length)

    assert len(samples) == (num_tokens - 1) // seq_length
    for index, sample in enumerate(samples):
        start = index * seq_length
        expected = np.arange(start, start + seq_length + 1)
        np.testing.assert_array_equal(sample.tokens, expected)
        np.testing.assert_array_equal(sample.documents, document_of[expected] - document_of[start])
        assert sample.tokens.dtype == np.int64
        assert sample.documents.dtype == np.int32
    # What is dropped could not have filled one more sample.
    assert num_tokens - (len(samples) * seq_length + 1) < seq_length or not samples


def test_a_sample_that_ends_with_a_document_shares_its_first_next_token() -> None:
    documents = [np.array([1, 2, 3]), np.array([4, 5, 6, 7])]
    first, second = pack_all(documents, seq_length=3)
    assert first.tokens.tolist() == [1, 2, 3, 4]
    assert first.documents.tolist() == [0, 0, 0, 1]
    assert second.tokens.tolist() == [4, 5, 6, 7]
    assert second.documents.tolist() == [0, 0, 0, 0]


def test_too_few_tokens_make_no_sample() -> None:
    assert [num_samples(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), seq_length=st.integers(1, 25))
def test_best_fit_puts_every_token_somewhere_and_cuts_only_what_is_too_long(lengths, seq_length: int) -> None:
    bins = best_fit(np.array(lengths), seq_length)
    pieces: dict[int, list[tuple[int, int]]] = {}
    for index in range(len(bins.ends)):
        own = list(bins.pieces(index))
        assert 0 < sum(stop - start for _, start, stop in own) <= seq_length + 1
        for document, start, stop in own:
            pieces.setdefault(document, []).append((start, stop))
    assert sorted(pieces) == list(range(len(lengths)))
    for document, length in enumerate(lengths):
        found = sorted(pieces[document])
        if length <= seq_length + 1:
            assert found == [(0, length)]
        # Neighbours share a token, so that each of the length - 1 targets belongs to exactly one piece.
        assert found[0][0] == 0 and found[-1][1] == length
        assert all(one[1] - 1 == other[0] for one, other in pairwise(found))


@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=40))
def test_best_fit_against_its_slow_twin(lengths: list[int]) -> None:
    """Best-fit decreasing as it is told: look at every sample, take the fullest that has room."""
    samples: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        room = [17 - sum(lengths[d] for d in sample) for sample in samples]
        fitting = [index for index in range(len(samples)) if room[index] >= lengths[document]]
        if fitting:
            samples[min(fitting, key=lambda index: room[index])].append(document)
        else:
            samples.append([document])
    bins = best_fit(np.array(lengths), seq_length=16)
    assert len(bins.ends) == len(samples)
    filled = sorted(sum(stop - start for _, start, stop in bins.pieces(index)) for index in range(len(bins.ends)))
    assert filled == sorted(sum(lengths[d] for d in sample) for sample in samples)


def test_padding_belongs_to_no_document() -> None:
    sample = pad(pack([Piece(np.array([4, 5])), Piece(np.array([6]))]), 5, token=0)
    assert sample.tokens.tolist() == [4, 5, 6, 0, 0]
    assert sample.documents.tolist() == [0, 0, 1, -1, -1]
    assert sample.tokens.dtype == np.int64 and sample.documents.dtype == np.int32
