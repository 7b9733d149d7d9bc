"""Which class reads files of which ending."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from data.config import UNIT_BYTES
from data.errors import CorpusError
from data.read.arrow_files import ArrowRows
from data.read.endings import ROW_ENDINGS, ending_of
from data.read.json_files import JsonRows
from data.read.listing import Listing
from data.read.parquet_files import ParquetRows
from data.read.rows import Rows
from data.read.text_files import TextRows

KINDS: tuple[Callable[..., Rows], ...] = (ParquetRows, JsonRows, JsonRows, ArrowRows)
READERS = dict(zip(ROW_ENDINGS, KINDS, strict=True))
TEXT_ENDING = ".txt"


def open_rows(
    path: str,
    listing: Listing,
    column: str,
    skips: bool = False,
    unit_bytes: int = UNIT_BYTES,
    setting: str = "data.column",
    sample_by: str = "document",
    cache: Path | None = None,
    chat: bool = False,
) -> Rows:
    """The rows of a column of listed files.

    Args:
        path: what the user calls them.
        skips: leave out rows and files that cannot be used.
        unit_bytes: how much of JSON lines and arrow files is read together.
        setting: the name of the column's setting, for messages.
        sample_by: what a document is in plain text.
        cache: directory that keeps what need not be found out by every process.
        chat: rows are conversations.
    Raises:
        CorpusError: they are of several kinds.
    """
    endings = {ending_of(file.path) for file in listing.files}
    kinds = READERS | {TEXT_ENDING: partial(TextRows, sample_by=sample_by)}
    if len({kinds[ending] for ending in endings}) > 1:
        raise CorpusError(f"{path} mixes {_and(endings)}: give files of one kind")
    rows = kinds[endings.pop()](path, listing.files, column, skips, unit_bytes, setting, cache, chat)
    rows.left_out = (*listing.left_out, *rows.left_out)
    return rows


def _and(endings: Iterable[str]) -> str:
    return " and ".join(sorted(endings))
