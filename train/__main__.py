"""The command line: ``python -m train COMMAND [-cn RECIPE] [key=value ...]``. The only file that knows Hydra.

Exit codes: 0 success, 1 failure, 2 a user's mistake (one line on stderr), 75 a run that stopped and can go on, 130
Ctrl-C (a run has saved then), 143 SIGTERM of other commands.
"""

import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.dataset import check_data
from data.errors import StorageError
from data.secrets import hidden, hide, one_line
from model.backend import check_backend, require_backend
from model.config import ModelConfig, check_model
from parallel.engine import require_package
from parallel.quiet import quiet_upstream
from train import arguments as command_line
from train import commands, front, usage
from train.arguments import CommandLine, named
from train.job.directory import finished_line, require_same_data, starting_checkpoint, steps_done
from train.job.lock import refuse_if_held
from train.job.starter import RESUMABLE, end_with_starter, stop_while_starting
from train.nodes import place, slurm
from train.plan.estimate import PUBLISHED, EstimateConfig, check_budget, estimate_text
from train.plan.propose import proposals
from train.settings.commands import BenchConfig, DryRunConfig, check_bench, check_dry_run, check_variants
from train.settings.paths import OPTION, anchored
from train.settings.run import USER_ERRORS, Config, RunConfig, batch_schedule, load_start
from train.settings.run_checks import check, check_plan, check_start
from train.settings.tree import (
    MISSING,
    ConfigError,
    from_dict,
    from_text,
    hint_known,
    over,
    settings,
    to_dict,
)
from train.watch.trackers import check_login

SETTINGS = {setting.path: setting for setting in settings(Config)}


def compose(arguments: list[str], planned: bool = False) -> Config:
    """The configuration of a recipe with overrides. Later wins: defaults, groups, recipe, ``key=value``.

    What is only planned (an estimate, a dry run) needs no corpus, so none must be given.

    Raises:
        ConfigError: an unknown recipe, group choice or setting, or an override that cannot be read.
    """
    line = command_line.read(arguments)
    name = line.file.stem
    try:
        values = _composed(line)
        if {"init", "fork"} & {key for key, value in values["run"].items() if value not in (None, MISSING)}:
            model = _origin_model(values, name)
            values = _composed(replace(line, overrides=(*model, *line.overrides)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{' '.join(line.arguments)} cannot be composed: {one_line(error)}") from error
    if planned or values["run"].get("dry_run"):
        for section, key, nothing in (("data", "corpus", ""), ("run", "init", None)):
            if values[section].get(key) == MISSING:
                values[section][key] = nothing
    return from_dict(Config, values)


def _composed(line: CommandLine) -> dict[str, Any]:
    """The recipe with its overrides over the defaults, all of which interpolation sees: ``run.name=exp_${seed}``."""
    own, *others = line.folders
    groups = usage.groups(tuple(line.folders))
    overrides = [command_line.typed(override, SETTINGS, groups) for override in line.overrides]
    search = ",".join(f"'file://{folder}'" for folder in others)
    with initialize_config_dir(str(own), version_base=None):
        composed = hydra_compose(line.file.stem, [*overrides, f"hydra.searchpath=[{search}]"])
    plain: Any = OmegaConf.to_container(composed)  # a dict with names as its keys, as is what comes of it
    values = over(to_dict(Config()), plain)
    values["run"]["name"] = values["run"]["name"] or line.file.stem
    resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    return resolved


def _origin_model(values: dict[str, Any], recipe: str) -> list[str]:
    """The model of the run that `run.init` or `run.fork` names, as overrides; of the run itself once it has begun.

    Where the same layers are cut for a pipeline here, the cut stays.
    """
    run, stages = values["run"], values["parallel"]["pipeline"]
    asked = {key: run[key] for key in ("name", "dir", "init", "fork") if run.get(key) is not None}
    config = RunConfig(**(asked | {"name": run["name"] or recipe}))
    check_start(config)
    source = load_start(config)
    model = to_dict(source.model)
    own = ModelConfig(pattern=values["model"]["pattern"], repeats=values["model"]["repeats"])
    if own.layers == source.model.layers and stages > 1 and len(own.stages) % stages == 0:
        model |= {"pattern": own.pattern, "repeats": own.repeats}
    return [f"model.{key}={'null' if value is None else value}" for key, value in model.items()]


def _choices(override: str) -> list[str]:
    """The override once for each value that it sweeps over: ``seed=1,2`` is ``seed=1`` and ``seed=2``."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:  # text that needs no quotes, or what `compose` will refuse
        return [override]
    if not parsed.is_sweep_override():
        return [override]
    if "shuffle" in override:
        raise ConfigError(f"{override} would be another order in each process: leave shuffle out")
    try:
        return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]
    except HydraException as error:
        raise ConfigError(f"{override} cannot be swept over: {one_line(error)}") from error


def sweep(command: str, line: CommandLine) -> int:
    """Runs the command for each combination of the settings that sweep; one after the other, or in jobs of an array.

    All are composed before the first starts. Runs that would share a name get what is their own into it. A run that
    fails lets the next ones start; one that was stopped ends the sweep.
    """
    swept = [_choices(override) for override in line.overrides]
    lines = command_line.combinations(line, swept)
    labels, share = [command_line.label(item, swept) for item in lines], command_line.share_of_array(len(lines))
    if front.world_size() and len(share) > 1:
        raise ConfigError("-m starts its runs one after the other itself: leave torchrun out, or start a job array")
    if command == "train":
        names = [compose(item.arguments).run.name for item in lines]
        if len(set(names)) < len(names):
            lines = [named(item, f"{name}_{text}") for item, name, text in zip(lines, names, labels, strict=True)]
    if len(share) > 1 and slurm.in_batch():
        print(f"runs come one after the other; sbatch --array=0-{len(lines) - 1} gives each a job", flush=True)
    code = 0
    for number in share:
        print(f"{number + 1} of {len(lines)}: {labels[number]}", flush=True)
        this = COMMANDS[command](lines[number].arguments)
        code = max(code, this)
        if this not in (0, 1):
            break
    return code


def train(arguments: list[str]) -> int:
    """Trains a recipe, or resumes the run of that name."""
    own, arguments = command_line.own_settings(arguments, "dry_run.")
    config = compose(arguments)
    part = from_text(DryRunConfig, own).dry_run
    if own or config.run.dry_run:
        topology = check_plan(config, config.parallel.world or front.num_processes())
        check_dry_run(config, part, topology.world)
        from train.plan.dry_run import dry_run

        print(dry_run(config, topology, part.rank))
        return 0
    front.set_environment(config.run.environment)
    processes = front.world_size() or front.num_processes()
    more_nodes = 0 if front.world_size() else slurm.nodes_wanted(place.here(), processes, config.parallel.world)
    check(config, processes * max(1, more_nodes))
    if front.world_size():
        stop_while_starting()
        from train.loop import run_training

        with front.prepare_among_workers(lambda: _prepare(config)):
            return run_training(config)
    done = steps_done(config)
    if done >= config.run.steps:
        print(finished_line(config, done))
        return 0
    refuse_if_held(config.run)
    if more_nodes:
        dry = place.DRY_RUN in arguments
        if not dry:
            _prepare(config)  # on one node, before many are waited for
        return slurm.grow(more_nodes, processes * more_nodes, dry)
    return front.launch("train", arguments, processes, lambda: _prepare(config), config.run.path)


def _prepare(config: Config) -> None:
    """Makes, counts and proves the corpus of a run, and lets go of it: a front only waits from then on."""
    check_login(config.wandb)
    dataset = front.ensure_corpus(config.data)
    dataset.check_repeats(batch_schedule(config).samples(config.run.steps).start)
    if before := starting_checkpoint(config.run):
        require_same_data(before, dataset.identity(config.seed), config.data.on_change)


def prepare(arguments: list[str]) -> int:
    """What `commands.prepare` does; with ``--index`` and a recipe, the index of what its run will read."""
    if arguments[:1] != ["--index"]:
        return commands.prepare(arguments)
    config = compose(arguments[1:])
    check_data(config.data, config.mtp.steps)
    samples = batch_schedule(config).samples(config.run.steps).start
    dataset = front.ensure_corpus(config.data)
    dataset.check_repeats(samples)
    print("\n".join(map(hide, dataset.describe(samples))))
    return 0


def estimate(arguments: list[str]) -> int:
    """Says what a recipe would cost, without a GPU or a corpus."""
    own, arguments = command_line.own_settings(arguments, "estimate.")
    budget = from_text(EstimateConfig, own).estimate
    check_budget(budget)
    config = compose(arguments, planned=True)
    if budget.propose:
        print("\n".join(proposals(config, budget)))
        return 0
    topology = check_plan(config, config.parallel.world or front.layout_size(config.parallel))
    peers = {peer.recipe: compose(["-cn", peer.recipe], planned=True) for peer in PUBLISHED} if budget.compare else {}
    print(estimate_text(config, topology, budget, peers))
    return 0


def bench(arguments: list[str]) -> int:
    """Times a layout, and in one process peers beside it."""
    own, rest = command_line.own_settings(arguments, "bench.")
    settings = from_text(BenchConfig, own).bench
    check_bench(settings)
    configs = {"the recipe": compose(rest, planned=True)}
    configs |= {variant: compose([*rest, *variant.split()], planned=True) for variant in settings.also}
    parallel = configs["the recipe"].parallel
    front.set_environment(configs["the recipe"].run.environment)
    alone = 1 if settings.as_first_of else 0
    processes = front.world_size() or alone or front.num_processes(parallel.world or front.layout_size(parallel))
    check_variants(configs, settings.as_first_of or processes)
    if front.world_size():
        from train.measure.bench import run_bench

        return run_bench(configs, settings)
    return front.launch("bench", arguments, processes, lambda: None, None)


def report(arguments: list[str]) -> int:
    """Writes a page of some runs; imports no torch."""
    return commands.report(arguments, _recipe_of)


def _recipe_of(command: list[str]) -> tuple[str, Config | None]:
    """The recipe that a command line of train names, and what it comes to today; None where it does not any more."""
    words = command[len(command) - command[::-1].index("train") :] if "train" in command else []
    name = command_line.DEFAULT_RECIPE
    try:
        line = command_line.read(words)
        name = line.recipe
        return name, compose(replace(line, overrides=()).arguments, planned=True)
    except USER_ERRORS:
        return name, None


def doctor(arguments: list[str]) -> int:
    """Says what this machine is, and checks its kernels."""
    config = compose(arguments, planned=True)
    check_model(config.model, config.mtp)
    check_backend(config.model)
    require_package(config.engine)
    require_backend(config.model)
    from train.measure.doctor import run_doctor

    return run_doctor(config)


COMMANDS = {
    "train": train,
    "estimate": estimate,
    "prepare": prepare,
    "evaluate": commands.evaluate,
    "generate": commands.generate,
    "status": commands.status,
    "report": report,
    "dashboard": commands.dashboard,
    "export": commands.export,
    "import": commands.import_,
    "bench": bench,
    "doctor": doctor,
}


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; user mistakes raise one of USER_ERRORS."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(usage.overview())
        return 0
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}: {hint_known(command, list(COMMANDS))}")
    if not front.started_by_front():
        front.load_environment([Path(), *([Path(rest[1])] if rest[:1] == [OPTION] else [])])
    of_recipe = SETTINGS if command in usage.WITH_RECIPE else {}
    rest = anchored(rest, {*of_recipe, *(setting.path for setting in settings(usage.CONFIGS[command]))})
    if {"-h", "--help"} & set(rest):
        print(usage.command_help(command))
        return 0
    quiet_upstream()
    line = command_line.read(rest) if command in usage.WITH_RECIPE else CommandLine()
    if line.cfg:
        print(yaml.safe_dump(hidden(to_dict(compose(rest, planned=True))), sort_keys=False), end="")
        return 0
    return sweep(command, line) if line.multirun else COMMANDS[command](rest)


def main() -> int:
    """The exit code of ``sys.argv``'s command."""
    slurm.adopt_slurm_task()
    arguments = sys.argv[1:]
    sys.argv[1:] = hidden(arguments)  # of which W&B, for one, takes a note
    if front.world_size():
        end_with_starter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(arguments[1:] if arguments[:1] == [front.WORKER] else arguments)
    except USER_ERRORS as error:
        front.report_mistake(error)
        return 2
    except StorageError as error:
        front.report_mistake(error)
        return RESUMABLE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        front.record_failure(error)
        print(hide(traceback.format_exc()), end="", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
