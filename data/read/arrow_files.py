"""Arrow files, as `datasets` saves them: mapped into memory."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from data.errors import CorpusError
from data.read.faults import BrokenUnit, Faults
from data.read.index import Index
from data.read.remote import File, is_url
from data.read.rows import Rows, column_path, take_column
from data.secrets import one_line


class ArrowRows(Rows):
    """A unit is rows of about `unit_bytes` together."""

    def __init__(self, path: str, files: list[File], *arguments: Any, **settings: Any) -> None:
        super().__init__(path, files, *arguments, **settings)
        if any(is_url(file.path) for file in files):
            raise CorpusError(f"{path} is arrow, which is mapped into memory: copy it to a disk, or use parquet")
        index = self.once("windows", self._cut)
        self._windows = index.arrays["windows"]  # int64 [units, 3]: file, first row, rows
        self.left_out = tuple(index.notes["left_out"])

    def _cut(self) -> Index:
        windows: list[tuple[int, int, int]] = []
        for number, table in self.usable(self.files, map(_arrow_table, self.files)):
            column = table.column(self._path_in(self.files[number])[0])
            step = max(1, self.unit_bytes * len(table) // max(1, column.nbytes))
            windows += [(number, start, step) for start in range(0, len(table), step)]
        return Index({"windows": np.array(windows, dtype=np.int64).reshape(-1, 3)}, {"left_out": self.left_out})

    @property
    def num_units(self) -> int:
        return len(self._windows)

    @property
    def sizes(self) -> np.ndarray:
        return np.full(self.num_units, self.unit_bytes, dtype=np.int64)

    def file_of(self, unit: int) -> int:
        return int(self._windows[unit][0])

    def label(self, unit: int) -> str:
        number, start, _ = self._windows[unit].tolist()
        return f"{self.files[number].shown} (from row {start})"

    def row_name(self, unit: int, row: int) -> str:
        return f"row {self._windows[unit][1] + row}"

    def batches(self, unit: int, faults: Faults) -> Iterator[tuple[int, pa.Array]]:
        number, start, rows = self._windows[unit].tolist()
        file = self.files[number]
        yield 0, take_column(_arrow_table(file).slice(start, rows), self._path_in(file), self.chat)

    def _path_in(self, file: File) -> tuple[str, ...]:
        schema = _arrow_table(file).schema
        path = column_path(schema, self.column)
        if path is None:
            raise self.absent(file.shown, schema.names)
        return path


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
        raise BrokenUnit(f"{file.shown} is corrupt: {one_line(error)}") from error
