"""Readers of parquet, arrow and JSON-lines files: which rows make a unit, and how its bytes are fetched."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from data.errors import CorpusError, one_line
from data.progress import count_bar
from data.read.faults import BrokenUnit, Faults
from data.read.remote import File, RangeFile, fetch, is_url
from data.read.rows import RowReader
from data.read.units import Sizes
from data.text.tokenizer import Tokenizer

FOOTER_BYTES = 2**16  # fetched at once from the end of a parquet file; longer footers take a second fetch
FOOTER_THREADS = 16
JSONL_UNIT_BYTES = 2**24
ARROW_UNIT_ROWS = 4096


class ParquetReader(RowReader):
    """A unit is a row group. Footers tell how many values each holds, so token lists are never read to be counted."""

    def __init__(self, path: str, files: list[File], column: str, tokenizer: Tokenizer) -> None:
        super().__init__(path, files, column, tokenizer)
        self._groups: list[tuple[int, int]] = []  # file, group within it
        self._counts: list[tuple[int, int, int]] = []  # rows, values, lists without values (-1: not written down)
        digest = sha256()
        with ThreadPoolExecutor(FOOTER_THREADS) as pool, count_bar(f"footers of {path}", len(files)) as bar:
            for number, (footer, metadata) in enumerate(pool.map(_footer, files)):
                digest.update(footer)
                self._note(number, metadata)
                bar.update()
        self._digest = digest.hexdigest()

    def _note(self, number: int, metadata: pq.FileMetaData) -> None:
        leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        own = [i for i, leaf in enumerate(leaves) if leaf.split(".")[0] == self.column]
        if not own:
            names = sorted({leaf.split(".")[0] for leaf in leaves})
            where = self.files[number].path
            raise CorpusError(f"data.column={self.column} is not in {where}: it has {', '.join(names)}")
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(own[0])
            nulls = chunk.statistics.null_count if chunk.statistics and chunk.statistics.has_null_count else -1
            self._groups.append((number, group))
            self._counts.append((metadata.row_group(group).num_rows, chunk.num_values, nulls))

    @property
    def num_units(self) -> int:
        return len(self._groups)

    def label(self, unit: int) -> str:
        number, group = self._groups[unit]
        return f"{self.files[number].path} (row group {group})"

    def rows(self, unit: int, faults: Faults) -> pa.Array:
        number, group = self._groups[unit]
        file = self.files[number]
        try:
            parquet = pq.ParquetFile(RangeFile(file, faults), metadata=_metadata(file), page_checksum_verification=True)
            column = parquet.read_row_group(group, columns=[self.column], use_threads=False).column(self.column)
        except (pa.ArrowException, OSError) as error:
            raise BrokenUnit(f"{self.label(unit)} is corrupt: {one_line(error)}") from error
        return column.combine_chunks()

    def known(self) -> Sizes | None:
        rows, values, nulls = np.array(self._counts, dtype=np.int64).reshape(-1, 3).T
        if self.is_text or (nulls < 0).any():
            return None
        # A list that is missing or empty counts as one value, which is null.
        documents = rows - nulls
        tokens = values - nulls + (documents if self.appends_eod else 0)
        return Sizes(documents, tokens, nulls, self._digest)


class JsonlReader(RowReader):
    """A unit is what begins in a piece of JSONL_UNIT_BYTES, to the end of its last line."""

    def __init__(self, path: str, files: list[File], column: str, tokenizer: Tokenizer) -> None:
        super().__init__(path, files, column, tokenizer)
        self._pieces = [
            (number, start) for number, file in enumerate(files) for start in range(0, file.size, JSONL_UNIT_BYTES)
        ]

    @property
    def num_units(self) -> int:
        return len(self._pieces)

    def label(self, unit: int) -> str:
        number, start = self._pieces[unit]
        return f"{self.files[number].path} (from byte {start})"

    def rows(self, unit: int, faults: Faults) -> pa.Array:
        number, start = self._pieces[unit]
        content = self._lines(self.files[number], start, faults)
        if not content.strip():
            return pa.array([], pa.string())
        try:
            options = pj.ReadOptions(block_size=max(2**20, len(content) + 1))
            table = pj.read_json(io.BytesIO(content), options)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise BrokenUnit(f"{self.label(unit)} is not JSON lines: {one_line(error)}") from error
        if self.column not in table.column_names:
            raise CorpusError(
                f"data.column={self.column} is not in {self.label(unit)}: it has {', '.join(table.column_names)}"
            )
        return table.column(self.column).combine_chunks()

    def _lines(self, file: File, start: int, faults: Faults) -> bytes:
        """The lines that begin in [start, start + JSONL_UNIT_BYTES)."""
        stop = min(file.size, start + JSONL_UNIT_BYTES)
        begin = max(0, start - 1)
        content = fetch(file.path, begin, stop, faults)
        if start:  # a line that began before belongs to the piece before, unless it ended just there
            border = content.find(b"\n")
            if border < 0:
                return b""
            content = content[border + 1 :]
            if not content:
                return b""
        while stop < file.size and not content.endswith(b"\n"):
            more = fetch(file.path, stop, min(file.size, stop + 2**16), faults)
            border = more.find(b"\n")
            content += more if border < 0 else more[: border + 1]
            stop += len(more)
        return content


class ArrowReader(RowReader):
    """A unit is ARROW_UNIT_ROWS rows of a memory map, as `datasets` saves them."""

    def __init__(self, path: str, files: list[File], column: str, tokenizer: Tokenizer) -> None:
        super().__init__(path, files, column, tokenizer)
        if any(is_url(file.path) for file in files):
            raise CorpusError(
                f"data.corpus={path} is arrow, which is mapped into memory: copy it to a disk, or use parquet"
            )
        self._windows = [
            (number, start)
            for number, file in enumerate(files)
            for start in range(0, len(self._column(file)), ARROW_UNIT_ROWS)
        ]

    @property
    def num_units(self) -> int:
        return len(self._windows)

    def label(self, unit: int) -> str:
        number, start = self._windows[unit]
        return f"{self.files[number].path} (from row {start})"

    def rows(self, unit: int, faults: Faults) -> pa.Array:
        number, start = self._windows[unit]
        return self._column(self.files[number]).slice(start, ARROW_UNIT_ROWS).combine_chunks()

    def _column(self, file: File) -> pa.ChunkedArray:
        table = _arrow_table(file)
        if self.column not in table.column_names:
            raise CorpusError(
                f"data.column={self.column} is not in {file.path}: it has {', '.join(table.column_names)}"
            )
        return table.column(self.column)


@lru_cache(maxsize=64)
def _arrow_table(file: File) -> pa.Table:
    def read() -> pa.Table:
        source = pa.memory_map(file.path)
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_file(source).read_all()

    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise BrokenUnit(f"{file.path} is corrupt: {one_line(error)}") from error


def _footer(file: File) -> tuple[bytes, pq.FileMetaData]:
    """The footer of a parquet file and what it says. BrokenUnit names the file."""
    faults = Faults()
    tail = fetch(file.path, max(0, file.size - FOOTER_BYTES), file.size, faults)
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        raise BrokenUnit(f"{file.path} is not a parquet file, or is cut off")
    length = struct.unpack("<I", tail[-8:-4])[0] + 8
    if length > file.size:
        raise BrokenUnit(f"{file.path} is not a parquet file, or is cut off")
    if length > len(tail):
        tail = fetch(file.path, file.size - length, file.size, faults)
    footer = tail[-length:]
    try:
        return footer, pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    except (pa.ArrowException, OSError) as error:
        raise BrokenUnit(f"{file.path} has a corrupt footer: {one_line(error)}") from error


@lru_cache(maxsize=64)
def _metadata(file: File) -> pq.FileMetaData:
    return _footer(file)[1]
