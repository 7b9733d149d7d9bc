"""bfloat16 on the kernels over two GPUs, in every layout, against one GPU; no plain twin runs on the way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType

import pytest
import torch

from data.order.batches import Batch
from model.config import BalanceConfig, ModelConfig, MtpConfig
from model.layers import attention, chain, delta_rule, deltanet, dense, experts, loss, norm, router, rows
from parallel import groups as process_groups
from parallel.topology import ParallelConfig, resolve
from tests.dist import run_ranks
from tests.parallel.tiny import LENGTH, VOCAB, fill, leave_layout, part_of, random_batch, start_engine, tiny_config
from train.job.build import Job, build_chunks
from train.loop import train_step
from train.observe import step_metrics
from train.routing import balances
from train.settings.run import BatchConfig, DataConfig
from train.watch import metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ROWS, STEPS, LR = 8, 3, 1e-3
SMALL = ModelConfig(
    hidden_size=256,
    head_dim=64,
    linear_key_dim=128,
    linear_value_dim=128,
    experts=16,
    experts_per_token=4,
    expert_size=64,
    shared_expert_size=64,
    dtype="bfloat16",
)
PIPELINED = replace(SMALL, pattern="GEGE|GE*E")
WIDE = ModelConfig(  # the heads and widths of Qwen3-Next-80B-A3B
    pattern="GE*E",
    hidden_size=2048,
    attention_heads=16,
    key_value_heads=2,
    head_dim=256,
    linear_key_heads=16,
    linear_value_heads=32,
    linear_key_dim=128,
    linear_value_dim=128,
    experts=32,
    experts_per_token=4,
    expert_size=512,
    shared_expert_size=512,
    dtype="bfloat16",
)
LONG = 16384


@dataclass(frozen=True)
class Case:
    """A layout of GPUs, and what is trained on it.

    Attributes:
        favoured: the first so many experts get all tokens; 0: as the router has it.
    """

    world: int
    parallel: ParallelConfig
    model: ModelConfig = SMALL
    micro_batches: int = 2
    favoured: int = 0
    length: int = LENGTH
    rows: int = ROWS


def two(model: ModelConfig = SMALL, **sizes) -> Case:
    """A layout of two GPUs; experts are spread only where ``expert`` says so."""
    return Case(2, ParallelConfig(**({"expert": 1} | sizes)), model)


LAYOUTS = {
    "data": two(),
    "expert": two(expert=2),
    "expert tensor": two(expert_tensor=2),
    "tensor": two(tensor=2),
    "context": two(context=2),
    "pipeline": two(PIPELINED, pipeline=2),
    "tensor and expert": two(tensor=2, expert=2),
    "context and expert": two(context=2, expert=2),
}
UNEVEN = {
    "a rank without tokens": replace(LAYOUTS["expert"], favoured=8),
    "collapsed routing": replace(LAYOUTS["expert"], favoured=4),
}
ALONE, ALONE_IN_FOUR = Case(1, ParallelConfig()), Case(1, ParallelConfig(), micro_batches=4)
LONG_ALONE = Case(1, ParallelConfig(), WIDE, 1, length=LONG, rows=1)
LONG_HALVED = replace(LONG_ALONE, parallel=ParallelConfig(recompute="selective"))
LONG_CONTEXT = Case(2, ParallelConfig(context=2, expert=1), WIDE, 1, length=LONG, rows=1)
MODULES = (attention, chain, delta_rule, deltanet, dense, experts, loss, norm, router, rows)
NAMES = (metrics.LM_LOSS, metrics.mtp_loss(1), metrics.BALANCE_LOSS, metrics.GRAD_NORM)
# Where two runs of one GPU happen to agree to more digits than bfloat16 has, by the roundings of its 8 bits in a mean
# over hundreds of tokens.
LEAST = {metrics.LM_LOSS: 3e-4, metrics.mtp_loss(1): 3e-4, metrics.BALANCE_LOSS: 2e-3, metrics.GRAD_NORM: 5e-3}


def _refuse_plain_twins() -> None:
    for module in MODULES:
        for name, function in vars(module).items():
            if isinstance(function, FunctionType) and "kernel" in vars(function):
                function.__wrapped__ = _refusal(f"{module.__name__}.{name}")


def _refusal(name: str) -> Callable:
    def refuse(*_, **__):
        raise AssertionError(f"the plain {name} ran on a GPU")

    return refuse


def _batch(case: Case, seed: int) -> Batch:
    if case.length == LENGTH:
        return random_batch(case.rows, seed)
    tokens = torch.randint(VOCAB, (case.rows, case.length + 1), generator=torch.Generator().manual_seed(seed))
    documents = (torch.arange(case.length + 1) >= case.length // 3).int().expand(case.rows, -1)
    return Batch(tokens, documents)


def _train(case: Case) -> list[dict[str, float]]:
    """The metrics of a few training steps."""
    balance = BalanceConfig(weight=0.01, micro_weight=0.0, mode="exact" if case.micro_batches > 1 else "online")
    balance = replace(balance, bias_rate=1e-6 if case.favoured else 0.0)
    config = tiny_config(case.model, case.parallel, balance=balance, mtp=MtpConfig(steps=2))
    topology = resolve(config.parallel, config.model, case.world)
    groups, device = process_groups.lay_out(topology), process_groups.local_device()
    micro = case.rows // groups.dp.size() // case.micro_batches
    config = replace(config, batch=BatchConfig(global_=case.rows, micro=micro), data=DataConfig(seq_length=case.length))
    with torch.device(device):
        chunks = build_chunks(config, topology, groups, VOCAB)
    job = Job(config, topology, groups, device, None, chunks)
    fill(job)
    for own in balances(job).values() if case.favoured else ():
        own.bias[: case.favoured] = 10.0
    engine, found = start_engine(job), []
    for step in range(STEPS):
        whole = _batch(case, step)
        parts = [part_of(whole, index, case.micro_batches) for index in range(case.micro_batches)]
        batches = [part_of(part, groups.dp.rank(), groups.dp.size()) for part in parts]
        outputs, grad_norm = train_step(job, engine, batches, LR)
        found.append(step_metrics(job, outputs) | {metrics.GRAD_NORM: grad_norm})
    return found


def _train_all(cases: list[Case]) -> list[list[dict[str, float]]]:
    process_groups.start(process_groups.local_device())
    _refuse_plain_twins()
    results = []
    for case in cases:
        results.append(_train(case))
        leave_layout()
        torch.cuda.empty_cache()
    return results


def _results(cases: list[Case]) -> dict[Case, list[dict[str, float]]]:
    found = {}
    for world in (1, 2):
        own = [case for case in cases if case.world == world]
        found |= dict(zip(own, run_ranks(_train_all, world, own, timeout=800, gpus=True)[0], strict=True))
    return found


@pytest.fixture(scope="module")
def results() -> dict[Case, list[dict[str, float]]]:
    cases = [ALONE, ALONE_IN_FOUR, *LAYOUTS.values(), *UNEVEN.values(), LONG_ALONE, LONG_HALVED, LONG_CONTEXT]
    for case in UNEVEN.values():
        cases += [replace(ALONE, favoured=case.favoured), replace(ALONE_IN_FOUR, favoured=case.favoured)]
    return _results(cases)


def _differences(found: list[dict], expected: list[dict]) -> dict[str, float]:
    pairs = list(zip(found, expected, strict=True))
    return {name: max(abs(row[name] / wanted[name] - 1) for row, wanted in pairs) for name in NAMES}


def _assert_equal(found: list[dict], expected: list[dict], another: list[dict]) -> None:
    """``another``: the same on one GPU in another way, which differs by rounding alone."""
    different, rounding = _differences(found, expected), _differences(another, expected)
    print(different, rounding)
    for name in NAMES:
        assert different[name] < max(4 * rounding[name], LEAST[name]), (name, different, rounding)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_train_as_one(results, name: str) -> None:
    _assert_equal(results[LAYOUTS[name]], results[ALONE], results[ALONE_IN_FOUR])


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_experts_over_two_gpus_train_as_on_one(results, name: str) -> None:
    case = UNEVEN[name]
    alone, another = (replace(each, favoured=case.favoured) for each in (ALONE, ALONE_IN_FOUR))
    _assert_equal(results[case], results[alone], results[another])


def test_a_long_sequence_at_real_width_over_two_gpus(results) -> None:
    _assert_equal(results[LONG_CONTEXT], results[LONG_ALONE], results[LONG_HALVED])
