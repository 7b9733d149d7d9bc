"""Settings of a dry run and of the commands that use a run, show it or measure speed, and their checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from data.config import DataConfig
from data.errors import check_choice
from data.files import why_unwritable
from model.backend import on_torch, require_backend
from parallel.topology import ParallelConfig
from train.settings.checks import check_least, check_seed
from train.settings.run import Config, RunReference
from train.settings.run_checks import check_plan
from train.settings.tree import ConfigError, from_dict, over, to_dict, values_of


@dataclass(frozen=True)
class DryRun:
    """Which process of a job run.dry_run=true builds."""

    rank: Annotated[int, "which process of parallel.world is built"] = 0


@dataclass(frozen=True)
class DryRunConfig:
    """What a dry run takes beside the settings of a recipe."""

    dry_run: DryRun = field(default_factory=DryRun)


@dataclass(frozen=True)
class BenchSettings:
    """What `bench` measures, in the layout that the recipe asks for: parallel.expert=2 takes two processes."""

    sequences: Annotated[tuple[int, ...], "sequences of a data-parallel rank's step, one after the other"] = (2, 4, 8)
    repeats: Annotated[int, "steps of each size; their median counts"] = 7
    optimizer: Annotated[bool, "also times whole steps, with AdamW: 18 bytes a parameter"] = False
    peers: Annotated[
        bool,
        "also times transformers' and megatron-core's Qwen3-Next in one process; patterns of GE and *E only",
    ] = True
    as_first_of: Annotated[
        int,
        "processes of a job whose first one is timed alone, with made-up rows from the others and no time for sending "
        "them; 0: all processes are started",
    ] = 0
    project: Annotated[
        int,
        "repeats of the pattern for which a row is projected from what was measured: its layers as often, one head; 0: "
        "none",
    ] = 12
    also: Annotated[
        tuple[str, ...],
        'variants timed after the recipe, as in ["model.repeats=3","balance.forced=true"]',
    ] = ()
    output: Annotated[str, "where the numbers go, and beside it the same as a page (.md)"] = "bench.json"


@dataclass(frozen=True)
class BenchConfig:
    """What `bench` takes beside the settings of a recipe."""

    bench: BenchSettings = field(default_factory=BenchSettings)


@dataclass(frozen=True)
class EvaluateConfig:
    """What `evaluate` measures."""

    run: RunReference = field(default_factory=RunReference)
    step: Annotated[int | None, "which checkpoint, by its step; null takes the last"] = None
    samples: Annotated[int | None, "held-out sequences; null takes the run's run.eval_samples"] = None
    draft: Annotated[
        int | None,
        "tokens of an MTP draft, whose acceptance is measured; null: mtp.steps; 0: none",
    ] = None
    prompts: Annotated[int, "held-out prompts that drafts continue"] = 64
    prompt_tokens: Annotated[int, "tokens of a prompt, at the most"] = 32
    tokens: Annotated[int, "tokens that each prompt is continued by"] = 64
    dtype: Annotated[str | None, "type that the weights are rounded to first: float32 or bfloat16; null: none"] = None
    needles: Annotated[
        int, "held-out sequences with words hidden at several depths and asked for at the end; 0: none"
    ] = 0
    output: Annotated[str | None, "JSON file for prompts, texts and the acceptance of their drafts"] = None


@dataclass(frozen=True)
class StatusConfig:
    """What `status` is asked about."""

    run: RunReference = field(default_factory=RunReference)


@dataclass(frozen=True)
class RunsReference:
    """Existing runs."""

    name: Annotated[tuple[str, ...], "names of the runs, or their directories, which have a slash"] = ("tiny",)
    dir: Annotated[str, "directory that holds the runs"] = "runs"

    @property
    def each(self) -> list[RunReference]:
        """One after the other."""
        paths = [Path(name) if "/" in name else Path(self.dir) / name for name in self.name]
        return [RunReference(path.name, str(path.parent)) for path in paths]


@dataclass(frozen=True)
class ReportConfig:
    """What `report` shows."""

    run: RunsReference = field(default_factory=RunsReference)
    output: Annotated[
        str | None,
        "the page; null: report.html in the run's directory, or NAME_NAME.html beside several runs",
    ] = None

    @property
    def path(self) -> Path:
        """Where the page goes."""
        if self.output is not None:
            return Path(self.output)
        names = [run.path for run in self.run.each]
        if len(names) == 1:
            return names[0] / "report.html"
        return names[0].parent / f"{'_'.join(path.name for path in names)}.html"


@dataclass(frozen=True)
class DashboardConfig:
    """What `dashboard` publishes."""

    run: RunReference = field(default_factory=RunReference)
    title: Annotated[str, "name of the view in the project's list of views"] = "Tessera"
    url: Annotated[str | None, "address of a view that was published and is written anew; null: a new one"] = None
    output: Annotated[str | None, "JSON file that gets the view instead of W&B, without an account"] = None


LOWEST_TEMPERATURE = 1e-4  # below it a difference of logits overflows float32


@dataclass(frozen=True)
class GenerateConfig:
    """What `generate` writes."""

    run: RunReference = field(default_factory=RunReference)
    step: Annotated[int | None, "which checkpoint, by its step; null takes the last"] = None
    prompt: Annotated[str, "text to continue"] = "def "
    prompt_file: Annotated[str | None, "file whose text is the prompt, but for a last line break"] = None
    tokens: Annotated[int, "tokens to write"] = 100
    temperature: Annotated[float, "0 takes the likeliest token; 1 samples from the model's distribution"] = 0.0
    seed: Annotated[int, "seed of the sampling"] = 1234
    draft: Annotated[int, "tokens that the MTP layer drafts ahead for one pass of the model to check; 0: none"] = 0

    @property
    def text(self) -> str:
        """The prompt.

        Raises:
            ConfigError: it is not UTF-8, or a file that cannot be read.
        """
        try:
            if self.prompt_file is None:
                return self.prompt.encode().decode()
            return Path(self.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeError as error:
            name = "prompt" if self.prompt_file is None else f"prompt_file={self.prompt_file}"
            raise ConfigError(f"{name} is not UTF-8: give text in UTF-8") from error
        except OSError as error:
            raise ConfigError(f"prompt_file={self.prompt_file} cannot be read: {error.strerror}") from error


RUNS = 8  # that a page compares: as many colours can be told apart


def check_report(report: ReportConfig) -> None:
    """Raises ConfigError where there is nothing to show, or nowhere to show it."""
    names = report.run.name
    if not 0 < len(names) <= RUNS or len(set(names)) < len(names):
        raise ConfigError(f"run={list(names)} cannot be shown beside each other: name 1 to {RUNS} different runs")
    check_output(str(report.path))


def check_output(output: str | None, setting: str = "output") -> None:
    """Raises ConfigError where a file cannot be written."""
    if output is None:
        return
    path = Path(output).absolute()
    if reason := f"{path} is a directory" if path.is_dir() else why_unwritable(path.parent):
        raise ConfigError(f"{setting}={output} cannot be written: {reason}: choose another file")


def check_dry_run(config: Config, dry_run: DryRun, world: int) -> None:
    """Raises ConfigError where there is no such process, or no dry run."""
    if not config.run.dry_run:
        raise ConfigError(f"dry_run.rank={dry_run.rank} but run.dry_run=false: add run.dry_run=true, or leave it out")
    if not 0 <= dry_run.rank < world:
        raise ConfigError(f"dry_run.rank={dry_run.rank} is not one of {world} processes: choose 0 to {world - 1}")


@dataclass(frozen=True)
class Elsewhere:
    """What `evaluate` and `generate` may take in place of what the run was trained with."""

    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def used_elsewhere(config: Config, arguments: list[str]) -> Config:
    """The configuration of a run, laid out as the arguments say, on the text that they name.

    What they leave open is the run's text, and a layout for any number of processes: pipeline stages are joined. Its
    model is made of torch's parts, whatever it was trained with.

    Raises:
        ConfigError: an argument that sets nothing of a layout or of data.
    """
    asked = values_of(Elsewhere, arguments)
    model = on_torch(config.model)
    if asked.get("parallel", {}).get("pipeline", 1) == 1:
        model = replace(model, pattern=model.pattern.replace("|", ""))
    return from_dict(Config, over(to_dict(replace(config, model=model, parallel=ParallelConfig())), asked))


def check_generate(config: GenerateConfig) -> None:
    """Raises ConfigError for the first setting that cannot be used."""
    check_least("tokens", config.tokens, 1)
    check_least("temperature", config.temperature, 0.0)
    if 0 < config.temperature < LOWEST_TEMPERATURE or config.temperature == float("inf"):
        raise ConfigError(f"temperature={config.temperature} is no temperature to divide by: use 0 for the likeliest")
    check_least("draft", config.draft, 0)
    check_seed("seed", config.seed)
    if not config.text:
        raise ConfigError("prompt='' has no tokens: give some text to continue")


def check_bench(bench: BenchSettings) -> None:
    """Raises ConfigError for the first setting that cannot be used."""
    check_least("bench.repeats", bench.repeats, 1)
    check_least("the shortest of bench.sequences", min(bench.sequences, default=0), 1)
    check_least("bench.as_first_of", bench.as_first_of, 0)
    check_least("bench.project", bench.project, 0)
    check_output(bench.output, "bench.output")
    if Path(bench.output).suffix == ".md":
        raise ConfigError(f"bench.output={bench.output} is where the page goes: name a file of numbers (.json)")


def check_variants(configs: Mapping[str, Config], world: int) -> None:
    """Raises one of USER_ERRORS for the first recipe that `bench` cannot time on ``world`` processes with the others.

    Its steps have sizes of their own, so the recipe's batch is not asked whether it fits.
    """
    layouts = set()
    for name, config in configs.items():
        batch = replace(config.batch, global_=config.batch.micro * world, schedule=())
        layouts.add(check_plan(replace(config, batch=batch), world))
        require_backend(config.model)
        if config.parallel.pipeline > 1:
            raise ConfigError(
                f"parallel.pipeline={config.parallel.pipeline} but bench times all layers in one process: choose "
                "parallel.pipeline=1 and fewer layers (model.repeats)"
            )
        if len(layouts) > 1:
            raise ConfigError(f"bench.also={name!r} is another layout than the recipe's: run bench with it on its own")


def check_evaluate(config: EvaluateConfig) -> None:
    """Raises ConfigError for the first setting that cannot be used."""
    if config.samples is not None:
        check_least("samples", config.samples, 1)
    if config.draft is not None:
        check_least("draft", config.draft, 0)
    for name in ("prompts", "prompt_tokens", "tokens"):
        check_least(name, vars(config)[name], 1)
    check_least("needles", config.needles, 0)
    if config.dtype is not None:
        check_choice("dtype", config.dtype, ("float32", "bfloat16"), ConfigError)
    check_output(config.output)


def check_decoding(parallel: ParallelConfig) -> None:
    """Raises ConfigError where a layout cannot write text."""
    if parallel.pipeline > 1:
        raise ConfigError(f"parallel.pipeline={parallel.pipeline}: generate needs all layers in one process")
    if parallel.context > 1:
        raise ConfigError(f"parallel.context={parallel.context}: generate does not cut a growing text into parts")


def check_draft(draft: int | None, config: Config) -> None:
    """Raises ConfigError where a run cannot draft."""
    if draft and not config.mtp.steps:
        raise ConfigError(f"draft={draft} but run.name={config.run.name} has no MTP layer (mtp.steps=0): use draft=0")
    if draft and config.parallel.pipeline > 1:
        raise ConfigError(
            f"draft={draft} but run.name={config.run.name} has several pipeline stages (parallel.pipeline="
            f"{config.parallel.pipeline}), and drafts need all layers in one process: use draft=0"
        )
