"""What a run measures on held-out text every so often: its losses, and how many drafted tokens are accepted."""

import sys

import torch

from data.order.batches import Batch
from parallel.collectives import max_over_all
from train.job.build import Job
from train.use.acceptance import heldout_prompts, measure_acceptance
from train.use.heldout import heldout_metrics, read_heldout

PROMPT_TOKENS = 32  # of a prompt, and of its continuation


def training_prompts(job: Job) -> list[list[int]]:
    """The held-out prompts of a run's evaluations; none where a process has not all layers."""
    prompts = job.config.run.eval_prompts
    if not prompts or not job.config.mtp.steps or job.topology.pipeline > 1:
        return []
    return heldout_prompts(job, prompts, min(PROMPT_TOKENS, job.config.data.seq_length))


def draft_metrics(job: Job, texts: list[list[int]]) -> dict[str, float]:
    """Acceptance of drafts as long as in training, on short texts; empty without any."""
    return measure_acceptance(job, job.chunks[0], texts, job.config.mtp.steps, PROMPT_TOKENS).values() if texts else {}


def evaluation(job: Job) -> dict[str, float]:
    """What a run measures on held-out text every so often; empty, with a warning, where a process cannot read it.

    All is read before anything is computed, so that no process waits for one that could not read.
    """
    batches: list[Batch] = []
    prompts: list[list[int]] = []
    failed = 0
    try:
        batches, prompts = list(read_heldout(job, job.config.run.eval_samples)), training_prompts(job)
    except (OSError, ValueError) as error:  # CorpusError is one of these
        print(f"warning: process {job.rank} could not read held-out text: {error}", file=sys.stderr, flush=True)
        failed = 1
    if max_over_all(torch.tensor(failed, device=job.device)):
        if job.is_first:
            print("warning: this evaluation is left out; training goes on", file=sys.stderr, flush=True)
        return {}
    return heldout_metrics(job, batches) | draft_metrics(job, prompts)
