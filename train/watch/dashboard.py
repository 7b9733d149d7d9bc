"""What of a run is looked at together: sections and their panels, once for the report and for W&B.

A panel names metrics of `train.watch.catalog`, which says what they are; which names of a log they stand for follows
from their kinds.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from train.watch import catalog, goodput, metrics
from train.watch.catalog import Kind, Metric

LAYER, PART, ANY = r"\d+|mtp", r"[^/]+", ".+"  # a source of data may be a path
SEVERAL = (Kind.BY_PART, Kind.BY_PART_AND_LAYER)


class View(StrEnum):
    """How a panel shows its metrics."""

    CURVES = "curves"  # over the steps; of a metric of layers its mean over them
    LAYERS = "layers"  # layers x steps
    COLUMNS = "columns"  # layers x numbers of a list, as it was logged last
    SHARES = "shares"  # parts of a whole, as they were logged last


@dataclass(frozen=True)
class Panel:
    """A figure.

    Attributes:
        metrics: names in the catalog.
        logarithmic: whether the axis of the values is.
    """

    title: str
    metrics: tuple[str, ...]
    view: View = View.CURVES
    logarithmic: bool = False

    @property
    def declared(self) -> list[Metric]:
        """What the catalog says of its metrics, in the panel's order."""
        found = []
        for name in self.metrics:
            fitting = [one for one in catalog.METRICS if one.name == name and one.kind in KINDS[self.view]]
            found += fitting[:1]  # of a number that also has its extremes beside it: the number
        return found

    def pattern(self, metric: Metric) -> str:
        """A regular expression for the names under which the panel finds a metric in a log."""
        known = "|".join(metric.parts) or (PART if metric.kind is Kind.BY_PART_AND_LAYER else ANY)
        name, part, layer = re.escape(metric.name), f"/(?:{known})", f"/(?:{LAYER})"
        if self.view in (View.LAYERS, View.COLUMNS):
            return name + (part if metric.kind is Kind.BY_PART_AND_LAYER else "") + layer
        return name + (part if metric.kind in SEVERAL else "")

    def names(self, logged: Iterable[str]) -> list[str]:
        """The names of a log that the panel shows: metric by metric, layers and parts in their order."""
        found = sorted(logged, key=order)
        return [name for metric in self.declared for name in found if re.fullmatch(self.pattern(metric), name)]


KINDS = {
    View.CURVES: (Kind.SCALAR, Kind.BY_LAYER, *SEVERAL),
    View.LAYERS: (Kind.BY_LAYER, Kind.BY_PART_AND_LAYER),
    View.COLUMNS: (Kind.HEATMAP,),
    View.SHARES: (Kind.BY_PART,),
}


@dataclass(frozen=True)
class Section:
    """Panels under one title.

    Attributes:
        without: why a run may have nothing to show here.
    """

    title: str
    panels: tuple[Panel, ...]
    without: str = "the run has logged nothing of it yet"


def order(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 10 behind layer 9, and the MTP layer last."""
    return [(int(word), "") if word.isdecimal() else (10**9, word) for word in name.split("/")]


def layer_map(title: str, metric: str) -> Panel:
    """A panel of a metric in each layer over the steps."""
    return Panel(title, (metric,), View.LAYERS)


SECTIONS = (
    Section(
        "Loss",
        (
            Panel("Language-model loss", (metrics.LM_LOSS, metrics.HELDOUT_LM_LOSS)),
            Panel("Loss that is minimised", (metrics.LOSS,)),
            Panel("Held-out text", (metrics.HELDOUT_LM_LOSS, metrics.HELDOUT_UNIGRAM_ENTROPY)),
            Panel("Held-out bits a byte", (metrics.HELDOUT_BITS_PER_BYTE,)),
        ),
    ),
    Section(
        "Multi-token prediction",
        (
            Panel("Loss by step of prediction", (metrics.MTP_LOSS,)),
            Panel("Held-out loss by step of prediction", (metrics.HELDOUT_MTP_LOSS,)),
            Panel("Acceptance of drafts", (metrics.HELDOUT_ACCEPTANCE,)),
            Panel("Tokens a pass yields", (metrics.HELDOUT_ACCEPTED_LENGTH,)),
        ),
        "the model has no MTP layer (mtp.steps=0)",
    ),
    Section(
        "Optimizer",
        (
            Panel("Gradient norm", (metrics.GRAD_NORM,), logarithmic=True),
            Panel("Learning rate", (metrics.LR,)),
            Panel("Clipped steps since the last line", (metrics.CLIPPED_STEPS,)),
            Panel("Skipped steps", (metrics.SKIPPED_STEPS,)),
            Panel("Gradient norm by group", (metrics.GROUP_GRAD_NORM,), logarithmic=True),
            Panel("Update over weight by group", (metrics.UPDATE_TO_WEIGHT,), logarithmic=True),
            Panel("Update over weight by layer", (metrics.UPDATE_TO_WEIGHT,), View.LAYERS),
        ),
    ),
    Section(
        "Routing",
        (
            Panel("MaxVio, batch and micro-batch", (metrics.MAX_VIOLATION, metrics.MAX_VIOLATION_MICRO)),
            Panel("Balance loss", (metrics.BALANCE_LOSS, metrics.BALANCE_LOSS_MICRO)),
            Panel(
                "Expert load, percentiles",
                (metrics.LOAD_MIN, metrics.LOAD_P10, metrics.LOAD_P50, metrics.LOAD_P90),
            ),
            Panel("Spread of expert load", (metrics.LOAD_VARIATION,)),
            Panel("Dead experts", (metrics.DEAD_EXPERTS,)),
            Panel("Router entropy", (metrics.ROUTER_ENTROPY,)),
            Panel("Top-k mass", (metrics.TOP_K_MASS,)),
            Panel("Router z-loss", (metrics.Z_LOSS,)),
            Panel("Assignments of the fullest process", (metrics.EXPERT_ROWS_MAX,)),
            Panel("Rows of a token that cross the network", (metrics.EXPERT_NETWORK_ROWS,)),
            Panel("Dropped assignments", (metrics.DROPPED_SHARE,)),
            Panel("Load of each expert", (metrics.EXPERT_LOAD,), View.COLUMNS),
            layer_map("MaxVio by layer", metrics.MAX_VIOLATION),
            layer_map("Dead experts by layer", metrics.DEAD_EXPERTS),
            layer_map("Router entropy by layer", metrics.ROUTER_ENTROPY),
        ),
        "the model has no mixture of experts",
    ),
    Section(
        "Attention",
        (
            Panel("Attention on the first token", (metrics.ATTENTION_SINK,)),
            layer_map("Attention on the first token by layer", metrics.ATTENTION_SINK),
            Panel("Output gates", (metrics.GATE_MEAN, metrics.GATE_LOW)),
            layer_map("Output gates by layer", metrics.GATE_MEAN),
        ),
        "the model has no layer of softmax attention, or run.detail_every=0",
    ),
    Section(
        "Gated DeltaNet",
        (
            Panel("Decay of the state", (metrics.DECAY_MIN, metrics.DECAY_MEAN, metrics.DECAY_MAX)),
            Panel("Write strength", (metrics.BETA_MIN, metrics.BETA_MEAN, metrics.BETA_MAX)),
            Panel("A_log", (metrics.A_LOG_MIN, metrics.A_LOG_MAX)),
            Panel("dt_bias", (metrics.DT_BIAS_MIN, metrics.DT_BIAS_MAX)),
            layer_map("Decay by layer", metrics.DECAY_MEAN),
            layer_map("Write strength by layer", metrics.BETA_MEAN),
        ),
        "the model has no Gated DeltaNet layer, or run.detail_every=0",
    ),
    Section(
        "Activations and norms",
        (
            Panel("Largest activation", (metrics.ACTIVATION_PEAK,), logarithmic=True),
            layer_map("Largest activation by layer", metrics.ACTIVATION_MAX),
            Panel("Massive activations", (metrics.MASSIVE_ACTIVATIONS,)),
            Panel("Largest norm gain", (metrics.NORM_GAIN_MAX,)),
            Panel("Least norm gain", (metrics.NORM_GAIN_MIN,)),
        ),
        "run.detail_every=0",
    ),
    Section(
        "Speed",
        (
            Panel("Tokens a second", (metrics.TOKENS_PER_SECOND,)),
            Panel("MFU and share of matrix products", (metrics.MFU, metrics.MATMUL_SHARE)),
            Panel("TFLOP/s of a process", (metrics.TFLOPS,)),
            Panel(
                "Seconds of a step",
                tuple(map(metrics.seconds, ("step", "data", "forward_backward", "optimizer"))),
            ),
            Panel("Seconds of saves and evaluations", tuple(map(metrics.seconds, ("save", "eval")))),
            Panel("Slowest process", (metrics.SLOWEST_RATE,)),
        ),
    ),
    Section(
        "Time",
        (
            Panel("Goodput", (goodput.GOODPUT,)),
            Panel("Where the wall time went", (goodput.WALL_SECONDS,), View.SHARES),
        ),
    ),
    Section(
        "Memory and disk",
        (
            Panel("Memory of the fullest GPU", (metrics.MEMORY_PEAK, metrics.MEMORY_RESERVED)),
            Panel("Retries of the allocator", (metrics.MEMORY_RETRIES,)),
            Panel("Free disk", (metrics.DISK_FREE,)),
        ),
        "memory is measured on GPUs alone",
    ),
    Section(
        "Data",
        (
            Panel("Tokens trained on", (metrics.TOKENS,)),
            Panel("Times each source was read", (metrics.EPOCH,)),
            Panel("Reads tried again, readers restarted", (metrics.DATA_RETRIES, metrics.DATA_RESTARTS)),
            Panel("Tokens that damage left out", (metrics.DATA_SKIPPED_TOKENS,)),
        ),
    ),
)
