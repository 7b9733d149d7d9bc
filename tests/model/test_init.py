"""Initialisation: every parameter has a rule, its numbers depend on nothing but seed and name, and they are sane."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.nn import functional as F

from model.config import BalanceConfig, ModelConfig, MtpConfig
from model.init import _draw, initialise, narrowed, rows_as_drawn, rules, suspicious
from model.layers.router import normalise_rows
from model.network import LanguageModel
from model.stack import hybrid_config
from tests.model.helpers import BALANCE, SMALL

FLOAT32 = replace(SMALL, dtype="float32", pattern="GE*E")


def sharded_state(network: LanguageModel, groups) -> dict:
    return network.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})


@pytest.fixture
def fresh(build: Callable, groups) -> Callable[..., LanguageModel]:
    """A model as a run starts it."""

    def make(
        shape: ModelConfig = FLOAT32,
        steps: int = 2,
        seed: int = 1,
        vocab_size: int = 40,
        balance: BalanceConfig = BALANCE,
    ) -> LanguageModel:
        network = build(shape, MtpConfig(steps=steps), vocab_size, balance=balance)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(torch.nan)  # so that what is left out shows
        initialise(network, sharded_state(network, groups), seed)
        return network

    return make


@pytest.mark.parametrize("pattern", ["G", "*", "E", "-", "GE*E", "GEGEGE*E", "*-G-"])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_parameter_has_a_rule(fresh: Callable, pattern: str, steps: int, dtype: str) -> None:
    network = fresh(replace(FLOAT32, pattern=pattern, dtype=dtype), steps)
    assert suspicious(network) == []


def test_the_same_seed_draws_the_same_model(fresh: Callable) -> None:
    torch.manual_seed(1)
    first = fresh(seed=5)
    torch.manual_seed(2)
    again, other = fresh(seed=5), fresh(seed=6)
    for (name, one), two, three in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert torch.equal(one, three) == name.endswith("norm.weight"), name


def test_a_parameter_does_not_depend_on_the_others(fresh: Callable) -> None:
    """Another vocabulary, no MTP layer, one layer less after it: the first layers start alike."""
    full, part = fresh(), fresh(replace(FLOAT32, pattern="GE*"), steps=0, vocab_size=64)
    ours, theirs = dict(full.named_parameters()), dict(part.named_parameters())
    # The outputs into the residual stream scale with the number of layers.
    residual = ("out_proj.weight", "linear_proj.weight", "weight2", "linear_fc2.weight")
    names = [name for name in theirs if name.startswith("decoder.layers.") and not name.endswith(residual)]
    assert len(names) > 10
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name


def test_no_two_parameters_share_their_numbers(fresh: Callable) -> None:
    network = fresh(replace(FLOAT32, pattern="GEGE*E*E"))
    seen = {}
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight"):
            continue
        start = tuple(F.normalize(parameter.detach().flatten()[:4].double(), dim=0).tolist())
        assert start not in seen, f"{name} and {seen[start]}"
        seen[start] = name
    experts = network.decoder.layers[1].mlp.experts.weight1
    assert len({round(expert[0, 0, 0].item(), 9) for expert in experts}) == FLOAT32.experts


@pytest.mark.parametrize("size", [2, 3])
def test_a_part_equals_the_part_of_the_whole(groups, size: int) -> None:
    table = rules(hybrid_config(FLOAT32, MtpConfig()))
    whole_shape = (6, 4, 12)
    for key, axis in (
        ("decoder.layers.1.mlp.experts.weight1", 0),
        ("decoder.layers.0.self_attention.in_proj.weight", 2),
    ):
        draw = table[key.rsplit(".", 2)[-2] + "." + key.rsplit(".", 1)[-1]]
        whole = _draw(ShardedTensor.from_rank_offsets(key, torch.empty(whole_shape)), draw, seed=3)
        local = [length // size if dim == axis else length for dim, length in enumerate(whole_shape)]
        parts = []
        for rank in range(size):
            entry = ShardedTensor.from_rank_offsets(key, torch.empty(local), (axis, rank, size))
            parts.append(_draw(entry, draw, seed=3))
        assert torch.equal(torch.cat(parts, dim=axis), whole), key


def test_router_rows_have_one_norm(fresh: Callable) -> None:
    for moe in fresh(replace(FLOAT32, dtype="bfloat16")).moe_layers():
        norms = moe.router.weight.norm(dim=1)
        expected = FLOAT32.init_std * FLOAT32.hidden_size**0.5
        # float32 norms of 24 terms.
        assert torch.allclose(norms, torch.full_like(norms, expected), rtol=1e-6, atol=0)
        assert moe.router.weight.dtype == torch.float32


def test_decay_parameters_start_in_flas_ranges(fresh: Callable) -> None:
    shape = replace(FLOAT32, linear_value_heads=64, linear_key_heads=2, dtype="bfloat16", pattern="G")
    layer = fresh(shape, steps=0).decoder.layers[0].self_attention
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
    decay, step = layer.A_log.exp(), F.softplus(layer.dt_bias)
    # 64 draws of U(0, 16) fill the range; its ends are met to float32 rounding through a logarithm.
    assert 0 < decay.min() < 2 and 14 < decay.max() <= 16 * (1 + 1e-5)
    assert 1e-3 * (1 - 1e-5) <= step.min() < 2e-3 and 0.05 < step.max() <= 0.1 * (1 + 1e-5)


def test_spread_of_the_weights(fresh: Callable) -> None:
    """Standard deviations of what is wide enough to measure; outputs into the residual stream start smaller."""
    shape = replace(FLOAT32, hidden_size=96, pattern="GE*E", experts=16, expert_size=32, shared_expert_size=32)
    network = fresh(shape, vocab_size=512)
    residual = ("out_proj.weight", "linear_proj.weight", "weight2", "linear_fc2.weight")
    network.requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight"):
            assert not parameter.any(), name
        elif name.endswith("conv_weight"):
            assert parameter.abs().max() <= 0.5, name
            assert parameter.std() == pytest.approx(0.5 / 3**0.5, rel=0.15), name
        elif parameter.numel() > 1000 and not name.endswith("router.weight"):
            std = shape.init_std / (2.0 if name.endswith(residual) else 1.0)
            # n > 1000 numbers give their standard deviation to 1 / sqrt(2n) < 2.3 %; 10 % is above four sigma.
            assert parameter.std() == pytest.approx(std, rel=0.1), name
            assert parameter.mean().abs() < 5 * std / parameter.numel() ** 0.5, name


def test_rows_as_drawn_are_there_for_a_while(fresh: Callable, groups) -> None:
    network = fresh(replace(FLOAT32, experts=64, experts_per_token=2), steps=1)
    routers = [moe.router.weight for moe in network.moe_layers()]
    before = [weight.detach().clone() for weight in routers]
    with rows_as_drawn(network, sharded_state(network, groups), seed=1):
        drawn = [weight.detach().clone() for weight in routers]
    for weight, one, other in zip(routers, before, drawn, strict=True):
        assert torch.equal(weight, one)
        # The same draws to float32 rounding, but for their lengths: norms of 24 normal numbers scatter by 1 / sqrt(48).
        torch.testing.assert_close(normalise_rows(other, FLOAT32.init_std), one, rtol=1e-5, atol=1e-8)
        assert 0.1 < other.norm(dim=1).std() / other.norm(dim=1).mean() < 0.2
        assert other.std() == pytest.approx(FLOAT32.init_std, rel=0.1)


def test_suspicious_names_planted_faults(fresh: Callable) -> None:
    network = fresh()
    delta, experts = network.decoder.layers[0].self_attention, network.decoder.layers[1].mlp
    with torch.no_grad():
        delta.in_proj.weight[3, 2] = torch.nan
        delta.dt_bias[1] = torch.inf
        experts.experts.weight2.zero_()
        experts.router.weight[0, 0] = -25.0
    assert suspicious(network) == [
        "decoder.layers.0.self_attention.dt_bias holds values that are not finite",
        "decoder.layers.0.self_attention.in_proj.weight holds values that are not finite",
        "decoder.layers.1.mlp.router.weight reaches 25.0",
        "decoder.layers.1.mlp.experts.weight2 is all zero",
    ]


def test_what_must_stay_wide_is_named_once_it_is_narrowed(fresh: Callable) -> None:
    """As megatron-core's wrapper for bfloat16 models does with all that it wraps."""
    network = fresh(replace(FLOAT32, dtype="bfloat16", pattern="GE"), steps=0, balance=BalanceConfig(bias_rate=1e-3))
    assert narrowed(network) == []
    network.bfloat16()
    network.decoder.layers[1].mlp.router.balance.counts = torch.zeros(2)
    layers = "decoder.layers.{}."
    assert sorted(narrowed(network)) == sorted(
        [
            f"{layers.format(0)}self_attention.A_log is bfloat16, not float32",
            f"{layers.format(0)}self_attention.dt_bias is bfloat16, not float32",
            *(
                f"{layers.format(1)}mlp.router.{name} is {found}, not {wanted}"
                for name, found, wanted in (
                    ("weight", "bfloat16", "float32"),
                    ("balance.bias", "bfloat16", "float32"),
                    ("balance.counts", "float32", "int64"),
                    ("balance.forecast.squares", "bfloat16", "float64"),
                    ("balance.forecast.products", "bfloat16", "float64"),
                )
            ),
        ]
    )


def test_a_parameter_without_a_rule_is_an_error(build: Callable, groups) -> None:
    network = build(FLOAT32, MtpConfig())
    network.decoder.layers[0].novelty = torch.nn.Parameter(torch.empty(3))
    with pytest.raises(KeyError, match=r"no initialisation rule for parameter decoder\.layers\.0\.novelty: add one"):
        initialise(network, sharded_state(network, groups), seed=1)


def test_a_parameter_that_is_not_saved_is_an_error(build: Callable, groups) -> None:
    network = build(FLOAT32, MtpConfig())
    sharded = sharded_state(network, groups)
    del sharded["output_layer.weight"]
    with pytest.raises(RuntimeError, match=r"parameter output_layer\.weight is missing from the sharded state dict"):
        initialise(network, sharded, seed=1)
