"""Attention over a prefix and a few keys of one's own against one softmax over all of them."""

import pytest
import torch

from model.documents import Documents
from model.layers.chain import chain_attention, prefix_attention
from model.reference import model as reference_model
from tests.model.helpers import assert_close, assert_twins, ids_from_starts

ROWS, LENGTH, DIM = 2, 13, 6


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole_softmax(q, k, v, chain_k, chain_v, ids: torch.Tensor) -> torch.Tensor:
    """The keys of all steps side by side under one mask."""
    share = q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat([prefix, *chain.unbind(1)]).repeat_interleave(share, dim=1)
        for prefix, chain in ((k, chain_k), (v, chain_v))
    )
    mask = reference_model.visible(reference_model.rows_apart(ids), 1 + chain_k.shape[1])
    scores = torch.einsum("tnd,snd->nts", q, keys) / DIM**0.5
    return torch.einsum("nts,snd->tnd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values)


def inputs(queries: int, keys: int, chain: int) -> dict[str, torch.Tensor]:
    tokens = ROWS * LENGTH
    shapes = {"q": (tokens, queries), "k": (tokens, keys), "v": (tokens, keys)}
    shapes |= {"chain k": (tokens, chain, keys), "chain v": (tokens, chain, keys)}
    return {name: normal(*shape, DIM, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("starts", [([], []), ([1, 2, 9], [5])], ids=["single", "packed"])
@pytest.mark.parametrize(("queries", "keys", "chain"), [(2, 2, 1), (4, 2, 3), (4, 1, 2)])
def test_one_softmax_over_prefix_and_chain(queries: int, keys: int, chain: int, starts: tuple) -> None:
    ids = ids_from_starts(LENGTH, *starts)
    assert_twins(
        lambda *x: chain_attention(*x, Documents.from_ids(ids)),
        lambda *x: whole_softmax(*x, ids),
        inputs(queries, keys, chain),
    )


def test_half_precision_merges_in_float32() -> None:
    documents, wide = Documents.from_ids(ids_from_starts(LENGTH, [4], [])), inputs(4, 2, 2)
    narrow = {name: x.bfloat16().requires_grad_() for name, x in wide.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in narrow.items()}
    found, expected = (chain_attention(*x.values(), documents) for x in (narrow, exact))
    assert found.dtype == torch.bfloat16
    assert prefix_attention(*list(narrow.values())[:3], documents)[1].dtype == torch.float32
    # Values up to 3, rounded to 8 bits twice (the prefix's part, and the sum).
    assert_close(found.double(), expected, 0.02, "output")
    for out in (found, expected):
        out.sum().backward()
    for name, leaf in narrow.items():
        assert leaf.grad.dtype == torch.bfloat16
        # Sums over up to 13 shares and queries of numbers rounded to 8 bits.
        assert_close(leaf.grad.double(), exact[name].grad, 0.03, name)
