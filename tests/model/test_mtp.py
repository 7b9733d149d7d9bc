"""Multi-token prediction: what each step may see, and that one layer serves all steps (test_network has its twin)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.batch import MicroBatch, count_targets
from model.config import MtpConfig
from model.network import LanguageModel
from tests.model.helpers import FLOAT64_TOLERANCE, SMALL, assert_close

VOCAB, LENGTH = 40, 12
SHAPE = replace(SMALL, pattern="GE*E")


def micro_batch(tokens_S: torch.Tensor, steps: int) -> MicroBatch:
    ids = torch.zeros(1, tokens_S.numel(), dtype=torch.int64)
    return MicroBatch.build(tokens_S[None], ids, count_targets(ids, steps))


@torch.no_grad()
def states(network: LanguageModel, tokens_S: torch.Tensor) -> torch.Tensor:
    """The states that the head reads, [1 + K, T, H]."""
    return torch.stack(network.predictions(micro_batch(tokens_S, network.config.mtp.steps)))[:, :, 0]


def test_each_step_sees_one_token_more_and_none_beyond(build: Callable) -> None:
    network = build(SHAPE, MtpConfig(steps=2), VOCAB)
    tokens = torch.randint(VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(0))
    before = states(network, tokens)
    for changed in range(LENGTH + 1):
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % VOCAB
        moved = (states(network, other) - before).abs().amax(dim=-1)
        for step in range(3):
            # Position t at step k reads the tokens up to t+k and predicts token t+k+1.
            first = max(0, changed - step)
            # Rows of an expert are multiplied together, so rounding (1e-15) may change with the company they keep.
            assert (moved[step, :first] < 1e-12).all(), f"step {step} sees token {changed} too early"
            assert (moved[step, first : LENGTH - step] > 1e-9).all(), f"step {step} overlooks token {changed}"


def test_embedding_comes_first(build: Callable) -> None:
    """[embedding; hidden], the order of Qwen3-Next: with the second half cut off, the trunk has no say."""
    network = build(SHAPE, MtpConfig(steps=1), VOCAB)
    tokens = torch.arange(LENGTH + 1)
    with torch.no_grad():
        network.mtp.layers[0].eh_proj.weight[:, SHAPE.hidden_size :] = 0
        before = states(network, tokens)[1]
        network.decoder.final_norm.weight.normal_()
        assert torch.equal(states(network, tokens)[1], before)
        network.embedding.word_embeddings.weight.normal_()
        assert not torch.allclose(states(network, tokens)[1], before, atol=0.01)


def test_one_layer_serves_all_steps(build: Callable) -> None:
    names = {}
    for steps in range(4):
        network = build(SHAPE, MtpConfig(steps=steps), VOCAB)
        names[steps] = {name for name, _ in network.named_parameters()}
    own = {name for name in names[1] if name.startswith("mtp.")}
    assert names[0] == names[1] - own
    assert names[1] == names[2] == names[3]
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight"} < own
    # The embedding and the head are the trunk's.
    assert not any("embedding" in name or "output_layer" in name for name in own)


@pytest.mark.parametrize(
    ("mtp", "tokens_before", "shares"),
    [
        (MtpConfig(steps=0), 0, []),
        (MtpConfig(steps=1), 0, [0.3]),
        (MtpConfig(steps=2, weight=0.7), 0, [0.35, 0.35]),
        (MtpConfig(steps=3, weight=0.7, step_weights=0.5), 0, [0.4, 0.2, 0.1]),
        (MtpConfig(steps=2, weight=1.0, step_weights=(3.0, 1.0)), 0, [0.75, 0.25]),
        (MtpConfig(steps=2, weight=((0.0, 0.3), (100.0, 0.1))), 99, [0.15, 0.15]),
        (MtpConfig(steps=2, weight=((0.0, 0.3), (100.0, 0.1))), 100, [0.05, 0.05]),
    ],
    ids=str,
)
def test_total_adds_the_steps_by_their_weights(build: Callable, mtp: MtpConfig, tokens_before: int, shares) -> None:
    network = build(SHAPE, mtp, VOCAB)
    losses = network(replace(micro_batch(torch.arange(LENGTH + 1), mtp.steps), tokens_before=tokens_before))
    assert losses.by_step.shape == (1 + mtp.steps,)
    assert losses.tokens_KT.shape == (1 + mtp.steps, LENGTH)
    expected = losses.by_step @ torch.tensor([1.0, *shares], dtype=torch.float64)
    # float64 sums of a few numbers.
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("recompute", [(), ("layer",), ("attention", "norm")], ids=str)
@pytest.mark.parametrize("keys", ["inference", "depth"])
def test_detached_only_the_layer_itself_learns_from_its_loss(build: Callable, keys: str, recompute: tuple) -> None:
    """Its own gradients are those of joint training; the rest has those of training without it."""
    gradients, weights = [], build(SHAPE, MtpConfig(steps=2), VOCAB).state_dict()
    for mtp in (MtpConfig(steps=2, detach=True, keys=keys), MtpConfig(steps=2, keys=keys), MtpConfig(steps=0)):
        network = build(SHAPE, mtp, VOCAB)
        network.load_state_dict(weights, strict=mtp.steps > 0)
        network.config.recompute = frozenset(recompute)
        network(micro_batch(torch.arange(LENGTH + 1), mtp.steps)).total.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    detached, joint, without = gradients
    for name, gradient in detached.items():
        expected = joint[name] if name.startswith("mtp.") else without[name]
        assert_close(gradient, expected, FLOAT64_TOLERANCE, name)
    assert not torch.allclose(joint["output_layer.weight"], without["output_layer.weight"])
