"""The commands that take no recipe: what is done with a run, and with text. Those that take one stand in `__main__`."""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.config import PrepareConfig
from data.read.corpus import check_corpus
from data.text.tokenizer import TOKENIZER_FILE
from parallel.topology import resolve
from train import front
from train.arguments import layout_and_data, run_by_name, runs_by_name
from train.hub.settings import ExportConfig, ImportConfig, check_export, check_import
from train.job.directory import require_checkpoint
from train.job.footprint import fewest_processes
from train.job.provenance import TOKENIZER_CONFIG_FILE, kept_tokenizer
from train.settings.commands import (
    DashboardConfig,
    EvaluateConfig,
    GenerateConfig,
    ReportConfig,
    StatusConfig,
    check_decoding,
    check_draft,
    check_evaluate,
    check_generate,
    check_output,
    check_report,
    used_elsewhere,
)
from train.settings.run import Config, RunConfig, load_config
from train.settings.tree import ConfigError, from_text
from train.watch.status import print_status

SHARE = 0.8  # of a GPU's memory that weights may take: the rest is for what is computed
LARGEST_VOCAB = 2**18  # where a run leaves its vocabulary to the tokenizer


def with_tokenizer(checkpoint: Path, asked: list[str]) -> list[str]:
    """The settings of data with the run's own tokenizer, where another corpus is named without one.

    A corpus that prepare has made brings its own, which must be equal then.
    """
    names = {text.partition("=")[0] for text in asked}
    file = checkpoint / TOKENIZER_FILE
    if not names & {"data.corpus", "data.sources"} or "data.tokenizer" in names or not file.is_file():
        return asked
    eod_token = json.loads((checkpoint / TOKENIZER_CONFIG_FILE).read_text(encoding="utf-8"))["eos_token"]
    return [*asked, f"data.tokenizer={file}", f"data.eod_token={eod_token}"]


def elsewhere(config: Config, asked: list[str]) -> tuple[Config, list[str], int]:
    """A run's configuration for its use here, the layout as arguments where none is asked for, and the processes.

    Without parallel.* and NPROC a run is used on the fewest processes that hold its model, whatever it was trained on.

    Raises:
        USER_ERRORS: an unknown setting, a layout that does not fit, or GPUs that do not hold the model.
    """
    config, chosen = used_elsewhere(config, asked), [text for text in asked if text.startswith("parallel.")]
    fewest: list[str] = []
    if not chosen and not front.world_size() and "NPROC" not in os.environ:
        import torch

        gpus = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
        room = SHARE * min(gpus) if gpus else math.inf
        parallel = fewest_processes(config, config.model.vocab_size or LARGEST_VOCAB, room, max(1, len(gpus)))
        if parallel is None:
            raise ConfigError(
                f"the {len(gpus)} GPUs of this machine do not hold run.name={config.run.name}: use more, with "
                f"parallel.expert=N, or CUDA_VISIBLE_DEVICES= for its CPU"
            )
        fewest = [f"parallel.tensor={parallel.tensor}", f"parallel.expert={parallel.expert}"]
        config = used_elsewhere(config, fewest)
    processes = front.world_size() or front.num_processes(front.layout_size(config.parallel))
    resolve(config.parallel, config.model, processes)
    return config, fewest, processes


def evaluate(arguments: list[str]) -> int:
    """Measures a run's last checkpoint on held-out text."""
    asked, own = layout_and_data(arguments)
    evaluation = from_text(EvaluateConfig, run_by_name(own))
    check_evaluate(evaluation)
    config = load_config(evaluation.run)
    path = require_checkpoint(config.run, evaluation.step)
    config, fewest, processes = elsewhere(config, with_tokenizer(path, asked))
    check_draft(evaluation.draft, config)
    prepare = partial(front.ensure_corpus, config.data)
    if front.world_size():
        from train.use.evaluate import run_evaluation

        with front.prepare_among_workers(prepare):
            return run_evaluation(evaluation, config)
    return front.launch("evaluate", [*arguments, *fewest], processes, prepare, None)


def generate(arguments: list[str]) -> int:
    """Writes text with a run's last checkpoint."""
    asked, own = layout_and_data(arguments)
    generation = from_text(GenerateConfig, run_by_name(own))
    check_generate(generation)
    config = load_config(generation.run)
    path = require_checkpoint(config.run, generation.step)
    config, fewest, processes = elsewhere(config, with_tokenizer(path, asked))
    check_decoding(config.parallel)
    check_draft(generation.draft, config)
    needs_corpus = kept_tokenizer(path) is None
    prepare = partial(front.ensure_corpus, config.data) if needs_corpus else lambda: None
    if front.world_size():
        from train.use.generate import run_generation

        with front.prepare_among_workers(prepare):
            return run_generation(generation, config)
    return front.launch("generate", [*arguments, *fewest], processes, prepare, None)


def status(arguments: list[str]) -> int:
    """Says how a run is, whether it runs or not; imports no torch."""
    print_status(load_config(from_text(StatusConfig, run_by_name(arguments)).run))
    return 0


def report(arguments: list[str], recipe_of: Callable[[list[str]], tuple[str, Config | None]]) -> int:
    """Writes a page of some runs; imports no torch.

    Args:
        recipe_of: the recipe that a command line names, and what it comes to.
    """
    asked = from_text(ReportConfig, runs_by_name(arguments))
    check_report(asked)
    configs = [load_config(run) for run in asked.run.each]
    from train.watch.report.page import last_command, read_run, write_page

    runs = [read_run(config, recipe_of(last_command(config.run.path))) for config in configs]
    size = write_page(runs, asked.path)
    print(f"{asked.path}: {size / 1e6:.1f} MB, to open in a browser")
    return 0


def dashboard(arguments: list[str]) -> int:
    """Publishes a view of a W&B project, or writes it to a file."""
    asked = from_text(DashboardConfig, run_by_name(arguments))
    check_output(asked.output)
    config = load_config(asked.run)
    from train.watch.workspace import publish

    print(publish(asked, config))
    return 0


def prepare(arguments: list[str]) -> int:
    """Turns raw text into a corpus of tokenized shards; its options work on one that is there."""
    if arguments and arguments[0] in ("--check", "--join", "--repair"):
        print(_with_corpus(*arguments))
        return 0
    from data.prepare.prepare import prepare as prepare_corpus

    config = from_text(PrepareConfig, arguments)
    path = prepare_corpus(config)
    if config.part is not None:
        print(f"part {config.part} is ready; when all are: ./launch.sh prepare --join {config.output}")
    else:
        print(f"corpus ready: ./launch.sh train data.corpus={path}")
    return 0


def _with_corpus(option: str, *words: str) -> str:
    """What an option of ``prepare`` does with a corpus, in a line."""
    if not words or (len(words) > 1 and option != "--repair"):
        raise ConfigError(f"{option} takes one corpus directory: prepare {option} corpora/mine")
    if option == "--check":
        return check_corpus(words[0])
    if option == "--join":
        from data.prepare.join import join_parts

        return join_parts(words[0])
    from data.prepare.repair import repair

    return repair(words[0], words[1:])


def export(arguments: list[str]) -> int:
    """Writes a run's weights as a Hugging Face checkpoint."""
    config = from_text(ExportConfig, run_by_name(arguments))
    run, checkpoint = check_export(config)
    from train.hub.exporting import export_run

    export_run(config, run, checkpoint)
    print(f"{checkpoint} is now in {config.out}, for transformers, vLLM and SGLang")
    return 0


def import_(arguments: list[str]) -> int:
    """Makes a run of a Hugging Face checkpoint."""
    config = from_text(ImportConfig, run_by_name(arguments))
    run = check_import(config)
    from train.hub.importing import import_run

    path = import_run(config, run)
    origin = config.run.name if config.run.dir == RunConfig.dir else path  # a name is looked for in the new run's place
    print(f"{config.hf} is now {path}: ./launch.sh train run.init={origin} run.name=... data.corpus=...")
    return 0
