"""The assembly: settings become objects here and nowhere else."""

from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from data.dataset import Dataset
from data.secrets import hide
from data.text.tokenizer import Tokenizer
from model.config import check_kernels
from model.init import initialise, narrowed, suspicious
from model.network import LanguageModel
from model.stack import hybrid_config
from parallel import engine_megatron
from parallel import groups as process_groups
from parallel.collectives import from_first
from parallel.domains import require_alike
from parallel.engine import Engine
from parallel.engine_megatron import MegatronEngine
from parallel.half_state import fused_adam_error
from parallel.topology import Topology, TopologyError, resolve
from train.job.footprint import VOCAB_MULTIPLE, exact_balance, recomputed
from train.job.optim import adamw, decays
from train.settings.optim import BFLOAT16
from train.settings.run import Config, batch_schedule
from train.settings.tree import ConfigError


@dataclass
class RoutingState:
    """What a process remembers from step to step beside the model."""

    has_counts: bool = False  # whether every router knows the counts of a last step


@dataclass(frozen=True)
class Job:
    """What every command of a run works with, as this process has it."""

    config: Config
    topology: Topology
    groups: ProcessGroupCollection
    device: torch.device
    dataset: Dataset
    chunks: list[LanguageModel]
    routing: RoutingState = field(default_factory=RoutingState)

    @property
    def rank(self) -> int:
        """Number of this process in the job."""
        return torch.distributed.get_rank()

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the job: writes files, prints lines."""
        return self.rank == 0

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.config.batch.micro * self.config.data.seq_length

    @property
    def sequence_part(self) -> tuple[int, int]:
        """Which part of each sequence this process has, and of how many (context parallelism)."""
        return self.groups.cp.rank(), self.groups.cp.size()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.chunks[0].vocab_size

    def describe(self) -> list[str]:
        """Lines for the start of a run: the model as this process holds it."""
        held = sum(parameter.numel() for chunk in self.chunks for parameter in chunk.parameters())
        exact = exact_balance(self.config, self.topology, self.vocab_size)
        samples = batch_schedule(self.config).samples(self.config.run.steps).start
        return [
            f"model: {self.vocab_size} token vocabulary, {held:,} parameters in this process on {self.device}",
            *([process_groups.cuda_variables()] if self.device.type == "cuda" else []),
            *([exact] if exact and self.config.balance.mode == "exact" else []),
            *map(hide, self.dataset.describe(samples)),
        ]

    def close(self) -> None:
        """Lets go of what the processes of a machine share, and leaves the job's process group."""
        self.dataset.close()
        process_groups.stop()


def padded_vocab(config: Config, dataset: Dataset, topology: Topology) -> int:
    """Rows of the embedding.

    Raises:
        ConfigError: fewer rows than the corpus has tokens. TopologyError: rows that tensor parallelism cannot share.
    """
    size = config.model.vocab_size
    if size is None:
        size = -(-dataset.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if size < dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the corpus's tokenizer ({dataset.vocab_size} tokens): "
            f"choose at least {dataset.vocab_size}, or null"
        )
    if size % topology.tensor:
        raise TopologyError(f"parallel.tensor={topology.tensor} does not divide the vocabulary of {size} rows")
    return size


def build_chunks(
    config: Config, topology: Topology, groups: ProcessGroupCollection, vocab_size: int
) -> list[LanguageModel]:
    """The pipeline stages of this process, empty parameters on the current device.

    Stage number s of the whole model belongs to process s % pipeline of its pipeline.
    """
    mcore_config = hybrid_config(config.model, config.mtp, topology, recomputed(config.parallel), config.balance)
    last = topology.pipeline * topology.virtual - 1
    numbers = [chunk * topology.pipeline + groups.pp.rank() for chunk in range(topology.virtual)]
    return [
        LanguageModel(
            mcore_config,
            vocab_size,
            groups,
            pre_process=number == 0,
            post_process=number == last,
            vp_stage=chunk if topology.virtual > 1 else None,
        )
        for chunk, number in enumerate(numbers)
    ]


def gpu_or_cpu(config: Config) -> torch.device:
    """This process's device, once what CUDA and the compilers of its kernels read from the environment is set."""
    process_groups.set_cuda_variables(config.parallel, config.run.deterministic)
    process_groups.set_kernel_caches(config.run.kernel_cache)
    return process_groups.local_device()


def build_job(config: Config, tokenizer: Tokenizer | None = None) -> Job:
    """Joins the process group, lays it out, opens the corpus and builds this process's part of the model.

    The first process lists and counts the corpus before the others find what it has counted. That all have the same is
    proved before the first step (`train.job.agree`): a listing that grows would give each process samples of its own.

    Args:
        tokenizer: takes the place of the corpus where none is read.
    """
    device = gpu_or_cpu(config)
    process_groups.start(device, config.run.start_timeout)
    topology = resolve(config.parallel, config.model, torch.distributed.get_world_size())
    require_alike(topology, device)
    if device.type == "cuda":
        check_kernels(config.model, topology)
    groups = process_groups.lay_out(topology, config.run.start_timeout)
    listings = from_first(lambda: Dataset(config.data, tokenizer).listings)
    dataset = Dataset(config.data, tokenizer, shared=topology.world > 1, listings=listings)
    with torch.device(device):
        chunks = build_chunks(config, topology, groups, padded_vocab(config, dataset, topology))
    return Job(config, topology, groups, device, dataset, chunks)


def draw_weights(job: Job) -> None:
    """Draws the model's parameters.

    Raises:
        RuntimeError: parameters with suspicious values after initialisation.
    """
    for chunk in job.chunks:
        initialise(chunk, chunk.sharded_state_dict(), job.config.seed)
        found = suspicious(chunk)
        if found:
            raise RuntimeError("the initialisation went wrong: " + "; ".join(found))


def engine_of(
    chunks: list[LanguageModel], config: Config, groups: ProcessGroupCollection, device: torch.device
) -> Engine:
    """The engine of a configuration around pipeline stages whose parameters are filled."""
    if config.engine == "deepspeed":
        from parallel.engine_deepspeed import DeepSpeedEngine  # it need not be installed for the other

        return DeepSpeedEngine(chunks, groups, adamw(config.optim), device, decays, config.deepspeed)
    return MegatronEngine(chunks, groups, adamw(config.optim), device, decays, config.parallel)


def optimizer_error(config: Config) -> float | None:
    """How far an optimizer that the engine brings along is from AdamW in float64, relative; None: it is torch's."""
    if config.engine == "deepspeed" and config.deepspeed.offload:
        from parallel.engine_deepspeed import cpu_adam_error

        return cpu_adam_error()
    if config.optim.moments == BFLOAT16:
        return fused_adam_error()
    return None


def allocated_bytes(chunk: LanguageModel, groups: ProcessGroupCollection, config: Config) -> dict[str, int]:
    """Bytes that the engine of a configuration takes for a pipeline stage: weights, gradients, optimizer."""
    return engine_megatron.allocated_bytes(chunk, groups, config.parallel, adamw(config.optim))


def build_engine(job: Job) -> Engine:
    """Wraps the model, whose parameters are filled, for training.

    Raises:
        RuntimeError: wrapping made something narrower that must stay wide.
    """
    engine = engine_of(job.chunks, job.config, job.groups, job.device)
    found = [fault for chunk in engine.wrapped for fault in narrowed(chunk)]
    if found:
        raise RuntimeError("the engine changed types that training relies on: " + "; ".join(found))
    return engine
