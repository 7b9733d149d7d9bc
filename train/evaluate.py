"""Held-out loss: nats a token for each prediction step, bits a byte, beside the entropy of guessing blindly."""

import math
from collections.abc import Iterable, Iterator
from itertools import batched

import torch

from data.batches import Batch
from data.loader import heldout_batches
from model.batch import MicroBatch, count_targets
from parallel.collectives import from_last, sum_over
from parallel.engine_megatron import run_schedule
from train import metrics
from train.build import Job, build_job
from train.checkpoint import load_model
from train.config import Config, EvaluateConfig
from train.runs import read_state, require_checkpoint


def microbatch(job: Job, batch: Batch, counts: torch.Tensor) -> MicroBatch:
    """A batch of the data pipeline as the network takes it, on this process's device."""
    part, parts = job.groups.cp.rank(), job.groups.cp.size()
    return MicroBatch.build(batch.tokens, batch.documents, counts, part, parts).to(job.device)


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of ``size`` micro-batches, the last filled up with padding: what a pipeline runs at once."""
    for group in batched(batches, size):
        padding = Batch(group[0].tokens, torch.full_like(group[0].documents, -1))
        yield [*group, *[padding] * (size - len(group))]


def unigram_entropy(histogram: torch.Tensor) -> float:
    """Entropy in nats of tokens counted by id: the loss of a model that knows only how frequent each token is."""
    share = histogram[histogram > 0].double() / histogram.sum()
    return float(-(share * share.log()).sum())


@torch.no_grad()
def heldout_metrics(job: Job, max_samples: int) -> dict[str, float]:
    """Losses over the first ``max_samples`` held-out sequences (spread evenly), the same on every process."""
    config, steps = job.config, job.config.mtp.steps
    stream = job.dataset.heldout_stream()
    token_bytes = torch.from_numpy(job.dataset.token_bytes).long()
    histogram = torch.zeros(job.dataset.vocab_size, dtype=torch.int64)
    sums = torch.zeros(1 + steps, dtype=torch.float64)
    counts = torch.zeros(1 + steps, dtype=torch.int64)
    data = job.groups.dp
    batches = heldout_batches(stream, config.batch.micro, data.rank(), data.size(), max_samples)
    for group in in_groups(batches, job.topology.pipeline):
        ready = [microbatch(job, batch, count_targets(batch.documents, steps).clamp(min=1)) for batch in group]
        outputs = run_schedule(job.chunks, ready, job.microbatch_tokens, forward_only=True)
        for losses, batch in zip(outputs, ready, strict=bool(outputs)):
            sums += (losses.tokens_KT.double() * (batch.weights_KT > 0)).sum(dim=1).cpu()
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
    values = {
        metrics.HELDOUT_LM_LOSS: losses[0],
        metrics.HELDOUT_BITS_PER_BYTE: float(sums[0]) / math.log(2) / num_bytes,
        metrics.HELDOUT_UNIGRAM_ENTROPY: unigram_entropy(histogram),
    }
    return values | {metrics.heldout_mtp_loss(step): losses[step] for step in range(1, 1 + steps)}


def report(values: dict[str, float]) -> str:
    """What an evaluation found, in a line or two for a person."""
    loss, entropy = values[metrics.HELDOUT_LM_LOSS], values[metrics.HELDOUT_UNIGRAM_ENTROPY]
    text = (
        f"held-out lm_loss {loss:.4f} nats a token, {abs(entropy - loss):.4f} {'under' if loss < entropy else 'above'} "
        f"the unigram entropy {entropy:.4f}; "
        f"{values[metrics.HELDOUT_BITS_PER_BYTE]:.4f} bits a byte"
    )
    deeper = [f"{name} {value:.4f}" for name, value in values.items() if name.startswith(metrics.heldout_mtp_loss(""))]
    return "; ".join([text, *deeper])


def run_evaluation(evaluation: EvaluateConfig, config: Config) -> int:
    """The evaluate command, in each of its processes."""
    path = require_checkpoint(evaluation.run)
    job = build_job(config)
    load_model(job, path)
    values = heldout_metrics(job, evaluation.samples or config.run.eval_samples)
    if job.is_first:
        print(f"{config.run.name} after {read_state(path)['step']} steps: {report(values)}", flush=True)
    job.close()
    return 0
