"""Layouts of processes: every refusal names the sizes that clash and the nearest valid values."""

import itertools
import re
from dataclasses import replace

import pytest

from model.config import ModelConfig
from parallel.topology import (
    ParallelConfig,
    Topology,
    TopologyError,
    check_length,
    divisors,
    microbatches,
    nearest_divisors,
    resolve,
)

# 4 attention heads over 2 key/value heads, 2 linear key heads, 16 experts, one pipeline stage.
MODEL = ModelConfig()


def test_divisors():
    assert divisors(1) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(13) == [1, 13]


@pytest.mark.parametrize(
    ("number", "wanted", "text"),
    [(16, 3, "1 or 2 or 4"), (512, 48, "16 or 32 or 64"), (7, 3, "1 or 7"), (12, 100, "4 or 6 or 12"), (1, 5, "1")],
)
def test_nearest_divisors(number: int, wanted: int, text: str):
    assert nearest_divisors(number, wanted) == text


@pytest.mark.parametrize(
    ("world", "parallel", "expected"),
    [
        (1, ParallelConfig(), Topology(1, 1, 1, 1, 1, 1)),
        (2, ParallelConfig(), Topology(2, 1, 1, 1, 2, 2)),
        (2, ParallelConfig(expert=1), Topology(2, 1, 1, 1, 1, 2)),
        (8, ParallelConfig(tensor=2), Topology(8, 2, 1, 1, 8, 4)),
        (8, ParallelConfig(context=4), Topology(8, 1, 1, 4, 8, 2)),
        (8, ParallelConfig(tensor=2, expert=2, world=8), Topology(8, 2, 1, 1, 2, 4)),
        # The largest size that divides 16 experts and 12 or 32 processes.
        (12, ParallelConfig(), Topology(12, 1, 1, 1, 4, 12)),
        (32, ParallelConfig(), Topology(32, 1, 1, 1, 16, 32)),
        (7, ParallelConfig(), Topology(7, 1, 1, 1, 1, 7)),
        # Two processes share each expert, so the experts lie on half as many.
        (8, ParallelConfig(tensor=2, expert_tensor=2), Topology(8, 2, 1, 1, 4, 4, expert_tensor=2)),
    ],
)
def test_layout(world: int, parallel: ParallelConfig, expected: Topology):
    assert resolve(parallel, MODEL, world) == expected


def test_a_layout_says_what_it_is():
    topology = resolve(ParallelConfig(tensor=2, expert_tensor=2), MODEL, 8)
    assert str(topology) == ("8 = tensor 2 x pipeline 1 x context 1 x data 4; experts over 8, each in 2 parts")
    assert str(resolve(ParallelConfig(), MODEL, 2)) == "2 = tensor 1 x pipeline 1 x context 1 x data 2; experts over 2"


ONCE = " NVLink domains: a token's row crosses the network once for each"
FOR_EACH = ", unevenly over NVLink domains of {}: a token's row crosses the network for each process"


@pytest.mark.parametrize(
    ("world", "sizes", "domains", "text"),
    [
        (64, {"expert": 16}, 2, "16 in 2" + ONCE),
        (64, {"expert": 16, "nvlink_domain": 4}, 4, "16 in 4" + ONCE),
        (64, {"expert": 8, "expert_tensor": 2}, 2, "16, each in 2 parts in 2" + ONCE),
        (64, {"expert": 8}, 1, "8"),
        (64, {"expert": 16, "nvlink_domain": 1}, 1, "16"),
        (64, {"expert": 16, "nvlink_domain": 64}, 1, "16"),
        (48, {"expert": 8, "nvlink_domain": 6}, 1, "8" + FOR_EACH.format(6)),
        (48, {"expert": 4, "nvlink_domain": 6}, 1, "4" + FOR_EACH.format(6)),
        # A part of an expert would lie in another domain.
        (64, {"expert": 4, "expert_tensor": 4, "nvlink_domain": 2}, 1, "16, each in 4 parts" + FOR_EACH.format(2)),
    ],
)
def test_experts_spread_evenly_over_domains_exchange_in_two_legs(world: int, sizes: dict, domains: int, text: str):
    topology = resolve(ParallelConfig(**sizes), MODEL, world)
    assert topology.expert_domains == domains and str(topology).endswith(f"; experts over {text}")


def test_the_launcher_says_how_many_processes_a_machine_has(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert resolve(ParallelConfig(), MODEL, 16).expert_domains == 4
    assert resolve(ParallelConfig(nvlink_domain=8), MODEL, 16).expert_domains == 2
    assert resolve(ParallelConfig(), MODEL, 32).nvlink_domain == 8  # that is only planned
    with pytest.raises(TopologyError, match=r"parallel\.nvlink_domain=0 must be at least 1, or null"):
        resolve(ParallelConfig(nvlink_domain=0), MODEL, 16)


def test_layout_of_a_pipeline():
    model = ModelConfig(pattern="GE*E|", repeats=2)
    assert resolve(ParallelConfig(tensor=2, pipeline=2), model, 8) == Topology(8, 2, 2, 1, 4, 2)


@pytest.mark.parametrize(("repeats", "pipeline", "virtual"), [(4, 2, 2), (6, 2, 3), (4, 4, 1), (8, 4, 2)])
def test_more_stages_than_processes_are_interleaved(repeats: int, pipeline: int, virtual: int):
    topology = resolve(ParallelConfig(pipeline=pipeline), ModelConfig(pattern="GE*E|", repeats=repeats), pipeline)
    assert (topology.pipeline, topology.virtual) == (pipeline, virtual)


def test_interleaved_stages_need_rounds_of_microbatches():
    topology = resolve(ParallelConfig(pipeline=4), ModelConfig(pattern="GE*E|", repeats=8), 8)
    assert microbatches(topology, global_batch=32, micro_batch=2) == 8
    with pytest.raises(TopologyError) as refusal:
        microbatches(topology, global_batch=24, micro_batch=2)
    assert str(refusal.value) == (
        "batch.global=24 makes 6 microbatches, which 2 interleaved stages a process need to be a multiple of "
        "parallel.pipeline=4: choose batch.global=32, another batch.micro, or 4 stages in model.pattern"
    )
    assert microbatches(replace(topology, virtual=1), global_batch=24, micro_batch=2) == 6


@pytest.mark.parametrize(
    ("world", "parallel", "model", "message"),
    [
        (
            2,
            ParallelConfig(world=4),
            MODEL,
            "parallel.world=4 but 2 processes are started: start 4, on several machines if need be (sbatch -N, or "
            "NNODES; NPROC is of each), or set parallel.world=null",
        ),
        (1, ParallelConfig(context=0), MODEL, "parallel.context=0 must be at least 1"),
        (1, ParallelConfig(tensor=0), MODEL, "parallel.tensor=0 must be at least 1"),
        (1, ParallelConfig(pipeline=-1), MODEL, "parallel.pipeline=-1 must be at least 1"),
        (
            7,
            ParallelConfig(tensor=2),
            MODEL,
            "7 processes cannot be laid out as parallel.tensor=2 x parallel.pipeline=1 x parallel.context=1 = 2 each: "
            "start a multiple of 2 (NPROC=6)",
        ),
        (
            2,
            ParallelConfig(tensor=2, pipeline=2),
            MODEL,
            "2 processes cannot be laid out as parallel.tensor=2 x parallel.pipeline=2 x parallel.context=1 = 4 each: "
            "start a multiple of 4 (NPROC=4)",
        ),
        (
            3,
            ParallelConfig(tensor=3),
            MODEL,
            "parallel.tensor=3 does not divide model.attention_heads=4: choose 1 or 2 or 4",
        ),
        (
            4,
            ParallelConfig(tensor=4),
            MODEL,
            "parallel.tensor=4 does not divide model.key_value_heads=2: choose 1 or 2",
        ),
        (
            4,
            ParallelConfig(tensor=4),
            ModelConfig(key_value_heads=4),
            "parallel.tensor=4 does not divide model.linear_key_heads=2: choose 1 or 2",
        ),
        (
            2,
            ParallelConfig(pipeline=2),
            MODEL,
            "parallel.pipeline=2 but model.pattern='GEGEGE*E' x 1 has 1 stage: cut the layers with 1 '|' (or a "
            "multiple of 2 stages, which are interleaved), or choose parallel.pipeline=1",
        ),
        (
            1,
            ParallelConfig(),
            ModelConfig(pattern="GE|GE|*E"),
            "parallel.pipeline=1 but model.pattern='GE|GE|*E' x 1 has 3 stages: cut the layers with 0 '|', or choose "
            "parallel.pipeline=3",
        ),
        (
            3,
            ParallelConfig(expert=3),
            MODEL,
            "parallel.expert=3 does not divide model.experts=16: choose 1 or 2 or 4",
        ),
        (1, ParallelConfig(expert=0), MODEL, "parallel.expert=0 does not divide model.experts=16: choose 1 or 2 or 4"),
        (
            2,
            ParallelConfig(expert=4),
            MODEL,
            "parallel.expert=4 does not divide the processes of a pipeline stage=2: choose 1 or 2",
        ),
        (
            3,
            ParallelConfig(expert_tensor=3),
            MODEL,
            "parallel.expert_tensor=3 does not divide model.expert_size=64: choose 1 or 2 or 4",
        ),
        (
            2,
            ParallelConfig(expert=2, expert_tensor=2),
            MODEL,
            "parallel.expert=2 does not divide the groups of parallel.expert_tensor processes of a pipeline stage=1: "
            "choose 1",
        ),
        (
            2,
            ParallelConfig(expert="all"),
            MODEL,
            "parallel.expert='all' is not known: choose a number of processes or auto",
        ),
    ],
)
def test_refusals_name_sizes_and_nearest_valid_values(world, parallel, model, message):
    with pytest.raises(TopologyError) as refusal:
        resolve(parallel, model, world)
    assert str(refusal.value) == message


def test_microbatches():
    topology = Topology(8, 2, 1, 1, 2, 4)
    assert microbatches(topology, global_batch=16, micro_batch=4) == 1
    assert microbatches(topology, global_batch=48, micro_batch=2) == 6


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "message"),
    [
        (0, 1, "batch.global=0 and batch.micro=1 must be at least 1"),
        (4, 0, "batch.global=4 and batch.micro=0 must be at least 1"),
        (
            12,
            2,
            "batch.global=12 is not a multiple of batch.micro=2 x 4 data-parallel processes = 8: choose "
            "batch.global=16, a batch.micro that divides 3, or fewer processes (NPROC)",
        ),
        (
            2,
            1,
            "batch.global=2 is not a multiple of batch.micro=1 x 4 data-parallel processes = 4: choose batch.global=4, "
            "or fewer processes (NPROC)",
        ),
    ],
)
def test_batches_that_cannot_be_divided(global_batch: int, micro_batch: int, message: str):
    with pytest.raises(TopologyError) as refusal:
        microbatches(Topology(8, 2, 1, 1, 2, 4), global_batch, micro_batch)
    assert str(refusal.value) == message


def test_the_proposed_batches_are_valid():
    refused = 0
    for world, global_batch, micro_batch in itertools.product(range(1, 7), range(1, 25), range(1, 9)):
        topology = resolve(ParallelConfig(expert=1), MODEL, world)
        try:
            microbatches(topology, global_batch, micro_batch)
        except TopologyError as refusal:
            refused += 1
            proposed = {key: int(value) for key, value in re.findall(r"(global=|divides )(\d+)", str(refusal))}
            assert microbatches(topology, proposed["global="], micro_batch) >= 1
            for smaller in divisors(proposed["divides "]) if "divides " in proposed else []:
                assert microbatches(topology, global_batch, smaller) >= 1
    assert refused > 500


def test_a_sequence_that_cannot_be_cut_is_refused():
    topology, model = Topology(8, 2, 1, 4, 1, 1), ModelConfig()
    check_length(topology, 64, model)
    with pytest.raises(TopologyError, match=r"data.seq_length=60 cannot be cut .* = 8: choose data.seq_length=64"):
        check_length(topology, 60, model)
    with pytest.raises(TopologyError, match=r"leaves 2 tokens .* reaches 3 .* data.seq_length=16 or more"):
        check_length(topology, 8, model)
    check_length(topology, 16, model)


def test_heads_that_the_parts_of_a_sequence_cannot_share_are_refused():
    model = ModelConfig(attention_heads=12, key_value_heads=4, linear_key_heads=4)
    resolve(ParallelConfig(context=6, expert=1), model, 6)  # four key heads, three times each
    with pytest.raises(TopologyError, match=r"context=8 cannot share out .* choose 1 or 2 or 3 or 4 or 6 or 12"):
        resolve(ParallelConfig(context=8, expert=1), model, 8)


def test_parts_of_experts_that_no_kernel_takes_are_refused():
    model = ModelConfig(expert_size=24, dtype="bfloat16")
    with pytest.raises(TopologyError, match=r"parallel.expert_tensor=2 leaves 12 columns .* multiple of 8"):
        resolve(ParallelConfig(expert=1, expert_tensor=2), model, 2)
