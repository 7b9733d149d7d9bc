"""What it does to a model whether its experts are balanced over the global batch or over each micro-batch.

    python -m tests.bench.balance_scope [--runs DIR] [--steps N] [--weight W]

Trains the recipe `balance_scope` once for each scope and seed, one run after the other in one process each, and prints
a table in Markdown: means over the seeds, and in parentheses the standard deviation. A run that is finished already is
only read, so the command can be repeated.

The corpus is the standard library; its packages are the kinds of text. How much experts specialise is the mutual
information between the kind of a token and the experts that it uses, with all kinds equally likely: 0 where every kind
uses all experts alike, log(kinds) where no two share an expert; and the mean total variation between the experts of
a kind and those of all. Both are above 0 by chance, and more so the fewer tokens are counted, so the same rows dealt
to the kinds at random stand beside them.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from data.dataset import Dataset
from data.order.batches import Batch
from data.prepare.embedded import embedded_input
from data.read.faults import Faults
from model.batch import MicroBatch, count_targets
from model.layers.balance import load_fractions
from parallel import compat
from parallel import groups as process_groups
from parallel.topology import resolve
from tests.bench.mtp_acceptance import cell, command
from tests.parallel.tiny import leave_layout
from tests.train.logs import read_metrics
from train import routing
from train.job.build import Job, build_chunks, padded_vocab
from train.job.checkpoint import load_model
from train.job.directory import require_checkpoint
from train.settings.run import RunReference, load_config
from train.watch import metrics

SCOPES, SEEDS = ("global", "micro"), (1, 2, 3)
KINDS = ("asyncio", "email", "encodings", "importlib", "multiprocessing", "pydoc_data", "unittest", "xml")
ROWS = 64  # sequences of a kind
INFORMATION, VARIATION = "mutual information", "total variation"
BY_CHANCE = " by chance"
COLUMNS = (
    metrics.HELDOUT_LM_LOSS,
    INFORMATION,
    INFORMATION + BY_CHANCE,
    VARIATION,
    VARIATION + BY_CHANCE,
    metrics.MAX_VIOLATION,
    metrics.MAX_VIOLATION_MICRO,
)
LAST_STEPS = 5  # logged steps that a violation is the mean of


def rows_of_kinds(job: Job) -> Tensor:
    """Tokens [kinds, ROWS, sequence length + 1] of packages of the standard library.

    Raises:
        ValueError: a package that is too short.
    """
    texts = dict.fromkeys(KINDS, "")
    for document in filter(None, embedded_input().documents(0, Faults())):
        kind = document.name.split("/")[0]
        if kind in texts:
            texts[kind] += str(document.content)
    size, found = ROWS * (job.config.data.seq_length + 1), []
    for kind, ids in zip(texts, job.dataset.tokenizer.encode_batch(list(texts.values())), strict=True):
        if len(ids) < size:
            raise ValueError(f"{kind} has {len(ids)} tokens, fewer than {size}")
        found.append(torch.tensor(ids[:size], dtype=torch.int64).view(ROWS, -1))
    return torch.stack(found)


def counts_by_kind(job: Job, tokens_KRS: Tensor) -> Tensor:
    """Assignments [layers, kinds, experts] of rows of each kind."""
    parts = tokens_KRS.flatten(0, 1).split(job.config.batch.micro)
    batches = [Batch(tokens, torch.zeros_like(tokens, dtype=torch.int32)) for tokens in parts]
    ready = [
        MicroBatch.build(batch.tokens, batch.documents, count_targets(batch.documents, 0)).to(job.device)
        for batch in batches
    ]
    routing.count_ahead(job, ready)
    found = [balance.by_micro_batch()[0] for _, balance in sorted(routing.balances(job).items())]
    return torch.stack(found).unflatten(1, (len(tokens_KRS), -1)).sum(dim=2)


def specialisation(counts_LKE: Tensor) -> tuple[float, float]:
    """Mutual information in nats, and mean total variation, both means over layers."""
    share = load_fractions(counts_LKE)
    mean = share.mean(dim=1, keepdim=True)
    information = torch.xlogy(share, share / mean).nan_to_num().sum(dim=2).mean()
    return information.item(), ((share - mean).abs().sum(dim=2) / 2).mean().item()


def read_run(run: RunReference) -> dict[str, float]:
    """A trained run's row of the table, without its standard deviations."""
    config = load_config(run)
    topology = resolve(config.parallel, config.model, 1)
    groups, dataset = process_groups.lay_out(topology), Dataset(config.data)
    chunks = build_chunks(config, topology, groups, padded_vocab(config, dataset, topology))
    job = Job(config, topology, groups, torch.device("cpu"), dataset, chunks)
    load_model(job, require_checkpoint(config.run))
    tokens_KRS = rows_of_kinds(job)
    dealt = tokens_KRS.flatten(0, 1)[torch.randperm(len(KINDS) * ROWS, generator=torch.Generator().manual_seed(0))]
    values = {}
    for rows, suffix in ((tokens_KRS, ""), (dealt.view_as(tokens_KRS), BY_CHANCE)):
        found = specialisation(counts_by_kind(job, rows))
        values |= {name + suffix: value for name, value in zip((INFORMATION, VARIATION), found, strict=True)}
    steps = read_metrics(run.path / metrics.METRICS_FILE)
    for name in (metrics.MAX_VIOLATION, metrics.MAX_VIOLATION_MICRO):
        values[name] = fmean(step[name] for step in steps[-LAST_STEPS:])
    leave_layout()
    return values | {metrics.HELDOUT_LM_LOSS: steps[-1][metrics.HELDOUT_LM_LOSS]}


def table(results: dict[tuple[str, int], dict[str, float]]) -> str:
    """The results in Markdown."""
    lines = ["| balance.scope | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for scope in SCOPES:
        cells = [cell([results[scope, seed][name] for seed in SEEDS]) for name in COLUMNS]
        lines.append(f"| {scope} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/balance_scope"), help="directory of the runs")
    parser.add_argument("--steps", type=int, default=150, help="steps of each run; 150 is the recipe's")
    parser.add_argument("--weight", type=float, default=0.01, help="weight of the balance loss; 0.01 is the recipe's")
    asked = parser.parse_args()
    runs = {pair: RunReference("{}_{}".format(*pair), str(asked.runs)) for pair in product(SCOPES, SEEDS)}
    for (scope, seed), run in runs.items():
        place = [f"run.name={run.name}", f"run.dir={run.dir}", f"run.steps={asked.steps}", "wandb.mode=disabled"]
        balance = [f"balance.scope={scope}", f"balance.weight={asked.weight}"]
        command("train", "-cn", "balance_scope", *place, f"seed={seed}", *balance)
        print(f"{run.name} done", file=sys.stderr, flush=True)
    compat.apply(torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(table({pair: read_run(run) for pair, run in runs.items()}))


if __name__ == "__main__":
    main()
