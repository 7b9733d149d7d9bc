"""The engine's optimizer step: what decays, how gradients are clipped, what stays in float32, what a NaN does."""

import math
from dataclasses import replace

import pytest
import torch

from model.batch import MicroBatch, count_targets
from model.config import BalanceConfig, MtpConfig
from parallel import groups as process_groups
from parallel.engine import AdamW
from parallel.engine_megatron import MegatronEngine
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, build_tiny, fill, leave_layout, parameters, part_of, random_batch, tiny_config
from train.job.build import Job
from train.job.optim import decays
from train.loop import micro_batches, train_step
from train.routing import begin_step, end_step

LR, DECAY = 0.1, 0.25
# Parameters that are float32 in a model of any type.
ISLANDS = ("router.weight", "A_log", "dt_bias", "norm.weight", "layernorm.weight")


def _start(adamw: AdamW, parallel: ParallelConfig = ParallelConfig(), **model) -> tuple[Job, MegatronEngine]:  # noqa: B008
    leave_layout()
    job = build_tiny(tiny_config(replace(MODEL, **model), parallel))
    job = replace(job, config=replace(job.config, batch=replace(job.config.batch, micro=8 // job.topology.data)))
    fill(job)
    with torch.no_grad():
        for name, parameter in parameters(job).items():
            if name.endswith("norm.weight"):  # drawn as zero, which no decay would change
                parameter.fill_(0.5)
    return job, MegatronEngine(job.chunks, job.groups, adamw, job.device, decays)


def _values(job: Job) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters(job).items()}


def _step(job: Job, engine: MegatronEngine, seed: int, lr: float) -> float:
    batch = part_of(random_batch(8, seed), job.groups.dp.rank(), job.groups.dp.size())
    _, grad_norm = train_step(job, engine, [batch], lr)
    engine.gather_weights()
    return grad_norm


def _decay() -> tuple[float, dict, dict]:
    """A step on nothing but padding: every gradient is zero, so only weight decay acts."""
    job, engine = _start(AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, clip=1.0))
    padding = random_batch(8, seed=0)
    padding.documents.fill_(-1)
    before = _values(job)
    counts = count_targets(padding.documents, job.config.mtp.steps)
    ready = [MicroBatch.build(padding.tokens, padding.documents, counts)]  # no run takes such a step
    begin_step(job, ready, recording=False)
    _, grad_norm = engine.train_step(ready, job.microbatch_tokens, LR)
    return grad_norm, before, _values(job)


def _clip(clip: float) -> tuple[float, float]:
    """Gradient norm, and the length of the step of an optimizer that moves by lr / eps * gradient at first."""
    job, engine = _start(AdamW(betas=(0.9, 0.95), eps=1e6, weight_decay=0.0, clip=clip))
    before = _values(job)
    grad_norm = _step(job, engine, seed=0, lr=1e6)
    moved = [(after - before[name]).double().square().sum() for name, after in _values(job).items()]
    return grad_norm, math.sqrt(sum(moved))


def _poison() -> dict:
    """One rank of two meets a NaN in the middle of training; both must refuse, unharmed, and can go on."""
    settings = AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, clip=1.0)
    job, engine = _start(settings, ParallelConfig(expert=2))
    _step(job, engine, seed=0, lr=1e-3)
    before = _values(job)
    handle = None
    if job.groups.dp.rank() == 1:
        weight = job.chunks[0].moe_layers()[0].router.weight
        handle = weight.register_hook(lambda gradient: gradient * math.nan)
    refusal = None
    try:
        _step(job, engine, seed=1, lr=1e-3)
    except FloatingPointError as error:
        refusal = str(error)
    unharmed = all(torch.equal(value, before[name]) for name, value in _values(job).items())
    if handle:
        handle.remove()
    return {"refusal": refusal, "unharmed": unharmed, "next": _step(job, engine, seed=2, lr=1e-3)}


def _islands() -> dict:
    """Types in a bfloat16 model, and how far two tiny steps carry each parameter."""
    job, engine = _start(AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip=1.0), dtype="bfloat16")
    before = _values(job)
    for seed in range(2):
        _step(job, engine, seed, lr=1e-6)
    after = _values(job)
    return {
        "types": {name: parameter.dtype for name, parameter in parameters(job).items()},
        "gradients": {parameter.main_grad.dtype for parameter in parameters(job).values()},
        "masters": {x.dtype for part in engine.optimizer.chained_optimizers for x in part.get_parameters()},
        "moved": {name: bool((after[name] != before[name]).any()) for name in after},
    }


def _sums(dtype: str) -> dict:
    """Every gradient of a micro-batch as autograd returns it, and as two micro-batches of it were summed by the engine.

    Without a balance loss, whose estimate changes from step to step. In bfloat16 without MTP: the head's gradient is
    then that of one product, which no sum over steps could hide the rounding of."""
    leave_layout()
    mtp, balance = MtpConfig(steps=2 if dtype == "float32" else 0), BalanceConfig(weight=0.0, micro_weight=0.0)
    job = build_tiny(tiny_config(replace(MODEL, dtype=dtype), balance=balance, mtp=mtp))
    (network,) = fill(job)
    ready = micro_batches(job, [random_batch(8, seed=0)] * 2)
    begin_step(job, ready, recording=False)
    network(ready[0]).total.backward()
    end_step(job)
    alone = {}
    for name, parameter in network.named_parameters():
        alone[name], parameter.grad = parameter.grad, None
    adamw = AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip=0.0)
    engine = MegatronEngine([network], job.groups, adamw, job.device, decays)
    engine.train_step(ready, job.microbatch_tokens, 0.0)
    summed = {name: parameter.main_grad.clone() for name, parameter in network.named_parameters()}
    fused = {name for name, parameter in network.named_parameters() if parameter.grad_added_to_main_grad}
    return {"alone": alone, "summed": summed, "fused": fused}


def _one_process() -> dict:
    process_groups.start(torch.device("cpu"))
    sums = {"float32": _sums("float32"), "bfloat16": _sums("bfloat16")}
    return {
        "decay": _decay(),
        "clip": {clip: _clip(clip) for clip in (0.0, 0.1, 1e3)},
        "islands": _islands(),
        "sums": sums,
    }


def _two_processes() -> dict:
    process_groups.start(torch.device("cpu"))
    return _poison()


@pytest.fixture(scope="module")
def single() -> dict:
    return run_ranks(_one_process, 1)[0]


def test_weight_decay(single):
    grad_norm, before, after = single["decay"]
    assert grad_norm == 0.0
    undecayed = {name for name in before if torch.equal(before[name], after[name])}
    assert undecayed == {name for name in before if name.endswith(("A_log", "dt_bias"))}
    assert len(undecayed) == 2 * MODEL.layers.count("G")
    for name in before.keys() - undecayed:
        # One float32 multiplication by 1 - lr * decay: its rounding is all that may differ.
        torch.testing.assert_close(after[name], before[name] * (1 - LR * DECAY), rtol=2e-7, atol=0.0, msg=name)


def test_clipping(single):
    norms = {clip: norm for clip, (norm, _) in single["clip"].items()}
    lengths = {clip: length for clip, (_, length) in single["clip"].items()}
    norm = norms[0.0]
    assert norm > 0.5
    assert norms == {0.0: norm, 0.1: norm, 1e3: norm}, "the norm reported is the one before clipping"
    # The step is read off parameters of size 1 that it moves by 1e-3 and more: float32 keeps four digits of it.
    assert lengths[0.0] == pytest.approx(norm, rel=1e-3)
    assert lengths[0.1] == pytest.approx(0.1, rel=1e-3)
    assert lengths[1e3] == lengths[0.0]


def test_float32_islands_in_a_bfloat16_model(single):
    found = single["islands"]
    wide = {name for name, dtype in found["types"].items() if dtype == torch.float32}
    assert wide == {name for name in found["types"] if name.endswith(ISLANDS)}
    assert {dtype for name, dtype in found["types"].items() if name not in wide} == {torch.bfloat16}
    assert all(any(name.endswith(ending) for name in wide) for ending in ISLANDS)
    assert found["gradients"] == {torch.float32}
    assert found["masters"] == {torch.float32}
    # Steps of 1e-6 are far below bfloat16's spacing at 0.5 (4e-3) and above float32's (6e-8): the optimizer works on
    # the islands themselves, not on copies that come back rounded.
    assert [name for name in wide if not found["moved"][name]] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_go_straight_into_float32_sums(single, dtype: str):
    found = single["sums"][dtype]
    direct = ("linear_fc1.weight", "linear_fc2.weight", "experts.weight1", "experts.weight2", "output_layer.weight")
    assert {name for name in found["summed"] if name.endswith(direct)} <= found["fused"]
    for name, total in found["summed"].items():
        assert total.dtype == torch.float32
        # One rounding to the model's type is what the sum is spared; float32's own are in the order of its terms.
        tolerance = 2.0**-7 if dtype == "bfloat16" else 1e-5
        error = (total / 2 - found["alone"][name].float()).norm() / total.norm()
        assert error < tolerance, name
        if dtype == "bfloat16" and name in found["fused"]:
            assert not torch.equal(total, total.bfloat16().float()), f"{name} was rounded on its way"


def test_gradients_that_are_not_finite():
    for found in run_ranks(_two_processes, 2):
        assert found["refusal"] == "the gradient norm is nan; the optimizer step was not taken"
        assert found["unharmed"]
        assert 0 < found["next"] < math.inf
