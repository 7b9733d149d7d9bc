"""Held-out loss: nats a token for each prediction step, bits a byte, beside the entropy of guessing blindly; and how
many drafted tokens are accepted."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import batched
from pathlib import Path

import torch

from data.dataset import Source
from data.loader import heldout_batches
from data.order.batches import Batch
from model.batch import MicroBatch, count_targets
from parallel.collectives import from_last, max_over_all, sum_over
from parallel.stages import run_schedule
from train.job.build import Job, build_chunks
from train.use.acceptance import Acceptance, heldout_prompts, measure_acceptance
from train.watch import metrics

TRAINING_PROMPT = 32  # tokens of a prompt, and of its continuation, in the evaluations of a run


def microbatch(job: Job, batch: Batch, counts: torch.Tensor, tokens_before: int = 0) -> MicroBatch:
    """A batch of the data pipeline as the network takes it, on this process's device."""
    part, parts = job.groups.cp.rank(), job.groups.cp.size()
    return MicroBatch.build(batch.tokens, batch.documents, counts, part, parts, tokens_before).to(job.device)


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of ``size`` micro-batches, the last filled up with padding: what a pipeline runs at once."""
    for group in batched(batches, size):
        padding = Batch(group[0].tokens, torch.full_like(group[0].documents, -1))
        yield [*group, *[padding] * (size - len(group))]


def unigram_entropy(histogram: torch.Tensor) -> float:
    """Entropy in nats of tokens counted by id: the loss of a model that knows only how frequent each token is."""
    share = histogram[histogram > 0].double() / histogram.sum()
    return float(-(share * share.log()).sum())


def read_heldout(job: Job, max_samples: int, only: Source | None = None) -> Iterator[Batch]:
    """This process's share of the held-out sequences, or of so many of them spread evenly; of one source or all."""
    data = job.groups.dp
    with closing(job.dataset.heldout_stream(only)) as stream:
        yield from heldout_batches(stream, job.config.batch.micro, data.rank(), data.size(), max_samples)


Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@torch.no_grad()
def heldout_metrics(job: Job, batches: Iterable[Batch], observe: Observer | None = None) -> dict[str, float]:
    """Losses over what all processes' `read_heldout` has read, the same on every process.

    Args:
        observe: is shown each micro-batch: documents [R, S + 1], losses of the next token [T], which are valid [T].
    """
    steps = job.config.mtp.steps
    token_bytes = torch.from_numpy(job.dataset.token_bytes).long()
    histogram = torch.zeros(job.dataset.vocab_size, dtype=torch.int64)
    sums = torch.zeros(1 + steps, dtype=torch.float64)
    counts = torch.zeros(1 + steps, dtype=torch.int64)
    for group in in_groups(batches, job.topology.pipeline):
        ready = [microbatch(job, batch, count_targets(batch.documents, steps).clamp(min=1)) for batch in group]
        outputs = run_schedule(job.chunks, ready, job.microbatch_tokens, forward_only=True)
        for losses, batch, read in zip(outputs, ready, group, strict=bool(outputs)):
            sums += (losses.tokens_KT.double() * (batch.weights_KT > 0)).sum(dim=1).cpu()
            if observe:
                observe(read.documents, losses.tokens_KT[0], batch.weights_KT[0] > 0)
        for batch in ready:
            valid = batch.weights_KT > 0
            counts += valid.sum(dim=1).cpu()
            histogram += torch.bincount(batch.targets_KT[0][valid[0]], minlength=len(histogram)).cpu()
    # Every pipeline stage has read the same batches; only the last has losses.
    total = torch.cat([sums, counts.double(), histogram.double()]).to(job.device)
    total = from_last(sum_over(total, job.groups.dp_cp), job.groups.pp)
    sums, counts, histogram = total.cpu().split([1 + steps, 1 + steps, len(histogram)])
    losses = (sums / counts.clamp(min=1)).tolist()
    num_bytes = float((histogram * token_bytes).sum())
    values = {metrics.HELDOUT_LM_LOSS: losses[0], metrics.HELDOUT_UNIGRAM_ENTROPY: unigram_entropy(histogram)}
    if num_bytes:  # else every target ends a document
        values[metrics.HELDOUT_BITS_PER_BYTE] = float(sums[0]) / math.log(2) / num_bytes
    return values | {metrics.heldout_mtp_loss(step): losses[step] for step in range(1, 1 + steps)}


def training_prompts(job: Job) -> list[list[int]]:
    """The held-out prompts of a run's evaluations; none where a process has not all layers."""
    prompts = job.config.run.eval_prompts
    if not prompts or not job.config.mtp.steps or job.topology.pipeline > 1:
        return []
    return heldout_prompts(job, prompts, min(TRAINING_PROMPT, job.config.data.seq_length))


def draft_metrics(job: Job, texts: list[list[int]]) -> dict[str, float]:
    """Acceptance of drafts as long as in training, on short texts; empty without any."""
    return (
        measure_acceptance(job, job.chunks[0], texts, job.config.mtp.steps, TRAINING_PROMPT).values() if texts else {}
    )


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


def rounded(job: Job, dtype: str) -> Job:
    """The job with its model's weights and computation in another type."""
    config = replace(job.config, model=replace(job.config.model, dtype=dtype))
    with torch.device(job.device):
        chunks = build_chunks(config, job.topology, job.groups, job.vocab_size)
    for chunk, own in zip(chunks, job.chunks, strict=True):
        chunk.load_state_dict(own.state_dict())
    return replace(job, config=config, chunks=chunks)


def heldout_line(values: dict[str, float]) -> str:
    """What an evaluation found, in a line or two for a person."""
    loss, entropy = values[metrics.HELDOUT_LM_LOSS], values[metrics.HELDOUT_UNIGRAM_ENTROPY]
    text = (
        f"held-out lm_loss {loss:.4f} nats a token, {abs(entropy - loss):.4f} {'under' if loss < entropy else 'above'} "
        f"the unigram entropy {entropy:.4f}"
    )
    if metrics.HELDOUT_BITS_PER_BYTE in values:
        text += f"; {values[metrics.HELDOUT_BITS_PER_BYTE]:.4f} bits a byte"
    deeper = (metrics.HELDOUT_MTP_LOSS, metrics.HELDOUT_ACCEPTANCE, metrics.HELDOUT_ACCEPTED_LENGTH)
    return "; ".join([text, *(f"{name} {value:.4f}" for name, value in values.items() if name.startswith(deeper))])


def write_output(path: Path, values: dict[str, float], found: Acceptance | None) -> None:
    """Metrics, and prompts, texts and rounds by accepted tokens if drafts were measured, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metrics": values, "drafts": found and found.content()}) + "\n", encoding="utf-8")
