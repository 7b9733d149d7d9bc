"""Documents of a micro-batch: positions, borders and lengths."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.documents import Documents
from model.reference import layers as reference
from tests.model.helpers import ids_from_starts

LENGTH = 9

start_lists = st.lists(st.lists(st.integers(1, LENGTH - 1), unique=True), min_size=1, max_size=3)


def test_by_hand() -> None:
    documents = Documents.from_ids(torch.tensor([[0, 0, 1, 1, 1], [4, 5, 5, -1, -1]], dtype=torch.int32))
    assert documents.ids_RL.dtype == torch.int64
    assert documents.position_RL.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]
    assert documents.cu_seqlens_q.tolist() == documents.cu_seqlens_kv.tolist() == [0, 2, 5, 6, 8, 10]
    assert documents.cu_seqlens_q.dtype == torch.int32
    assert documents.max_seqlen_q == documents.max_seqlen_kv == 3
    assert documents.qkv_format == "thd"
    assert not documents.single
    assert documents.same_document(1).tolist() == [[False, True, False, True, True], [False, False, True, False, True]]
    assert documents.same_document(2).tolist() == [[False, False, False, False, True], [False] * 5]


@given(starts=start_lists)
def test_borders_are_those_of_the_spans(starts: list[list[int]]) -> None:
    ids = ids_from_starts(LENGTH, *starts)
    documents = Documents.from_ids(ids)
    spans = [(row, span) for row, ids_L in enumerate(ids) for span in reference.document_spans(ids_L)]
    lengths = [span.stop - span.start for _, span in spans]
    assert documents.cu_seqlens_q.diff().tolist() == lengths
    assert documents.max_seqlen_q == max(lengths)
    assert documents.single == (len(spans) == len(starts))
    for row, span in spans:
        assert documents.position_RL[row, span].tolist() == list(range(span.stop - span.start))
    for distance in range(1, 4):
        same = documents.same_document(distance)
        for row, span in spans:
            assert same[row, span].tolist() == [t - distance >= span.start for t in range(span.start, span.stop)]


def test_rows_of_one_document_each_are_single() -> None:
    assert Documents.from_ids(torch.tensor([[0, 0, 0], [7, 7, 7]])).single
    assert not Documents.from_ids(torch.tensor([[0, 0, 0], [7, 7, 8]])).single


def test_moving_takes_every_tensor_along() -> None:
    documents = Documents.from_ids(torch.tensor([[0, 0, 1]]))
    moved = documents.to(torch.device("meta"))
    for name in ("ids_RL", "position_RL", "cu_seqlens_q", "cu_seqlens_kv"):
        assert getattr(moved, name).is_meta, name
        assert getattr(moved, name).shape == getattr(documents, name).shape
    assert (moved.single, moved.max_seqlen_q, moved.max_seqlen_kv, moved.qkv_format) == (False, 2, 2, "thd")
