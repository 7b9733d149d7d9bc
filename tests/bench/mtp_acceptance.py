"""What MTP drafts are worth after equally long training on one step, on several by depth, and on inference's keys.

    python -m tests.bench.mtp_acceptance [--runs DIR] [--jobs N] [--steps N]

Trains the recipe `tiny` for every variant and seed, several runs at once, each in one process; then `evaluate` decodes
held-out prompts with three draft tokens; then prints a table in Markdown: means over the seeds, and in parentheses the
standard deviation. A run that is finished already is only evaluated, so the command can be repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from train.watch import metrics

VARIANTS = {
    "no MTP": ["mtp.steps=0"],
    "1 step": ["mtp.steps=1"],
    "3 steps, keys by depth": ["mtp.steps=3", "mtp.keys=depth"],
    "3 steps, keys of inference": ["mtp.steps=3", "mtp.keys=inference"],
}
SEEDS = (1, 2, 3)
DRAFT, PROMPTS = 3, 200
COLUMNS = (
    metrics.HELDOUT_LM_LOSS,
    *(metrics.heldout_acceptance(step) for step in range(1, 1 + DRAFT)),
    metrics.HELDOUT_ACCEPTED_LENGTH,
)


def command(*arguments: str) -> None:
    """Runs one of the project's commands in a single process.

    Raises:
        RuntimeError: it failed; the message is what it printed.
    """
    environment = {**os.environ, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "train", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")


def measure(runs: Path, variant: str, seed: int, steps: int) -> dict[str, float]:
    """Trains and evaluates one run; its held-out metrics."""
    name = f"{variant.replace(' ', '_').replace(',', '')}_{seed}"
    place = [f"run.name={name}", f"run.dir={runs}"]
    options = [f"seed={seed}", f"run.steps={steps}", "run.eval_every=0", "run.eval_prompts=0", "wandb.mode=disabled"]
    command("train", *place, *options, *VARIANTS[variant])
    output = runs / name / "evaluation.json"
    drafts = ["draft=0"] if variant == "no MTP" else [f"draft={DRAFT}", f"prompts={PROMPTS}"]
    command("evaluate", *place, *drafts, f"output={output}")
    print(f"{name} done", file=sys.stderr, flush=True)
    return json.loads(output.read_text())["metrics"]


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values):.3f} ({stdev(values):.3f})"


def table(results: dict[tuple[str, int], dict[str, float]]) -> str:
    """The results in Markdown."""
    lines = ["| trained with | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for variant in VARIANTS:
        rows = [results[variant, seed] for seed in SEEDS]
        cells = [cell([row[name] for row in rows]) if name in rows[0] else "" for name in COLUMNS]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/mtp_acceptance"), help="directory of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--steps", type=int, default=160, help="steps of each run; 160 is the recipe's")
    asked = parser.parse_args()
    pairs = list(product(VARIANTS, SEEDS))
    with ThreadPoolExecutor(asked.jobs) as pool:
        found = list(pool.map(lambda pair: measure(asked.runs, *pair, asked.steps), pairs))
    print(table(dict(zip(pairs, found, strict=True))))


if __name__ == "__main__":
    main()
