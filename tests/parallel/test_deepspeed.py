"""The DeepSpeed engine trains as megatron-core's does, and a run goes on with either.

Both are given the same parameters and batches; what differs is the order in which float32 sums are taken, and with the
optimizer on the CPU the arithmetic of its fused AdamW. That is compiled the first time on a machine, for more than a
minute, so torch's stands for it where tests do not wait (`PlainAdamW`).
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values

from model.config import BalanceConfig, MtpConfig
from parallel import groups as process_groups
from parallel.engine import DeepSpeedConfig, Engine, TopologyError, check_engine, check_recompute
from parallel.topology import ParallelConfig, Topology
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, build_tiny, part_of, random_batch, start_engine, tiny_config
from train.job.build import Job
from train.job.checkpoint import load, save
from train.job.directory import COUNTS
from train.job.shelf import Shelf
from train.loop import micro_batches, train_step
from train.measure.checks import ADAM_TOLERANCE
from train.observe import step_metrics
from train.routing import begin_step
from train.settings.run import BatchConfig, RunConfig
from train.watch.catalog import Cadence, find
from train.watch.gauges import Gauges
from train.watch.metrics import GRAD_NORM

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed: ./launch.sh setup deepspeed"
)
STEPS, ROWS, LR = 20, 8, 1e-3
SPARSE = replace(MODEL, pattern="GE*E", hidden_size=32, expert_size=16, shared_expert_size=16)
DENSE = replace(SPARSE, pattern="G-*-", dense_size=32)
NARROW = replace(SPARSE, dtype="bfloat16")  # but for routers, norms and decays, which ZeRO must leave as they are
EXPERTS_APART, EXPERTS_TWICE = ParallelConfig(expert=2), ParallelConfig(expert=1)
MEGATRON = DeepSpeedConfig(zero=0)  # it is not asked


def zero(stage: int, offload: bool = False) -> DeepSpeedConfig:
    """A stage of ZeRO that splits everything it can, however small."""
    return DeepSpeedConfig(zero=stage, offload=offload, persistent=0)


def _job(model, parallel: ParallelConfig, settings: DeepSpeedConfig, runs: Path = Path("runs")) -> Job:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    config = tiny_config(
        model,
        parallel,
        mtp=MtpConfig(steps=2 if "E" in model.pattern else 0),
        balance=BalanceConfig(weight=0.01, z_weight=0.001, mode="exact"),
        engine="deepspeed" if settings.zero else "megatron",
        deepspeed=settings,
        run=RunConfig(name="run", dir=str(runs)),
    )
    return replace(build_tiny(config), config=replace(config, batch=BatchConfig(global_=ROWS, micro=2)))


def _train(job: Job, engine: Engine, first: int, last: int) -> list[dict[str, float]]:
    """The metrics of steps of two micro-batches, of the first one with its gauges."""
    engine.gather_weights()
    gauges, values = Gauges(job, engine), []
    for step in range(first, last + 1):
        gauges.begin_step(step == first)
        own = part_of(random_batch(ROWS, step), job.groups.dp.rank(), job.topology.data)
        outputs, grad_norm = train_step(job, engine, [part_of(own, index, 2) for index in range(2)], LR)
        values.append(step_metrics(job, outputs) | {GRAD_NORM: grad_norm})
        values[-1] |= gauges.values(LR, grad_norm) if step == first else {}
    return values


class PlainAdamW(torch.optim.AdamW):
    """torch's AdamW in the place of DeepSpeed's on the CPU, which counts its steps in whole numbers."""

    def step(self, closure=None):
        for state in self.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(state["step"]))
        return super().step(closure)


def _plain_adamw() -> None:
    """Spares this process the fused AdamW."""
    for module in ("parallel.engine_deepspeed", "deepspeed.ops.adam"):
        importlib.import_module(module).DeepSpeedCPUAdam = PlainAdamW


CASES = {
    "megatron, experts apart": (SPARSE, EXPERTS_APART, MEGATRON),
    "megatron, dense": (DENSE, EXPERTS_TWICE, MEGATRON),
    "ZeRO 1, experts apart": (SPARSE, EXPERTS_APART, zero(1)),
    "ZeRO 2, every expert twice": (SPARSE, EXPERTS_TWICE, zero(2)),
    "ZeRO 2 with offload, layers recomputed": (
        SPARSE,
        ParallelConfig(expert=1, recompute="full"),
        zero(2, offload=True),
    ),
    "ZeRO 3, dense": (DENSE, EXPERTS_TWICE, zero(3)),
}
# With the fused AdamW.
LONG_CASES = {
    "ZeRO 2 with offload, experts apart": (SPARSE, EXPERTS_APART, zero(2, offload=True)),
    "ZeRO 1, every expert twice": (SPARSE, EXPERTS_TWICE, zero(1)),
    "ZeRO 2, experts apart": (SPARSE, EXPERTS_APART, zero(2)),
    "ZeRO 1 with offload, every expert twice": (SPARSE, EXPERTS_TWICE, zero(1, offload=True)),
    "ZeRO 3 with offload, dense": (DENSE, EXPERTS_TWICE, zero(3, offload=True)),
    "ZeRO 1, tensor parallel": (SPARSE, ParallelConfig(tensor=2, expert=1), zero(1)),
    "ZeRO 2, tensor parallel, experts apart": (SPARSE, ParallelConfig(tensor=2, expert=2), zero(2)),
    "ZeRO 1, context parallel": (SPARSE, ParallelConfig(context=2, expert=1), zero(1)),
}


def _trajectories(cases: dict) -> dict[str, list[dict[str, float]]]:
    process_groups.start(torch.device("cpu"))
    found = {}
    for name, case in cases.items():
        job = _job(*case)
        found[name] = _train(job, start_engine(job), 1, STEPS)
    return found


CHAINS = {
    "sparse": (SPARSE, [(EXPERTS_APART, zero(2)), (EXPERTS_APART, MEGATRON), (EXPERTS_TWICE, zero(1))]),
    "bfloat16": (NARROW, [(EXPERTS_APART, zero(2)), (EXPERTS_APART, MEGATRON), (EXPERTS_TWICE, zero(1))]),
    "bfloat16 with offload": (NARROW, [(EXPERTS_APART, zero(2, offload=True)), (EXPERTS_APART, MEGATRON)]),
    "dense": (DENSE, [(EXPERTS_TWICE, zero(3)), (EXPERTS_TWICE, MEGATRON), (EXPERTS_TWICE, zero(3))]),
}
type Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]


def _pieces(engine: Engine) -> Pieces:
    """(name, shape of the whole, where it begins, numbers) of every float of model and optimizer on this process."""
    entries = nested_values(engine.sharded_state_dict(is_loading=False))
    floats = [x for x in entries if isinstance(x, ShardedTensor) and x.data.is_floating_point()]
    return [(x.key, x.global_shape, x.global_offset, x.data.detach().clone()) for x in floats]


def _chain(name: str, runs: Path) -> dict:
    """A step with each engine of a chain, through checkpoints, and the same steps with megatron-core's alone."""
    model, parts = CHAINS[name]
    importlib.import_module("parallel.engine_deepspeed").GROUP = 3000  # several groups of each kind
    job = _job(model, parts[0][0], MEGATRON, runs)
    found = {"straight": _train(job, start_engine(job), 1, len(parts)), "values": [], "saved": [], "loaded": []}
    for step, (parallel, settings) in enumerate(parts, start=1):
        job = _job(model, parallel, settings, runs)
        engine = start_engine(job)
        if step > 1:
            load(engine, Shelf(job.config.run.checkpoints).path(step - 1))
            found["loaded"].append(_pieces(engine))
        found["values"] += _train(job, engine, step, step)
        save(job, engine, step, {})
        found["saved"].append(_pieces(engine))
    return found


SKIPPED = [(SPARSE, zero(2)), (DENSE, zero(3)), (NARROW, zero(2, offload=True)), (NARROW, zero(1))]


def _skipped(model, settings: DeepSpeedConfig) -> tuple[float, bool, float]:
    """The gradient norm of a step that is not accepted, whether it left the weights alone, and the next step's."""
    job = _job(model, EXPERTS_TWICE, settings)
    engine = start_engine(job)
    engine.gather_weights()
    before = [x.detach().clone() for x in job.chunks[0].parameters()]
    own = part_of(random_batch(ROWS, 1), job.groups.dp.rank(), job.topology.data)
    ready = micro_batches(job, [own])
    begin_step(job, ready, recording=False)
    _, grad_norm = engine.train_step(ready, job.microbatch_tokens, LR, lambda outputs, grad_norm: False)
    engine.gather_weights()
    unharmed = all(map(torch.equal, before, job.chunks[0].parameters())) and not engine.damaged_replicas()
    return grad_norm, unharmed, _train(job, engine, 1, 1)[0][GRAD_NORM]


def _refusal(model, settings: DeepSpeedConfig) -> str:
    """What a gradient that is no number on one rank leads to on each; the weights are as before."""
    job = _job(model, EXPERTS_APART, settings)
    engine = start_engine(job)
    before = [x.detach().clone() for x in job.chunks[0].parameters()]
    if job.rank == 1:
        job.chunks[0].moe_layers()[0].router.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError) as refusal:
        _train(job, engine, 1, 1)
    assert all(map(torch.equal, before, job.chunks[0].parameters()))
    return str(refusal.value)


def _left_on_the_device() -> int:
    """Numbers of gradients that ZeRO 2 with offload holds outside its optimizer's memory once they are computed."""
    job = _job(NARROW, EXPERTS_APART, zero(2, offload=True))
    engine = start_engine(job)
    own = part_of(random_batch(ROWS, 1), job.groups.dp.rank(), job.topology.data)
    ready = micro_batches(job, [part_of(own, index, 2) for index in range(2)])
    begin_step(job, ready, recording=False)
    engine.compute_gradients(ready, job.microbatch_tokens)
    assert all(main.grad.any() for main in engine.mains)
    own = [vars(x).get("grad_accum") if x.grad is None else x.grad for x in job.chunks[0].parameters()]
    flat = [x for group in engine._zero.averaged_gradients.values() for x in group or ()]
    return sum(x.numel() for x in (*own, *flat) if x is not None)


def _all(runs: Path) -> dict:
    _plain_adamw()
    for name in CHAINS:
        (runs / name).mkdir(exist_ok=True)
    return (
        _trajectories(CASES)
        | {name: _chain(name, runs / name) for name in CHAINS}
        | {
            "skipped": [_skipped(model, settings) for model, settings in SKIPPED],
            "refusals": [_refusal(SPARSE, zero(1)), _refusal(NARROW, zero(2, offload=True))],
            "left": _left_on_the_device(),
        }
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks(_all, 2, tmp_path_factory.mktemp("runs"), timeout=500)


@pytest.fixture(scope="module")
def long_ranks() -> list[dict]:
    references = {name: CASES[name] for name in CASES if name.startswith("megatron")}
    return run_ranks(_trajectories, 2, references | LONG_CASES, timeout=500)


def _assert_equal_runs(found: list[dict[str, float]], expected: list[dict[str, float]], narrow: bool = False) -> None:
    """As between layouts (`test_parity`): rounding at first, later a token that is tipped to another expert. ZeRO adds
    up gradients in bfloat16 where the model is ``narrow``: 2^-9 each, which the norm of all averages out."""
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        for key in LOSSES & one.keys():
            tolerance = (
                2e-3 if narrow else 1e-5 if not step else 1e-2 if key == GRAD_NORM else 2e-3 if key in ROUTERS else 7e-4
            )
            assert one[key] == pytest.approx(other[key], rel=tolerance), f"{key} at step {step + 1}"


# As between layouts (`test_parity`).
GAUGE = 2e-5
ROUTERS = {"balance_loss", "z_loss"}
LOSSES = {"loss", "lm_loss", "mtp_loss/1", "mtp_loss/2", GRAD_NORM, *ROUTERS}


def _compare(name: str, case: tuple, ranks: list[dict]) -> None:
    reference = "megatron, dense" if case[0] is DENSE else "megatron, experts apart"
    first, second = (rank[name] for rank in ranks)
    assert first == second, "ranks report different metrics"
    assert first[0]["lm_loss"] - first[-1]["lm_loss"] > 0.3, "it hardly trains"
    _assert_equal_runs(first, ranks[0][reference])
    found, expected = (
        {key: x for key, x in one[0].items() if find(key).cadence is Cadence.DETAIL}
        for one in (first, ranks[0][reference])
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=GAUGE), key


@needs_deepspeed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("megatron")])
def test_twenty_steps_are_those_of_the_megatron_engine(ranks, name: str):
    _compare(name, CASES[name], ranks)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LONG_CASES)
def test_twenty_steps_of_more_layouts_are_those_of_the_megatron_engine(long_ranks, name: str):
    _compare(name, LONG_CASES[name], long_ranks)


def _whole(pieces: list[Pieces]) -> dict[str, torch.Tensor]:
    """The tensors that the pieces of all ranks make up; every number must be there."""
    found: dict[str, torch.Tensor] = {}
    for key, shape, first, numbers in (piece for rank in pieces for piece in rank):
        tensor = found.setdefault(key, torch.full(shape, torch.nan))
        numbers = numbers.view((1,) * (len(shape) - numbers.ndim) + numbers.shape)
        tensor[tuple(slice(f, f + n) for f, n in zip(first, numbers.shape, strict=True))] = numbers
    assert not [key for key, tensor in found.items() if tensor.isnan().any()]
    return found


@needs_deepspeed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_with_the_other_engine(ranks, name: str):
    for part in range(len(CHAINS[name][1]) - 1):
        before, after = (_whole([rank[name][key][part] for rank in ranks]) for key in ("saved", "loaded"))
        assert before.keys() == after.keys()
        weights = {key for key in before if not key.startswith("optimizer.") and not key.endswith(COUNTS)}
        assert {f"optimizer.{moment}.{key}" for moment in ("exp_avg", "exp_avg_sq") for key in weights} < before.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        assert sum(before[f"optimizer.exp_avg_sq.{key}"].any() for key in weights) == len(weights)
    found = ranks[0][name]
    _assert_equal_runs(found["values"], found["straight"], name.startswith("bfloat16"))


@needs_deepspeed
@pytest.mark.timeout(600)
def test_gradients_that_are_not_finite_are_refused_on_every_rank(ranks):
    found = {refusal for rank in ranks for refusal in rank["refusals"]}
    assert found == {"the gradient norm is not finite; the optimizer step was not taken"}


@needs_deepspeed
@pytest.mark.timeout(600)
def test_with_offload_gradients_do_not_stay_on_the_device(ranks):
    assert [rank["left"] for rank in ranks] == [0, 0]


@needs_deepspeed
@pytest.mark.timeout(600)
def test_a_step_that_is_not_accepted_changes_nothing(ranks):
    for rank in ranks:
        for (model, _), (grad_norm, unharmed, following) in zip(SKIPPED, rank["skipped"], strict=True):
            assert unharmed
            # The same rows in one micro-batch and in two; in bfloat16 rounded as `_assert_equal_runs` says.
            assert following == pytest.approx(grad_norm, rel=2e-3 if model is NARROW else 1e-5)


@needs_deepspeed
@pytest.mark.slow
def test_the_fused_adamw_is_adamw():
    from parallel.engine_deepspeed import cpu_adam_error

    assert cpu_adam_error() < ADAM_TOLERANCE


def _topology(**sizes: int) -> Topology:
    return Topology(**({"world": 2, "tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "data": 2} | sizes))


@pytest.mark.parametrize(
    ("check", "refusal"),
    [
        (lambda: check_engine("fsdp", zero(1), _topology(), 0, "float32"), "engine='fsdp' is not known: choose"),
        (lambda: check_engine("deepspeed", zero(4), _topology(), 0, "float32"), "deepspeed.zero=4 is not known"),
        (
            lambda: check_engine("deepspeed", zero(3), _topology(), 4, "float32"),
            "zero=3 does not split experts",
        ),
        (lambda: check_engine("deepspeed", zero(1), _topology(pipeline=2), 0, "float32"), "parallel.pipeline=2 is not"),
        (lambda: check_engine("deepspeed", zero(1), _topology(expert_tensor=2), 0, "float32"), "expert_tensor=2 is"),
        (lambda: check_engine("deepspeed", zero(3), _topology(), 0, "bfloat16"), "model.dtype=bfloat16 is not for"),
        (
            lambda: check_recompute("deepspeed", zero(2), ParallelConfig(recompute="selective"), 2, True),
            "recompute=selective with",
        ),
        (
            lambda: check_recompute("deepspeed", zero(2), ParallelConfig(recompute="full"), 2, False),
            "recompute=full with mtp",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_name(check: Callable[[], None], refusal: str):
    with pytest.raises(TopologyError, match=refusal):
        check()


def test_zero_2_takes_what_is_computed_again_once_in_a_backward_pass():
    for recompute, steps, chained in (("selective", 1, True), ("full", 2, True), ("none", 2, False)):
        check_recompute("deepspeed", zero(2), ParallelConfig(recompute=recompute), steps, chained)
    check_recompute(
        "deepspeed", zero(2), ParallelConfig(recompute="selective", recompute_modules=("attention",)), 2, False
    )
    check_recompute("deepspeed", zero(1), ParallelConfig(recompute="full"), 2, False)
