"""Parquet files: a unit is a row group, fetched by itself."""

import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.progress import count_bar
from data.read.faults import BrokenUnit, Faults
from data.read.index import Index
from data.read.remote import File, RangeFile, fetch
from data.read.rows import Counts, Rows, column_path, take_column
from data.secrets import one_line

FOOTER_BYTES = 2**16  # fetched at once from the end of a parquet file; longer footers take a second fetch
FOOTER_THREADS = 16


class ParquetRows(Rows):
    """Footers tell how many values each row group holds, so token lists are never read to be counted."""

    def __init__(self, path: str, files: list[File], *arguments: Any, **settings: Any) -> None:
        super().__init__(path, files, *arguments, **settings)
        index = self.once("footers", self._read_footers)
        self._groups = index.arrays["groups"]  # int64 [units, 3]: file, group within it, first row within the file
        self._counts = index.arrays["counts"]  # int64 [units, 3]: rows, values, lists without values (-1: unknown)
        self._sizes = index.arrays["sizes"]  # int64 [units]: bytes of the column, not compressed
        self._path_of = index.arrays["path_of"]  # int64 [files]
        self._paths: list[list[str]] = index.notes["paths"]  # names down to the column
        self._digest: str = index.notes["digest"]
        self.left_out = tuple(index.notes["left_out"])

    def _read_footers(self) -> Index:
        """What the footers of all files say, which one process of a job asks for."""
        files, digest = self.files, sha256()
        groups: list[tuple[int, int, int]] = []
        counts: list[tuple[int, int, int]] = []
        sizes: list[int] = []
        paths: dict[tuple[str, ...], int] = {}
        path_of = np.zeros(len(files), dtype=np.int64)
        with ThreadPoolExecutor(FOOTER_THREADS) as pool, count_bar(f"footers of {self.path}", len(files)) as bar:
            footers: list[Future[tuple[bytes, pq.FileMetaData]]] = [pool.submit(_footer, file) for file in files]
            for number, (footer, metadata) in self.usable(files, map(Future.result, footers)):
                digest.update(footer)
                path = self._column_path(number, metadata)
                path_of[number] = paths.setdefault(path, len(paths))
                for group, first, count, size in _row_groups(metadata, ".".join(path)):
                    groups.append((number, group, first))
                    counts.append(count)
                    sizes.append(size)
                bar.update()
        arrays = {
            "groups": np.array(groups, dtype=np.int64).reshape(-1, 3),
            "counts": np.array(counts, dtype=np.int64).reshape(-1, 3),
            "sizes": np.array(sizes, dtype=np.int64),
            "path_of": path_of,
        }
        notes = {"paths": [list(path) for path in paths], "digest": digest.hexdigest(), "left_out": self.left_out}
        return Index(arrays, notes)

    def _column_path(self, number: int, metadata: pq.FileMetaData) -> tuple[str, ...]:
        schema = metadata.schema.to_arrow_schema()
        path = column_path(schema, self.column)
        if path is None:
            raise self.absent(self.files[number].shown, sorted(schema.names))
        return path

    @property
    def num_units(self) -> int:
        return len(self._groups)

    @property
    def sizes(self) -> np.ndarray:
        return self._sizes

    def file_of(self, unit: int) -> int:
        return int(self._groups[unit][0])

    def label(self, unit: int) -> str:
        number, group, _ = self._groups[unit].tolist()
        return f"{self.files[number].shown} (row group {group})"

    def row_name(self, unit: int, row: int) -> str:
        return f"row group {self._groups[unit][1]}, row {row}"

    def batches(self, unit: int, faults: Faults) -> Iterator[tuple[int, pa.Array]]:
        number, group, _ = self._groups[unit].tolist()
        file, path = self.files[number], tuple(self._paths[self._path_of[number]])
        try:
            parquet = pq.ParquetFile(RangeFile(file, faults), metadata=_metadata(file), page_checksum_verification=True)
            table = parquet.read_row_group(group, columns=[".".join(path)], use_threads=False)
            rows = take_column(table, path, self.chat)
        except (pa.ArrowException, OSError) as error:
            raise BrokenUnit(f"{self.label(unit)} is corrupt: {one_line(error)}") from error
        yield 0, rows

    def counts(self) -> Counts | None:
        rows, values, nulls = self._counts.T
        return None if (nulls < 0).any() else Counts(rows, values, nulls, self._digest)


def _row_groups(metadata: pq.FileMetaData, dotted: str) -> Iterator[tuple[int, int, tuple[int, int, int], int]]:
    """(number, first row, (rows, values, lists without values), bytes) of each row group of a file."""
    leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    own = [i for i, leaf in enumerate(leaves) if leaf == dotted or leaf.startswith(f"{dotted}.")]
    first = 0
    for group in range(metadata.num_row_groups):
        chunk, rows = metadata.row_group(group).column(own[0]), metadata.row_group(group).num_rows
        size = sum(metadata.row_group(group).column(leaf).total_uncompressed_size for leaf in own)
        nulls = chunk.statistics.null_count if chunk.statistics and chunk.statistics.has_null_count else -1
        yield group, first, (rows, chunk.num_values, nulls), size
        first += rows


def _footer(file: File) -> tuple[bytes, pq.FileMetaData]:
    """The footer of a parquet file and what it says. BrokenUnit names the file."""
    faults = Faults()
    tail = fetch(file.path, max(0, file.size - FOOTER_BYTES), file.size, faults)
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        raise BrokenUnit(f"{file.shown} is not a parquet file, or is cut off")
    length = struct.unpack("<I", tail[-8:-4])[0] + 8
    if length > file.size:
        raise BrokenUnit(f"{file.shown} is not a parquet file, or is cut off")
    if length > len(tail):
        tail = fetch(file.path, file.size - length, file.size, faults)
    footer = tail[-length:]
    try:
        return footer, pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    except (pa.ArrowException, OSError) as error:
        raise BrokenUnit(f"{file.shown} has a corrupt footer: {one_line(error)}") from error


@lru_cache(maxsize=64)
def _metadata(file: File) -> pq.FileMetaData:
    return _footer(file)[1]
