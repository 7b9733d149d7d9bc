"""Speculative decoding: the text of plain greedy decoding, whatever the drafts are worth, and what it says of them."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.config import MtpConfig
from model.decode.speculate import Speculator
from model.documents import Documents
from model.network import LanguageModel
from tests.model.helpers import FLOAT64_TOLERANCE, SMALL, assert_close
from tests.model.test_network import VOCAB

SHAPE = replace(SMALL, pattern="GEGE*E")
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2]]
TOKENS = 24


def speculate(network: LanguageModel, draft: int, tokens: int = TOKENS) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens that follow each prompt, and what was accepted of each of its drafts."""
    speculator = Speculator(network, PROMPTS, tokens, draft, VOCAB)
    texts, accepted = [[token] for token in speculator.next_R.tolist()], [[] for _ in PROMPTS]
    while min(map(len, texts)) < tokens:
        active = torch.tensor([len(text) < tokens for text in texts])
        chosen, right = speculator.advance(active)
        for row in active.nonzero().flatten().tolist():
            texts[row] += chosen[row, : right[row] + 1].tolist()
            accepted[row].append(int(right[row]))
    return [text[:tokens] for text in texts], accepted


@torch.no_grad()
def one_by_one(network: LanguageModel, prompt: list[int]) -> list[int]:
    """Greedy decoding that reads the whole text anew for each token."""
    ids = list(prompt)
    for _ in range(TOKENS):
        tokens = torch.tensor([ids])
        state = network.trunk(tokens, Documents.from_ids(torch.zeros_like(tokens)))[-1:]
        ids.append(int(network.logits(state).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("draft", [0, 1, 3])
def test_the_text_is_that_of_plain_greedy_decoding(build: Callable, draft: int) -> None:
    # Random weights draft badly, so that all kinds of rejections occur; in float64 no two logits are as close as the
    # roundings of two orders of a sum.
    network = build(SHAPE, MtpConfig(steps=1), VOCAB)
    texts, accepted = speculate(network, draft)
    assert texts == [one_by_one(network, prompt) for prompt in PROMPTS]
    assert {count for row in accepted for count in row} <= set(range(draft + 1))
    if draft:
        assert any(count == 0 for row in accepted for count in row)


def bigram(network: LanguageModel, sees: str) -> LanguageModel:
    """A model whose layers say nothing: what follows depends on the last token alone.

    Args:
        sees: which half of [embedding; hidden] the MTP layer lets through.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("out_proj.weight", "linear_proj.weight", "linear_fc2.weight", "experts.weight2")):
                parameter.zero_()
            if name.endswith("norm.weight"):
                parameter.zero_()
        identity, nothing = torch.eye(SHAPE.hidden_size), torch.zeros(SHAPE.hidden_size, SHAPE.hidden_size)
        halves = [identity, nothing] if sees == "embedding" else [nothing, identity]
        network.mtp.layers[0].eh_proj.weight.copy_(torch.cat(halves, dim=1))
    return network


def test_a_bigram_model_that_drafts_from_the_embedding_is_always_right(build: Callable) -> None:
    """Then step k predicts the token after token t+k just as the trunk does from token t+k itself."""
    _, accepted = speculate(bigram(build(SHAPE, MtpConfig(steps=2), VOCAB), "embedding"), draft=3)
    assert {count for row in accepted for count in row} == {3}


def test_a_bigram_model_that_drafts_from_the_state_is_almost_never_right(build: Callable) -> None:
    """It repeats the prediction before: right only where a token follows itself."""
    texts, accepted = speculate(bigram(build(SHAPE, MtpConfig(steps=2), VOCAB), "state"), draft=3)
    assert all(left != right for text in texts for left, right in itertools.pairwise(text))
    assert {count for row in accepted for count in row} == {0}


def test_drawn_tokens_come_from_the_logits_of_the_text_before_them(build: Callable) -> None:
    """So a text has the trunk's distribution, whatever the drafts were."""
    network, generator, seen = build(SHAPE, MtpConfig(steps=1), VOCAB), torch.Generator().manual_seed(0), []

    def draw(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])

    speculator = Speculator(network, PROMPTS, TOKENS, 2, VOCAB, draw)
    texts = [[*prompt, int(token)] for prompt, token in zip(PROMPTS, speculator.next_R, strict=True)]
    drawn = [[logits] for logits in seen.pop()]
    active = torch.ones(len(PROMPTS), dtype=torch.bool)
    while min(map(len, drawn)) < 8:
        chosen, right = speculator.advance(active)
        logits = seen.pop()
        for row, text in enumerate(texts):
            text += chosen[row, : right[row] + 1].tolist()
            drawn[row] += logits[row, : right[row] + 1]
    for prompt, text, logits in zip(PROMPTS, texts, drawn, strict=True):
        tokens = torch.tensor([text[:-1]])
        with torch.no_grad():
            states = network.trunk(tokens, Documents.from_ids(torch.zeros_like(tokens)))
        assert_close(torch.stack(logits), network.logits(states)[len(prompt) - 1 :], FLOAT64_TOLERANCE, "logits")
