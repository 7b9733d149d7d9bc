"""The checks of a run's settings, in one order: the cheap ones, then what the corpus and the disk say."""

import os
from importlib.util import find_spec

from data.dataset import check_data, check_seq_length
from data.errors import check_choice
from data.files import why_unwritable
from data.secrets import hide
from model.backend import check_backend, check_fp8_sizes, require_backend
from model.config import INFERENCE, check_balance, check_model
from parallel.engine import check_engine, check_recompute, require_package
from parallel.topology import Topology, TopologyError, check_length, microbatches, resolve
from train.settings.checks import check_environment, check_least, check_seed
from train.settings.optim import check_moments, check_optim, require_moments
from train.settings.run import Config, RunConfig, run_tokens
from train.settings.tree import INT64, ConfigError

MOST_MINUTES = 525_600  # a year: gloo and NCCL overflow somewhere beyond


def check(config: Config, world: int) -> Topology:
    """The layout of ``world`` processes, once every check has passed; creates the run's directory.

    Raises:
        USER_ERRORS: the first setting that cannot be used.
    """
    topology = check_plan(config, world)
    require_package(config.engine)
    require_backend(config.model)
    _require_tensorboard(config.run)
    require_moments(config.optim)
    check_data(config.data, config.mtp.steps)
    _check_writable(config.run)
    return topology


def _require_tensorboard(run: RunConfig) -> None:
    if run.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "run.tensorboard=true needs TensorBoard, which is not installed: ./launch.sh setup tensorboard, or leave "
            "it out (`report` shows a run too)"
        )


def check_plan(config: Config, world: int) -> Topology:
    """The layout of ``world`` processes; checks all that can be checked without a corpus or a run.

    Raises:
        USER_ERRORS: the first setting that cannot be used.
    """
    check_seed("seed", config.seed)
    _check_run(config.run)
    check_optim(config.optim)
    check_choice("wandb.mode", config.wandb.mode, ("offline", "online", "disabled"), ConfigError)
    check_model(config.model, config.mtp)
    check_seq_length(config.data.seq_length, config.mtp.steps)
    check_backend(config.model)
    check_moments(config.optim, config.engine, config.model.dtype)
    check_balance(config.balance)
    topology = resolve(config.parallel, config.model, world)
    experts = config.model.layers.count("E") + config.mtp.steps
    check_engine(config.engine, config.deepspeed, topology, experts, config.model.dtype, config.run.verify_every)
    chained = config.mtp.keys == INFERENCE
    check_recompute(config.engine, config.deepspeed, config.parallel, config.mtp.steps, chained)
    _check_schedule("batch.schedule", config.batch.schedule)
    _check_schedule("batch.length_schedule", config.batch.length_schedule)
    microbatches(topology, config.batch.global_, config.batch.micro)
    for begin, size in config.batch.schedule:
        try:
            microbatches(topology, size, config.batch.micro)
        except TopologyError as error:
            raise TopologyError(f"batch.schedule from {begin:,} tokens on: {error}") from error
    _check_countable(config)
    for length in (config.data.seq_length, *(length for _, length in config.batch.length_schedule)):
        _check_divides("batch.length_schedule", length, "data.seq_length", config.data.seq_length)
        check_length(topology, length, config.model)
        tokens = config.batch.micro * length // topology.context
        check_fp8_sizes(config.model, topology, tokens)
    return topology


def _check_alerts_and_profile(run: RunConfig) -> None:
    if run.profile and (len(run.profile) != 2 or not 1 <= run.profile[0] <= run.profile[1]):
        raise ConfigError(f"run.profile={list(run.profile)} are no steps: name the first and the last, as in [20,22]")
    if not run.alert_minutes > 0:
        raise ConfigError(f"run.alert_minutes={run.alert_minutes} must be above 0 minutes")
    if run.alert_webhook is not None and not os.environ.get(run.alert_webhook):
        raise ConfigError(
            f"run.alert_webhook={run.alert_webhook} is not in the environment: name the variable that holds the URL"
        )


def _check_run(run: RunConfig) -> None:
    if not run.name or run.name.startswith((".", "-")) or "/" in run.name:
        raise ConfigError(f"run.name={run.name!r} cannot name a directory in {run.dir}: choose a plain name")
    if "://" in run.dir:
        raise ConfigError(
            f"run.dir={hide(run.dir)} is a URL, and a run lives on a file system, whose locks and renames it needs: "
            f"give a directory, and run.mirror={hide(run.dir)} for copies of its checkpoints there"
        )
    check_least("run.steps", run.steps, 1)
    check_least("run.log_every", run.log_every, 1)
    check_least("run.detail_every", run.detail_every, 0)
    _check_alerts_and_profile(run)
    check_least("run.eval_samples", run.eval_samples, 1)
    check_least("run.eval_prompts", run.eval_prompts, 0)
    for name in ("save_every", "keep", "keep_every"):
        check_least(f"run.{name}", vars(run)[name], 0)
    if run.save_minutes is not None and not run.save_minutes > 0:
        raise ConfigError(
            f"run.save_minutes={run.save_minutes} must be above 0 minutes, or null to save by steps alone"
        )
    check_start(run)
    check_least("run.eval_every", run.eval_every, 0)
    check_least("run.verify_every", run.verify_every, 0)
    check_least("run.replicas_every", run.replicas_every, 0)
    for name, minutes in (("start", run.start_timeout), ("step", run.step_timeout)):
        if not 0 < minutes <= MOST_MINUTES:
            raise ConfigError(f"run.{name}_timeout={minutes} must be above 0 minutes, and at most {MOST_MINUTES}")
    check_environment(run.environment)
    if run.max_time is not None and not run.max_time > 0:
        raise ConfigError(f"run.max_time={run.max_time} must be above 0 minutes, or null to have no limit")


def check_start(run: RunConfig) -> None:
    """Raises ConfigError where `init` or `fork` cannot name where a run starts; whether that is there shows later."""
    if run.fork is not None and (run.forked_step is None or not run.fork.rpartition("@")[0]):
        raise ConfigError(f"run.fork={run.fork} names no checkpoint: write NAME@STEP, as in run.fork=first@2000")
    if run.fork is not None and run.init is not None:
        raise ConfigError(f"run.fork={run.fork} and run.init={run.init} both say where to start: set one")
    if run.init is not None and not run.init.strip():
        raise ConfigError("run.init is empty: name a run, or its directory, or leave it out (null)")


def _check_schedule(path: str, phases: tuple[tuple[int, int], ...]) -> None:
    """Phases [tokens, value] begin one after the other, and every value is at least 1."""
    begins = [begin for begin, _ in phases]
    if begins != sorted(set(begins)) or min((0, *begins)) < 0 or min((1, *(value for _, value in phases))) < 1:
        raise ConfigError(
            f"{path}={[list(phase) for phase in phases]} cannot be followed: its pairs begin at rising numbers of "
            f"tokens, from 0 on, with values of at least 1, as in [[0, 16], [1000000, 32]]"
        )


def _check_countable(config: Config) -> None:
    if run_tokens(config) >= INT64:
        raise ConfigError(
            f"run.steps={config.run.steps} x batch.global={config.batch.global_} x data.seq_length="
            f"{config.data.seq_length} are more than 2^63 tokens, which cannot be counted: lower one of them"
        )


def _check_divides(path: str, part: int, whole_path: str, whole: int) -> None:
    if whole % part:
        raise ConfigError(f"{path} has {part}, which does not divide {whole_path}={whole}: choose {whole // 2} or so")


def _check_writable(run: RunConfig) -> None:
    if reason := why_unwritable(run.path):
        raise ConfigError(f"run.dir={run.dir} cannot be written: {reason}: choose another run.dir")
    run.path.mkdir(parents=True, exist_ok=True)
