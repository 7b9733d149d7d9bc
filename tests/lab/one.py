"""One run of the lab in a process of its own: trained, measured at its end, kept as one file.

    python -m tests.lab.one --arm ARM --seed N --kept DIR --scratch DIR [--check] [key=value ...]

It saves no weights: what is measured of a trained model is measured before its process ends, and goes into the last
line of its metrics. So a run that does not come to its end leaves nothing, and is started anew.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from model.batch import MicroBatch, count_targets
from model.layers.balance import load_fractions
from tests.lab import kept
from tests.lab.arms import ARMS, FAILED_PROBE, INFORMATION, RECIPE, run_name
from tests.lab.seams import SEAMS
from train import __main__ as command_line
from train import front, loop, routing, training
from train.job.build import Job
from train.measure.verdict import Kernels
from train.settings.run import CONFIG_FILE, Config
from train.use.acceptance import heldout_prompts, measure_acceptance
from train.use.heldout import heldout_metrics, read_heldout
from train.use.needle import needle_metrics
from train.use.parts import TextParts, source_metrics
from train.watch import metrics

SOURCE_ROWS, NEEDLE_ROWS, KIND_ROWS = 32, 64, 16  # held-out sequences of each source, probe, kind
DRAFT, PROMPTS, PROMPT_TOKENS, TEXT_TOKENS = 3, 128, 32, 32
PACKAGES = ("torch", "triton", "megatron-core", "flash-linear-attention", "flash-qla", "tilelang")


def information(job: Job) -> dict[str, float]:
    """Mutual information in nats between kinds of text, equally likely, and the experts they use; mean over layers.

    0 where every kind uses all experts alike, log(kinds) where no two share one.
    """
    by_kind, steps = [], job.config.mtp.steps
    for source in job.dataset.sources:
        batches = list(read_heldout(job, KIND_ROWS, source))
        ready = [
            MicroBatch.build(batch.tokens, batch.documents, count_targets(batch.documents, steps)).to(job.device)
            for batch in batches
        ]
        routing.count_ahead(job, ready)
        found = [balance.by_micro_batch()[0] for _, balance in sorted(routing.balances(job).items())]
        by_kind.append(torch.stack(found).sum(dim=1))
    share = load_fractions(torch.stack(by_kind, dim=1))  # [layers, kinds, experts]
    mean = share.mean(dim=1, keepdim=True)
    found = torch.xlogy(share, share / mean).nan_to_num().sum(dim=2).mean()
    return {INFORMATION: found.item()}


def losses(job: Job) -> dict[str, float]:
    """Held-out loss, of all and by place in a document."""
    by_part = TextParts(job.config.data.seq_length)
    values = heldout_metrics(job, read_heldout(job, job.config.run.eval_samples), by_part.add)
    return values | by_part.values(job)


def acceptance(job: Job) -> dict[str, float]:
    """What drafts are worth; nothing without multi-token prediction."""
    prompts = heldout_prompts(job, PROMPTS, PROMPT_TOKENS) if job.config.mtp.steps else []
    return measure_acceptance(job, job.chunks[0], prompts, DRAFT, TEXT_TOKENS).values() if prompts else {}


PROBES: dict[str, Callable[[Job], dict[str, float]]] = {
    "losses": losses,
    "acceptance": acceptance,
    "sources": lambda job: source_metrics(job, SOURCE_ROWS),
    "needles": lambda job: needle_metrics(job, NEEDLE_ROWS),
    "information": information,
}


def measured(job: Job) -> dict[str, float]:
    """What is read of a trained model.

    A probe that cannot be computed or read, on this machine or of this text, costs neither the others nor the run: it
    is kept as failed, and the page says so. Any other error is a mistake and ends the run.
    """
    values: dict[str, float] = {}
    for name, probe in PROBES.items():
        try:
            values |= probe(job)
        except (RuntimeError, OSError, ValueError):  # CUDA's among the first, CorpusError among the last
            traceback.print_exc()
            values[f"{FAILED_PROBE}/{name}"] = 1.0
    return values


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def machine() -> dict[str, str]:
    """Where a run ran."""
    found = {"python": platform.python_version(), "device": "CPU"}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found | {package: text for package in PACKAGES if (text := _version(package))}


class Unchecked(Kernels):
    """No check of kernels: the lease's first run has made it, and arms that start together would all compile."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.needed, self._compiling, self._turn = False, None, None


def prepare(seams: tuple[str, ...], check: bool) -> None:
    """Makes this process one that trains without saving, measures at the end, and varies what ``seams`` name."""
    for seam in seams:
        SEAMS[seam]()
    training.evaluation = measured
    training.Training.save = lambda self, step: None
    if not check:
        loop.Kernels = Unchecked
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= where


def result(arm: str, seed: int, directory: Path, overrides: list[str], seconds: float) -> dict[str, Any]:
    """What is kept of a run that has ended."""
    lines = [json.loads(line) for line in (directory / metrics.METRICS_FILE).read_text().splitlines()]
    config = yaml.safe_load((directory / CONFIG_FILE).read_text())
    config["run"]["dir"] = "runs"  # wherever it was
    return {
        "arm": arm,
        "seed": seed,
        "seams": list(ARMS[arm].seams),
        "overrides": overrides,
        "config": config,
        "machine": machine() | {"date": time.strftime("%Y-%m-%d")},
        "seconds": round(seconds, 1),
        "metrics": kept.trimmed(lines),
    }


def main() -> int:
    """Trains, measures and keeps the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kept", type=Path, required=True, help="directory for what is kept")
    parser.add_argument("--scratch", type=Path, required=True, help="directory for what is not")
    parser.add_argument("--check", action="store_true", help="compares the GPU's kernels with their twins first")
    parser.add_argument("overrides", nargs="*")
    asked, began = parser.parse_args(), time.monotonic()
    name, arm = run_name(asked.arm, asked.seed), ARMS[asked.arm]
    shutil.rmtree(asked.scratch / name, ignore_errors=True)
    (asked.scratch / name).mkdir(parents=True)
    prepare(arm.seams, asked.check)
    overrides = [*asked.overrides, *arm.overrides, f"seed={asked.seed}"]
    place = [f"run.name={name}", f"run.dir={asked.scratch}", "wandb.mode=disabled", "run.save_minutes=null"]
    sys.argv[1:] = [front.WORKER, "train", "-cn", RECIPE, *place, *overrides]
    code = command_line.main()
    if code == 0:
        run = result(asked.arm, asked.seed, asked.scratch / name, overrides, time.monotonic() - began)
        kept.keep(asked.kept, name, run)
    return code


if __name__ == "__main__":
    sys.exit(main())
