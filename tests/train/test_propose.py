"""Proposed layouts: valid, within the memory, the fastest of all candidates, and written so that they can be run."""

import shlex
from dataclasses import replace

import pytest

from model.config import ModelConfig
from model.cost.cost import forward_flops, training_flops
from parallel.topology import microbatches, resolve
from train.__main__ import compose, run
from train.job.gpus import GPUS
from train.plan.propose import BANDWIDTHS, FIT, Machine, candidates, cuts, predict, proposal_lines, propose
from train.settings.run import BatchConfig, Config, DataConfig
from train.settings.tree import ConfigError

CONFIG = Config(
    model=ModelConfig(repeats=4, vocab_size=4096, hidden_size=512, dtype="bfloat16"),
    batch=BatchConfig(global_=32),
    data=DataConfig(seq_length=1024),
)
GPU = Machine("H200", 1e9, 4e14, 450e9, 50e9, per_node=4)
WORLD = 8


def forced(machine: Machine = GPU, world: int = WORLD, **parallel):
    """The prediction for one layout of the candidates, without pipeline stages of its own choice."""
    config = replace(CONFIG, batch=replace(CONFIG.batch, micro=2), parallel=replace(CONFIG.parallel, **parallel))
    return predict(config, resolve(config.parallel, config.model, world), machine)


@pytest.fixture(scope="module")
def proposals():
    return propose(CONFIG, WORLD, GPU)


def test_proposals_are_valid_and_the_fastest_that_fit(proposals) -> None:
    every = [predict(*candidate, GPU) for candidate in candidates(CONFIG, WORLD, GPU)]
    fitting = sorted(proposal.seconds for proposal in every if proposal.memory <= FIT * GPU.memory)
    assert 5 < len(fitting) < len(every)
    assert [proposal.seconds for proposal in proposals] == fitting[:5]
    for proposal in proposals:
        config = proposal.config
        assert resolve(config.parallel, config.model, WORLD) == proposal.topology
        assert microbatches(proposal.topology, config.batch.global_, config.batch.micro) >= 1
        assert config.model.layers == CONFIG.model.layers


def test_candidates_try_every_kind_of_parallelism() -> None:
    seen = {name: set() for name in ("tensor", "pipeline", "context", "expert", "virtual")}
    for _, topology in candidates(CONFIG, WORLD, GPU):
        assert topology.tensor * topology.context <= GPU.per_node
        for name, sizes in seen.items():
            sizes.add(getattr(topology, name))
    assert seen["tensor"] == {1, 2}  # two key heads
    assert seen["pipeline"] == {1, 2, 4}  # four repeats of the pattern
    assert seen["context"] == {1, 2}  # two key heads of Gated DeltaNet, whose states have no kernel
    assert seen["expert"] == {1, 2, 4, 8}
    assert seen["virtual"] == {1, 2}


def test_the_settings_of_a_proposal_can_be_typed(proposals) -> None:
    piped = next(predict(*candidate, GPU) for candidate in candidates(CONFIG, WORLD, GPU) if candidate[1].pipeline == 2)
    base = ["model.repeats=4", "batch.global=32", "data.seq_length=1024"]
    for proposal in [piped, *proposals]:
        typed = compose([*base, *shlex.split(proposal.settings())])
        assert replace(typed.parallel, world=WORLD) == proposal.config.parallel
        assert typed.batch == proposal.config.batch
        assert typed.model.stages == proposal.config.model.stages


def test_arithmetic_of_one_process() -> None:
    tokens = 32 * 1024
    whole = training_flops(CONFIG.model, CONFIG.mtp, 4096, 1024)
    again = sum(forward_flops(CONFIG.model, CONFIG.mtp, 4096, 1024).values())
    assert forced(world=1, expert=1).seconds == pytest.approx(tokens * whole / GPU.flops)
    full = forced(world=1, expert=1, recompute="full")
    assert full.seconds == pytest.approx(tokens * (whole + again) / GPU.flops)


def test_recomputation_trades_time_for_memory() -> None:
    none, selective, full = (forced(recompute=policy, expert=1) for policy in ("none", "selective", "full"))
    assert none.memory > selective.memory > full.memory
    assert none.arithmetic < selective.arithmetic < full.arithmetic


def test_transfers_take_the_farthest_link() -> None:
    near, far = forced(expert=4), forced(expert=8)
    network = replace(GPU, network_bandwidth=GPU.network_bandwidth * 2)
    assert far.transfers > 2 * near.transfers
    # Eight processes: every transfer of experts over all of them goes through the network.
    assert forced(network, expert=8).transfers == pytest.approx(far.transfers / 2)
    assert forced(replace(GPU, per_node=8), expert=8).transfers == pytest.approx(far.transfers / 9)


def test_pipelines_are_stretched_by_their_bubble() -> None:
    cut = cuts(CONFIG, 2)
    assert cuts(CONFIG, 3) is None
    assert cut.model.stages == (CONFIG.model.layers[:16], CONFIG.model.layers[16:])
    parallel = replace(CONFIG.parallel, pipeline=2, expert=1)
    times = []
    for micro in (1, 4):  # 8 and 2 microbatches for each of four data-parallel processes
        config = replace(cut, parallel=parallel, batch=replace(CONFIG.batch, micro=micro))
        times.append(predict(config, resolve(parallel, cut.model, WORLD), GPU).arithmetic)
    # One process of two waits for one microbatch in 8 + 1, or in 2 + 1.
    assert times[1] / times[0] == pytest.approx((3 / 2) / (9 / 8))


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 8 H200 fits into 90% of 0 GB \(the least takes"):
        propose(CONFIG, WORLD, replace(GPU, memory=1e6))
    with pytest.raises(ConfigError, match=r"batch\.global suits none"):
        propose(replace(CONFIG, model=replace(CONFIG.model, repeats=1), batch=BatchConfig(global_=7)), WORLD, GPU)
    odd = replace(CONFIG, model=replace(CONFIG.model, vocab_size=4095))
    assert {proposal.topology.tensor for proposal in propose(odd, WORLD, GPU, most=100)} == {1}


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
