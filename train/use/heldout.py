"""Held-out loss: nats a token for each prediction step, bits a byte, beside the entropy of guessing blindly; and how
many drafted tokens are accepted."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import batched

import torch

from data.dataset import Source
from data.loader import heldout_batches
from data.order.batches import Batch
from model.batch import MicroBatch, count_targets
from parallel.collectives import from_last, sum_over
from parallel.stages import run_schedule
from train.job.build import Job, build_chunks
from train.watch import metrics


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of ``size`` micro-batches, the last filled up with padding: what a pipeline runs at once."""
    for group in batched(batches, size):
        padding = replace(group[0], documents=torch.full_like(group[0].documents, -1))
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
        targets = [count_targets(batch.documents, steps, batch.learned).clamp(min=1) for batch in group]
        ready = [
            MicroBatch.build(batch.tokens, batch.documents, counted, job.sequence_part, learned_RS=batch.learned).to(
                job.device
            )
            for batch, counted in zip(group, targets, strict=True)
        ]
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
