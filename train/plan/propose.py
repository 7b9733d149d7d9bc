"""Layouts for a number of GPUs: what fits into their memory, ranked by the predicted time of a step.

How the time is foretold, `train.plan.step_time` says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise, product
from typing import Any

from model.config import ModelConfig, ModelError, MtpConfig, check_kernels, check_model
from model.cost.cost import layer_flops
from parallel.topology import RECOMPUTE_POLICIES, Topology, TopologyError, check_length, divisors, microbatches, resolve
from train.job.footprint import footprint, planned_vocab, stage_work
from train.plan.estimate import Budget, longest_phase
from train.plan.step_time import Machine, StepTime, machine_of, step_time
from train.settings.run import Config, run_tokens
from train.settings.tree import ConfigError

GB = 1e9
FIT = 0.9  # share of the memory that a layout may take; the rest is for the allocator, libraries and transfers
MICROS = (1, 2, 4, 8, 16)
EVEN = 1.01  # times the slowest stage of the best cut, at which whole patterns are preferred to it


@dataclass(frozen=True)
class Proposal:
    """A layout as the settings that make it, its fullest process in bytes, and the time of a step."""

    config: Config
    topology: Topology
    memory: float
    step: StepTime

    def settings(self) -> str:
        """The settings, as they are written on a command line."""
        parallel, model = self.config.parallel, self.config.model
        named = {
            "parallel.tensor": parallel.tensor,
            "parallel.pipeline": parallel.pipeline,
            "parallel.context": parallel.context,
            "parallel.expert": parallel.expert,
            "parallel.recompute": parallel.recompute,
            "batch.micro": self.config.batch.micro,
        }
        if parallel.pipeline > 1:
            named |= {"model.pattern": f"'{model.pattern}'", "model.repeats": model.repeats}
        return " ".join(f"{key}={value}" for key, value in named.items())


def propose(config: Config, world: int, machine: Machine, most: int = 5) -> list[Proposal]:
    """The fastest layouts of a model on ``world`` GPUs, fastest first; the settings of ``parallel`` are free.

    Each comes with as little recomputation as fits.

    Raises:
        ConfigError: none fits into the memory.
    """
    best: list[Proposal] = []
    least, room = float("inf"), FIT * machine.memory
    for by_micro in layouts(config, world, machine):
        smallest = predict(*by_micro[0][-1], machine).memory
        least = min(least, smallest)
        for policies in by_micro if smallest <= room else ():
            for policy in policies:  # each takes longer than the one before, and less memory
                each = predict(*policy, machine)
                if len(best) == most and _seconds(each) >= _seconds(best[-1]):
                    break
                if each.memory <= room:
                    best = sorted([*best, each], key=_seconds)[:most]
                    break
    if not best:
        needs = f"the least takes {least / GB:.0f} GB each" if least < float("inf") else "batch.global suits none"
        raise ConfigError(
            f"no layout of {world} {machine.name} fits into {FIT:.0%} of {machine.memory / GB:.0f} GB ({needs}): take "
            f"more GPUs, or a smaller data.seq_length or batch.global"
        )
    return best


def _seconds(proposal: Proposal) -> float:
    return proposal.step.seconds


def proposals(config: Config, budget: Budget) -> list[str]:
    """Lines of the layouts proposed for ``parallel.world`` GPUs of the budget's kind.

    Raises:
        ConfigError: no number of GPUs, or none that suffices.
    """
    check_model(config.model, config.mtp)
    world = config.parallel.world
    if world is None or world < 1:
        raise ConfigError(f"parallel.world={world}: estimate.propose needs the number of GPUs, as in parallel.world=64")
    machine = machine_of(budget.gpu, budget.mfu, config.parallel.nvlink_domain)
    config = longest_phase(config, budget.tokens or run_tokens(config))
    return proposal_lines(propose(config, world, machine, budget.propose), machine)


def cuts(config: Config, stages: int) -> Config | None:
    """The same layers in so many stages that the slowest is as quick as can be, or None where layers are too few.

    Head and multi-token prediction count with the last stage, so that it gets fewer layers. Whole patterns are cut
    where that is as good.
    """
    model = config.model
    pattern = model.pattern.replace("|", "")
    if stages > len(model.layers):
        return None
    if stages == 1:
        return replace(config, model=replace(model, pattern=pattern))
    sizes = (config.mtp, model.vocab_size or config.data.vocab_size, config.data.seq_length)
    cut = replace(model, pattern="|".join(best_cut(model, *sizes, stages)), repeats=1)
    if model.repeats % stages == 0:
        even = replace(model, pattern=pattern * (model.repeats // stages) + "|", repeats=stages)
        slowest = [max(stage_work(shape, *sizes)) for shape in (even, cut)]
        cut = even if slowest[0] <= EVEN * slowest[1] else cut
    return replace(config, model=cut)


@cache
def best_cut(model: ModelConfig, mtp: MtpConfig, vocab_size: int, seq_length: int, stages: int) -> tuple[str, ...]:
    """The layers in consecutive stages, none empty, whose largest work is the least; of such cuts the most even."""
    layers = model.layers
    whole = replace(model, pattern=layers, repeats=1)
    each = {symbol: sum(layer_flops(symbol, model, seq_length).values()) for symbol in set(layers)}
    works = list(accumulate((each[symbol] for symbol in layers), initial=0.0))
    ends = sum(stage_work(whole, mtp, vocab_size, seq_length)) - works[-1]  # head and multi-token prediction
    # The best way to cut the first so many layers: (largest work, sum of squares, where the stages end).
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for number in range(1, stages + 1):
        extra, last = (ends, True) if number == stages else (0.0, False)
        found = {}
        for end in [len(layers)] if last else range(number, len(layers) - stages + number + 1):
            options = (
                (max(most, work), squares + work**2, (*borders, end))
                for begin, (most, squares, borders) in best.items()
                if begin < end and (work := works[end] - works[begin] + extra)
            )
            found[end] = min(options)
        best = found
    return tuple(layers[begin:end] for begin, end in pairwise((0, *best[len(layers)][2])))


def layouts(config: Config, world: int, machine: Machine) -> Iterator[list[list[tuple[Config, Topology]]]]:
    """Every layout that the checks let pass: tensor and context parallelism inside a node, powers of two.

    Each as a list by growing micro-batches of lists by growing recomputation.
    """
    near = [size for size in divisors(world) if size <= machine.per_node]
    stages = [(size, virtual) for size in divisors(world) for virtual in (1, 2, 4) if size > 1 or virtual == 1]
    micros = [size for size in MICROS if size <= config.batch.global_]
    for (pipeline, virtual), tensor, context in product(stages, near, near):
        if tensor * context > machine.per_node or (cut := cuts(config, pipeline * virtual)) is None:
            continue
        for expert in divisors(world // pipeline) if "E" in cut.model.layers + cut.model.mtp_layers else (1,):
            sizes: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
            parallels = [replace(cut.parallel, **sizes, recompute=policy, world=world) for policy in RECOMPUTE_POLICIES]
            found = []
            for micro in micros:
                every = [replace(cut, parallel=each, batch=replace(cut.batch, micro=micro)) for each in parallels]
                topology = valid(every[0], world)  # recomputation is none of its business
                found += [[(each, topology) for each in every]] if topology else []
            if found:
                yield found


def valid(config: Config, world: int) -> Topology | None:
    """The layout, or None where it cannot be built."""
    try:
        topology = resolve(config.parallel, config.model, world)
        check_length(topology, config.data.seq_length, config.model)
        check_kernels(config.model, topology)
        microbatches(topology, config.batch.global_, config.batch.micro)
        planned_vocab(config, topology)
    except (TopologyError, ModelError):
        return None
    return topology


def predict(config: Config, topology: Topology, machine: Machine) -> Proposal:
    """Memory and time of a layout: those of a pipeline's first and last processes, and of its busiest between them."""
    vocab = planned_vocab(config, topology)
    first = footprint(config, topology, vocab, 0)
    last = topology.pipeline - 1
    # Those between send to both sides.
    between = sorted(range(1, last), key=lambda rank: sum(first.balance[rank :: topology.pipeline]))[-1:]
    others = (footprint(config, topology, vocab, rank) for rank in sorted({*between, last} - {0}))
    places = [first, *others]
    memory = max(sum(place.memory.values()) for place in places)
    return Proposal(config, topology, memory, step_time(config, topology, vocab, places, machine))


def proposal_lines(proposals: list[Proposal], machine: Machine) -> list[str]:
    """Lines for a person: one layout each, with the settings that make it."""
    tokens = proposals[0].config.batch.global_ * proposals[0].config.data.seq_length
    lines = [f"{proposals[0].topology.world} {machine.name}: predicted step, its transfers, memory a GPU, settings"]
    for proposal in proposals:
        step = proposal.step
        rate = tokens / step.seconds / proposal.topology.world
        lines.append(
            f"{step.seconds:7.2f} s  {sum(step.transfers.values()):6.2f} s  {proposal.memory / GB:6.1f} GB  "
            f"{rate:8,.0f} tokens/s/GPU  {proposal.settings()}"
        )
    return lines
