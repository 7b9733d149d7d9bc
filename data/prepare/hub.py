"""Datasets of the Hugging Face hub by name: `datasets` says which files a split of one has."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.config import PrepareConfig
from data.errors import CorpusError
from data.read.endings import ROW_ENDINGS, ending_of
from data.read.remote import File, find, is_url
from data.secrets import one_line

# What an unreachable or unknown dataset raises inside `datasets`.
HUB_ERRORS = (OSError, ValueError, RuntimeError)


def is_dataset_name(path: str) -> bool:
    """Whether an input is the name of a dataset rather than a path, which would be there or look like one."""
    if is_url(path) or path.startswith(("/", ".", "~")) or Path(path).exists():
        return False
    return ending_of(path) not in (*ROW_ENDINGS, ".txt") and not any(mark in path for mark in "*?[")


def dataset_files(config: PrepareConfig) -> list[File]:
    """The files of a split of a dataset on the hub.

    Raises:
        CorpusError: it cannot be reached, has no such split, or is stored in files of another kind.
    """
    if config.sample_by != "document":
        raise CorpusError(f"sample_by={config.sample_by} is for .txt files; input={config.input} is a dataset")
    try:
        with tempfile.TemporaryDirectory(prefix="prepare-") as cache, _quiet_datasets() as datasets:
            builder = datasets.load_dataset_builder(config.input, config.dataset_config, cache_dir=cache)
            splits = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
    except HUB_ERRORS as error:
        raise CorpusError(f"input={config.input} cannot be read: {one_line(error)}") from error
    if config.dataset_split not in splits:
        known = ", ".join(sorted(splits)) or "none"
        raise CorpusError(f"dataset_split={config.dataset_split} is not in input={config.input}: it has {known}")
    files = [file for url in splits[config.dataset_split] for file in find(url, "input").files]
    other = sorted({ending_of(file.path) for file in files} - {*ROW_ENDINGS, ".txt"})
    if other:
        raise CorpusError(
            f"input={config.input} is stored as {', '.join(other)}: only {', '.join(ROW_ENDINGS)} are read"
        )
    return sorted(files, key=lambda file: file.path)


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """`datasets` without its bars and messages: errors reach the user once, as a CorpusError."""
    import datasets  # here: it takes seconds to import, and only names of the hub need it

    verbosity = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
