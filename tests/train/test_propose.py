"""Proposed layouts: valid, within the memory, the fastest of all candidates, and written so that they can be run."""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, pairwise

import pytest

from model.config import ModelConfig, MtpConfig, check_kernels
from model.cost.cost import forward_flops, training_flops
from parallel.topology import Topology, microbatches, resolve
from train.__main__ import compose, run
from train.job.footprint import stage_work
from train.job.gpus import GPUS
from train.plan.propose import FIT, cuts, layouts, predict, proposal_lines, propose
from train.plan.step_time import BANDWIDTHS, Link, Machine, machine_of, transfer_seconds
from train.settings.run import BatchConfig, Config, DataConfig
from train.settings.tree import ConfigError

CONFIG = Config(
    model=ModelConfig(repeats=4, vocab_size=4096, hidden_size=512, dtype="bfloat16"),
    batch=BatchConfig(global_=32),
    data=DataConfig(seq_length=1024),
)
GPU = Machine("H200", 1e9, 4e14, 450e9, 50e9, per_node=4, launch=0.0)
WORLD = 8


def forced(machine: Machine = GPU, world: int = WORLD, **parallel):
    """The prediction for one layout of the candidates, without pipeline stages of its own choice."""
    config = replace(CONFIG, batch=replace(CONFIG.batch, micro=2), parallel=replace(CONFIG.parallel, **parallel))
    return predict(config, resolve(config.parallel, config.model, world), machine)


def candidates() -> Iterator[tuple[Config, Topology]]:
    return chain.from_iterable(chain.from_iterable(layouts(CONFIG, WORLD, GPU)))


@pytest.fixture(scope="module")
def proposals():
    return propose(CONFIG, WORLD, GPU)


def test_proposals_are_valid_and_the_fastest_that_fit(proposals) -> None:
    every = [predict(*candidate, GPU) for candidate in candidates()]
    fastest, fitting = {}, [proposal for proposal in every if proposal.memory <= FIT * GPU.memory]
    for proposal in fitting:
        place = (proposal.topology, proposal.config.batch.micro)  # recomputation apart
        fastest[place] = min(fastest.get(place, 1e9), proposal.step.seconds)
    assert 5 < len(fastest) < len(fitting) < len(every)
    assert [proposal.step.seconds for proposal in proposals] == sorted(fastest.values())[:5]
    for proposal in proposals:
        config = proposal.config
        assert resolve(config.parallel, config.model, WORLD) == proposal.topology
        assert microbatches(proposal.topology, config.batch.global_, config.batch.micro) >= 1
        assert config.model.layers == CONFIG.model.layers


def test_candidates_try_every_kind_of_parallelism() -> None:
    seen = {name: set() for name in ("tensor", "pipeline", "context", "expert", "virtual")}
    for _, topology in candidates():
        assert topology.tensor * topology.context <= GPU.per_node
        for name, sizes in seen.items():
            sizes.add(getattr(topology, name))
    assert seen["tensor"] == {1, 2}  # two key heads
    assert seen["pipeline"] == {1, 2, 4, 8}
    assert seen["context"] == {1, 2}  # two key heads of Gated DeltaNet, whose states have no kernel
    assert seen["expert"] == {1, 2, 4, 8}
    assert seen["virtual"] == {1, 2, 4}


def test_the_settings_of_a_proposal_can_be_typed(proposals) -> None:
    piped = next(predict(*candidate, GPU) for candidate in candidates() if candidate[1].pipeline == 2)
    base = ["model.repeats=4", "batch.global=32", "data.seq_length=1024"]
    for proposal in [piped, *proposals]:
        typed = compose([*base, *shlex.split(proposal.settings())])
        assert replace(typed.parallel, world=WORLD) == proposal.config.parallel
        assert typed.batch == proposal.config.batch
        assert typed.model.stages == proposal.config.model.stages


def test_arithmetic_of_one_process() -> None:
    tokens = 32 * 1024
    whole = training_flops(CONFIG.model, CONFIG.mtp, 4096, 1024)
    forward = forward_flops(CONFIG.model, CONFIG.mtp, 4096, 1024)
    again = sum(forward.values()) - forward["head"]  # whose gradients are there after the forward pass
    assert forced(world=1, expert=1).step.seconds == pytest.approx(tokens * whole / GPU.flops)
    full = forced(world=1, expert=1, recompute="full")
    assert full.step.seconds == pytest.approx(tokens * (whole + again) / GPU.flops)


def test_recomputation_trades_time_for_memory() -> None:
    none, selective, full = (forced(recompute=policy, expert=1) for policy in ("none", "selective", "full"))
    assert none.memory > selective.memory > full.memory
    assert none.step.arithmetic < selective.step.arithmetic < full.step.arithmetic


def test_transfers_take_the_slowest_way_by_hand() -> None:
    node, network = GPU.node_bandwidth, GPU.network_bandwidth  # nodes of 4
    assert transfer_seconds(9e9, Link(4), GPU) == transfer_seconds(9e9, Link(2, 2), GPU) == 9e9 / node
    # Of 8 ranks 4 others of 7 are beyond the node; a ring of all has 4 network cards a node, one of every 4th rank one.
    assert transfer_seconds(9e9, Link(8, to_all=True), GPU) == pytest.approx(9e9 * 4 / 7 / network)
    assert transfer_seconds(9e9, Link(8), GPU) == pytest.approx(9e9 / (4 * network))
    assert transfer_seconds(9e9, Link(2, 4), GPU) == 9e9 / network


def test_what_arithmetic_hides_counts_no_time() -> None:
    fast = replace(GPU, flops=1e30)
    all_shown, hidden, none_left = (forced(machine, expert=4).step for machine in (fast, GPU, replace(GPU, flops=1e10)))
    assert all_shown.transfers.keys() == hidden.transfers.keys() and all_shown.arithmetic < 1e-9
    assert sum(hidden.transfers.values()) < sum(all_shown.transfers.values())
    # Slow arithmetic hides experts' rows whole; of each buffer the last eighth has nothing to hide behind.
    assert none_left.transfers["expert all-to-all"] == 0
    reduced = "expert gradient reduce-scatter"
    assert none_left.transfers[reduced] == pytest.approx(all_shown.transfers[reduced] / 8)


def test_no_micro_batch_is_quicker_than_its_launches() -> None:
    hasty = replace(GPU, launch=1.0)  # 32 layers and 2 MTP steps of 2; 16 micro-batches on one process
    step = forced(hasty, world=1, expert=1).step
    assert step.launching == pytest.approx(16 * 36 - step.arithmetic) and step.seconds == pytest.approx(16 * 36)
    again = forced(hasty, world=1, expert=1, recompute="full").step
    assert again.seconds == pytest.approx(16 * 36 * 4 / 3)
    assert forced(replace(GPU, launch=1e-9), world=1, expert=1).step.launching == 0


def test_pipelines_are_stretched_by_their_bubble() -> None:
    cut = cuts(CONFIG, 2)
    parallel, waits = replace(CONFIG.parallel, pipeline=2, expert=1), []
    for micro in (1, 4):  # 8 and 2 microbatches for each of four data-parallel processes
        config = replace(cut, parallel=parallel, batch=replace(CONFIG.batch, micro=micro))
        step = predict(config, resolve(parallel, cut.model, WORLD), GPU).step
        waits.append(step.waiting / (step.arithmetic + step.transfers["pipeline sends"]))
    # One process of two waits for one microbatch of 8, or of 2.
    assert waits == pytest.approx([1 / 8, 1 / 2])


def test_cuts_make_the_slowest_stage_as_quick_as_can_be() -> None:
    layers, sizes = CONFIG.model.layers, (CONFIG.mtp, 4096, 1024)
    for stages in (2, 3):
        found = cuts(CONFIG, stages).model
        assert found.layers == layers and len(found.stages) == stages
        assert len(found.stages[-1]) < len(layers) / stages  # head and multi-token prediction are there too
        borders = (pairwise((0, *inner, len(layers))) for inner in combinations(range(1, len(layers)), stages - 1))
        every = (replace(found, pattern="|".join(layers[a:b] for a, b in ends)) for ends in borders)
        assert max(stage_work(found, *sizes)) == min(max(stage_work(model, *sizes)) for model in every)
    assert cuts(CONFIG, len(layers) + 1) is None
    plain = replace(CONFIG, mtp=MtpConfig(steps=0), model=replace(CONFIG.model, vocab_size=1))
    assert (cuts(plain, 2).model.pattern, cuts(plain, 2).model.repeats) == ("GEGEGE*E" * 2 + "|", 2)


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 8 H200 fits into 90% of 0 GB \(the least takes"):
        propose(CONFIG, WORLD, replace(GPU, memory=1e6))
    with pytest.raises(ConfigError, match=r"batch\.global suits none"):
        propose(
            replace(CONFIG, model=replace(CONFIG.model, pattern="E", repeats=1), batch=BatchConfig(global_=7)),
            WORLD,
            GPU,
        )
    odd = replace(CONFIG, model=replace(CONFIG.model, vocab_size=4095))
    assert {proposal.topology.tensor for proposal in propose(odd, WORLD, GPU, most=100)} == {1}


def test_512_h100s_get_a_layout_of_kernels_with_its_traffic_in_the_time() -> None:
    config = compose(["-cn", "qwen3_next_80b_a3b"], planned=True)
    machine = machine_of("H100", 0.4)
    first, *_ = propose(config, 512, machine)
    check_kernels(first.config.model, first.topology)
    assert first.memory <= FIT * 80e9
    # Rows cross the network once for each of two nodes; over more of them they would take longer than arithmetic.
    assert first.topology.expert_domains <= 2 and first.topology.expert_owners <= 2 * machine.per_node
    assert first.step.seconds > first.step.arithmetic + first.step.waiting > 0
    assert first.step.transfers["expert all-to-all"] > 0
    # The recipe of 64 GPUs eight times: its experts go over eight nodes.
    spread = replace(config, parallel=replace(config.parallel, world=512))
    wide = predict(spread, resolve(spread.parallel, spread.model, 512), machine)
    assert wide.step.arithmetic < first.step.seconds < wide.step.seconds


def test_a_dense_model_gets_layouts_that_differ() -> None:
    dense = replace(CONFIG, model=replace(CONFIG.model, pattern="G-G-G-*-"))
    found = [(x.topology, x.config.batch.micro) for x in propose(dense, WORLD, replace(GPU, memory=1e11))]
    assert len({*found}) == 5 and {topology.expert for topology, _ in found} == {1}


def test_the_command(capsys) -> None:
    asked = ["estimate", "-cn", "qwen3_next_80b_a3b", "estimate.propose=3"]
    assert run([*asked, "parallel.world=64"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("64 H200")
    assert len(lines) == 3
    with pytest.raises(ConfigError, match="no layout of 8 H200 fits"):
        run([*asked, "parallel.world=8"])
    with pytest.raises(ConfigError, match=r"parallel\.world=None: estimate.propose needs the number of GPUs"):
        run([*asked, "parallel.world=null"])


def test_every_gpu_has_its_bandwidths() -> None:
    assert BANDWIDTHS.keys() == GPUS.keys()


def test_the_table_names_time_memory_and_settings(proposals) -> None:
    title, *lines = proposal_lines(proposals, GPU)
    assert title.startswith("8 H200")
    assert len(lines) == len(proposals)
    assert all("tokens/s/GPU" in line and "parallel.expert=" in line for line in lines)
