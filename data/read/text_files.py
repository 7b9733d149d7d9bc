"""Plain text files: a document is a file, a paragraph or a line."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from data.read.compressed import unpacked
from data.read.faults import BrokenUnit, Faults
from data.read.remote import File
from data.read.rows import Rows
from data.secrets import one_line

SEPARATORS = {"paragraph": "\n\n", "line": "\n"}


class TextRows(Rows):
    """A unit is a file. Files have no columns, so none is asked for."""

    def __init__(self, path: str, files: list[File], *arguments: Any, sample_by: str, **settings: Any) -> None:
        super().__init__(path, files, *arguments, **settings)
        self._sample_by = sample_by

    @property
    def identity(self) -> list[Any]:
        return [*super().identity, self._sample_by]

    @property
    def num_units(self) -> int:
        return len(self.files)

    @property
    def sizes(self) -> np.ndarray:
        return np.array([file.size for file in self.files], dtype=np.int64)

    def file_of(self, unit: int) -> int:
        return unit

    def label(self, unit: int) -> str:
        return self.files[unit].shown

    def row_name(self, unit: int, row: int) -> str:
        return "all of it" if self._sample_by == "document" else f"{self._sample_by} {row}"

    @property
    def column_type(self) -> pa.DataType:
        return pa.string()

    def batches(self, unit: int, faults: Faults) -> Iterator[tuple[int, pa.Array]]:
        with unpacked(self.files[unit], faults) as stream:
            content = stream.read()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BrokenUnit(f"{self.label(unit)} holds text that is not UTF-8: {one_line(error)}") from error
        if self._sample_by == "document":
            yield 0, pa.array([text], pa.string())
            return
        texts = text.removesuffix("\n").split(SEPARATORS[self._sample_by])
        yield 0, pa.array(texts, pa.large_string())
