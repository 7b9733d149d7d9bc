"""Predicted bytes against what real processes allocate, and the traffic formulas on sizes done by hand."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from model.config import ModelConfig, MtpConfig
from model.cost.activations import stage_bytes, used_parts
from model.cost.cost import ParameterSize
from parallel import groups as process_groups
from parallel import half_state, layout_cost, optimizer_state
from parallel.engine_megatron import allocated_bytes, buffer_layout
from parallel.topology import ParallelConfig, Topology
from tests.dist import run_ranks
from tests.model.helpers import kept_bytes
from tests.parallel import fused_adam
from tests.parallel.tiny import (
    MODEL,
    PIPELINED,
    VOCAB,
    build_tiny,
    leave_layout,
    part_of,
    random_batch,
    start_engine,
    tiny_config,
)
from train.job.build import build_chunks
from train.job.footprint import held_weights
from train.job.optim import adamw
from train.loop import train_step
from train.plan.dry_run import sum_parts
from train.settings.optim import OptimConfig
from train.settings.run import BatchConfig

BFLOAT16 = replace(MODEL, dtype="bfloat16")
CASES = {
    "DP2 float32": (MODEL, ParallelConfig(expert=1)),
    "DP2": (BFLOAT16, ParallelConfig(expert=1)),
    "EP2": (BFLOAT16, ParallelConfig(expert=2)),
    "EP2, a bucket for each parameter": (BFLOAT16, ParallelConfig(expert=2, bucket=1, bucket_share=1)),
    "TP2": (BFLOAT16, ParallelConfig(tensor=2, expert=1)),
    "TP2xEP2": (BFLOAT16, ParallelConfig(tensor=2, expert=2)),
    "CP2": (BFLOAT16, ParallelConfig(context=2, expert=1)),
    "TP2, experts in 2 parts": (BFLOAT16, ParallelConfig(tensor=2, expert=1, expert_tensor=2)),
    "PP2": (replace(PIPELINED, dtype="bfloat16"), ParallelConfig(pipeline=2)),
    "plain": (
        replace(BFLOAT16, pattern="*-*E", attention_gate=False, shared_expert_size=0),
        ParallelConfig(tensor=2, expert=2),
    ),
}
HALVED = "DP2, AdamW's state in half the memory"
CASES[HALVED] = CASES["DP2"]
OPTIM = (OptimConfig(), OptimConfig(moments="bfloat16"))
PADDING = 64 * 2 * 3  # megatron-core starts each parameter at a multiple of 64 numbers, and pads the end


def storages(tensors) -> dict[int, int]:
    """Bytes of each storage behind some tensors, by address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def taken_back(engine) -> bool:
    """Whether the optimizer's state and the weights are the same bits again, once a checkpoint's were taken back."""

    def bits() -> list[torch.Tensor]:
        inner = [part.optimizer for part in engine.optimizer.chained_optimizers]
        held = [weight for adam in inner for group in adam.param_groups for weight in group["params"]]
        states = [x for adam in inner for state in adam.state.values() for x in state.values()]
        # FusedAdam makes a copy of float32 weights, too, and never reads it.
        return [x.clone() for x in (*held, *(x for x in states if x.dtype != torch.float32))]

    before = bits()
    described = engine.sharded_state_dict(is_loading=False)["optimizer"]
    saved = {name: [piece.data.clone() for piece in pieces] for name, pieces in described.items()}
    assert all(piece.dtype == torch.float32 for pieces in saved.values() for piece in pieces)
    half_state.allocate(engine.optimizer.chained_optimizers[0].optimizer)
    changed = bits()
    optimizer_state.take(engine.shards(), engine._sharded_weights(), saved)
    equal = [torch.equal(x, y) for x, y in zip(before, bits(), strict=True)]
    return all(equal) and not all(torch.equal(x, y) for x, y in zip(before, changed, strict=True))


def really_allocated(job) -> dict[str, int]:
    """Bytes behind the weights, their gradients and AdamW's state after a step."""
    engine = start_engine(job)
    own = part_of(random_batch(8, seed=0), job.groups.dp.rank(), job.groups.dp.size())
    train_step(job, engine, [own], 1e-3)
    parameters = [parameter for chunk in job.chunks for parameter in chunk.parameters()]
    weights = storages(parameters)
    optimizer = 0
    for part in engine.optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            optimizer += sum(x.nbytes for name, x in state.items() if name != "step")
            optimizer += parameter.nbytes * (parameter.untyped_storage().data_ptr() not in weights)
    gradients = storages(parameter.main_grad for parameter in parameters)
    assert not engine.adamw.halved or taken_back(engine)
    return {"weights": sum(weights.values()), "gradients": sum(gradients.values()), "optimizer": optimizer}


def measure() -> dict[str, dict]:
    """For each case: what this rank really allocates, what its layout says, and what the formula says."""
    process_groups.start(torch.device("cpu"))
    fused_adam.install()
    found = {}
    for name, (model, parallel) in CASES.items():
        config = tiny_config(model, parallel, optim=OPTIM[name == HALVED])
        job = build_tiny(config)
        job = replace(job, config=replace(config, batch=BatchConfig(global_=8, micro=8 // job.groups.dp.size())))
        weights = held_weights(config, job.topology, VOCAB, job.groups.pp.rank())
        element = 4 if model.dtype == "float32" else 2
        found[name] = {
            "real": really_allocated(job),
            "formula": layout_cost.state_bytes(weights, job.topology, element, halved=name == HALVED),
            "parameters": (
                sum(parameter.numel() for chunk in job.chunks for parameter in chunk.parameters()),
                sum(layout_cost.held(weight, job.topology) for weight in weights),
            ),
            "topology": job.topology,
            "tensors": sum(1 for chunk in job.chunks for _ in chunk.parameters()),
        }
        leave_layout()
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    for name, (model, parallel) in CASES.items():
        topology = found[name]["topology"]
        process_groups.start_fake(rank, topology.world)
        groups = process_groups.lay_out(topology)
        with torch.device("meta"):
            chunks = build_chunks(tiny_config(model, parallel), topology, groups, VOCAB)
        settings = adamw(OPTIM[name == HALVED])
        found[name]["layout"] = sum_parts(allocated_bytes(chunk, groups, parallel, settings) for chunk in chunks)
        process_groups.stop()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(measure, 2)


@pytest.mark.parametrize("name", CASES)
def test_the_layout_built_without_numbers_is_what_a_real_process_allocates(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        assert rank[name]["layout"] == rank[name]["real"]


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_the_allocation_but_for_padding(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        built, counted = rank[name]["parameters"]
        assert counted == built
        real, formula = rank[name]["real"], rank[name]["formula"]
        padding = 4 * PADDING * rank[name]["tensors"]
        for part in ("weights", "gradients"):
            assert formula[part] <= real[part] <= formula[part] + padding, part
    # Cuts of a buffer fall where they fall, so a rank's share is even only in sum.
    real = sum(rank[name]["real"]["optimizer"] for rank in ranks)
    assert real == pytest.approx(sum(rank[name]["formula"]["optimizer"] for rank in ranks), rel=1e-12)


def test_a_token_leaves_a_node_once_for_each_other_one_that_it_uses() -> None:
    """Ten of 512 experts over 64 processes in 8 nodes: 9.4 processes and 5.9 nodes a token, of which 8.2 and 5.2 are
    others."""
    model = ModelConfig(experts=512, experts_per_token=10)
    two = Topology(64, 1, 1, 1, 64, 64, nvlink_domain=8)
    one = replace(two, nvlink_domain=1)
    rows, leaving = (used_parts(model, parts) for parts in (64, 8))
    # Nearly as if each expert were drawn anew: 64 (1 - (63/64)^10), 8 (1 - (7/8)^10).
    assert (rows, leaving) == (
        pytest.approx(64 * (1 - (63 / 64) ** 10), 0.01),
        pytest.approx(8 * (1 - 0.875**10), 0.01),
    )
    whole, legs = (layout_cost.expert_traffic(rows, leaving, 4096.0, 0.0, topology, 0) for topology in (one, two))
    assert whole == {layout_cost.EXCHANGE: pytest.approx(4 * 4096 * rows * 63 / 64)}
    assert legs[layout_cost.EXCHANGE] == pytest.approx(4 * 4096 * leaving * 7 / 8)
    assert legs[layout_cost.SPREAD] == pytest.approx(4 * 4096 * rows * 7 / 8)
    beyond = 4 * 4096 * rows * 56 / 64  # of one leg: to the 56 processes of other nodes
    assert beyond / legs[layout_cost.EXCHANGE] == pytest.approx(1.58, abs=0.01)


class _Stage(torch.nn.Module):
    """A stage of 8 layers, as large as an 80B model's at 64 parts of its experts: 0.6 G numbers and 2.3 G of experts.

    Like there, embedding and head are half of what is not experts'.
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = [151_936 * 2048, *[35_000_000] * 8, 151_936 * 2048] + [36_000_000] * 64
        for number, size in enumerate(sizes):
            parameter = torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device="meta"))
            parameter.allreduce = number < 10  # megatron-core's mark of what is not experts'
            self.register_parameter(f"p{number}", parameter)


@pytest.mark.parametrize(("world", "owners"), [(8, 8), (64, 64), (512, 64), (2048, 64), (8192, 8)])
def test_each_buffer_has_buckets_of_its_own_groups_size_and_enough_of_them(world: int, owners: int) -> None:
    def group(size: int) -> SimpleNamespace:
        return SimpleNamespace(size=lambda: size)

    groups = SimpleNamespace(intra_dp_cp=group(world), intra_expt_dp=group(world // owners))
    parallel = ParallelConfig()
    for key, layout in buffer_layout(_Stage(), groups, parallel).layouts.items():
        buckets = [stop - start for start, stop in layout.bucket_indices]
        wanted = max(parallel.bucket, parallel.bucket_share * (world // owners if key.is_expert_parallel else world))
        assert len(buckets) >= layout_cost.FEWEST_BUCKETS
        largest = max(stop - start for start, stop, _ in layout.param_index_map.values())
        assert max(buckets) <= wanted + largest
        # As large as wanted, or no smaller than it takes to have so many: half as many would be too few.
        assert min(buckets[:-1]) >= wanted or len(buckets) < 2 * layout_cost.FEWEST_BUCKETS


def test_a_small_buffer_has_few_buckets_all_the_same() -> None:
    stage = torch.nn.Linear(3000, 3000, device="meta")
    one = SimpleNamespace(size=lambda: 4)
    (layout,) = buffer_layout(
        stage, SimpleNamespace(intra_dp_cp=one, intra_expt_dp=one), ParallelConfig()
    ).layouts.values()
    assert len(layout.bucket_indices) == 1


ACTIVATIONS = {
    "TP2": ParallelConfig(tensor=2, expert=1),
    "TP2xEP2": ParallelConfig(tensor=2, expert=2),
    "EP2": ParallelConfig(expert=2),
    "CP2": ParallelConfig(context=2, expert=1),
    "TP2, experts in 2 parts": ParallelConfig(tensor=2, expert=1, expert_tensor=2),
}
PATTERNS = {"GGGG": 0, "****": 0, "EEEE": 0, "----": 0, "GEGEGE*E": 1}  # with the steps of MTP
WIDE = replace(BFLOAT16, hidden_size=192, head_dim=32, linear_key_dim=48, linear_value_dim=64, expert_size=96)


def measure_activations() -> dict[tuple[str, str], float]:
    """What autograd keeps over what the formula says, for each layout and pattern."""
    process_groups.start(torch.device("cpu"))
    ratios = {}
    for (name, parallel), (pattern, steps) in product(ACTIVATIONS.items(), PATTERNS.items()):
        config = tiny_config(replace(WIDE, pattern=pattern), parallel, mtp=MtpConfig(steps=steps))
        job = build_tiny(config)
        for parameter in job.chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        rows, length, context = 2, 128, job.groups.cp
        kept = kept_bytes(job.chunks[0], rows, length, context.rank(), context.size())
        sizes = (length, rows * length // context.size(), parallel.tensor)
        parts = parallel.expert_tensor
        counted = stage_bytes(pattern, config.model, config.mtp, VOCAB, *sizes, frozenset(), True, parts)
        ratios[name, pattern] = kept / counted
        leave_layout()
    return ratios


def test_activations_in_parts() -> None:
    for rank in run_ranks(measure_activations, 2):
        assert len(rank) == len(ACTIVATIONS) * len(PATTERNS)
        for case, ratio in rank.items():
            # As in one process: what the formula leaves out at small widths, and uneven loads of the experts.
            assert ratio == pytest.approx(1, abs=0.06), case


TOPOLOGY = Topology(world=64, tensor=2, pipeline=4, context=2, expert=8, data=4)


def test_halves_of_a_float32_weight_lose_nothing() -> None:
    bits = torch.randint(
        -(2**31), 2**31, (10_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64
    ).int()
    main = torch.cat(
        [bits.view(torch.float32), torch.tensor([0.0, -0.0, 1.0, torch.inf]), torch.tensor(1.0).view(1) * 3]
    )
    main = torch.cat([main, (main.view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)])  # halfway cases
    main = main[main.isfinite() & main.bfloat16().isfinite()]
    weight, rest = half_state.split(main)
    assert torch.equal(half_state.join(weight, rest).view(torch.int32), main.view(torch.int32))
    halfway = rest == -(2**15)
    assert 1000 < int(halfway.sum()) < len(main) and torch.equal(weight[~halfway], main.bfloat16()[~halfway])


def test_state_bytes_by_hand() -> None:
    weights = [
        ParameterSize("a", 800, "tensor"),
        ParameterSize("b", 1600, "expert"),
        ParameterSize("c", 100, "whole", float32=True),
    ]
    # Held: 400, 200 and 100 numbers; replicas: 8, 2 (64 / 4 stages / 8 experts) and 8.
    assert layout_cost.state_bytes(weights, TOPOLOGY, 2) == {
        "weights": 400 * 2 + 200 * 2 + 100 * 4,
        "gradients": 700 * 4,
        "optimizer": 400 * 12 / 8 + 200 * 12 / 2 + 100 * 8 / 8,
    }
    assert layout_cost.gradient_traffic(weights, TOPOLOGY, 2) == {
        "gradient reduce-scatter": 1600 * 7 / 8 + 400 * 7 / 8,
        "parameter all-gather": 800 * 7 / 8 + 400 * 7 / 8,
        "expert gradient reduce-scatter": 800 / 2,
        "expert parameter all-gather": 400 / 2,
    }


def test_traffic_by_hand() -> None:
    def exchanged(topology: Topology, again: int = 0) -> list[float]:
        return list(layout_cost.expert_traffic(80, 30, 16, 200, topology, again).values())

    sent = 4 * 80 * 16 + 2 * 200 * 8
    assert exchanged(TOPOLOGY) == [sent * 7 / 8]
    assert exchanged(TOPOLOGY, again=1) == [1.5 * sent * 7 / 8]
    in_parts = replace(TOPOLOGY, expert=4, expert_tensor=2)  # the same 8 holders, each row to two of them
    assert exchanged(in_parts) == [2 * sent * 7 / 8]
    # 30 rows leave for one of two domains, where all goes on to the four holders.
    assert exchanged(replace(in_parts, nvlink_domain=4)) == [(4 * 30 * 16 + 2 * 200 * 8) / 2, 2 * sent * 3 / 4]
    assert layout_cost.tensor_traffic(1000, TOPOLOGY, again=0) == 5 * 500
    assert layout_cost.tensor_traffic(1000, TOPOLOGY, again=1) == 7 * 500
    assert [layout_cost.pipeline_traffic(1000, TOPOLOGY, rank) for rank in range(4)] == [500, 1000, 1000, 500]
    assert [layout_cost.pipeline_traffic(1000, TOPOLOGY, rank, ahead=1) for rank in (0, 1, 3)] == [1000, 1500, 500]
    interleaved = replace(TOPOLOGY, virtual=2)
    assert [layout_cost.pipeline_traffic(1000, interleaved, rank) for rank in range(4)] == [1500, 2000, 2000, 1500]
    # Both ends of a pipeline send the gradients of their half of the embedding, and its sum.
    assert [layout_cost.embedding_traffic(1000, TOPOLOGY, rank) for rank in range(4)] == [2000, 0, 0, 2000]
    alone = Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1)
    assert (
        sum(exchanged(alone))
        == layout_cost.pipeline_traffic(1000, alone, 0)
        == layout_cost.embedding_traffic(1000, alone, 0)
        == 0
    )


def test_micro_batches_in_flight() -> None:
    assert [layout_cost.in_flight(TOPOLOGY, rank, 16) for rank in range(4)] == [((n,),) for n in (4, 3, 2, 1)]
    assert layout_cost.in_flight(TOPOLOGY, 0, 2) == ((2,),)
    # Two stages a process: 2 x 3 + 4 forward passes of a stage before the first backward pass, and it runs one more.
    first, last = (layout_cost.in_flight(replace(TOPOLOGY, virtual=2), rank, 16) for rank in (0, 3))
    assert {sum(held) for held in first} == {11} and {sum(held) for held in last} == {5}
    assert first[0] == (7, 4)  # 4 of the first stage, 4 of the second, and 3 more of the first
    assert {held[1] for held in last} == {1, 0}  # behind the last stage nothing is waited for
    assert layout_cost.in_flight(replace(TOPOLOGY, virtual=2), 0, 4) == ((4, 4),)
    assert layout_cost.bubble(TOPOLOGY, 9) == 3 / 12
    assert layout_cost.bubble(replace(TOPOLOGY, virtual=3), 9) == 1 / 10
