"""Gated attention: packed attention, rotary embedding and the whole layer against their twins."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig, MtpConfig
from model.documents import Documents
from model.kernels.backends import column_linear, row_linear
from model.layers.attention import GatedAttention, GatedAttentionSubmodules, packed_attention
from model.layers.norm import ZeroCentredRMSNorm
from model.layers.rope import apply_rotary, rotary_frequencies, rotary_table
from model.reference import layers as reference
from model.stack import hybrid_config
from tests.model.helpers import SMALL, assert_close, assert_module_twin, assert_twins, ids_from_starts, randomise


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("starts", [([], []), ([1, 2, 9], [5]), (range(1, 13), [])])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (4, 2), (4, 1)])
def test_packed_attention(queries: int, keys: int, starts: tuple) -> None:
    ids = ids_from_starts(13, *starts)
    documents = Documents.from_ids(ids)
    assert documents.single == (starts == ([], []))
    inputs = {"q": normal(26, queries, 6), "k": normal(26, keys, 6, seed=1), "v": normal(26, keys, 6, seed=2)}
    assert_twins(
        lambda q, k, v: packed_attention(q, k, v, documents),
        lambda q, k, v: reference.attention(*(x.view(2, 13, -1, 6) for x in (q, k, v)), ids).flatten(0, 1),
        inputs,
    )


def test_padding_attends_to_itself_alone() -> None:
    ids = ids_from_starts(8, [3])
    ids[0, 6:] = -1
    q, k, v = normal(8, 1, 4), normal(8, 1, 4, seed=1), normal(8, 1, 4, seed=2)
    out = packed_attention(q, k, v, Documents.from_ids(ids))
    assert out.isfinite().all()
    assert torch.equal(out[6], v[6])


def rotary(rotary_dim: int, base: float, **changes) -> ModelConfig:
    """A shape that rotates so many of 8 dimensions."""
    return replace(SMALL, head_dim=8, rotary_fraction=rotary_dim / 8, rope_base=base, **changes)


# RoPE as it is; YaRN with pairs of every kind (kept, mixed, stretched); with none kept; with none stretched.
ROPES = {
    "plain": {},
    "YaRN": {"yarn_factor": 8.0, "yarn_original_length": 512},
    "YaRN from a short context": {"yarn_factor": 1.5, "yarn_original_length": 30},
    "YaRN from a long context": {"yarn_factor": 4.0, "yarn_original_length": 10**9},
}


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_rotary_table_is_that_of_each_documents_positions(changes: dict) -> None:
    ids, shape = ids_from_starts(200, [150], [1, 2]), rotary(8, 1e4, **changes)
    table = rotary_table(Documents.from_ids(ids).position_RL, shape)
    exact = reference.rotary_table(ids, shape)
    assert table.dtype == torch.float32
    # Angles up to 200 in float32 are off by up to 200 * 2^-24 * (a few roundings) = 5e-5.
    assert_close(table[..., :4].double(), exact, 5e-5, "the table")
    assert torch.equal(table[..., :4], table[..., 4:])


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_rotary_frequencies_equal_their_twins(changes: dict) -> None:
    shape = replace(SMALL, head_dim=256, rotary_fraction=0.25, rope_base=1e7, **changes)
    twin = torch.tensor([reference.rotary_frequency(i, shape) for i in range(32)], dtype=torch.float64)
    # A power of a float32 base: its logarithm's rounding, 2^-24, grows by the exponent, up to ln(1e7) = 16.
    assert ((rotary_frequencies(shape).double() / twin - 1).abs() <= 5e-6).all()


@pytest.mark.parametrize("rotary_dim", [0, 2, 4, 8])
def test_apply_rotary(rotary_dim: int) -> None:
    table = reference.rotary_table(ids_from_starts(9, [4]), rotary(rotary_dim, 100.0))
    assert_twins(
        lambda x: apply_rotary(x, torch.cat([table, table], dim=-1)),
        lambda x: reference.rotate(x, table),
        {"x": normal(9, 3, 8)},
    )


def test_rotary_embedding_depends_on_distances_alone() -> None:
    query, key = normal(1, 1, 8).expand(6, 1, 8), normal(1, 1, 8, seed=1).expand(6, 1, 8)
    table = reference.rotary_table(ids_from_starts(6, []), rotary(8, 10.0))
    table = torch.cat([table, table], dim=-1)
    scores = (apply_rotary(query, table) @ apply_rotary(key, table)[:, 0].T)[:, 0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        # Products of rotations in float64.
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), 1e-12, f"scores at distance {distance}")
    assert (scores[0, 0] - scores[0, 1]).abs() > 0.01


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("queries", "keys", "fraction"), [(2, 2, 0.5), (4, 2, 0.5), (4, 1, 1.0), (4, 2, 0.0)])
def test_layer_equals_its_twin(groups, queries: int, keys: int, fraction: float, gated: bool) -> None:
    shape = replace(
        SMALL, attention_heads=queries, key_value_heads=keys, rotary_fraction=fraction, attention_gate=gated
    )
    submodules = GatedAttentionSubmodules(column_linear, row_linear, ZeroCentredRMSNorm)
    layer = GatedAttention(hybrid_config(shape, MtpConfig()), submodules, 1, groups).double()
    randomise(layer)
    ids = ids_from_starts(12, [1, 7], [])
    table = reference.rotary_table(ids, shape)
    keywords = {"rotary_pos_emb": torch.cat([table, table], dim=-1), "packed_seq_params": Documents.from_ids(ids)}
    assert_module_twin(
        layer,
        lambda x: layer(x[:, None], **keywords)[0][:, 0],
        lambda x, weights: reference.gated_attention(x, weights, shape, ids, table),
        normal(24, shape.hidden_size),
    )
