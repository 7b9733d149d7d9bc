"""A tiny model, random packed batches, and the job that trains them: what the distributed tests share."""

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data.order.batches import Batch
from model.config import BalanceConfig, ModelConfig, MtpConfig
from model.init import initialise
from model.network import LanguageModel
from parallel import groups as process_groups
from parallel.engine import Engine
from parallel.topology import ParallelConfig, resolve
from train.job.build import Job, build_chunks, engine_of
from train.settings.optim import OptimConfig
from train.settings.run import BatchConfig, Config, DataConfig, RunConfig

LENGTH = 64
VOCAB = 256
MODEL = ModelConfig(
    hidden_size=64,
    attention_heads=4,
    key_value_heads=2,
    head_dim=16,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=16,
    linear_value_dim=16,
    experts=8,
    experts_per_token=2,
    expert_size=32,
    shared_expert_size=32,
)
PIPELINED = replace(MODEL, pattern="GEGE|GE*E")
INTERLEAVED = replace(MODEL, pattern="GEG|E|GE*|E")  # uneven, like what `estimate.propose` cuts


def tiny_config(model: ModelConfig = MODEL, parallel: ParallelConfig = ParallelConfig(), **parts) -> Config:  # noqa: B008
    """Settings of a tiny run: micro-batches of 8 sequences of 64 tokens, 2 MTP steps, clipping on."""
    defaults = {
        "data": DataConfig(seq_length=LENGTH),
        "batch": BatchConfig(global_=8, micro=8),
        "mtp": MtpConfig(steps=2),
        "balance": BalanceConfig(weight=0.01, z_weight=0.001),
        "optim": OptimConfig(lr=3e-3, clip=1.0),
        "run": RunConfig(name="tiny"),
    }
    return Config(model=model, parallel=parallel, **(defaults | parts))


def build_tiny(config: Config) -> Job:
    """The job on this process, whose process group is already joined; without a corpus."""
    topology = resolve(config.parallel, config.model, dist.get_world_size())
    groups = process_groups.lay_out(topology)
    return Job(config, topology, groups, torch.device("cpu"), None, build_chunks(config, topology, groups, VOCAB))


def leave_layout() -> None:
    """Makes room for the groups of another layout: megatron-core forgets its own, whose threads would go on polling."""
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def random_batch(rows: int, seed: int) -> Batch:
    """Packed documents of random lengths over tokens that can be learned, with padding at some ends and a whole row.

    Rows differ much in how many valid targets they have, so that ranks do too.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (rows, LENGTH + 1), generator=generator)
    tokens = (torch.randint(0, VOCAB, (rows, 1), generator=generator) + steps.cumsum(1)) % VOCAB
    documents = torch.empty(rows, LENGTH + 1, dtype=torch.int32)
    for row in range(rows):
        often = torch.rand((), generator=generator) * 0.5
        documents[row] = (torch.rand(LENGTH + 1, generator=generator) < often).cumsum(0)
        if row % 3 == 1:
            documents[row, torch.randint(1, LENGTH, (), generator=generator) :] = -1
    documents[rows // 2] = -1
    return Batch(tokens, documents)


def part_of(batch: Batch, index: int, parts: int) -> Batch:
    """The index-th of equal parts of a batch."""
    return Batch(batch.tokens.chunk(parts)[index], batch.documents.chunk(parts)[index])


def fill(job: Job) -> list[LanguageModel]:
    """Draws the parameters of a job's model, with a router that prefers some experts, so that balance matters."""
    for chunk in job.chunks:
        initialise(chunk, chunk.sharded_state_dict(), job.config.seed)
        with torch.no_grad():
            for moe in chunk.moe_layers():
                preferred = torch.linspace(1.0, 10.0, job.config.model.experts)[:, None]
                moe.router.weight.mul_(preferred.to(job.device))
    return job.chunks


def parameters(job: Job) -> dict[str, torch.nn.Parameter]:
    """The parameters of this process, named by pipeline stage."""
    return {
        f"{index}.{name}": parameter
        for index, chunk in enumerate(job.chunks)
        for name, parameter in chunk.named_parameters()
    }


def start_engine(job: Job) -> Engine:
    """The engine that trains a job's model from its filled parameters."""
    return engine_of(fill(job), job.config, job.groups, job.device)
