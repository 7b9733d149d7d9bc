"""Any layout of processes computes what one process computes over the whole batch.

The batch is packed with documents of random lengths and padding, so that ranks hold unequal numbers of valid targets.
One process over all of it in one micro-batch is the reference. Two comparisons complete each other: gradients of the
first step in float64 are exact to rounding and show any wrong factor or missing sum, which AdamW's steps would hide;
twenty steps in float32 put the optimizer, the clipping and the reported losses to the test. The gauges of the step in
float64 are compared with those that are computed by hand on the reference (`gauges_by_hand`).

The balance loss of the global batch is exact in every layout (balance.mode=exact). Its online estimate depends on how
many micro-batches a pipeline holds, so layouts without one are held to one process with the same micro-batches.
"""

from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from model.batch import count_targets
from model.config import BalanceConfig, ModelConfig, MtpConfig
from model.layers import gauges as layer_gauges
from parallel import groups as process_groups
from parallel.engine_megatron import _finalize
from parallel.stages import run_schedule
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.parallel import gauges_by_hand
from tests.parallel.tiny import (
    INTERLEAVED,
    MODEL,
    PIPELINED,
    build_tiny,
    fill,
    part_of,
    random_batch,
    start_engine,
    tiny_config,
)
from train.job.build import Job
from train.loop import micro_batches, train_step
from train.observe import step_metrics
from train.routing import balances, begin_step, detailed_metrics, end_step, layer_loads
from train.settings.run import BatchConfig
from train.watch import metrics
from train.watch.catalog import Cadence, find
from train.watch.gauges import Gauges

pytestmark = pytest.mark.timeout(1500)  # the first test computes all results
ROWS = 8
STEPS = 20
BUCKET = 10_000  # numbers: gradients and weights travel in more than ten parts
LR = 3e-3  # takes the loss from 5.5 to 3.9 nats in twenty steps


@dataclass(frozen=True)
class Case:
    """A layout, and what is computed on it."""

    name: str
    world: int
    parallel: ParallelConfig
    model: ModelConfig = MODEL  # the same layers in all, cut for a pipeline
    micro_batches: int = 2
    mtp_steps: int = 2
    keys: str = "inference"  # which keys the MTP steps attend to


def layout(name: str, world: int, model: ModelConfig = MODEL, **sizes) -> Case:
    """A case of two micro-batches; experts are spread only where ``expert`` says so."""
    return Case(name, world, ParallelConfig(**({"expert": 1} | sizes)), model)


REFERENCE = Case("one process", 1, ParallelConfig(), micro_batches=1)
TWO_MICRO_BATCHES = Case("one process, two micro-batches", 1, ParallelConfig())
LAYOUTS = [
    layout("DP2", 2),
    layout("EP2", 2, expert=2),
    layout("TP2 with sequence parallelism", 2, tensor=2),
    layout("PP2", 2, PIPELINED, pipeline=2),
    layout("PP2 interleaved", 2, INTERLEAVED, pipeline=2),
    layout("CP2", 2, context=2),
    layout("CP2xEP2", 2, context=2, expert=2),
    layout("DP2, each expert in 2 parts", 2, expert_tensor=2),
    layout("TP2, each expert in 2 parts", 2, tensor=2, expert_tensor=2),
    layout("EP2, layers recomputed", 2, expert=2, recompute="full"),
    layout("TP2, parts recomputed", 2, tensor=2, recompute="selective"),
    layout("DP4", 4),
    layout("EP4", 4, expert=4),
    layout("CP4, by states", 4, context=4),
    layout("DP2xEP2", 4, expert=2),
    layout("DP2xPP2", 4, PIPELINED, pipeline=2),
    layout("TP2xEP2", 4, tensor=2, expert=2),
    layout("EP2xPP2", 4, PIPELINED, expert=2, pipeline=2),
    layout("TP2xCP2, by states", 4, tensor=2, context=2),
    layout("TP2xPP2", 4, PIPELINED, tensor=2, pipeline=2),
    replace(
        layout("EP2 in 2 domains, in 2 parts, layers recomputed", 4, tensor=2, expert=2, expert_tensor=2),
        parallel=ParallelConfig(tensor=2, expert=2, expert_tensor=2, nvlink_domain=2, recompute="full"),
    ),
    layout("DP2xPP2, each expert in 2 parts", 4, PIPELINED, pipeline=2, expert_tensor=2),
    layout("TP2xCP2xEP4 in 2 domains", 4, tensor=2, context=2, expert=4, nvlink_domain=2),
    layout("CP2xPP2xEP2", 4, PIPELINED, context=2, pipeline=2, expert=2),
    layout("DP2xCP2xEP2", 4, context=2, expert=2),
    layout("EP2xPP2 interleaved", 4, INTERLEAVED, expert=2, pipeline=2),
]
DEPTH_REFERENCE = replace(REFERENCE, name="one process, MTP by depth", keys="depth")
DEPTH = replace(layout("TP2xCP2, MTP by depth", 4, tensor=2, context=2), keys="depth")
MICRO_BATCHED = [
    Case("one process, 8 micro-batches", 1, ParallelConfig(), micro_batches=8),
    Case("PP2, 4 micro-batches", 2, ParallelConfig(expert=1, pipeline=2), PIPELINED, 4),
    Case("PP2 interleaved, 8 micro-batches", 2, ParallelConfig(expert=1, pipeline=2), INTERLEAVED, 8),
]
RECOMPUTED = ParallelConfig(expert=1, pipeline=2, recompute="full")
OTHER_DEPTHS = [
    Case("EP2, 1 MTP step", 2, ParallelConfig(expert=2), mtp_steps=1),
    Case("TP2, 3 MTP steps", 2, ParallelConfig(expert=1, tensor=2), mtp_steps=3),
    Case("PP2, layers recomputed, 3 MTP steps, 8 micro-batches", 2, RECOMPUTED, PIPELINED, 8, mtp_steps=3),
]
DEPTH_REFERENCES = {
    steps: Case(f"one process, {steps} MTP steps", 1, ParallelConfig(), micro_batches=1, mtp_steps=steps)
    for steps in (1, 3)
}
REFERENCES = (REFERENCE, TWO_MICRO_BATCHES, DEPTH_REFERENCE, *DEPTH_REFERENCES.values())
EXACT = BalanceConfig(weight=0.01, micro_weight=0.0, z_weight=0.001, mode="exact")


def _job(case: Case, balance: BalanceConfig = EXACT, **model) -> Job:
    mtp = MtpConfig(steps=case.mtp_steps, keys=case.keys)
    parallel = replace(case.parallel, bucket=BUCKET, bucket_share=BUCKET)
    job = build_tiny(tiny_config(replace(case.model, **model), parallel, balance=balance, mtp=mtp))
    micro = ROWS // job.groups.dp.size() // case.micro_batches
    return replace(job, config=replace(job.config, batch=BatchConfig(global_=ROWS, micro=micro)))


def _batches(job: Job, case: Case, seed: int) -> list:
    """This rank's micro-batches: the same rows make up micro-batch m of all ranks together in every layout."""
    data, whole = job.groups.dp, random_batch(ROWS, seed)
    parts = [part_of(whole, index, case.micro_batches) for index in range(case.micro_batches)]
    return [part_of(part, data.rank(), data.size()) for part in parts]


def _trajectory(case: Case, experts_per_token: int, mode: str) -> list[dict[str, float]]:
    """The metrics of twenty training steps."""
    job = _job(case, replace(EXACT, mode=mode), experts_per_token=experts_per_token)
    engine = start_engine(job)
    gauges, steps = Gauges(job, engine), []
    for step in range(STEPS):
        gauges.begin_step(sampled=step == 0)
        outputs, grad_norm = train_step(job, engine, _batches(job, case, step), LR)
        steps.append(step_metrics(job, outputs) | {metrics.GRAD_NORM: grad_norm})
        steps[-1] |= gauges.values(LR, grad_norm) if step == 0 else {}
    return steps


def _in_float64(case: Case, balance: BalanceConfig) -> tuple[Job, list[DistributedDataParallel]]:
    """A job whose parameters and gradients are float64, and its wrapped stages."""
    job = _job(case, balance, dtype="float64")
    chunks = [chunk.double() for chunk in fill(job)]
    config = chunks[0].config
    config.finalize_model_grads_func = _finalize
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=False)
    return job, [DistributedDataParallel(config, ddp_config, chunk, pg_collection=job.groups) for chunk in chunks]


@patch.multiple(layer_gauges, MASSIVE=1.0, TIMES_MEDIAN=5.0)  # some activations are massive then
def _gradients(case: Case, balance: BalanceConfig) -> dict:
    """A forward and backward pass in float64, of weights and activations that are not even: its gauges, those by hand
    where one process holds the model, and (name, shape of the whole, where this part starts, gradient) of every
    parameter of this rank.
    """
    job, ddp = _in_float64(case, balance)
    gauges_by_hand.vary(job)
    seen = gauges_by_hand.Seen(job) if case == REFERENCE else None
    gauges = Gauges(job, gauges_by_hand.OneStep(job))
    gauges.begin_step(sampled=True)
    ready = micro_batches(job, _batches(job, case, seed=0))
    begin_step(job, ready, recording=True)
    run_schedule(ddp, ready, job.microbatch_tokens, forward_only=False)
    end_step(job)
    of_step = gauges.values(gauges_by_hand.LR, gauges_by_hand.GRAD_NORM)
    of_routers = detailed_metrics(job, layer_loads(job))
    found: dict = {"gradients": [], "gauges": of_step | _of_trunk(of_routers)}
    if seen:
        valid = ready[0].documents.ids_RL.flatten() >= 0
        of_layers = gauges_by_hand.of_activations(job, seen, valid) | gauges_by_hand.of_routing(seen, valid)
        found["by hand"] = of_layers | gauges_by_hand.of_parameters(job)
    whole = gauges_by_hand.whole_places(job)
    for parameter in (parameter for chunk in job.chunks for parameter in chunk.parameters()):
        entry = whole[id(parameter)]
        part = entry.key, entry.global_shape, entry.global_offset, parameter.main_grad.clone()
        found["gradients"].append(part)
    return found


def _of_trunk(of_routers: dict) -> dict:
    """What does not depend on how a batch is cut into micro-batches."""
    micro = (metrics.BALANCE_LOSS_MICRO, metrics.MAX_VIOLATION_MICRO)
    return {name: x for name, x in of_routers.items() if name[-1].isdigit() and not name.startswith(micro)}


def _biases(case: Case) -> dict[int, torch.Tensor]:
    """Each router's bias, by its place in the model, after three steps in float64 that leave the weights alone."""
    job, ddp = _in_float64(case, replace(EXACT, mode="online", bias_rate=0.01))
    for seed in range(3):
        ready = micro_batches(job, _batches(job, case, seed))
        begin_step(job, ready, recording=False)
        run_schedule(ddp, ready, job.microbatch_tokens, forward_only=False)
        end_step(job)
    return {place: balance.bias for place, balance in balances(job).items()}


SPARSE, ONLINE, DENSE, GRADIENTS = "sparse", "sparse, online", "dense", "gradients"
BY_SEQUENCE, BIASES, DROPPING = "by sequence", "biases", "dropping"
COMPUTE = {
    SPARSE: lambda case: _trajectory(case, MODEL.experts_per_token, "exact"),
    ONLINE: lambda case: _trajectory(case, MODEL.experts_per_token, "online"),
    # With every expert active the counts are constant, so that a pass to count them would only take time.
    DENSE: lambda case: _trajectory(case, MODEL.experts, "online"),
    GRADIENTS: lambda case: _gradients(case, EXACT),
    BY_SEQUENCE: lambda case: _gradients(case, replace(EXACT, mode="online", scope="sequence")),
    BIASES: _biases,
    DROPPING: lambda case: _gradients(case, replace(EXACT, capacity=1.0)),
}
CHOOSING = [case for case in LAYOUTS if case.world == 2]
SEQUENCES = [case for case in LAYOUTS if case.name in ("DP2", "TP2xCP2", "CP2xEP2", "PP2 interleaved")]
BOUNDED = [case for case in LAYOUTS if case.name in ("DP2", "EP2", "CP2xEP2", "EP2, layers recomputed")]
BIASED = [case for case in CHOOSING if case.name.startswith(("DP2", "EP2", "TP2 with", "PP2 inter", "CP2 by heads"))]
BOTH = ((REFERENCE, GRADIENTS), (TWO_MICRO_BATCHES, DROPPING))
PLAN = (
    [(REFERENCE, kind) for kind in (SPARSE, DENSE, GRADIENTS, BY_SEQUENCE, BIASES)]
    + [(TWO_MICRO_BATCHES, kind) for kind in (ONLINE, DROPPING)]
    + [(case, kind) for case in LAYOUTS for kind in (DENSE, GRADIENTS)]
    + [(case, SPARSE if case.parallel.pipeline > 1 else ONLINE) for case in CHOOSING]
    + [(case, kind) for case in MICRO_BATCHED for kind in (DENSE, GRADIENTS)]
    + [(case, GRADIENTS) for case in (*OTHER_DEPTHS, *DEPTH_REFERENCES.values(), DEPTH_REFERENCE, DEPTH)]
    + [(case, BY_SEQUENCE) for case in SEQUENCES]
    + [(case, BIASES) for case in BIASED]
    + [(case, DROPPING) for case in BOUNDED]
)


def _compute(case: Case, kind: str) -> dict | list:
    process_groups.start(torch.device("cpu"))
    return COMPUTE[kind](case)


@pytest.fixture(scope="module")
def results(request) -> dict:
    """(case, kind of result) -> what each rank computed, for the cases of the tests that were asked for."""
    asked = [item.callspec.params["case"] for item in request.session.items if "case" in item.fixturenames]
    found = {}
    for case, kind in PLAN:
        if case in (*REFERENCES, *asked):
            # megatron-core's groups are never taken down, and each keeps threads: processes of its own for each result.
            found[case, kind] = run_ranks(_compute, case.world, case, kind, timeout=300)
    return found


def _assert_close(found: dict[str, float], expected: dict[str, float], tolerance: dict[str, float], where: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The default is for the losses: the next token's, each MTP step's and their sum with the router's.
        relative = GAUGE if find(name).cadence is Cadence.DETAIL else tolerance.get(name, tolerance[metrics.LOSS])
        assert found[name] == pytest.approx(value, rel=relative), f"{name} {where}"


def _assert_same_trajectory(
    results: dict, case: Case, kind: str, first: dict, later: dict, reference: Case = REFERENCE
) -> None:
    trajectory, *others = results[case, kind]
    assert all(other == trajectory for other in others), "ranks report different metrics"
    for step, (found, expected) in enumerate(zip(trajectory, results[reference, kind][0], strict=True)):
        found, expected = _comparable(found, step, kind), _comparable(expected, step, kind)
        _assert_close(found, expected, later if step else first, f"at step {step + 1} of {case.name}, {kind}")


def _comparable(values: dict[str, float], step: int, kind: str) -> dict[str, float]:
    """What must agree: where tokens choose experts, what tells of micro-batches differs, and so do loads later on."""
    if kind == DENSE:
        return values
    micro = (metrics.BALANCE_LOSS_MICRO, metrics.MAX_VIOLATION_MICRO)
    return {
        name: value
        for name, value in values.items()
        if (name in AFTER_A_CHOICE if step else not name.startswith(micro))
    }


AFTER_A_CHOICE = {
    metrics.LOSS,
    metrics.LM_LOSS,
    metrics.mtp_loss(1),
    metrics.mtp_loss(2),
    metrics.BALANCE_LOSS,
    metrics.Z_LOSS,
    metrics.GRAD_NORM,
}


def _assert_same_gradients(results: dict, case: Case, kind: str, reference: Case = REFERENCE) -> None:
    whole = {name: gradient for name, _, _, gradient in results[reference, kind][0]["gradients"]}
    covered = {name: torch.zeros(gradient.shape, dtype=torch.bool) for name, gradient in whole.items()}
    for rank in results[case, kind]:
        for name, shape, offset, gradient in rank["gradients"]:
            assert shape == whole[name].shape
            part = tuple(slice(start, start + size) for start, size in zip(offset, gradient.shape, strict=True))
            covered[name][part] = True
            error = (gradient - whole[name][part]).abs().max() / whole[name].abs().max()
            # Sums of a few thousand float64 terms in another order: 1e-14 was seen.
            assert error < 1e-12, f"gradient of {name} in {case.name}, {kind}"
    assert all(mask.all() for mask in covered.values()), "parts of parameters that no rank holds"


# Equal weights, so what differs is the order in which float32 sums are taken: 2e-7 was seen.
FIRST_STEP = {metrics.LOSS: 1e-6}
# Gauges are of single layers and tensors, whose float32 sums differ more: 3e-6 was seen. A wrong count or mask, or a
# part that is counted twice, shows as 1e-2.
GAUGE = 2e-5


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_gradients_of_the_first_step_in_float64(results, case: Case):
    _assert_same_gradients(results, case, GRADIENTS)


@pytest.mark.parametrize("case", [REFERENCE, *LAYOUTS], ids=lambda case: case.name)
def test_gauges_are_those_computed_by_hand_in_float64(results, case: Case):
    expected, ranks = results[REFERENCE, GRADIENTS][0]["by hand"], [rank["gauges"] for rank in results[case, GRADIENTS]]
    assert all(found == ranks[0] for found in ranks), "ranks report different gauges"
    assert ranks[0].keys() == expected.keys()
    for name, value in expected.items():
        # Sums of thousands of float64 terms in another order: 1e-14 was seen. Means of routers take one over the number
        # of tokens from a float32, which rounds it by half of 2^-23. A wrong count or mask shows as 1e-2.
        relative = 2**-24 if name.startswith(OVER_TOKENS) else 1e-11
        assert ranks[0][name] == pytest.approx(value, rel=relative, abs=1e-12), name


OVER_TOKENS = (metrics.BALANCE_LOSS, metrics.ROUTER_ENTROPY, metrics.TOP_K_MASS)


def test_the_gauges_by_hand_are_no_trivial_ones(results):
    found = results[REFERENCE, GRADIENTS][0]["by hand"]
    assert 0.01 < found[metrics.GATE_LOW] < 0.99 and 0.005 < found[metrics.ATTENTION_SINK] < 0.95
    assert found[metrics.MASSIVE_ACTIVATIONS] > 10
    assert found[metrics.DECAY_MIN] < 0.1 and found[metrics.DECAY_MAX] > 0.9


@pytest.mark.parametrize("case", [DEPTH], ids=lambda case: case.name)
def test_gradients_where_each_mtp_step_attends_to_its_own_keys(results, case: Case):
    _assert_same_gradients(results, case, GRADIENTS, DEPTH_REFERENCE)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_twenty_steps_with_every_expert_active(results, case: Case):
    """Without a choice of experts training is smooth, so rounding differences only grow as AdamW amplifies them.

    Losses drift by up to 4e-6 (eight float32 roundings) and gradient norms by 5e-5 over several seeds, between two
    orders of the same rows in one process just as between layouts. Tolerances are six times that.
    """
    _assert_same_trajectory(results, case, DENSE, FIRST_STEP, {metrics.LOSS: 2e-5, metrics.GRAD_NORM: 3e-4})


@pytest.mark.parametrize("case", CHOOSING, ids=lambda case: case.name)
def test_twenty_steps_with_a_choice_of_experts(results, case: Case):
    """With top-k routing a rounding difference can tip a token that stands between two experts.

    One such token (about one run in three has one, the same rows in another order too) moves the losses of the steps
    after it by up to 1.3e-4, the balance loss by 3e-4 and the gradient norm by 2e-3. A balance loss estimated from a
    quarter of the batch, for comparison, is off by 2e-2 and moves the losses by 1.6e-3.
    """
    later = {metrics.LOSS: 7e-4, metrics.BALANCE_LOSS: 2e-3, metrics.Z_LOSS: 2e-3, metrics.GRAD_NORM: 1e-2}
    if case.parallel.pipeline > 1:
        _assert_same_trajectory(results, case, SPARSE, FIRST_STEP, later)
    else:
        _assert_same_trajectory(results, case, ONLINE, FIRST_STEP, later, TWO_MICRO_BATCHES)


@pytest.mark.parametrize("case", MICRO_BATCHED, ids=lambda case: case.name)
def test_micro_batches_add_up_to_the_whole_batch(results, case: Case):
    _assert_same_gradients(results, case, GRADIENTS)
    _assert_same_trajectory(results, case, DENSE, FIRST_STEP, {metrics.LOSS: 2e-5, metrics.GRAD_NORM: 3e-4})


@pytest.mark.parametrize("case", OTHER_DEPTHS, ids=lambda case: case.name)
def test_gradients_with_other_numbers_of_mtp_steps(results, case: Case):
    _assert_same_gradients(results, case, GRADIENTS, DEPTH_REFERENCES[case.mtp_steps])


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.name)
def test_gradients_of_a_balance_loss_by_sequence(results, case: Case):
    """Sequences are the same in every layout, whole or cut into parts, so this loss is exact without a count ahead."""
    _assert_same_gradients(results, case, BY_SEQUENCE)
    found = [results[REFERENCE, kind][0]["gradients"] for kind in (GRADIENTS, BY_SEQUENCE)]
    of_whole, by_sequence = ({name: x for name, _, _, x in parts if "router." in name} for parts in found)
    effects = [float((by_sequence[name] - x).abs().max() / x.abs().max()) for name, x in of_whole.items()]
    assert max(effects) > 1e-3, "the balance loss plays no part here"


@pytest.mark.parametrize("case", BOUNDED, ids=lambda case: case.name)
def test_the_same_tokens_are_dropped_in_every_layout(results, case: Case):
    """With balance.capacity, which looks at a micro-batch of all processes."""
    _assert_same_gradients(results, case, DROPPING, TWO_MICRO_BATCHES)
    weight = "decoder.layers.1.mlp.experts.weight1"
    all_of_them, kept = ({name: x for name, _, _, x in results[of][0]["gradients"]}[weight] for of in BOTH)
    assert (all_of_them - kept).abs().max() > 0.1 * all_of_them.abs().max(), "hardly any token was dropped"


@pytest.mark.parametrize("case", BIASED, ids=lambda case: case.name)
def test_the_bias_is_the_same_in_every_layout(results, case: Case):
    """Bit for bit: it moves by the signs of sums of whole numbers."""
    expected = results[REFERENCE, BIASES][0]
    assert all(len(bias.unique()) > 2 for bias in expected.values()), "the biases have hardly moved"
    ranks = results[case, BIASES]
    assert set().union(*ranks) == expected.keys()
    for place, bias in (pair for rank in ranks for pair in rank.items()):
        assert torch.equal(bias, expected[place]), f"router {place}"


def test_the_reference_is_a_hard_case(results):
    """Weights move, gradients are clipped, experts are used unevenly, and ranks hold unequal numbers of targets."""
    steps = results[REFERENCE, SPARSE][0]
    assert steps[0][metrics.LM_LOSS] - steps[-1][metrics.LM_LOSS] > 1.0
    assert sum(step[metrics.GRAD_NORM] > 1.0 for step in steps) > STEPS // 2
    assert steps[0][metrics.BALANCE_LOSS] > 1.05
    halves = [part_of(random_batch(ROWS, seed=0), index, 2) for index in range(2)]
    tokens, *targets = torch.stack([count_targets(half.documents, 2) for half in halves], dim=1).tolist()
    assert all(max(counts) > 1.2 * min(counts) for counts in [tokens, *targets])
