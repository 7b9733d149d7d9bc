"""Held-out loss of parts of the text."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from data.order.batches import Batch
from model.batch import MicroBatch, count_targets
from train.job.build import Job
from train.use import needle, parts
from train.use.parts import TextParts, lengths, places, source_metrics

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 2, 3, 3, 3, -1, -1]])


def test_places_count_the_tokens_of_the_document_that_stand_before() -> None:
    assert places(DOCUMENTS).tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 0]]


def test_lengths_count_all_tokens_of_the_document() -> None:
    assert lengths(DOCUMENTS).tolist() == [[3, 3, 3, 3, 3, 3], [1, 1, 3, 3, 3, 1]]


def test_losses_are_summed_by_place_and_length_over_valid_targets(monkeypatch) -> None:
    """Each token's loss is its place here, laid out as the network lays them out."""
    monkeypatch.setattr(parts, "sum_over", lambda total, group: total)
    monkeypatch.setattr(parts, "from_last", lambda total, group: total)
    tokens = torch.arange(DOCUMENTS.numel()).view_as(DOCUMENTS)
    batch = MicroBatch.build(tokens, DOCUMENTS, count_targets(DOCUMENTS, 0))
    losses = torch.where(batch.weights_KT[0] > 0, batch.targets_KT[0] - 1, 999)  # the number of the token itself
    by_part = TextParts(6)
    by_part.add(DOCUMENTS, losses, batch.weights_KT[0] > 0)
    job = cast(Job, SimpleNamespace(device=torch.device("cpu"), groups=SimpleNamespace(dp_cp=None, pp=None)))
    # Of the tokens numbered 0 to 13, those that a token of their document follows: 0 1, 3 4 5; 9 10 of the second row.
    # The row ends after token 5 and 12: its documents have 3, 3 (and 1, 1) 3 tokens.
    assert by_part.values(job) == pytest.approx(
        {
            "heldout_lm_loss/after_0": (0 + 3 + 9) / 3,
            "heldout_lm_loss/after_1": (1 + 4 + 5 + 10) / 4,
            "heldout_lm_loss/documents_of_2": (0 + 1 + 3 + 4 + 5 + 9 + 10) / 7,
        }
    )


def test_each_of_several_sources_has_its_own_loss_and_all_count_alike(monkeypatch, capsys) -> None:
    means = {"s3://me:secret@bucket/a": 2.0, "b": 4.0}
    sources = [SimpleNamespace(path=path) for path in (*means, "holds nothing out")]
    dataset = SimpleNamespace(sources=sources, fills_heldout=lambda some: some[0].path in means)
    job = SimpleNamespace(dataset=dataset, is_first=True)
    monkeypatch.setattr(parts, "read_heldout", lambda job, samples, source: means[source.path])
    monkeypatch.setattr(
        parts, "heldout_metrics", lambda job, mean: {"heldout_lm_loss": mean, "heldout_bits_per_byte": mean / 2}
    )
    assert source_metrics(cast(Job, job), 8) == {
        "heldout_lm_loss/s3://***@bucket/a": 2.0,
        "heldout_bits_per_byte/s3://***@bucket/a": 1.0,
        "heldout_lm_loss/b": 4.0,
        "heldout_bits_per_byte/b": 2.0,
        "heldout_lm_loss/macro": 3.0,
        "heldout_bits_per_byte/macro": 1.5,
    }
    assert "no parts of holds nothing out" in capsys.readouterr().err
    # Where every target ends a document there are no bytes to share the loss between.
    monkeypatch.setattr(parts, "heldout_metrics", lambda job, mean: {"heldout_lm_loss": mean})
    assert source_metrics(cast(Job, job), 8)["heldout_lm_loss/macro"] == 3.0
    job.dataset.sources = sources[:1]
    assert source_metrics(cast(Job, job), 8) == {}


def test_a_needle_costs_what_is_asked_again(monkeypatch) -> None:
    """A network that knows each token which stood in its row before: it costs 0, all else 5 nats."""
    monkeypatch.setattr(needle, "sum_over", lambda total, group: total)
    monkeypatch.setattr(needle, "from_last", lambda total, group: total)
    job = cast(Job, SimpleNamespace(device=torch.device("cpu"), groups=SimpleNamespace(dp_cp=None, pp=None)))
    tokens = torch.arange(3 * 101).view(3, 101)
    documents = torch.zeros(3, 101, dtype=torch.int32)
    documents[0, 50:], documents[2] = 1, -1  # two documents, which become one; a row of padding
    for depth in needle.DEPTHS:
        hidden = needle.with_needle(Batch(tokens, documents), depth, 10**6)
        first, last = needle.needle_places(100, depth)
        assert torch.equal(hidden.tokens[:, first : first + 16], hidden.tokens[:, last : last + 16])
        assert first == (101 - 32) * depth // 100 and last == 85
        assert (hidden.tokens != tokens)[:2].sum() == 2 * 32 and hidden.documents[:, -1].tolist() == [0, 0, -1]
        known = torch.tensor(
            [[token in row[:place] for place, token in enumerate(row)] for row in hidden.tokens.tolist()]
        )
        losses = torch.where(known[:, 1:], 0.0, 5.0).flatten()
        valid = (hidden.documents[:, 1:] >= 0).flatten()
        found = needle.Needles(depth)
        found.add(hidden.documents, losses, valid)
        assert list(found.values(job).values()) == [0.0, 5.0, 1.0]
