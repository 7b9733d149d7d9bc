"""Gauges against explicit computation, and what is planted in a model: it shows, and is told of."""

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.layers import gauges
from model.layers.gauges import Gauge, note_activations
from parallel import groups as process_groups
from parallel.engine import Engine
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, build_tiny, random_batch, start_engine, tiny_config
from train.job.build import Job
from train.loop import micro_batches, train_step
from train.observe import step_metrics
from train.routing import balances
from train.watch import metrics
from train.watch.alerts import Rules
from train.watch.gauges import Gauges

PLANTED = replace(MODEL, pattern="*EGE", attention_heads=2)
LR = 3e-3


def _watched() -> tuple[Job, Engine, Gauges]:
    """A small model on one process, its engine, and its gauges."""
    process_groups.start(torch.device("cpu"))
    job = build_tiny(tiny_config())
    engine = start_engine(job)
    return job, engine, Gauges(job, engine)


def _activations(gauge: Gauges) -> dict[str, float]:
    return gauge._of_activations(*(x.cpu() for x in gauge._activations()))


def _evaluated() -> list[dict]:
    """Gauges of a sampled step, and of one after which there was an evaluation."""
    (job, _, gauge), found = _watched(), []
    for evaluates in (False, True):
        gauge.begin_step(True)
        (batch,) = micro_batches(job, [random_batch(8, seed=3)])
        job.chunks[0](batch)
        if evaluates:
            with torch.no_grad():
                job.chunks[0](batch)
        found.append(_activations(gauge))
    return found


class Refuses:
    """Leaves everything as it is, so that the same step can be computed once more."""

    reason = "it is to be computed again"

    def accept(self, outputs: list, grad_norm: float) -> bool:
        return False


@patch.multiple(gauges, MASSIVE=0.01, TIMES_MEDIAN=2.0)  # some activations are massive then
def _verified() -> list[dict]:
    """Gauges, gradient norm and loads of a run's first step, refused; computed twice to compare, and once."""
    (job, engine, gauge), found = _watched(), []
    for verify in (True, False):
        gauge.begin_step(True)
        batches = [random_batch(8, seed) for seed in (3, 4)]
        outputs, grad_norm = train_step(job, engine, batches, LR, judge=Refuses(), verify=verify)
        found.append(_activations(gauge))
        found[-1] |= step_metrics(job, outputs) | {metrics.GRAD_NORM: grad_norm}
        assert not any(balance.counts.any() for balance in balances(job).values())  # no step has counted yet
    return found


def _optimizer() -> None:
    job, engine, gauge = _watched()
    train_step(job, engine, [random_batch(8, seed=0)], LR)
    before = {name: x.detach().clone() for name, x in job.chunks[0].named_parameters()}
    gradients: dict[str, Tensor] = {}

    class Keeps:
        reason = ""

        def accept(self, outputs: list, grad_norm: float) -> bool:
            gradients.update({name: x.main_grad.clone() for name, x in job.chunks[0].named_parameters()})
            return True

    _, grad_norm = train_step(job, engine, [random_batch(8, seed=1)], LR, judge=Keeps())
    assert grad_norm > 1.0  # it is clipped
    found = gauge.values(LR, grad_norm)
    after = dict(job.chunks[0].named_parameters())
    own = {
        "router": [name for name in after if name.endswith("router.weight")],
        "router/2": ["decoder.layers.3.mlp.router.weight"],
        "router/mtp": [name for name in after if name.startswith("mtp") and name.endswith("router.weight")],
        "decay/1": ["decoder.layers.0.self_attention.A_log", "decoder.layers.0.self_attention.dt_bias"],
        "norm/7": [name for name in after if name.startswith("decoder.layers.6.") and name.endswith("norm.weight")],
        "experts": [name for name in after if ".experts." in name],
        "embedding": ["embedding.word_embeddings.weight"],
    }
    for group, names in own.items():
        assert names
        norm = math.sqrt(sum(gradients[name].double().square().sum().item() for name in names))
        moved = math.sqrt(sum((after[name] - before[name]).double().square().sum().item() for name in names))
        gain = float(group.startswith("norm"))  # which is stored as its distance from one
        size = math.sqrt(sum((after[name].detach().double() + gain).square().sum().item() for name in names))
        # float32 gradients, scaled down when they are clipped and up again.
        assert found[f"{metrics.GROUP_GRAD_NORM}/{group}"] == pytest.approx(norm, rel=1e-6), group
        # The difference of float32 weights is rounded to 1e-7 of a weight, some 1e-3 of which moves.
        assert found[f"{metrics.UPDATE_TO_WEIGHT}/{group}"] == pytest.approx(moved / size, rel=1e-3), group
    groups = [value for name, value in found.items() if name.count("/") == 1 and name.startswith("group_grad_norm")]
    assert math.sqrt(sum(value**2 for value in groups)) == pytest.approx(grad_norm, rel=1e-6)
    q_norm = after["decoder.layers.6.self_attention.q_layernorm.weight"]
    mtp = next(x for name, x in after.items() if name.startswith("mtp") and name.endswith("q_layernorm.weight"))
    assert found["norm_gain_max/q_layernorm"] == pytest.approx(1 + max(q_norm.max(), mtp.max()).item())
    A_log = after["decoder.layers.2.self_attention.A_log"]
    assert (found["A_log_min/2"], found["A_log_max/2"]) == pytest.approx((A_log.min().item(), A_log.max().item()))


def _plant(job: Job) -> None:
    """A sink, massive activations, a norm that has grown, and an expert that nothing chooses."""
    chunk = job.chunks[0]
    attention, hidden = chunk.decoder.layers[0].self_attention, job.config.model.hidden_size
    with torch.no_grad():
        # Every token has 1 in column 0, and first ones (token 0) in column 1 too: queries ask for what first keys have.
        embedding = chunk.embedding.word_embeddings.weight
        embedding[:, :2], embedding[0] = torch.tensor([1.0, 0.0]), torch.zeros(hidden)
        embedding[0, 0], embedding[0, 1] = 1.0, 1.0
        each = attention.queries_per_group
        rows = attention.linear_qkv.weight.view(attention.groups, -1, attention.head_dim, hidden)
        rows[:, :each] = 0
        rows[:, :each, -1, 0] = 1.0
        rows[:, -2, -1, 1] = 100.0
        attention.k_layernorm.weight.fill_(9.5)
        chunk.decoder.layers[2].self_attention.out_proj.weight[5] *= 1e5
        chunk.decoder.layers[1].mlp.router.balance.bias[3] = -100.0
        chunk.decoder.layers[1].pre_mlp_layernorm.weight[7] = 11.0


def _measure(job: Job, engine: Engine, batch) -> dict:
    gauge = Gauges(job, engine)
    gauge.begin_step(True)
    outputs, grad_norm = train_step(job, engine, [batch], 1e-6)
    return (
        step_metrics(job, outputs)
        | gauge.values(1e-6, grad_norm)
        | {metrics.TOKENS_PER_SECOND: 1.0, metrics.TFLOPS: 1.0}
    )


def _planted() -> list[dict]:
    process_groups.start(torch.device("cpu"))
    config = tiny_config(PLANTED)
    config = replace(config, balance=replace(config.balance, bias_rate=1e-9))
    batch = random_batch(8, seed=0)
    first = torch.ones_like(batch.documents, dtype=torch.bool)
    first[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
    batch = replace(batch, tokens=torch.where(first, 0, 1 + batch.tokens % 255))
    job = build_tiny(config)
    engine = start_engine(job)
    healthy = _measure(job, engine, batch)
    _plant(job)
    return [healthy, _measure(job, engine, batch)]


def test_an_evaluation_does_not_count() -> None:
    """What layers compute in a step is compared with what is computed by hand in `tests.parallel.test_parity`."""
    (first, second) = run_ranks(_evaluated, 1)[0]
    assert first == second


def test_a_step_that_is_computed_twice_and_refused_leaves_nothing() -> None:
    (twice, once) = run_ranks(_verified, 1)[0]
    assert twice == once
    assert once[metrics.MASSIVE_ACTIVATIONS] > 0 and once[metrics.MAX_VIOLATION] > 0


def test_what_the_optimizer_does() -> None:
    run_ranks(_optimizer, 1)


def test_what_is_planted_shows_and_is_told_of() -> None:
    ((healthy, planted),) = run_ranks(_planted, 1)
    assert [alert for _ in range(4) for alert in Rules("log", 8).look(healthy)] == []
    rules = Rules("log", 8)
    for _ in range(2):
        assert {alert.rule for alert in rules.look(planted)} == {"sink", "massive activations", "norm gain"}
    told = {alert.rule: str(alert) for alert in rules.look(planted)}
    # Routers behind the massive activation see little else, and choose alike for all tokens.
    assert set(told) == {"sink", "massive activations", "norm gain", "dead experts", "collapse"}
    assert told["sink"].startswith("attention_sink/1: ") and "model.attention_gate" in told["sink"]
    assert told["massive activations"].startswith(f"{metrics.MASSIVE_ACTIVATIONS}/3: ")
    assert told["norm gain"].startswith("norm_gain_max/pre_mlp_layernorm has grown to 12.0")
    assert planted[metrics.of_layer(metrics.EXPERT_LOAD, "1")][3] == 0.0
    assert "on 3 sampled steps in a row: layer 1: " in told["dead experts"]
    assert healthy[metrics.MASSIVE_ACTIVATIONS] == 0 and healthy[metrics.ATTENTION_SINK] < 0.3


def test_massive_is_above_both_limits() -> None:
    hidden = torch.full((4, 1, 8), 0.5)
    hidden[0, 0, 1], hidden[1, 0, 2], hidden[3, 0, 0] = 600.0, -99.0, 5000.0
    hidden[2] = 300.0  # large as a whole: nothing stands out
    gauge = Gauge()
    note_activations(gauge, hidden, torch.tensor([True, True, True, False]))  # the last token is padding
    assert gauge.sums["massive"] == 1 and gauge.maxima["activation"] == 600.0


def test_a_long_row_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many queries as are asked for, spread evenly over the row."""
    from model.documents import Documents

    monkeypatch.setattr(gauges, "QUERIES", 4)
    monkeypatch.setattr(gauges, "EARLIEST", 2)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(16, heads, 8, generator=generator) for heads in (4, 2))
    documents = Documents.from_ids(torch.tensor([[0] * 6 + [1] * 8 + [-1] * 2]))
    gauge = Gauge()
    gauges.note_sink(gauge, q, k, documents)
    assert gauge.sums["queries"] == 3 * 4  # places 4, 8 and 12 of 0, 4, 8, 12, times four heads
    shares = [
        (k[first : place + 1, head // 2] @ q[place, head] / 8**0.5).softmax(0)[0]
        for place, first in ((4, 0), (8, 6), (12, 6))
        for head in range(4)
    ]
    assert gauge.sums["sink"].item() == pytest.approx(sum(shares).item(), rel=1e-5)
