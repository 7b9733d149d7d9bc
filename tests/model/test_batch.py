"""Targets and weights of a micro-batch: by hand, and against the definition on random packed rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batch import MicroBatch, count_targets, prediction_valid
from tests.model.helpers import ids_from_starts

SAMPLE = 10

# Rows of samples: where documents start, and how many places at the end are padding.
rows = st.tuples(st.lists(st.integers(1, SAMPLE - 1), unique=True), st.integers(0, SAMPLE))


def packed(row_list: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, all different, and document ids [rows, SAMPLE]."""
    ids = ids_from_starts(SAMPLE, *(starts for starts, _ in row_list))
    for row, (_, padding) in enumerate(row_list):
        ids[row, SAMPLE - padding :] = -1
    return 100 + torch.arange(ids.numel()).view(ids.shape), ids


def test_by_hand() -> None:
    tokens, ids = torch.tensor([[10, 11, 12, 13, 14, 15]]), torch.tensor([[0, 0, 0, 1, 1, -1]])
    counts = count_targets(ids, steps=2)
    # Five tokens; 10>11, 11>12, 13>14 are next tokens; 10>12 is the one at step 1; none at step 2.
    assert counts.tolist() == [5, 3, 1, 0]
    batch = MicroBatch.build(tokens, ids, counts)
    assert batch.tokens_KRL.tolist() == [[[10, 11, 12, 13, 14]], [[11, 12, 13, 14, 15]], [[12, 13, 14, 15, 0]]]
    assert batch.targets_KT.tolist() == [[11, 12, 0, 14, 0], [12, 0, 0, 0, 0], [0] * 5]
    third = torch.tensor(1 / 3).item()
    assert batch.weights_KT.tolist() == [[third, third, 0, third, 0], [1, 0, 0, 0, 0], [0] * 5]
    # Every token is routed by the trunk; the layer of step 1 counts where it predicts something.
    fifth = torch.tensor(1 / 5).item()
    assert batch.token_weights_KT.tolist() == [[fifth] * 5, [1, 0, 0, 0, 0], [0] * 5]
    assert batch.documents.ids_RL.tolist() == [[0, 0, 0, 1, 1]]


def test_the_last_token_is_a_target_only() -> None:
    """It is read by the steps beyond the next token, and its document may end with it."""
    tokens, ids = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 0]])
    batch = MicroBatch.build(tokens, ids, count_targets(ids, 1))
    assert batch.tokens_KRL.tolist() == [[[1, 2]], [[2, 3]]]
    assert batch.targets_KT.tolist() == [[2, 3], [3, 0]]
    assert batch.weights_KT.tolist() == [[0.5, 0.5], [1, 0]]


@given(row_list=st.lists(rows, min_size=1, max_size=4), steps=st.integers(0, 3))
def test_targets_never_cross_documents(row_list: list, steps: int) -> None:
    tokens, ids = packed(row_list)
    counts = count_targets(ids, steps)
    batch = MicroBatch.build(tokens, ids, counts)
    length, found = SAMPLE - 1, [0] * (1 + steps)
    for row in range(len(row_list)):
        for t in range(length):
            position = row * length + t
            for step in range(1 + steps):
                inside = t + step + 1 < SAMPLE
                has_target = inside and ids[row, t] >= 0 and ids[row, t] == ids[row, t + step + 1]
                assert (batch.weights_KT[step, position] > 0) == has_target
                assert batch.targets_KT[step, position] == (tokens[row, t + step + 1] if has_target else 0)
                if t + step < SAMPLE:
                    assert batch.tokens_KRL[step, row, t] == tokens[row, t + step]
                routed = ids[row, t] >= 0 if step == 0 else has_target
                assert (batch.token_weights_KT[step, position] > 0) == routed
                found[step] += bool(has_target)
    assert counts.tolist() == [int((ids[:, :-1] >= 0).sum()), *found]
    assert torch.equal(prediction_valid(ids, steps).flatten(1), batch.weights_KT > 0)


@given(row_list=st.lists(rows, min_size=1, max_size=5), split=st.integers(0, 5), steps=st.integers(0, 2))
def test_weights_of_all_micro_batches_sum_to_one(row_list: list, split: int, steps: int) -> None:
    tokens, ids = packed(row_list)
    parts = [(tokens[:split], ids[:split]), (tokens[split:], ids[split:])]
    parts = [part for part in parts if len(part[0])]
    counts = sum(count_targets(part_ids, steps) for _, part_ids in parts)
    assert torch.equal(counts, count_targets(ids, steps))
    batches = [MicroBatch.build(*part, counts) for part in parts]
    weights = sum(batch.weights_KT.double().sum(dim=1) for batch in batches)
    token_weights = sum(batch.token_weights_KT.double().sum(dim=1) for batch in batches)
    # Up to 45 equal float32 numbers, each good to 6e-8 of itself.
    assert weights.tolist() == pytest.approx([float(count > 0) for count in counts[1:]], abs=1e-6)
    per_token = [counts[0], *counts[2:]]
    assert token_weights.tolist() == pytest.approx([float(count > 0) for count in per_token], abs=1e-6)


def test_padding_never_counts() -> None:
    ids = torch.full((2, 5), -1)
    assert count_targets(ids, 2).tolist() == [0, 0, 0, 0]
    batch = MicroBatch.build(torch.ones(2, 5, dtype=torch.int64), ids, count_targets(ids, 2))
    assert not batch.weights_KT.any() and not batch.token_weights_KT.any() and not batch.targets_KT.any()


def test_moving_takes_every_tensor_along() -> None:
    tokens, ids = packed([([3], 1)])
    batch = MicroBatch.build(tokens, ids, count_targets(ids, 1))
    moved = batch.to(torch.device("meta"))
    for name in ("tokens_KRL", "targets_KT", "weights_KT", "token_weights_KT"):
        assert getattr(moved, name).is_meta, name
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert moved.documents.ids_RL.is_meta
