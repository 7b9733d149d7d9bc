"""The evaluate command: everything that is measured of a checkpoint on held-out text."""

import json
from pathlib import Path

from parallel.collectives import from_first
from train.job.build import build_job
from train.job.checkpoint import load_model, require_whole
from train.job.directory import require_checkpoint
from train.job.shelf import read_state
from train.settings.commands import EvaluateConfig
from train.settings.run import Config
from train.use.acceptance import Acceptance, heldout_prompts, measure_acceptance
from train.use.heldout import heldout_line, heldout_metrics, read_heldout, rounded
from train.use.needle import needle_lines, needle_metrics
from train.use.parts import TextParts, part_lines, source_metrics


def run_evaluation(asked: EvaluateConfig, config: Config) -> int:
    """The evaluate command, in each of its processes."""
    job = build_job(config)
    path = from_first(lambda: require_checkpoint(config.run, asked.step))  # while it trains, others may see another
    require_whole(job, path)
    load_model(job, path)
    if asked.dtype:
        job = rounded(job, asked.dtype)
    samples = asked.samples or config.run.eval_samples
    by_part = TextParts(config.data.seq_length) if job.topology.context == 1 else None  # else rows are in parts
    values = heldout_metrics(job, read_heldout(job, samples), by_part.add if by_part else None)
    parts = (by_part.values(job) if by_part else {}) | source_metrics(job, samples)
    needles = needle_metrics(job, asked.needles) if asked.needles else {}
    draft = asked.draft
    if draft is None:
        draft = config.mtp.steps if job.topology.pipeline == 1 else 0
    found = None
    prompts = heldout_prompts(job, asked.prompts, asked.prompt_tokens) if draft else []
    if prompts:
        found = measure_acceptance(job, job.chunks[0], prompts, draft, asked.tokens, show=True)
        values |= found.values()
    if job.is_first:
        print(f"{config.run.name} after {read_state(path)['step']} steps: {heldout_line(values)}", flush=True)
        print("\n".join([*part_lines(parts), *needle_lines(needles)]), flush=True)
    if job.is_first and found:
        print(f"{found.tally.describe()}, on {len(prompts)} held-out prompts", flush=True)
    if job.is_first and draft and not found:
        print("no drafts are measured: no held-out sequence begins a document that goes on after a prompt", flush=True)
    if job.is_first and asked.output:
        _write_output(Path(asked.output), values | parts | needles, found)
    job.close()
    return 0


def _write_output(path: Path, values: dict[str, float], found: Acceptance | None) -> None:
    """Metrics, and prompts, texts and rounds by accepted tokens if drafts were measured, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metrics": values, "drafts": found and found.content()}) + "\n", encoding="utf-8")
