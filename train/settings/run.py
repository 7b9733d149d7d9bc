"""Every setting of a training run as one frozen tree, and its checks."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from data.config import DataConfig
from data.dataset import check_data
from data.errors import CorpusError, one_line
from data.files import why_unwritable, write_whole
from data.order.batches import BatchSchedule
from data.secrets import hidden
from model.backend import check_backend, check_fp8_sizes, require_backend
from model.config import BalanceConfig, ModelConfig, ModelError, MtpConfig, check_balance, check_model
from parallel.checkpoint.unpickle import UnsafePickle
from parallel.engine import DeepSpeedConfig, check_engine, require_package
from parallel.topology import ParallelConfig, Topology, TopologyError, check_length, microbatches, resolve
from train.settings.checks import check_choice, check_least, check_seed
from train.settings.optim import OptimConfig, check_optim
from train.settings.tree import ConfigError, from_dict, hint_known, leaves, setting, to_dict

USER_ERRORS = (ConfigError, ModelError, TopologyError, CorpusError, UnsafePickle)
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, where it lives, and what it writes on the way."""

    name: str = setting("", "the run and its directory; empty takes the recipe's; an old name resumes")
    dir: str = setting("runs", "directory that holds the runs")
    init: str | None = setting(
        None,
        "run (its name, or its directory) whose last weights, and model settings, a new run starts from",
    )
    steps: int = setting(300, "optimizer steps of the whole run")
    fork: str | None = setting(
        None,
        "NAME@STEP: a new run goes on from that checkpoint of another run (its name, or its directory), with its "
        "weights, optimizer and place in the data",
    )
    save_every: int = setting(0, "steps between checkpoints; 0: none by steps; there is always one at the end")
    save_minutes: float | None = setting(30.0, "minutes between checkpoints, beside save_every; null: none by time")
    mirror: str | None = setting(
        None,
        "directory or URL (s3://bucket/runs) that checkpoints are copied to, in a folder of the run's name; a run that "
        "has lost its own goes on from there",
    )
    keep: int = setting(3, "newest checkpoints that stay; 0: all")
    keep_every: int = setting(0, "checkpoints of multiples of so many steps stay for good; 0: none do")
    eval_every: int = setting(0, "steps between held-out evaluations; 0 evaluates only at the end")
    eval_samples: int = setting(64, "held-out sequences of one evaluation")
    eval_prompts: int = setting(16, "held-out prompts on which an evaluation checks MTP drafts (not over a pipeline)")
    log_every: int = setting(10, "steps between logged lines")
    start_timeout: float = setting(
        30.0, "minutes after which processes that wait for another give up, until the first step and in saves"
    )
    step_timeout: float = setting(5.0, "the same in the steps after the first one")
    verify_every: int = setting(
        0, "steps between those whose gradients are computed twice and compared bit for bit; 0: never"
    )
    replicas_every: int = setting(
        0, "steps between comparisons of the weights that several processes hold, bit for bit; 0: never"
    )
    dry_run: bool = setting(False, "builds one process's part without numbers, says what it would take, and ends")
    max_time: float | None = setting(None, "minutes after which the run saves and stops; null: no limit")

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

    global_: int = setting(16, "sequences of one optimizer step, over all processes")
    micro: int = setting(8, "sequences that a process computes at once")
    schedule: tuple[tuple[int, int], ...] = setting(
        (), "[[tokens, sequences], ...]: from so many tokens on, so many sequences a step; before: batch.global"
    )
    length_schedule: tuple[tuple[int, int], ...] = setting(
        (), "[[tokens, length], ...]: from so many tokens on, sequences are cut into pieces of that length"
    )


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases beside metrics.jsonl, which is always written."""

    mode: str = setting("offline", "offline (files in the run's directory), online or disabled")
    project: str = setting("tessera", "project that the run is filed under")
    entity: str | None = setting(None, "user or team; null takes the account's default")


@dataclass(frozen=True)
class Config:
    """Everything that decides a training run."""

    seed: int = setting(1234, "seed of the initialisation and of the order of the data")
    engine: str = setting("megatron", "who runs the training steps: megatron or deepspeed")
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

    name: str = setting("tiny", "name of the run")
    dir: str = setting("runs", "directory that holds the runs")

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.dir) / self.name


def check(config: Config, world: int) -> Topology:
    """The layout of ``world`` processes, once every check has passed; creates the run's directory.

    Raises:
        USER_ERRORS: the first setting that cannot be used.
    """
    topology = check_plan(config, world)
    require_package(config.engine)
    require_backend(config.model)
    check_data(config.data, config.mtp.steps)
    _check_writable(config.run)
    return topology


def check_plan(config: Config, world: int) -> Topology:
    """The layout of ``world`` processes; checks all that can be checked without a corpus or a run.

    Raises:
        USER_ERRORS: the first setting that cannot be used.
    """
    check_seed("seed", config.seed)
    _check_run(config.run)
    check_optim(config.optim)
    check_choice("wandb.mode", config.wandb.mode, ("offline", "online", "disabled"))
    check_model(config.model, config.mtp)
    check_backend(config.model, config.parallel.recompute)
    check_balance(config.balance)
    topology = resolve(config.parallel, config.model, world)
    experts = config.model.layers.count("E") + config.mtp.steps
    check_engine(config.engine, config.deepspeed, topology, experts, config.model.dtype, config.run.verify_every)
    _check_schedule("batch.schedule", config.batch.schedule)
    _check_schedule("batch.length_schedule", config.batch.length_schedule)
    microbatches(topology, config.batch.global_, config.batch.micro)
    for begin, size in config.batch.schedule:
        try:
            microbatches(topology, size, config.batch.micro)
        except TopologyError as error:
            raise TopologyError(f"batch.schedule from {begin:,} tokens on: {error}") from error
    for length in (config.data.seq_length, *(length for _, length in config.batch.length_schedule)):
        _check_divides("batch.length_schedule", length, "data.seq_length", config.data.seq_length)
        check_length(topology, length, config.model)
        tokens = config.batch.micro * length // topology.context
        check_fp8_sizes(config.model, topology, tokens)
    return topology


def batch_schedule(config: Config) -> BatchSchedule:
    """Sizes and lengths of the batches of a run, by samples instead of tokens."""
    length = config.data.seq_length
    sizes = ((0, config.batch.global_), *((-(-begin // length), size) for begin, size in config.batch.schedule))
    return BatchSchedule(sizes, tuple((-(-begin // length), cut) for begin, cut in config.batch.length_schedule))


def run_tokens(config: Config) -> int:
    """Tokens of the whole run."""
    return batch_schedule(config).samples(config.run.steps).start * config.data.seq_length


def describe(config: Config, topology: Topology) -> list[str]:
    """Lines for the start of a run: the settings that differ from their defaults, and what follows."""
    chosen = dict(leaves(hidden(to_dict(config))))
    defaults = dict(leaves(to_dict(Config())))
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


def load_config(run: RunReference) -> Config:
    """The configuration of an existing run, where it is now and on whatever processes it is used with.

    Raises:
        ConfigError: no such run, or a configuration that cannot be read.
    """
    path = run.path / CONFIG_FILE
    kept = sorted(run.path.glob(f"checkpoints/step_*[0-9]/{CONFIG_FILE}"), reverse=True)
    if not path.is_file() and not kept:
        known = sorted(item.parent.name for item in Path(run.dir).glob(f"*/{CONFIG_FILE}"))
        mend = hint_known(run.name, known) if known else "it holds none"
        raise ConfigError(f"run.name={run.name} is not a run in {run.dir}: {mend}")
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


def _check_run(run: RunConfig) -> None:
    if not run.name or run.name.startswith((".", "-")) or "/" in run.name:
        raise ConfigError(f"run.name={run.name!r} cannot name a directory in {run.dir}: choose a plain name")
    check_least("run.steps", run.steps, 1)
    check_least("run.log_every", run.log_every, 1)
    check_least("run.eval_samples", run.eval_samples, 1)
    check_least("run.eval_prompts", run.eval_prompts, 0)
    for name in ("save_every", "keep", "keep_every"):
        check_least(f"run.{name}", vars(run)[name], 0)
    if run.save_minutes is not None and not run.save_minutes > 0:
        raise ConfigError(
            f"run.save_minutes={run.save_minutes} must be above 0 minutes, or null to save by steps alone"
        )
    if run.fork is not None and (run.forked_step is None or not run.fork.rpartition("@")[0]):
        raise ConfigError(f"run.fork={run.fork} names no checkpoint: write NAME@STEP, as in run.fork=first@2000")
    if run.fork is not None and run.init is not None:
        raise ConfigError(f"run.fork={run.fork} and run.init={run.init} both say where to start: set one")
    check_least("run.eval_every", run.eval_every, 0)
    check_least("run.verify_every", run.verify_every, 0)
    check_least("run.replicas_every", run.replicas_every, 0)
    for name, minutes in (("start", run.start_timeout), ("step", run.step_timeout)):
        if not minutes > 0:
            raise ConfigError(f"run.{name}_timeout={minutes} must be above 0 minutes")
    if run.max_time is not None and not run.max_time > 0:
        raise ConfigError(f"run.max_time={run.max_time} must be above 0 minutes, or null to have no limit")


def _check_schedule(path: str, phases: tuple[tuple[int, int], ...]) -> None:
    """Phases [tokens, value] begin one after the other, and every value is at least 1."""
    begins = [begin for begin, _ in phases]
    if begins != sorted(set(begins)) or min((0, *begins)) < 0 or min((1, *(value for _, value in phases))) < 1:
        raise ConfigError(
            f"{path}={[list(phase) for phase in phases]} cannot be followed: its pairs begin at rising numbers of "
            f"tokens, from 0 on, with values of at least 1, as in [[0, 16], [1000000, 32]]"
        )


def _check_divides(path: str, part: int, whole_path: str, whole: int) -> None:
    if whole % part:
        raise ConfigError(f"{path} has {part}, which does not divide {whole_path}={whole}: choose {whole // 2} or so")


def _check_writable(run: RunConfig) -> None:
    if reason := why_unwritable(run.path):
        raise ConfigError(f"run.dir={run.dir} cannot be written: {reason}: choose another run.dir")
    run.path.mkdir(parents=True, exist_ok=True)
