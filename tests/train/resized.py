"""Steps of a job over the samples that are its own on any layout, for the tests that resize runs."""

from parallel.engine import Engine
from tests.parallel.tiny import part_of, random_batch
from train.job.build import Job
from train.loop import train_step
from train.observe import step_metrics
from train.watch.metrics import GRAD_NORM


def train_steps(job: Job, engine: Engine, first: int, last: int, micro: int = 1) -> list[dict[str, float]]:
    """Trains from one step to another, both counted, in micro-batches of so many rows; metrics, the same everywhere."""
    values, rows = [], job.config.batch.global_
    for step in range(first, last + 1):
        own = part_of(random_batch(rows, step), job.groups.dp.rank(), job.topology.data)
        parts = len(own.tokens) // micro
        batches = [part_of(own, index, parts) for index in range(parts)]
        outputs, grad_norm = train_step(job, engine, batches, 1e-3)
        values.append(step_metrics(job, outputs) | {GRAD_NORM: grad_norm})
    return values
