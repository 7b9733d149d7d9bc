"""Raw text from files, URLs or the hub, through Hugging Face `datasets`, always streamed."""

import glob
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.config import PrepareConfig
from data.documents import Document, Source
from data.errors import CorpusError, one_line

# File ending -> the builder of `datasets` that reads it.
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".arrow": "arrow"}
COMPRESSED = (".gz", ".xz", ".bz2")
# What `Dataset.save_to_disk` writes beside its .arrow files.
HF_METADATA = ("dataset_info.json", "state.json", "dataset_dict.json")
# What damaged or unreachable input raises inside `datasets`: files, text and columns, decompression.
READ_ERRORS = (OSError, ValueError, RuntimeError, EOFError, zlib.error)


def dataset_source(config: PrepareConfig) -> Source:
    """The documents of `config.input` in its order. CorpusError at once where no such path exists."""
    arguments = _load_arguments(config)

    def documents() -> Iterator[Document]:
        for number, row in enumerate(_rows(arguments, config)):
            yield _document(row, number, config)

    description = {"input": config.input, "text_column": config.text_column}
    return Source(description, documents)


def _load_arguments(config: PrepareConfig) -> dict[str, Any]:
    """Arguments of `load_dataset` for a local path, a URL or a hub name."""
    path = Path(config.input).expanduser()
    if path.exists():
        return _file_arguments(config, _local_files(path, config.input))
    if "://" in config.input:
        return _file_arguments(config, [config.input])
    if _builder(path) or config.input.startswith(("/", ".", "~")):
        raise CorpusError(f"input={config.input} does not exist: give a file, a directory or a dataset name")
    if config.sample_by != "document":
        raise CorpusError(f"sample_by={config.sample_by} is for .txt files; input={config.input} is a dataset")
    return {"path": config.input, "name": config.dataset_config, "split": config.dataset_split}


def _file_arguments(config: PrepareConfig, files: list[str]) -> dict[str, Any]:
    if config.dataset_config is not None or config.dataset_split != "train":
        raise CorpusError(
            f"dataset_config={config.dataset_config} dataset_split={config.dataset_split} are for datasets "
            f"of the hub: leave them out for the files of input={config.input}"
        )
    builders = {_builder(Path(file)) for file in files}
    if len(builders) != 1 or None in builders:
        endings = " and ".join(sorted({Path(file).suffix or "none" for file in files}))
        raise CorpusError(f"input={config.input} has the endings {endings}: give one of {', '.join(BUILDERS)}")
    (builder,) = builders
    arguments: dict[str, Any] = {"path": builder, "data_files": files, "split": "train"}
    if builder == "text":
        arguments["sample_by"] = config.sample_by
    elif config.sample_by != "document":
        raise CorpusError(f"sample_by={config.sample_by} is for .txt files; input={config.input} has others")
    return arguments


def _local_files(path: Path, setting: str) -> list[str]:
    """Files with text under `path` sorted by name; `datasets` fails on those of no size."""
    if path.is_file():
        candidates = [path]
    else:
        visible = (p for p in sorted(path.rglob("*")) if not _is_hidden(p.relative_to(path)))
        candidates = [p for p in visible if p.is_file() and _builder(p) and p.name not in HF_METADATA]
    if not candidates:
        raise CorpusError(f"input={setting} holds no file of {', '.join(BUILDERS)}")
    files = [glob.escape(str(p.absolute())) for p in candidates if p.stat().st_size > 0]
    if not files:
        raise CorpusError(f"input={setting} is empty: there is no text to prepare")
    return files


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _builder(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def _rows(arguments: dict[str, Any], config: PrepareConfig) -> Iterator[dict[str, Any]]:
    rows = _stream(arguments)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except READ_ERRORS as error:
            raise CorpusError(f"input={config.input} cannot be read: {one_line(error)}") from error
        yield row


def _stream(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # Streaming keeps nothing but lock files, and those go with the temporary directory.
    with tempfile.TemporaryDirectory(prefix="prepare-") as cache, _quiet_datasets() as datasets:
        yield from datasets.load_dataset(**arguments, streaming=True, cache_dir=cache)


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """`datasets` without its bars and messages: errors reach the user once, as a CorpusError."""
    import datasets  # here: it takes seconds to import, and training on a prepared corpus never needs it

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


def _document(row: dict[str, Any], number: int, config: PrepareConfig) -> Document:
    if config.text_column not in row:
        raise CorpusError(
            f"text_column={config.text_column} is not in {config.input}: it has {', '.join(map(str, row))}"
        )
    text = row[config.text_column]
    if not isinstance(text, str):
        raise CorpusError(
            f"text_column={config.text_column} holds {type(text).__name__} instead of text "
            f"in row {number} of {config.input}"
        )
    # Split by text: a document that occurs twice never stands in both splits.
    return Document(text, name=f"row {number}", split_key=text)
