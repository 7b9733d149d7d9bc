"""Raw text from files, URLs or the hub, through Hugging Face `datasets`, always streamed."""

import glob
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.config import PrepareConfig
from data.errors import CorpusError, one_line
from data.prepare.documents import Batch, Document, Place, Source, in_batches

# File ending -> the builder of `datasets` that reads it.
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".arrow": "arrow"}
COMPRESSED = (".gz", ".xz", ".bz2")
# What `Dataset.save_to_disk` writes beside its .arrow files.
HF_METADATA = ("dataset_info.json", "state.json", "dataset_dict.json")
# What damaged or unreachable input raises inside `datasets`: files, text and columns, decompression.
READ_ERRORS = (OSError, ValueError, RuntimeError, EOFError, zlib.error)


def dataset_source(config: PrepareConfig) -> Source:
    """The documents of `config.input` in its order. CorpusError at once where no such path exists."""
    arguments, split = _load_arguments(config)

    def batches(begin: Place) -> Iterator[Batch]:
        with _reading(config), _builder_of(arguments) as builder:
            rows = builder.as_streaming_dataset(split)
            if begin.state is not None:
                rows.load_state_dict(begin.state)
            documents = (_document(row, number, config) for number, row in enumerate(rows, begin.number))
            yield from in_batches(documents, begin, rows.state_dict)

    description: dict[str, str | int] = {"input": config.input, "text_column": config.text_column}
    return Source(description, batches, identity=_identity(arguments, split, config))


def _identity(arguments: dict[str, Any], split: str, config: PrepareConfig) -> tuple[Any, ...]:
    """Names, sizes and times of local files; elsewhere the tags or revisions that their servers tell."""
    path = Path(config.input).expanduser()
    if path.exists():
        stats = [(file, file.stat()) for file in _local_files(path, config.input)]
        return tuple([str(file.absolute()), stat.st_size, stat.st_mtime_ns] for file, stat in stats)
    with _reading(config), _builder_of(arguments) as builder:
        files = (builder.config.data_files or {}).get(split)
        return () if files is None else (list(map(str, files)), [list(origin) for origin in files.origin_metadata])


def _load_arguments(config: PrepareConfig) -> tuple[dict[str, Any], str]:
    """Arguments of `load_dataset_builder` for a local path, a URL or a hub name, and the split to read."""
    path = Path(config.input).expanduser()
    if path.exists():
        files = _local_files(path, config.input)
        return _file_arguments(config, [glob.escape(str(file.absolute())) for file in files])
    if "://" in config.input:
        return _file_arguments(config, [config.input])
    if _builder(path) or config.input.startswith(("/", ".", "~")):
        raise CorpusError(f"input={config.input} does not exist: give a file, a directory or a dataset name")
    if config.sample_by != "document":
        raise CorpusError(f"sample_by={config.sample_by} is for .txt files; input={config.input} is a dataset")
    return {"path": config.input, "name": config.dataset_config}, config.dataset_split


def _file_arguments(config: PrepareConfig, files: list[str]) -> tuple[dict[str, Any], str]:
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
    arguments: dict[str, Any] = {"path": builder, "data_files": files}
    if builder == "text":
        arguments["sample_by"] = config.sample_by
    elif config.sample_by != "document":
        raise CorpusError(f"sample_by={config.sample_by} is for .txt files; input={config.input} has others")
    return arguments, "train"


def _local_files(path: Path, setting: str) -> list[Path]:
    """Files with text under `path` sorted by name; `datasets` fails on those of no size."""
    if path.is_file():
        candidates = [path]
    else:
        visible = (p for p in sorted(path.rglob("*")) if not _is_hidden(p.relative_to(path)))
        candidates = [p for p in visible if p.is_file() and _builder(p) and p.name not in HF_METADATA]
    if not candidates:
        raise CorpusError(f"input={setting} holds no file of {', '.join(BUILDERS)}")
    files = [p for p in candidates if p.stat().st_size > 0]
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


@contextmanager
def _reading(config: PrepareConfig) -> Iterator[None]:
    """Whatever fails inside `datasets` becomes a CorpusError that names the input."""
    try:
        yield
    except CorpusError:
        raise
    except READ_ERRORS as error:
        raise CorpusError(f"input={config.input} cannot be read: {one_line(error)}") from error


@contextmanager
def _builder_of(arguments: dict[str, Any]) -> Iterator[Any]:
    # Streaming keeps nothing but lock files, and those go with the temporary directory.
    with tempfile.TemporaryDirectory(prefix="prepare-") as cache, _quiet_datasets() as datasets:
        yield datasets.load_dataset_builder(**arguments, cache_dir=cache)


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
