"""Gauges against explicit computation, and what is planted in a model: it shows, and is told of."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.layers import gauges
from model.layers.gauges import EARLIEST, Gauge, note_activations
from parallel import groups as process_groups
from parallel.engine import Engine
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, build_tiny, fill, random_batch, start_engine, tiny_config
from train.job.build import Job
from train.loop import micro_batches, train_step
from train.observe import step_metrics
from train.watch import metrics
from train.watch.alerts import Rules
from train.watch.gauges import Gauges

PLANTED = replace(MODEL, pattern="*EGE", attention_heads=2)
LR = 3e-3


class Seen:
    """What the layers of a model compute, caught by hooks."""

    def __init__(self, job: Job) -> None:
        self.states: dict[int, Tensor] = {}
        self.inputs: dict[int, tuple] = {}
        for layer in job.chunks[0].decoder.layers:
            layer.register_forward_hook(self._state(layer.layer_number))
            layer.self_attention.register_forward_hook(self._input(layer.layer_number), with_kwargs=True)

    def _state(self, number: int):
        return lambda module, args, output: self.states.__setitem__(number, output[0].detach()[:, 0])

    def _input(self, number: int):
        return lambda module, args, kwargs, output: self.inputs.__setitem__(number, (module, args[0].detach(), kwargs))


def explicit_sink(attention: nn.Module, hidden: Tensor, kwargs: dict) -> tuple[float, float, float]:
    """Mean attention on first tokens, mean gate and share of low gates, token by token and head by head."""
    documents = kwargs["packed_seq_params"]
    query, key, _, gate = attention.project(hidden, kwargs["rotary_pos_emb"])
    ids, places, length = documents.ids_RL.flatten(), documents.position_RL.flatten(), documents.ids_RL.shape[1]
    shares = []
    for token in range(len(ids)):
        if ids[token] < 0 or places[token] < EARLIEST:
            continue
        first = token - int(places[token])
        assert first >= token // length * length
        for head in range(query.shape[1]):
            keys = key[first : token + 1, head * key.shape[1] // query.shape[1]]
            shares.append((keys @ query[token, head] / query.shape[2] ** 0.5).softmax(0)[0].item())
    gates = gate[ids >= 0].sigmoid()
    return sum(shares) / len(shares), gates.mean().item(), (gates < 0.1).double().mean().item()


def explicit_delta(delta: nn.Module, hidden: Tensor, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Decays and write strengths of all tokens that are no padding."""
    mixed = delta.in_proj(hidden)[0].view(len(hidden), delta.key_heads, -1)
    b, a = mixed[..., -2 * delta.ratio :].split(delta.ratio, dim=-1)
    rate = delta.A_log.exp() * nn.functional.softplus(a.flatten(1) + delta.dt_bias)
    valid = kwargs["packed_seq_params"].ids_RL.flatten() >= 0
    return (-rate).exp()[valid], b.flatten(1).sigmoid()[valid]


def _wide_job() -> Job:
    job = build_tiny(tiny_config(replace(MODEL, dtype="float64")))
    with torch.no_grad():
        for chunk in fill(job):
            chunk.double()
            generator = torch.Generator().manual_seed(0)
            for parameter in chunk.parameters():  # gates off a half, decays and norms of all kinds
                parameter.mul_(20).add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return job


def _activations() -> None:
    process_groups.start(torch.device("cpu"))
    job = _wide_job()
    seen, gauge = Seen(job), Gauges(job, None)
    gauge.begin_step(True)
    (batch,) = micro_batches(job, [random_batch(8, seed=3)])
    job.chunks[0](batch)
    with torch.no_grad():
        job.chunks[0](batch)  # an evaluation, which must not count
    found = gauge._of_activations(*(x.cpu() for x in gauge._activations()))
    valid = batch.documents.ids_RL.flatten() >= 0
    largest = [seen.states[number][valid].abs().max().item() for number in range(1, 9)]
    sink, gate, low = explicit_sink(*seen.inputs[7])
    expected = {metrics.ACTIVATION_MAX: sum(largest) / 8, metrics.ACTIVATION_PEAK: max(largest)}
    expected |= {metrics.of_layer(metrics.ACTIVATION_MAX, str(n)): value for n, value in enumerate(largest, start=1)}
    expected |= {metrics.ATTENTION_SINK: sink, metrics.GATE_MEAN: gate, metrics.of_layer(metrics.GATE_LOW, "1"): low}
    for number, layer in enumerate((1, 3, 5), start=1):
        decay, beta = explicit_delta(*seen.inputs[layer])
        for names, x in (
            ((metrics.DECAY_MIN, metrics.DECAY_MEAN, metrics.DECAY_MAX), decay),
            ((metrics.BETA_MIN, metrics.BETA_MEAN, metrics.BETA_MAX), beta),
        ):
            for name, value in zip(names, (x.min(), x.mean(), x.max()), strict=True):
                expected[metrics.of_layer(name, str(number))] = value.item()
    assert 0.01 < low < 0.99 and 0.005 < sink < 0.95
    for name, value in expected.items():
        # Sums in float64 in another order; the strongest decays are exponentials of large numbers.
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def _optimizer() -> None:
    process_groups.start(torch.device("cpu"))
    job = build_tiny(tiny_config())
    engine = start_engine(job)
    gauge = Gauges(job, engine)
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
    return step_metrics(job, outputs) | gauge.values(1e-6, grad_norm) | {metrics.TOKENS_PER_SECOND: 1.0}


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


def test_what_layers_compute() -> None:
    run_ranks(_activations, 1)


def test_what_the_optimizer_does() -> None:
    run_ranks(_optimizer, 1)


def test_what_is_planted_shows_and_is_told_of() -> None:
    ((healthy, planted),) = run_ranks(_planted, 1)
    assert [alert for _ in range(4) for alert in Rules("log").look(healthy)] == []
    rules = Rules("log")
    assert {alert.rule for alert in rules.look(planted)} == {"sink", "massive activations", "norm gain"}
    told = {alert.rule: str(alert) for _ in range(2) for alert in rules.look(planted)}
    assert set(told) == {"sink", "massive activations", "norm gain", "dead experts"}
    assert told["sink"].startswith("attention_sink/1: ") and "model.attention_gate" in told["sink"]
    assert told["massive activations"].startswith(f"{metrics.MASSIVE_ACTIVATIONS}/3: ")
    assert told["norm gain"].startswith("norm_gain_max/pre_mlp_layernorm has grown to 12.0")
    assert planted[metrics.of_layer(metrics.EXPERT_LOAD, "1")][3] == 0.0
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
