"""Reading block by block against reading whole texts, and the MTP steps of training against an engine's draft loop."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.config import MtpConfig
from model.decode.decode import Decoder
from model.documents import Documents
from model.network import LanguageModel
from model.reference import layers as reference
from tests.model.helpers import FLOAT64_TOLERANCE, SMALL, assert_close, ids_from_starts
from tests.model.test_network import VOCAB, micro_batch, random_tokens

SHAPE = replace(SMALL, pattern="GEGE*E")


@torch.no_grad()
def whole_states(network: LanguageModel, tokens_L: torch.Tensor) -> torch.Tensor:
    """The trunk's states [L, H] of a text read at once."""
    return network.trunk(tokens_L[None], Documents.from_ids(torch.zeros_like(tokens_L)[None]))[:, 0]


@pytest.mark.parametrize("pattern", ["GEGE*E", "*-*-", "G-"])
def test_blocks_with_rejected_ends_give_the_states_of_the_whole_text(build: Callable, pattern: str) -> None:
    """Prompts of unequal lengths, one across the delta rule's chunks, then blocks of which a part is taken back."""
    network = build(replace(SMALL, pattern=pattern), MtpConfig(steps=0), VOCAB)
    lengths = torch.tensor([1, 70, 5])
    texts, wrong = random_tokens(3, 100), random_tokens(3, 100, seed=1)
    expected = [whole_states(network, text) for text in texts]
    decoder, rows = Decoder(network, rows=3, room=110), torch.arange(3)[:, None]

    states = decoder.read(texts[:, :70], lengths)
    decoder.keep(lengths)
    for row, length in enumerate(lengths):
        assert_close(states[row, :length], expected[row][:length], FLOAT64_TOLERANCE, f"prompt {row}")
    position = lengths
    for kept in ([4, 2, 1], [0, 1, 4], [1, 1, 1], [3, 0, 2], [4, 4, 4]):
        index, count = position[:, None] + torch.arange(4), torch.tensor(kept)
        right = torch.arange(4) < count[:, None]
        states = decoder.read(torch.where(right, texts[rows, index], wrong[rows, index]))
        decoder.keep(count)
        for row in range(3):
            found, whole = states[row, : kept[row]], expected[row][position[row] :][: kept[row]]
            assert_close(found, whole, FLOAT64_TOLERANCE, f"row {row} at {position[row]}")
        position = position + count


def drafted_logits(network: LanguageModel, document_N: torch.Tensor, steps: int) -> dict[tuple[int, int], torch.Tensor]:
    """(position, step) -> logits [V] of an engine's draft loop over a document, fed with the document's own tokens.

    Token by token: the trunk reads token p, the first step writes the keys of position p, and the later steps of the
    draft that starts from p write theirs behind it, where those of the next position overwrite them.
    """
    decoder, found = Decoder(network, rows=1, room=document_N.numel() + steps), {}
    for p in range(document_N.numel() - 1):
        state = decoder.read(document_N[None, p : p + 1])
        decoder.keep(torch.ones(1, dtype=torch.int64))
        for step in range(1, 1 + steps):
            if p + step >= document_N.numel():
                break
            token = document_N[None, p + step : p + step + 1]
            state = decoder.predict(state, token, torch.tensor([p + step - 1]))
            found[p, step] = decoder.logits(state)[0, 0]
    return found


# Documents of 1, 2, 5 and more tokens, and padding.
STARTS = [[1, 3, 8], [20]]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", FLOAT64_TOLERANCE), ("float32", 1e-5)])
def test_training_logits_are_those_of_the_draft_loop(build: Callable, dtype: str, tolerance: float) -> None:
    steps = 4
    network = build(replace(SHAPE, dtype=dtype), MtpConfig(steps=steps), VOCAB)
    ids = ids_from_starts(30, *STARTS)
    ids[1, -4:] = -1
    tokens, length, compared = random_tokens(*ids.shape), ids.shape[1] - 1, set()
    with torch.no_grad():
        states = network.predictions(micro_batch(tokens, ids, steps))
        logits = torch.stack([network.logits(state) for state in states]).unflatten(1, (2, length))
    for row in range(2):
        for span in reference.document_spans(ids[row]):
            for (p, step), expected in drafted_logits(network, tokens[row, span], steps).items():
                if ids[row, span.start] >= 0 and span.start + p < length:
                    difference = (logits[step, row, span.start + p] - expected).abs().max()
                    assert difference <= tolerance, f"{difference:.2g} at row {row}, {span}, {p}, step {step}"
                    compared.add(step)
    assert compared == {1, 2, 3, 4}


def test_keys_by_depth_are_not_those_of_the_draft_loop(build: Callable) -> None:
    """The comparison above can tell the two apart from the second step on."""
    network = build(SHAPE, MtpConfig(steps=3, keys="depth"), VOCAB)
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        states = network.predictions(micro_batch(tokens, torch.zeros_like(tokens), 3))
    drafted = drafted_logits(network, tokens[0], 3)
    apart = [(network.logits(states[step])[5] - drafted[5, step]).abs().max() for step in (1, 2, 3)]
    assert apart[0] < 1e-12 and min(apart[1:]) > 1e-3
