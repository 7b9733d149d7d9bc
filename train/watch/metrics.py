"""What a run measures: the names, the log that is always written, and the line on the console."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

STEP = "step"
TOKENS = "tokens"  # trained on since the start of the run
EPOCH = "epoch"  # times that a source was read
LOSS = "loss"  # what is minimised: lm_loss + weighted MTP and balance losses
LM_LOSS = "lm_loss"  # nats a token, next-token prediction
MTP_LOSS = "mtp_loss"
# Of the routers; means over layers, and by layer as `of_layer` names them. Loads are relative to an even share, 1.0.
BALANCE_LOSS = "balance_loss"  # over the global batch; 1.0 is perfectly balanced
BALANCE_LOSS_MICRO = "balance_loss_micro"  # over each micro-batch of a data-parallel rank (or sequence: balance.scope)
Z_LOSS = "z_loss"
MAX_VIOLATION = "max_violation"  # MaxVio: the largest load over the global batch, minus 1
MAX_VIOLATION_MICRO = "max_violation_micro"  # mean of the same over the micro-batches of each data-parallel rank
LOAD_VARIATION = "expert_load_cv"  # coefficient of variation: standard deviation over experts, of loads of mean 1.0
LOAD_MIN = "expert_load_min"
LOAD_P10 = "expert_load_p10"
LOAD_P50 = "expert_load_p50"
LOAD_P90 = "expert_load_p90"
DEAD_EXPERTS = "dead_experts"  # experts of a layer that no token of the global batch used
ROUTER_ENTROPY = "router_entropy"  # nats, of a token's scores
DROPPED_SHARE = "dropped_share"  # of the tokens' assignments, which balance.capacity left to no expert
TOP_K_MASS = "top_k_mass"  # sum of a token's scores of the experts that it used
EXPERT_LOAD = "expert_load"  # list: of each expert
FORCED_ROUTING = "forced_routing"  # 1 beside every other metric of a run whose experts are chosen in turn
GRAD_NORM = "grad_norm"  # of the whole gradient, before clipping
CLIPPED_STEPS = "clipped_steps"  # since the last logged step
EVERY_LM_LOSS = "every_step/lm_loss"  # list: of each step since the last logged one; in metrics.jsonl only
EVERY_GRAD_NORM = "every_step/grad_norm"
GROUP_GRAD_NORM = "group_grad_norm"  # of a group of parameters, and of it in a layer; before clipping
UPDATE_TO_WEIGHT = "update_to_weight"  # norm of what a step adds to the weights of a group, over their own norm
LR = "lr"
# Of the trunk's layers on sampled steps (run.detail_every): definitions in `model.layers.gauges`.
ATTENTION_SINK = "attention_sink"
GATE_MEAN = "gate_mean"
GATE_LOW = "gate_low"
ACTIVATION_MAX = "activation_max"
ACTIVATION_PEAK = "activation_peak"
MASSIVE_ACTIVATIONS = "massive_activations"
DECAY_MIN = "decay_min"
DECAY_MEAN = "decay_mean"
DECAY_MAX = "decay_max"
BETA_MIN = "beta_min"
BETA_MEAN = "beta_mean"
BETA_MAX = "beta_max"
A_LOG_MIN = "A_log_min"
A_LOG_MAX = "A_log_max"
DT_BIAS_MIN = "dt_bias_min"
DT_BIAS_MAX = "dt_bias_max"
NORM_GAIN_MIN = "norm_gain_min"  # 1 + weight, by the norm's place in its layer
NORM_GAIN_MAX = "norm_gain_max"
TOKENS_PER_SECOND = "tokens_per_second"  # over all processes
TFLOPS = "tflops"  # 1e12 operations a second that the model needs on these documents, a process
MFU = "mfu"  # the same as a share of peak_tflops
PEAK_TFLOPS = "peak_tflops"  # of the GPU's data sheet, dense bfloat16; elsewhere the rate measured at the start
MATMUL_SHARE = "matmul_share"  # tflops as a share of the rate of a large matrix product, measured at the start
STEP_SECONDS = "seconds/step"  # mean since the last logged step, its wait for samples included
SLOWEST_RATE = "slowest_rate"  # of matrix products, of the slowest process over the median one's
SLOWEST_PROCESS = "slowest_process"
DISK_FREE = "disk_free_gb"
DISK_SIZE = "disk_gb"
EXPERT_NETWORK_ROWS = "expert_network_rows"  # that leave an NVLink domain for experts beyond, a token and layer
EXPERT_ROWS_MAX = "expert_rows_max"  # most assignments of a micro-batch that any rank computed, over an even share
MEMORY_PEAK = "memory_peak_gb"  # of the fullest GPU since the last logged step, and what its allocator holds
MEMORY_RESERVED = "memory_reserved_gb"
MEMORY_RETRIES = "memory_retries"  # times that an allocator had to free what it held, since the run was started
SKIPPED_STEPS = "skipped_steps"  # bad steps (optim.spike_factor) since the start of the run
DATA_RETRIES = "data_retries"  # reads that failed and were tried again, since the run was started
DATA_RESTARTS = "data_restarts"  # times that killed reading processes were started again
DATA_SKIPPED_TOKENS = "data_skipped_tokens"  # positions that damaged parts of the corpus left without a target
HELDOUT_LM_LOSS = "heldout_lm_loss"
HELDOUT_BITS_PER_BYTE = "heldout_bits_per_byte"
HELDOUT_UNIGRAM_ENTROPY = "heldout_unigram_entropy"  # nats a token, of knowing only frequencies
HELDOUT_MTP_LOSS = "heldout_mtp_loss"
HELDOUT_ACCEPTANCE = "heldout_acceptance"
NEEDLE_LOSS = "heldout_needle_loss"  # nats a token of a needle read before (`train.use.needle`)
NEEDLE_FIRST_LOSS = "heldout_needle_first_loss"  # of the same where it was new
NEEDLE_FOUND = "heldout_needle_found"
HELDOUT_ACCEPTED_LENGTH = "heldout_accepted_length"  # tokens that a pass of the trunk yields with MTP drafts

METRICS_FILE = "metrics.jsonl"
type Value = float | list[float]
BLOCK = 2**16  # bytes of a log that are read at once from its end


def mtp_loss(depth: int) -> str:
    """Name of the loss of multi-token-prediction step ``depth``, from 1."""
    return f"{MTP_LOSS}/{depth}"


def seconds(part: str) -> str:
    """Name of the seconds that a part of the steps since the last logged one took."""
    return f"seconds/{part}"


def extremes(name: str) -> tuple[str, str, str]:
    """Names of a metric's least, mean and largest value over the steps since the last logged one."""
    return f"{name}/min", f"{name}/mean", f"{name}/max"


def heldout_mtp_loss(depth: int) -> str:
    """Name of the held-out loss of multi-token-prediction step ``depth``, from 1."""
    return f"{HELDOUT_MTP_LOSS}/{depth}"


def of_layer(name: str, layer: str) -> str:
    """Name of a router's metric in one mixture of experts: a number from 1 in the trunk, ``mtp`` for the MTP layer."""
    return f"{name}/{layer}"


def as_drawn(name: str) -> str:
    """Name of a load of a new run's first batch, had the rows of its routers not been made equally long."""
    return f"{name}_rows_as_drawn"


def heldout_acceptance(step: int) -> str:
    """Name of the share of drafts, right so far, whose token number ``step`` is accepted, from 1."""
    return f"{HELDOUT_ACCEPTANCE}/{step}"


class MetricsLog:
    """``metrics.jsonl``: one JSON object a logged step, written through at once.

    Floats keep all their digits: equal files mean bit-identical runs. What is not finite becomes
    null, as JSON has no word for it. A disk that takes no more ends no run: lines wait in memory until it does.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        """Opens the log of a run that goes on after ``start_step``; what lies beyond is cut off."""
        _cut(path, start_step)
        self._file, self._waits = path.open("a", encoding="utf-8"), False

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        finite = {name: _finite(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps({STEP: step, **finite}) + "\n")
            self._file.flush()
            self._waits = False
        except OSError as error:
            if not self._waits:
                print(f"warning: {METRICS_FILE} cannot be written ({error}); its lines wait", file=sys.stderr)
            self._waits = True

    def alert(self, title: str, text: str) -> None:
        """Nothing: what an alert is of stands in the log."""

    def close(self) -> None:
        with suppress(OSError):  # told already
            self._file.close()


def last_entries(path: Path) -> Iterator[dict[str, float]]:
    """The objects of a log from its end on; reads no more of the file than is asked for."""
    with path.open("rb") as file:
        for _, line in _lines_from_end(file):
            if (entry := _entry(line)) is not None:
                yield entry


def console_line(step: int, steps: int, values: Mapping[str, Any], eta_s: float) -> str:
    """``step  10/300  loss 7.6241  lm_loss 6.9042  grad_norm 0.41..0.52..0.93  lr 1.00e-03  8.1k tokens/s  ETA 1m40s``.

    The gradient norm is the least, mean and largest one since the last line.
    """
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    losses = (LOSS, LM_LOSS, HELDOUT_LM_LOSS, HELDOUT_BITS_PER_BYTE)
    parts += [f"{name} {values[name]:.4f}" for name in losses if name in values]
    if FORCED_ROUTING in values:
        parts.append("FORCED ROUTING")
    if all(name in values for name in extremes(GRAD_NORM)):
        parts.append(f"{GRAD_NORM} " + "..".join(f"{values[name]:.2f}" for name in extremes(GRAD_NORM)))
    if LR in values:
        parts.append(f"{LR} {values[LR]:.2e}")
    if TOKENS_PER_SECOND in values:
        parts.append(f"{_short(values[TOKENS_PER_SECOND])} tokens/s")
    return "  ".join([*parts, f"ETA {duration(eta_s)}"])


def duration(seconds: float) -> str:
    """A time in its two largest units: ``1m40s``, ``3h05m``, ``2d07h``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _finite(value: Value) -> float | list[float | None] | None:
    if isinstance(value, list):
        return [one if math.isfinite(one) else None for one in value]
    return value if math.isfinite(value) else None


def _cut(path: Path, start_step: int) -> None:
    """Ends the log after its last whole line of a step up to ``start_step``, found from the end on."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        kept = 0
        for start, line in _lines_from_end(file) if start_step else ():
            entry = _entry(line)
            if entry is not None and entry[STEP] <= start_step:
                kept = start + len(line)
                break
        file.truncate(kept)


def _entry(line: bytes) -> dict[str, float] | None:
    """The object of a line; None where it is not whole."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # also bytes that are no UTF-8
        return None
    return entry if isinstance(entry, dict) and STEP in entry else None


def _lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(place of its first byte, line with its end) of a file, the last first."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start > 0:
        size = min(BLOCK, start)
        start = file.seek(start - size)
        first, *lines = (file.read(size) + rest).splitlines(keepends=True)
        place = start + len(first) + sum(map(len, lines))
        for line in reversed(lines):
            place -= len(line)
            yield place, line
        rest = first
    if rest:
        yield 0, rest
