"""The commands that take no recipe: what is done with a run, and with text. Those that take one stand in `__main__`."""

from dataclasses import replace

from data.config import PrepareConfig
from data.read.corpus import check_corpus
from parallel.topology import resolve
from train import front
from train.arguments import run_by_name
from train.hub.settings import ExportConfig, ImportConfig, check_export, check_import
from train.job.directory import require_checkpoint
from train.settings.commands import EvaluateConfig, GenerateConfig, check_draft, check_evaluate, check_generate
from train.settings.run import load_config
from train.settings.tree import ConfigError, from_text


def evaluate(arguments: list[str]) -> int:
    """Measures a run's last checkpoint on held-out text."""
    evaluation = from_text(EvaluateConfig, run_by_name(arguments))
    check_evaluate(evaluation)
    config = load_config(evaluation.run)
    check_draft(evaluation.draft, config)
    require_checkpoint(config.run, evaluation.step)
    processes = front.world_size() or front.num_processes()
    resolve(config.parallel, config.model, processes)
    if front.world_size():
        from train.use.evaluate import run_evaluation

        return run_evaluation(evaluation, config)
    front.ensure_corpus(config.data)
    return front.launch(["-m", "train", "evaluate", *arguments], processes)


def generate(arguments: list[str]) -> int:
    """Writes text with a run's last checkpoint."""
    generation = from_text(GenerateConfig, run_by_name(arguments))
    check_generate(generation)
    config = load_config(generation.run)
    check_draft(generation.draft, config)
    config = replace(config, parallel=replace(config.parallel, context=1))  # a growing prefix is not cut into parts
    require_checkpoint(config.run, generation.step)
    processes = front.world_size() or front.num_processes(front.layout_size(config.parallel))
    resolve(config.parallel, config.model, processes)
    if front.world_size():
        from train.use.generate import run_generation

        return run_generation(generation, config)
    front.ensure_corpus(config.data)
    return front.launch(["-m", "train", "generate", *arguments], processes)


def prepare(arguments: list[str]) -> int:
    """Turns raw text into a corpus of tokenized shards, or proves one that is there (``--check DIR``)."""
    if arguments[:1] == ["--check"]:
        if len(arguments) != 2:
            raise ConfigError("--check takes one corpus directory: prepare --check corpora/mine")
        print(check_corpus(arguments[1]))
        return 0
    from data.prepare.prepare import prepare as prepare_corpus

    path = prepare_corpus(from_text(PrepareConfig, arguments))
    print(f"corpus ready: ./launch.sh train data.corpus={path}")
    return 0


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
    print(f"{config.hf} is now {path}: ./launch.sh train run.init={config.run.name} run.name=... data.corpus=...")
    return 0
