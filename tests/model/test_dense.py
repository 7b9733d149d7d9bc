"""The dense SwiGLU layer against its twin, alone and inside a whole model."""

from dataclasses import replace

import torch

from model.batch import MicroBatch, count_targets
from model.config import MtpConfig
from model.kernels.backends import column_linear, row_linear
from model.layers.dense import Dense, SwiGLUSubmodules
from model.layers.rope import rotary_table
from model.reference import layers as reference
from model.reference import model as reference_model
from model.stack import hybrid_config
from tests.model.helpers import FLOAT64_TOLERANCE, SMALL, assert_close, assert_module_twin, randomise, weights_of


def test_dense_equals_its_twin(groups) -> None:
    shape = replace(SMALL, dense_size=14)
    module = Dense(hybrid_config(shape, MtpConfig()), SwiGLUSubmodules(column_linear, row_linear), groups).double()
    assert module.linear_fc1.weight.shape == (28, shape.hidden_size)
    randomise(module)
    hidden = torch.randn(7, shape.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_module_twin(module, lambda x: module(x[:, None])[0][:, 0], reference.dense, hidden)


def test_a_plain_transformer_equals_its_twin(build) -> None:
    """The pattern of a dense model: ungated attention and SwiGLU, no experts, no MTP."""
    shape = replace(SMALL, pattern="*-", repeats=2, attention_gate=False, rotary_fraction=1.0)
    mtp = MtpConfig(steps=0)
    network = build(shape, mtp)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    batch = MicroBatch.build(tokens, documents, count_targets(documents, 0))
    # The twin takes half of the fast path's own float32 table.
    table = rotary_table(batch.documents.position_RL, shape)
    table = table[..., : shape.rotary_dim // 2].double()
    expected = reference_model.loss(weights_of(network), batch, shape, mtp, 0.0, [table])
    assert_close(network(batch).total.detach(), expected.detach(), FLOAT64_TOLERANCE, "the loss")
