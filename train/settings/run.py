"""Every setting of a training run as one frozen tree, and its checks."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml

from data.config import DataConfig
from data.errors import CorpusError
from data.files import write_whole
from data.order.batches import BatchSchedule
from data.secrets import hidden, one_line
from model.config import BalanceConfig, ModelConfig, ModelError, MtpConfig
from parallel.checkpoint.unpickle import UnsafePickle
from parallel.engine import DeepSpeedConfig
from parallel.topology import ParallelConfig, Topology, TopologyError, microbatches
from train.settings.optim import OptimConfig
from train.settings.tree import ConfigError, from_dict, hint_known, leaves, to_dict

USER_ERRORS = (ConfigError, ModelError, TopologyError, CorpusError, UnsafePickle)
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, where it lives, and what it writes on the way."""

    name: Annotated[str, "the run and its directory; empty takes the recipe's; an old name resumes"] = ""
    dir: Annotated[str, "directory that holds the runs"] = "runs"
    init: Annotated[
        str | None,
        "run (its name, or its directory) whose last weights, and model settings, a new run starts from",
    ] = None
    steps: Annotated[int, "optimizer steps of the whole run"] = 300
    fork: Annotated[
        str | None,
        "NAME@STEP: a new run goes on from that checkpoint of another run (its name, or its directory), with its "
        "weights, optimizer and place in the data",
    ] = None
    save_every: Annotated[int, "steps between checkpoints; 0: none by steps; there is always one at the end"] = 0
    save_minutes: Annotated[float | None, "minutes between checkpoints, beside save_every; null: none by time"] = 30.0
    mirror: Annotated[
        str | None,
        "directory or URL (s3://bucket/runs) that checkpoints are copied to, in a folder of the run's name; a run that "
        "has lost its own goes on from there",
    ] = None
    keep: Annotated[int, "newest checkpoints that stay; 0: all"] = 3
    keep_every: Annotated[int, "checkpoints of multiples of so many steps stay for good; 0: none do"] = 0
    eval_every: Annotated[int, "steps between held-out evaluations; 0 evaluates only at the end"] = 0
    eval_samples: Annotated[int, "held-out sequences of one evaluation"] = 64
    eval_prompts: Annotated[int, "held-out prompts on which an evaluation checks MTP drafts (not over a pipeline)"] = 16
    log_every: Annotated[int, "steps between logged lines"] = 10
    detail_every: Annotated[
        int, "steps between those that are logged with the gauges of every layer and group of parameters; 0: the last"
    ] = 200
    tensorboard: Annotated[
        bool, "writes what is logged for TensorBoard too, which needs no account: tensorboard --logdir runs/NAME"
    ] = False
    profile: Annotated[
        tuple[int, ...], "[first, last]: steps whose trace, and on GPUs memory, each process writes into the run's logs"
    ] = ()
    alert_minutes: Annotated[float, "minutes without a step after which an alert says so"] = 3.0
    alert_webhook: Annotated[
        str | None, "environment variable whose URL gets each alert as JSON, its text under text; null: none"
    ] = None
    kernel_cache: Annotated[
        str, "directory of compiled GPU kernels and of the verdicts on them, which machines can share"
    ] = ".cache/kernels"
    start_timeout: Annotated[
        float,
        "minutes after which processes that wait for another give up, until the first step and in saves",
    ] = 30.0
    step_timeout: Annotated[float, "the same in the steps after the first one"] = 5.0
    verify_every: Annotated[
        int,
        "steps between those whose gradients are computed twice and compared bit for bit; 0: never",
    ] = 0
    deterministic: Annotated[
        bool, "on GPUs: kernels that give the same bits each time; the start of a run says what they cost"
    ] = False
    replicas_every: Annotated[
        int,
        "steps between comparisons of the weights that several processes hold, bit for bit; 0: never",
    ] = 0
    dry_run: Annotated[bool, "builds one process's part without numbers, says what it would take, and ends"] = False
    max_time: Annotated[float | None, "minutes after which the run saves and stops; null: no limit"] = None
    environment: Annotated[
        tuple[str, ...],
        "[NAME=VALUE, ...]: variables of all processes, for NCCL, InfiniBand and the like; they go before launch.env",
    ] = ()

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.dir) / self.name

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def origin(self) -> "RunReference":
        """The run that `init` or `fork` names."""
        named = self.init or (self.fork or "").rpartition("@")[0]
        path = Path(named) if "/" in named else Path(self.dir) / named
        return RunReference(path.name, str(path.parent))

    @property
    def forked_step(self) -> int | None:
        """The step that `fork` names."""
        step = (self.fork or "").rpartition("@")[2]
        return int(step) if step.isdecimal() else None


@dataclass(frozen=True)
class BatchConfig:
    """Sequences of a step. ``global_`` is batch.global: the other spelling is a Python keyword."""

    global_: Annotated[int, "sequences of one optimizer step, over all processes"] = 16
    micro: Annotated[int, "sequences that a process computes at once"] = 8
    schedule: Annotated[
        tuple[tuple[int, int], ...],
        "[[tokens, sequences], ...]: from so many tokens on, so many sequences a step; before: batch.global",
    ] = ()
    length_schedule: Annotated[
        tuple[tuple[int, int], ...],
        "[[tokens, length], ...]: from so many tokens on, sequences are cut into pieces of that length",
    ] = ()


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases beside metrics.jsonl, which is always written."""

    mode: Annotated[str, "offline (files in the run's directory), online or disabled"] = "offline"
    project: Annotated[str, "project that the run is filed under"] = "tessera"
    entity: Annotated[str | None, "user or team; null takes the account's default"] = None


@dataclass(frozen=True)
class Config:
    """Everything that decides a training run."""

    seed: Annotated[int, "seed of the initialisation and of the order of the data"] = 1234
    engine: Annotated[str, "who runs the training steps: megatron or deepspeed"] = "megatron"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class RunReference:
    """An existing run."""

    name: Annotated[str, "name of the run"] = "tiny"
    dir: Annotated[str, "directory that holds the runs"] = "runs"

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.dir) / self.name


def batch_schedule(config: Config) -> BatchSchedule:
    """Sizes and lengths of the batches of a run, by samples instead of tokens."""
    length = config.data.seq_length
    sizes = ((0, config.batch.global_), *((-(-begin // length), size) for begin, size in config.batch.schedule))
    return BatchSchedule(sizes, tuple((-(-begin // length), cut) for begin, cut in config.batch.length_schedule))


def run_tokens(config: Config) -> int:
    """Tokens of the whole run."""
    return batch_schedule(config).samples(config.run.steps).start * config.data.seq_length


def shown_settings(config: Config) -> dict[str, Any]:
    """Every setting by its path, without secrets."""
    return dict(leaves(hidden(to_dict(config))))


def describe(config: Config, topology: Topology) -> list[str]:
    """Lines for the start of a run: the settings that differ from their defaults, and what follows."""
    chosen, defaults = shown_settings(config), shown_settings(Config())
    lines = [f"{path} = {value}" for path, value in chosen.items() if value != defaults[path]]
    batches, length = batch_schedule(config), config.data.seq_length
    lines.append(f"processes: {topology}")
    for behind, size in batches.sizes:
        when = f" from {behind * length:,} tokens on" if behind else ""
        lines.append(
            f"a step{when}: {size} sequences = micro {config.batch.micro} x data {topology.data} x "
            f"{microbatches(topology, size, config.batch.micro)} microbatches = {size * length:,} tokens"
        )
    for behind, cut in batches.lengths:
        lines.append(f"sequences from {behind * length:,} tokens on: {length // cut} of {cut} tokens in place of each")
    if config.balance.forced:
        lines.append("FORCED ROUTING: experts take tokens in turn; nothing learnt or measured here is a model's")
    lines.append(f"the run: {config.run.steps:,} steps = {run_tokens(config):,} tokens")
    return lines


def save_config(config: Config, directory: Path | None = None) -> Path:
    """Writes the resolved configuration, without secrets, into the run's directory, or into another one."""
    path = (directory or config.run.path) / CONFIG_FILE
    write_whole(path, yaml.safe_dump(hidden(to_dict(config)), sort_keys=False))
    return path


def load_origin(run: RunConfig) -> Config:
    """The configuration of the run that `init` or `fork` names.

    Raises:
        ConfigError: no such run, or a configuration that cannot be read.
    """
    return load_config(run.origin, f"run.init={run.init}" if run.init else f"run.fork={run.fork}")


def load_start(run: RunConfig) -> Config:
    """The configuration of a run that has begun, else of the run that `init` or `fork` names. Raises as these do."""
    begun = RunReference(run.name, run.dir)
    return load_config(begun) if (begun.path / CONFIG_FILE).is_file() else load_origin(run)


def load_config(run: RunReference, asked: str = "") -> Config:
    """The configuration of an existing run, where it is now and on whatever processes it is used with.

    Args:
        asked: the setting that names the run, with its value; `run.name`, unless said otherwise.
    Raises:
        ConfigError: no such run, or a configuration that cannot be read.
    """
    path = run.path / CONFIG_FILE
    kept = sorted(run.path.glob(f"checkpoints/step_*[0-9]/{CONFIG_FILE}"), reverse=True)
    if not path.is_file() and not kept:
        known = sorted(item.parent.name for item in Path(run.dir).glob(f"*/{CONFIG_FILE}"))
        mend = hint_known(run.name, known) if known else "it holds none"
        raise ConfigError(f"{asked or f'run.name={run.name}'} is not a run in {run.dir}: {mend}")
    config = _first_readable([path, *kept])
    here = replace(config.run, name=run.name, dir=run.dir)
    return replace(config, run=here, parallel=replace(config.parallel, world=None))


def read_config(path: Path) -> Config:
    """The configuration in a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return from_dict(Config, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from error


def _first_readable(paths: list[Path]) -> Config:
    """The first configuration that can be read: checkpoints have copies of the run's. Raises the first one's error."""
    first: ConfigError | None = None
    for path in paths:
        try:
            return read_config(path)
        except ConfigError as error:
            first = first or error
    assert first is not None, "there is a file to read"
    raise first
