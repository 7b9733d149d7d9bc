"""What a recipe would cost: parameters, operations, memory of a GPU, GPU-hours and money, from the settings alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated

from model.config import MtpConfig
from model.cost import cost
from parallel.engine import require_planned
from parallel.topology import Topology
from train.job.footprint import Footprint, checkpoint_bytes, exact_balance, footprint, planned_vocab
from train.job.gpus import GPUS
from train.plan.step_time import machine_of, step_time
from train.settings.run import Config, run_tokens
from train.settings.tree import ConfigError

GIB = 2**30
HOUR = 3600


@dataclass(frozen=True)
class PublishedCost:
    """A model that the seed of Qwen3-Next compares it with: its recipe, its tokens and the published cost."""

    recipe: str
    tokens: float
    published: float
    claim: str


PUBLISHED = (
    PublishedCost("qwen3_32b", 36e12, 0.093, "9.3 % of its training cost (GPU hours)"),
    PublishedCost("qwen3_30b_a3b", 36e12, 0.8, "less than 80 % of its GPU hours"),
)
LENGTHS = (4096, 32768)  # pretraining, and its long-context stage


@dataclass(frozen=True)
class Budget:
    """What is to be bought."""

    tokens: Annotated[float, "tokens to train on; 0: as many as the recipe's run reads"] = 0.0
    gpu: Annotated[str, "GPU to train on: H100, H200 or B200"] = "H200"
    mfu: Annotated[
        float,
        "share of the GPU's dense bfloat16 peak that arithmetic reaches; transfers that nothing hides come on top",
    ] = 0.4
    price: Annotated[float | None, "USD a GPU-hour; null: no money is shown"] = None
    propose: Annotated[int, "instead, so many layouts for parallel.world GPUs, fastest first"] = 0
    compare: Annotated[bool, "also Qwen3-Next's published comparison with Qwen3-32B and Qwen3-30B-A3B"] = False


@dataclass(frozen=True)
class EstimateConfig:
    """What `estimate` takes beside the settings of a recipe."""

    estimate: Budget = field(default_factory=Budget)


def check_budget(budget: Budget) -> None:
    """Raises ConfigError for the first setting that cannot be used."""
    if budget.gpu not in GPUS:
        raise ConfigError(f"estimate.gpu={budget.gpu!r} is not known: choose {', '.join(GPUS)}")
    if not 0 <= budget.tokens < float("inf"):
        raise ConfigError(f"estimate.tokens={budget.tokens} must be a number of tokens, or 0 for those of the run")
    if not 0 < budget.mfu <= 1:
        raise ConfigError(f"estimate.mfu={budget.mfu} must lie above 0 and not above 1")
    if budget.propose < 0:
        raise ConfigError(f"estimate.propose={budget.propose} must be at least 0")
    if budget.price is not None and not budget.price >= 0:
        raise ConfigError(f"estimate.price={budget.price} must be at least 0, or null")


def number_lines(rows: Iterable[tuple[str, float]], unit: str, scale: float, share: bool = False) -> list[str]:
    """Lines of a name, a number in units of ``scale``, and its share of the sum."""
    rows = list(rows)
    total = sum(count for _, count in rows) or 1.0
    return [
        f"  {name.replace('_', ' '):<30}{count / scale:>12,.3f} {unit}" + (f"{count / total:>8.1%}" if share else "")
        for name, count in rows
    ]


def parameter_lines(config: Config, vocab_size: int) -> list[str]:
    """Parameters by part, and the totals that papers quote."""
    counts = cost.parameters(config.model, config.mtp, vocab_size)
    total, active = cost.total_parameters(config.model, vocab_size), cost.active_parameters(config.model)
    head = counts.get(cost.HEAD, counts[cost.EMBEDDING])  # tied, the embedding is the head too
    ends = counts[cost.EMBEDDING] + counts.get(cost.HEAD, 0)
    rows = [(part, count) for part, count in counts.items() if part != cost.MTP]
    totals = [
        ("total", total),
        ("without embedding and head", total - ends),
        ("active, of these", active),
        ("active with the head", active + head),
        ("MTP layer, beside the total", counts.get(cost.MTP, 0)),
    ]
    return ["parameters", *number_lines(rows, "B", 1e9), "", *number_lines(totals, "B", 1e9)]


def flop_lines(config: Config, vocab_size: int) -> list[str]:
    """Operations of training on a token, by part, beside the usual rule."""
    length = config.data.seq_length
    parts = cost.forward_flops(config.model, config.mtp, vocab_size, length)
    training = {part: cost.TRAINING_FACTOR * count for part, count in parts.items()}
    without = cost.training_flops(config.model, MtpConfig(steps=0), vocab_size, length)
    usual = cost.rule_of_thumb_flops(config.model, vocab_size, length)
    totals = [("total", sum(training.values())), ("without MTP", without), ("usual rule", usual)]
    return [
        f"operations of training on a token, sequences of {length} (backward = 2 x forward, nothing for recomputation)",
        *number_lines(training.items(), "GFLOP", 1e9, share=True),
        *number_lines(totals, "GFLOP", 1e9),
        "  The usual rule: 6 x (active parameters + head) + causal attention + the delta rule token by token, no MTP.",
        "  The parts count the delta rule in chunks, as it is computed, and no norms.",
    ]


def memory_lines(config: Config, topology: Topology, place: Footprint, gpu: str) -> list[str]:
    """Bytes that the fullest process holds, and whether they fit."""
    total, room = sum(place.memory.values()), GPUS[gpu].memory
    fits = "fits" if total < 0.9 * room else "does not fit with a tenth to spare"
    fp8 = f"  model.fp8={config.model.fp8} counts as bfloat16, in time and memory: what it changes is not foreseen"
    return [
        f"memory of a GPU: processes {topology}; micro-batch {config.batch.micro} x {config.data.seq_length}; "
        f"recompute {config.parallel.recompute}",
        *number_lines(place.memory.items(), "GiB", GIB),
        *number_lines([("total", total)], "GiB", GIB),
        f"  {fits}: {gpu} has {room / GIB:.0f} GiB; {place.parameters:,} parameters in the fullest process",
        *([fp8] if config.model.fp8 != "off" else []),
    ]


def traffic_lines(places: list[Footprint]) -> list[str]:
    """Bytes that the busiest process sends in a step, and how even the pipeline's stages are."""
    busiest = max(places, key=lambda place: sum(place.traffic.values()))
    lines = ["a GPU sends in a step", *number_lines(busiest.traffic.items(), "GiB", GIB)]
    balance, bubble = busiest.balance, busiest.bubble
    if len(balance) > 1:
        shares = ", ".join(f"{share * len(balance):.2f}" for share in balance)
        lines += [
            "pipeline: operations of each stage relative to an even share: " + shares,
            f"  the slowest stage sets the pace ({max(balance) * len(balance):.2f}), and {bubble:.1%} of a step is "
            f"waiting for the first and last micro-batches",
        ]
    return lines


def phases(config: Config, tokens: float) -> list[tuple[Config, float]]:
    """The sizes of batch that so many tokens are read in, each as a configuration, and the tokens of each."""
    sizes = [(0, config.batch.global_), *config.batch.schedule]
    ends = [begin for begin, _ in sizes[1:]] + [float("inf")]
    return [
        (replace(config, batch=replace(config.batch, global_=size)), min(end, tokens) - begin)
        for (begin, size), end in zip(sizes, ends, strict=True)
        if begin < tokens
    ]


def longest_phase(config: Config, tokens: float) -> Config:
    """The configuration of the size of batch that most of so many tokens are read in."""
    return max(phases(config, tokens), key=lambda phase: phase[1])[0]


def cost_lines(config: Config, topology: Topology, vocab_size: int, budget: Budget) -> list[str]:
    """Where the time of a step goes, and the GPU-hours, days and money of the token budget."""
    machine, length = machine_of(budget.gpu, budget.mfu, config.parallel.nvlink_domain), config.data.seq_length
    steps = []
    for phase, tokens in phases(config, budget.tokens):
        places = [footprint(phase, topology, vocab_size, rank) for rank in range(topology.pipeline)]
        size, time = phase.batch.global_, step_time(phase, topology, vocab_size, places, machine)
        steps.append((tokens, size, tokens / (size * length) * time.seconds * topology.world / HOUR, time))
    _, size, _, step = max(steps, key=lambda phase: phase[0])
    hours = sum(phase[2] for phase in steps)
    flops = cost.training_flops(config.model, config.mtp, vocab_size, length) * budget.tokens
    share = flops / (hours * HOUR) / GPUS[budget.gpu].peak
    money = "" if budget.price is None else f" = {hours * budget.price:,.0f} USD at {budget.price:g} a GPU-hour"
    shown = f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}"
    links = f"{machine.node_bandwidth / 1e9:.0f} GB/s in a node of {machine.per_node}"
    rows = [("arithmetic", step.arithmetic), ("waiting for the host's launches", step.launching)]
    rows += [("waiting in the pipeline", step.waiting)]
    rows += step.transfers.items()
    return [
        f"{budget.tokens:.3g} tokens on {budget.gpu}, arithmetic at {budget.mfu:.0%} of "
        f"{GPUS[budget.gpu].peak / 1e12:.0f} TFLOP/s, {links} and {machine.network_bandwidth / 1e9:.0f} beyond",
        f"  of a step{f' of {size} sequences' * (len(steps) > 1)}, with the transfers that nothing hides:",
        *number_lines(((name, seconds) for name, seconds in rows if seconds), "ms", 1e-3, share=True),
        *number_lines([("total", step.seconds)], "ms", 1e-3),
        f"  {shown} GPU-hours{money}; {hours / topology.world / 24:,.1f} days on {topology.world} GPUs; {share:.1%} of "
        f"the peak over the whole step",
    ]


def disk_lines(config: Config, vocab_size: int) -> list[str]:
    """What the checkpoints of the whole run take, under the rule by which they are kept."""
    run, size = config.run, checkpoint_bytes(config, vocab_size)
    by_steps = run.steps // run.save_every if run.save_every else 1
    newest = min(run.keep or by_steps, by_steps)
    for_good = run.steps // run.keep_every if run.keep_every and run.keep else 0
    return [
        f"checkpoints: {size / 1e9:,.3f} GB each; {newest} newest and {for_good} for good are kept, beside one being "
        f"written: {(newest + for_good + 1) * size / 1e12:,.3f} TB of disk at the end",
    ]


def comparison_lines(config: Config, vocab_size: int, budget: Budget, peers: dict[str, Config]) -> list[str]:
    """The recipe's operations beside its peers', and what of the published comparison follows from them."""
    lines = [f"operations beside peers, {budget.tokens:.3g} tokens against theirs (without MTP; with one MTP step)"]
    ratios = {}
    for peer in PUBLISHED:
        model = peers[peer.recipe].model
        assert model.vocab_size is not None  # every peer's recipe gives it
        for length in LENGTHS:
            own = [cost.training_flops(config.model, MtpConfig(steps=n), vocab_size, length) for n in (0, 1)]
            other = cost.training_flops(model, MtpConfig(steps=0), model.vocab_size, length)
            ratio, with_mtp = (flops / other for flops in own)
            tokens = budget.tokens / peer.tokens
            ratios[peer.recipe, length] = ratio
            lines.append(
                f"  {peer.recipe:<14} {length:>6}: {own[0] / 1e9:6.1f} / {other / 1e9:6.1f} GFLOP a token = "
                f"{ratio:6.1%}; x {tokens:.3f} tokens = {ratio * tokens:5.1%} ({with_mtp * tokens:5.1%})"
            )
    lines.append("published, and what follows:")
    for peer in PUBLISHED:
        tokens = budget.tokens / peer.tokens
        arithmetic = ratios[peer.recipe, LENGTHS[0]] * tokens
        lines += [
            f"  {peer.recipe}: {peer.claim}",
            f"    arithmetic at {LENGTHS[0]} gives {arithmetic:.1%}: the published {peer.published:.1%} allows it "
            f"{arithmetic / peer.published:.2f} x the peer's share of peak (MFU), and",
            f"    needs {tokens / peer.published:.2f} x the peer's tokens a second and GPU, which only a measurement "
            f"on the same GPUs shows",
        ]
    return [
        *lines,
        "  From arithmetic follow the operations, and that fewer tokens cost less. How many GPU-hours an operation",
        "  takes does not: small experts, exchanges and the delta rule reach a smaller share of the peak.",
    ]


def estimate_text(config: Config, topology: Topology, budget: Budget, peers: dict[str, Config]) -> str:
    """All of the above as text. ``peers``: configurations of `PUBLISHED`, or none."""
    require_planned(config.engine)
    vocab_size = planned_vocab(config, topology)
    budget = replace(budget, tokens=budget.tokens or run_tokens(config))
    phase = longest_phase(config, budget.tokens)
    places = [footprint(phase, topology, vocab_size, rank) for rank in range(topology.pipeline)]
    exact = exact_balance(phase, topology, vocab_size)
    fullest = max(places, key=lambda place: sum(place.memory.values()))
    parts = [
        parameter_lines(config, vocab_size),
        [*flop_lines(config, vocab_size), *([f"  {exact}"] if exact else [])],
        memory_lines(config, topology, fullest, budget.gpu),
        traffic_lines(places),
        cost_lines(config, topology, vocab_size, budget),
        disk_lines(config, vocab_size),
    ]
    if peers:
        parts.append(comparison_lines(config, vocab_size, budget, peers))
    return "\n\n".join("\n".join(lines) for lines in parts)
