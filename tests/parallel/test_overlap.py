"""Gradients travel while others are still computed, and weights while the next step already reads others.

Nothing may read a weight before it has arrived. On a fast network it nearly always has, so here weights arrive at the
last moment: a rank's copy of what others hold is no number until the moment it is waited for.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from parallel import groups as process_groups
from parallel.engine_megatron import MegatronEngine
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.parallel.tiny import build_tiny, fill, leave_layout, part_of, random_batch, start_engine, tiny_config
from train.job.build import Job
from train.loop import train_step
from train.observe import step_metrics
from train.settings.run import BatchConfig
from train.watch import metrics

STEPS, ROWS = 3, 8
OWN_BUCKETS = {"bucket": 1, "bucket_share": 1}  # one for every parameter
LAYOUTS = {
    "DP2": ParallelConfig(expert=1),
    "EP2": ParallelConfig(expert=2),
    "CP2xEP2": ParallelConfig(context=2, expert=2),
    "DP2xEP2": ParallelConfig(expert=2),
    "DP2, layers recomputed": ParallelConfig(expert=1, recompute="full"),
}
FOUR = "DP2xEP2"  # of four processes, so that both kinds of weights have other holders
Group = param_and_grad_buffer._ParamAndGradBucketGroup


class _AtTheLastMoment:
    """A gather that happens when it is waited for."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def wait(self) -> None:
        group = self.group
        for bucket in group.buckets:
            ranks = group.intra_distributed_optimizer_instance_size
            own = shard_buffer(bucket.param_data, ranks)[group.intra_distributed_optimizer_instance_rank]
            dist.all_gather_into_tensor(
                bucket.param_data, own.clone(), group=group.intra_distributed_optimizer_instance_group
            )


def _start_late(group: Group, force_sync: bool = False) -> None:
    if force_sync:
        _AtTheLastMoment(group).wait()
        group.param_gather_handle = None
    else:
        group.param_gather_handle = _AtTheLastMoment(group)
    group.param_gather_dispatched = True


def _groups(engine: MegatronEngine) -> list[Group]:
    return [group for ddp in engine.wrapped for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups]


@torch.no_grad()
def _poison(engine: MegatronEngine) -> int:
    """Makes other ranks' parts of the weights NaN; how many numbers that were."""
    poisoned = 0
    for group in _groups(engine):
        for bucket in group.buckets:
            ranks = group.intra_distributed_optimizer_instance_size
            for rank, shard in enumerate(shard_buffer(bucket.param_data, ranks)):
                if rank != group.intra_distributed_optimizer_instance_rank:
                    shard.fill_(math.nan)
                    poisoned += shard.numel()
    return poisoned


def _job(layout: str) -> Job:
    leave_layout()
    job = build_tiny(tiny_config(parallel=replace(LAYOUTS[layout], **OWN_BUCKETS), batch=BatchConfig(ROWS, ROWS // 2)))
    fill(job)
    return job


def _batches(job: Job, seed: int) -> list:
    """Two micro-batches."""
    halves = [part_of(random_batch(ROWS, seed), index, 2) for index in range(2)]
    return [part_of(half, job.groups.dp.rank(), job.groups.dp.size()) for half in halves]


def _train(layout: str, late: bool) -> tuple[list[dict[str, float]], int]:
    """What three steps report, and how many numbers were not there between them."""
    job = _job(layout)
    engine, found, poisoned = start_engine(job), [], 0
    for step in range(STEPS):
        outputs, grad_norm = train_step(job, engine, _batches(job, step), 3e-3)
        found.append(step_metrics(job, outputs) | {metrics.GRAD_NORM: grad_norm})
        if late:
            poisoned += _poison(engine)
        else:
            engine.gather_weights()
    return found, poisoned


@contextlib.contextmanager
def _noting(events: list[str], engine: MegatronEngine) -> Iterator[None]:
    """Writes down when each bucket's gradients set off and when its weights do and are waited for, and when the first
    and the last layer are computed, forwards and backwards."""
    names = {id(group): str(number) for number, group in enumerate(_groups(engine))}
    starts = {"start_param_sync": "weights of", "finish_param_sync": "wait for", "start_grad_sync": "gradients of"}

    def noted(name: str):
        original = vars(Group)[name]

        def run(group: Group, *args, **kwargs):
            waits_for_nothing = name == "finish_param_sync" and group.param_gather_dispatched
            if not (waits_for_nothing and group.param_gather_handle is None):
                events.append(f"{starts[name]} {names[id(group)]}")
            return original(group, *args, **kwargs)

        return mock.patch.object(Group, name, run)

    layers = engine.wrapped[0].module.decoder.layers
    hooks = [layers[-1].register_forward_pre_hook(lambda *_: events.append("forward of the last layer"))]
    embedding = engine.wrapped[0].module.embedding.word_embeddings.weight
    hooks.append(embedding.register_hook(lambda *_: events.append("backward of the embedding")))
    with noted("start_param_sync"), noted("finish_param_sync"), noted("start_grad_sync"):
        yield
    for hook in hooks:
        hook.remove()


def _events() -> tuple[list[str], int]:
    """What happens in a second step, and the number of buckets."""
    job, events = _job("DP2"), []
    engine = start_engine(job)
    train_step(job, engine, _batches(job, 0), 3e-3)
    with _noting(events, engine):
        train_step(job, engine, _batches(job, 1), 3e-3)
    return events, len(_groups(engine))


def _all(layouts: list[str]) -> dict:
    process_groups.start(torch.device("cpu"))
    found = {"events": _events()} if "DP2" in layouts else {}
    for layout in layouts:
        found[layout, "at once"] = _train(layout, late=False)
        with mock.patch.object(Group, "start_param_sync", _start_late):
            found[layout, "late"] = _train(layout, late=True)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict]:
    of_two = run_ranks(_all, 2, [name for name in LAYOUTS if name != FOUR], timeout=400)
    of_four = run_ranks(_all, 4, [FOUR], timeout=400)
    return [two | four for two, four in zip(of_two, of_four, strict=False)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_weight_is_read_before_it_arrives(results, layout: str):
    for rank in results:
        (expected, _), (found, poisoned) = rank[layout, "at once"], rank[layout, "late"]
        assert poisoned > STEPS * 10_000
        assert found == expected, "the same numbers, bit for bit"


def test_weights_set_off_one_bucket_ahead(results):
    for events, buckets in (rank["events"] for rank in results):
        forward = events[: events.index("backward of the embedding")]
        waits = [event for event in forward if event.startswith("wait for")]
        assert len(waits) == buckets, "every bucket is waited for, once"
        for this, following in pairwise(waits):
            name = following.removeprefix("wait for ")
            assert events.index(f"weights of {name}") < events.index(following), following
            assert events.index(f"weights of {name}") > events.index(this), "not all at the start"
        assert forward.index("forward of the last layer") > forward.index(waits[0])


def test_gradients_set_off_before_the_backward_pass_ends(results):
    for events, buckets in (rank["events"] for rank in results):
        first, end = (index for index, event in enumerate(events) if event == "backward of the embedding")
        assert not [event for event in events[:first] if event.startswith("gradients of")], "not the last micro-batch"
        early = [event for event in events[:end] if event.startswith("gradients of")]
        # All but the embedding's own.
        assert len(set(early)) >= buckets - 2
        assert len([event for event in events if event.startswith("gradients of")]) == buckets
