"""Every metric of a run, declared once: name, unit, meaning, how often, and which names follow from its own.

Dashboards and reports are made of this table, by the sections of `train.watch.dashboard`; what logs a metric takes its
name from `train.watch.metrics`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from train.watch import goodput, metrics


class Cadence(StrEnum):
    """When a metric is logged."""

    LOGGED = "run.log_every"
    DETAIL = "run.detail_every"
    EVALUATED = "run.eval_every"
    START = "the first step"


class Kind(StrEnum):
    """Which names a metric has in the log, and what stands under them."""

    SCALAR = "NAME"
    BY_LAYER = "NAME over the layers, NAME/LAYER of each"
    BY_PART = "NAME/PART"
    BY_PART_AND_LAYER = "NAME/PART over the layers, NAME/PART/LAYER of each"
    HEATMAP = "NAME/LAYER, a list: one number a column"
    EACH_STEP = "NAME, a list: one number a step since the last logged one"


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Layers are numbered from 1 among those that have the metric; the MTP layer is called mtp.

    Attributes:
        parts: what stands for PART, as far as it is known; empty: that depends on the run.
        when: on what it depends whether the metric is there; empty: every run has it.
        rarely: it is zero, or not logged, as long as nothing is wrong.
    """

    name: str
    unit: str
    sentence: str
    cadence: Cadence = Cadence.LOGGED
    kind: Kind = Kind.SCALAR
    parts: tuple[str, ...] = ()
    when: str = ""
    rarely: bool = False


# What norms are called by their place in the model.
NORMS = (
    *("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "out_norm", "final_norm"),
    *("enorm", "hnorm", "final_layernorm"),
)
EXTREMES = ("min", "mean", "max")
MTP, EXPERTS, GATED, HYBRID = "mtp.steps", "mixtures of experts", "attention gates", "Gated DeltaNet layers"
GPU, SPREAD = "GPUs", "experts on several processes"
APART = "experts in several NVLink domains"
NATS, SHARE, NORM, EVEN, SECONDS, GB = "nats", "share", "norm", "even shares", "s", "GB"


def _of_loss() -> tuple[Metric, ...]:
    losses = "its least, mean and largest value over the steps since the last logged one"
    return (
        Metric(metrics.LOSS, NATS, "what is minimised: lm_loss and the weighted MTP and balance losses"),
        Metric(metrics.LM_LOSS, NATS, "a token, next-token prediction"),
        Metric(metrics.LM_LOSS, NATS, losses, kind=Kind.BY_PART, parts=EXTREMES),
        Metric(metrics.EVERY_LM_LOSS, NATS, "lm_loss of each step", kind=Kind.EACH_STEP),
        Metric(metrics.MTP_LOSS, NATS, "of each step of multi-token prediction", kind=Kind.BY_PART, when=MTP),
    )


def _of_optimizer() -> tuple[Metric, ...]:
    steps = "its least, mean and largest value over the steps since the last logged one"
    parts: dict[str, Any] = {"cadence": Cadence.DETAIL, "kind": Kind.BY_PART_AND_LAYER}
    return (
        Metric(metrics.GRAD_NORM, NORM, "of the whole gradient, before clipping"),
        Metric(metrics.GRAD_NORM, NORM, steps, kind=Kind.BY_PART, parts=EXTREMES),
        Metric(metrics.EVERY_GRAD_NORM, NORM, "grad_norm of each step", kind=Kind.EACH_STEP),
        Metric(metrics.CLIPPED_STEPS, "steps", "clipped since the last logged step", rarely=True),
        Metric(metrics.LR, "", "learning rate"),
        Metric(metrics.SKIPPED_STEPS, "steps", "bad ones since the start of the run", rarely=True),
        Metric(metrics.GROUP_GRAD_NORM, NORM, "of a group of parameters, before clipping", **parts),
        Metric(metrics.UPDATE_TO_WEIGHT, "ratio", "norm of a step's update over that of the weights", **parts),
    )


def _of_routers() -> tuple[Metric, ...]:
    def metric(name: str, unit: str, sentence: str, **others: Any) -> Metric:
        return Metric(name, unit, sentence, **({"kind": Kind.BY_LAYER, "when": EXPERTS} | others))

    start: dict[str, Any] = {"cadence": Cadence.START}
    return (
        metric(metrics.BALANCE_LOSS, "", "over the global batch; 1.0: perfectly balanced"),
        metric(metrics.BALANCE_LOSS_MICRO, "", "over each micro-batch of a rank, or each sequence (balance.scope)"),
        metric(metrics.Z_LOSS, "", "mean squared log-sum-exp of the logits", kind=Kind.SCALAR),
        metric(metrics.MAX_VIOLATION, EVEN, "MaxVio: the largest load over the global batch, minus 1"),
        metric(metrics.MAX_VIOLATION_MICRO, EVEN, "the same over the micro-batches of each data-parallel rank, mean"),
        metric(metrics.LOAD_VARIATION, "", "standard deviation of the experts' loads over their mean"),
        metric(metrics.LOAD_MIN, EVEN, "the least load", rarely=True),
        metric(metrics.LOAD_P10, EVEN, "load that a tenth of the experts stay under"),
        metric(metrics.LOAD_P50, EVEN, "median load"),
        metric(metrics.LOAD_P90, EVEN, "load that a tenth of the experts lie above"),
        metric(metrics.DEAD_EXPERTS, "experts", "that no token of the global batch used", rarely=True),
        metric(metrics.ROUTER_ENTROPY, NATS, "of a token's scores"),
        metric(metrics.TOP_K_MASS, SHARE, "of a token's scores that the experts hold which it used"),
        metric(metrics.EXPERT_LOAD, EVEN, "load of each expert", cadence=Cadence.DETAIL, kind=Kind.HEATMAP),
        metric(metrics.DROPPED_SHARE, SHARE, "of assignments", kind=Kind.SCALAR, when="balance.capacity"),
        metric(metrics.FORCED_ROUTING, "", "1: experts take tokens in turn", kind=Kind.SCALAR, when="balance.forced"),
        metric(metrics.as_drawn(metrics.MAX_VIOLATION), EVEN, "had router rows not been made equally long", **start),
        metric(metrics.as_drawn(metrics.LOAD_VARIATION), "", "had router rows not been made equally long", **start),
    )


def _of_layers() -> tuple[Metric, ...]:
    def metric(name: str, unit: str, sentence: str, **others: Any) -> Metric:
        return Metric(name, unit, sentence, **({"cadence": Cadence.DETAIL, "kind": Kind.BY_LAYER} | others))

    gains: dict[str, Any] = {"kind": Kind.BY_PART, "unit": "gain"}
    deltas: dict[str, Any] = {"when": HYBRID, "unit": ""}
    return (
        metric(
            metrics.ATTENTION_SINK,
            SHARE,
            "attention on a document's first token by those at least 16 places on",
        ),
        metric(metrics.GATE_MEAN, SHARE, "mean of the output gates", when=GATED),
        metric(metrics.GATE_LOW, SHARE, "of the output gates below 0.1", when=GATED, rarely=True),
        metric(metrics.ACTIVATION_MAX, "", "largest number of the residual stream behind a layer"),
        metric(metrics.ACTIVATION_PEAK, "", "largest of all layers", kind=Kind.SCALAR),
        metric(
            metrics.MASSIVE_ACTIVATIONS,
            "numbers",
            "of the residual stream above 100 and above 1000 times their token's median",
            rarely=True,
        ),
        metric(metrics.DECAY_MIN, sentence="strongest decay of the state by a token", **deltas, rarely=True),
        metric(metrics.DECAY_MEAN, sentence="what a token leaves of the state, mean", **deltas),
        metric(metrics.DECAY_MAX, sentence="weakest decay of the state by a token", **deltas),
        metric(metrics.BETA_MIN, sentence="least write strength", **deltas),
        metric(metrics.BETA_MEAN, sentence="mean write strength", **deltas),
        metric(metrics.BETA_MAX, sentence="largest write strength", **deltas),
        metric(metrics.A_LOG_MIN, sentence="least A_log of the heads", **deltas),
        metric(metrics.A_LOG_MAX, sentence="largest A_log of the heads", **deltas),
        metric(metrics.DT_BIAS_MIN, sentence="least dt_bias of the heads", **deltas),
        metric(metrics.DT_BIAS_MAX, sentence="largest dt_bias of the heads", **deltas),
        metric(metrics.NORM_GAIN_MIN, sentence="least 1 + weight of all norms of a kind", **gains),
        metric(metrics.NORM_GAIN_MAX, sentence="largest 1 + weight of all norms of a kind", **gains),
    )


def _of_machines() -> tuple[Metric, ...]:
    def part(name: str, sentence: str, **others: Any) -> Metric:
        return Metric(metrics.seconds(name), SECONDS, sentence, **others)

    spent = "since the last logged step"
    wall = "of all starts of the run: trained, and waited for instead"
    return (
        Metric(metrics.TOKENS, "tokens", "read since the start of the run, without padding"),
        Metric(metrics.TOKENS_PER_SECOND, "tokens/s", "over all processes, without padding, from step to step"),
        Metric(metrics.TFLOPS, "TFLOP/s", "that the model needs on these documents, a process"),
        Metric(metrics.MFU, SHARE, "tflops as a share of peak_tflops"),
        Metric(metrics.PEAK_TFLOPS, "TFLOP/s", "of the GPU's data sheet; elsewhere the measured rate"),
        Metric(metrics.MATMUL_SHARE, SHARE, "tflops as a share of the rate of a large matrix product"),
        Metric(metrics.SLOWEST_RATE, SHARE, "of the median process's rate of matrix products, the slowest",
               Cadence.DETAIL, when="several processes"),
        Metric(metrics.SLOWEST_PROCESS, "number", "of the process with that rate", Cadence.DETAIL,
               when="several processes", rarely=True),
        part("step", "from step to step: data, forward_backward and optimizer"),
        part("data", "waiting for a step's samples, the process that waited longest"),
        part("forward_backward", "a step, until its gradients are summed"),
        part("optimizer", "a step, clipping and the update"),
        part("save", f"blocked by checkpoints {spent}", when="a save", rarely=True),
        part("eval", f"of evaluations {spent}", when="an evaluation", rarely=True),
        Metric(goodput.GOODPUT, SHARE, "of the wall time of all starts that trained"),
        Metric(goodput.WALL_SECONDS, SECONDS, wall, kind=Kind.BY_PART, parts=goodput.KINDS, rarely=True),
        Metric(metrics.EXPERT_ROWS_MAX, EVEN, "most assignments of a micro-batch that a process computed", when=SPREAD),
        Metric(metrics.EXPERT_NETWORK_ROWS, "rows a token", "that leave an NVLink domain, of the process with most",
               when=APART),
        Metric(metrics.MEMORY_PEAK, GB, "of the fullest GPU since the last logged step", when=GPU),
        Metric(metrics.MEMORY_RESERVED, GB, "that its allocator holds", when=GPU),
        Metric(metrics.MEMORY_RETRIES, "times", "it had to free what it held", when=GPU, rarely=True),
        Metric(metrics.DISK_FREE, GB, "that are free on the run's disk"),
        Metric(metrics.DISK_SIZE, GB, "of that disk"),
    )  # fmt: skip


def _of_data() -> tuple[Metric, ...]:
    faults: dict[str, Any] = {"rarely": True}
    return (
        Metric(metrics.EPOCH, "times", "that a source was read", kind=Kind.BY_PART),
        Metric(metrics.TOKENS, "tokens", "of a source, padding and left-out samples included", kind=Kind.BY_PART),
        Metric(metrics.DATA_RETRIES, "reads", "that failed and were tried again in this start", **faults),
        Metric(metrics.DATA_RESTARTS, "times", "that killed reading processes were started again", **faults),
        Metric(metrics.DATA_SKIPPED_TOKENS, "tokens", "that damaged parts of the corpus left out", **faults),
    )


def _of_heldout() -> tuple[Metric, ...]:
    def metric(name: str, unit: str, sentence: str, **others: Any) -> Metric:
        return Metric(name, unit, sentence, Cadence.EVALUATED, **others)

    drafts: dict[str, Any] = {"when": MTP}
    return (
        metric(metrics.HELDOUT_LM_LOSS, NATS, "a token of held-out text"),
        metric(metrics.HELDOUT_BITS_PER_BYTE, "bits", "a byte of held-out text"),
        metric(metrics.HELDOUT_UNIGRAM_ENTROPY, NATS, "a token, of knowing only frequencies"),
        metric(metrics.HELDOUT_MTP_LOSS, NATS, "of each step of multi-token prediction", kind=Kind.BY_PART, **drafts),
        metric(metrics.HELDOUT_ACCEPTANCE, SHARE, "of drafts right so far whose token is accepted", kind=Kind.BY_PART,
               rarely=True, **drafts),
        metric(metrics.HELDOUT_ACCEPTED_LENGTH, "tokens", "that a pass yields with MTP drafts", **drafts),
    )  # fmt: skip


METRICS = (
    *_of_loss(),
    *_of_optimizer(),
    *_of_routers(),
    *_of_layers(),
    *_of_machines(),
    *_of_data(),
    *_of_heldout(),
)


def find(key: str) -> Metric | None:
    """The line of the table that a name in the log belongs to."""
    name, slash, rest = key.partition("/")
    if rest and any(metric.name == key for metric in METRICS):
        name, slash, rest = key, "", ""
    for metric in METRICS:
        if metric.name == name and _follows(metric, rest if slash else None):
            return metric
    return None


def _follows(metric: Metric, rest: str | None) -> bool:
    """Whether what stands behind a metric's name and a slash (None: nothing) can stand there."""
    if rest is None:
        return metric.kind in (Kind.SCALAR, Kind.BY_LAYER, Kind.EACH_STEP)
    layer = rest.rpartition("/")[2]
    is_layer = layer.isdecimal() or layer == "mtp"
    if metric.kind in (Kind.BY_LAYER, Kind.HEATMAP):
        return is_layer and "/" not in rest
    if metric.kind == Kind.BY_PART:
        return not metric.parts or rest in metric.parts
    return metric.kind == Kind.BY_PART_AND_LAYER and (is_layer or "/" not in rest)
