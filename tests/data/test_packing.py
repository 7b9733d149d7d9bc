"""Packing loses nothing, repeats only the shared token, and keeps every boundary."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.packing import Sample, num_samples, overlaps, pack, sample_span


def pack_all(documents: list[np.ndarray], seq_length: int) -> list[Sample]:
    ends = np.cumsum([len(document) for document in documents])
    return [
        pack([documents[d][lo:hi] for d, lo, hi in overlaps(ends, *sample_span(index, seq_length))])
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
