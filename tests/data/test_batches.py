"""Sizes and lengths of batches by step, against a run that counts its samples one step after the other."""

from itertools import pairwise

import pytest
import torch

from data.order.batches import Batch, BatchSchedule

PHASES = [
    ((0, 4),),
    ((0, 4), (10, 6)),  # begins inside the third step, so with the fourth
    ((0, 4), (8, 2), (16, 8)),
    ((0, 8), (1, 2), (3, 16), (9, 4)),  # begun and ended within one step: skipped
    ((0, 4), (0, 6)),
]


def replay(phases: tuple[tuple[int, int], ...], steps: int) -> list[range]:
    """The samples of each step by counting."""
    behind, found = 0, []
    for _ in range(steps):
        size = [value for begin, value in phases if begin <= behind][-1]
        found.append(range(behind, behind + size))
        behind += size
    return found


@pytest.mark.parametrize("phases", PHASES, ids=str)
def test_the_samples_of_a_step_are_those_that_replay_gives(phases: tuple[tuple[int, int], ...]) -> None:
    schedule = BatchSchedule(phases)
    # Asked backwards: no step needs the one before it.
    found = [schedule.samples(step) for step in reversed(range(40))][::-1]
    assert found == replay(phases, 40)
    assert all(before.stop == after.start for before, after in pairwise(found))


def test_constant() -> None:
    assert [BatchSchedule.constant(3).samples(step) for step in (0, 7)] == [range(3), range(21, 24)]
    assert BatchSchedule.constant(3).length(5) is None


def test_lengths_change_with_a_step() -> None:
    schedule = BatchSchedule(((0, 4), (12, 2)), ((2, 8), (13, 16)))
    # Samples behind steps 0, 1, ...: 0, 4, 8, 12, 14, 16.
    assert [schedule.length(step) for step in range(6)] == [None, 8, 8, 8, 16, 16]


def test_cutting_keeps_every_input_and_every_target() -> None:
    tokens = torch.arange(2 * 13).view(2, 13)
    documents = (tokens // 5).int()
    cut = Batch(tokens, documents).cut(4)
    assert cut.tokens.shape == cut.documents.shape == (6, 5)
    assert cut.tokens[:, :-1].reshape(2, 12).equal(tokens[:, :-1])
    assert cut.tokens[:, 1:].reshape(2, 12).equal(tokens[:, 1:])
    assert cut.documents.equal((cut.tokens // 5).int())
    assert cut.documents.dtype == torch.int32
