"""Which reader reads files of which ending."""

from collections.abc import Callable
from pathlib import Path

from data.config import TRAIN_SPLIT, UNIT_BYTES
from data.errors import CorpusError
from data.read.arrow_files import ArrowReader
from data.read.compressed import ending_of
from data.read.json_files import JsonReader
from data.read.listing import ROW_ENDINGS, list_files
from data.read.parquet_files import ParquetReader
from data.read.rows import RowReader
from data.text.tokenizer import Tokenizer

KINDS: tuple[Callable[..., RowReader], ...] = (ParquetReader, JsonReader, JsonReader, ArrowReader)
READERS = dict(zip(ROW_ENDINGS, KINDS, strict=True))


def open_rows(
    path: str,
    column: str,
    tokenizer: Tokenizer,
    split: str = TRAIN_SPLIT,
    skips: bool = False,
    unit_bytes: int = UNIT_BYTES,
    cache: Path | None = None,
) -> RowReader:
    """The reader of the files of a path.

    Args:
        split: of those that the files' names tell apart.
        skips: leave out rows and files that cannot be used.
        unit_bytes: how much of JSON lines and arrow files is read together.
        cache: directory that keeps what need not be found out by every process.
    Raises:
        CorpusError: there is none, or they are of several kinds.
    """
    listing = list_files(path, ROW_ENDINGS, split)
    readers = {READERS[ending_of(file.path)] for file in listing.files}
    if len(readers) > 1:
        endings = sorted({ending_of(file.path) for file in listing.files})
        raise CorpusError(f"data.corpus={path} mixes {' and '.join(endings)}: give files of one kind")
    reader = readers.pop()(path, listing.files, column, tokenizer, skips, unit_bytes, cache=cache)
    reader.left_out = (*listing.left_out, *reader.left_out)
    return reader
