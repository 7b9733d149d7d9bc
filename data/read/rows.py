"""Rows of a column of files: lists of token ids, or text. The type of the column decides.

A row without text is left out and counted. A row that cannot be used is named by file and place, or skipped and listed.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.config import UNIT_BYTES
from data.errors import CorpusError
from data.read.faults import BrokenUnit, Faults
from data.read.index import Index, built_once, digest_of
from data.read.remote import File, relative_names
from data.secrets import one_line

TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
FACTS_VERSION = 1  # of what the indexes of rows hold


class Counts(NamedTuple):
    """What the files say of the units of a column of lists, and a digest of what says it."""

    rows: np.ndarray  # int64 [units]
    values: np.ndarray  # int64 [units]: token ids; a list that is missing or empty counts as one
    nulls: np.ndarray  # int64 [units]: lists that are missing or empty
    digest: str


class Rows(ABC):
    """Rows of one column of files, in units that are read whole. Picklable: worker processes get a copy.

    Args:
        column: its name; `a.b` is the field b of the column a where no column has that very name.
        skips: go on without rows and files that cannot be used, and list them.
        unit_bytes: how much is read together of files that have no parts of their own.
        cache: directory that keeps what need not be found out by every process.
        chat: rows are conversations, lists of messages, which are passed on as text: their JSON.
        setting: the name of the column's setting, for messages.
    """

    left_out: tuple[str, ...] = ()

    def __init__(
        self,
        path: str,
        files: list[File],
        column: str,
        skips: bool = False,
        unit_bytes: int = UNIT_BYTES,
        setting: str = "data.column",
        cache: Path | None = None,
        chat: bool = False,
    ) -> None:
        self.path, self.files, self.column = path, files, column
        self.skips, self.unit_bytes, self.setting, self.cache = skips, unit_bytes, setting, cache
        self.chat = chat

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def identity(self) -> list[Any]:
        names = relative_names(file.path for file in self.files)
        files = [[name, file.size, file.version] for name, file in zip(names, self.files, strict=True)]
        return ["rows", self.column, self.chat, files]

    @property
    @abstractmethod
    def num_units(self) -> int: ...

    @property
    @abstractmethod
    def sizes(self) -> np.ndarray:
        """int64 [units]: bytes of the column in each, roughly and the same whenever it is asked."""

    @abstractmethod
    def label(self, unit: int) -> str:
        """A unit's file and place, for messages."""

    @abstractmethod
    def file_of(self, unit: int) -> int:
        """The number of the file that a unit lies in."""

    @abstractmethod
    def row_name(self, unit: int, row: int) -> str:
        """Where in its file a row of a unit lies, for messages and for people."""

    @abstractmethod
    def batches(self, unit: int, faults: Faults) -> Iterator[tuple[int, pa.Array]]:
        """The column of one unit, in parts of bounded size where the unit is not: (first row of the part, rows)."""

    def rows(self, unit: int, faults: Faults) -> pa.Array:
        """The column of one unit; dictionaries are spelled out."""
        parts = [rows for _, rows in self.batches(unit, faults)]
        if len(parts) == 1:
            return parts[0]
        return pa.concat_arrays(parts) if parts else pa.array([], pa.string())

    def once(self, what: str, build: Callable[[], Index]) -> Index:
        """What `build` finds out about the files; with a cache only the first process of a job has to."""
        if self.cache is None:
            return build()
        key = digest_of([what, FACTS_VERSION, self.identity, self.unit_bytes, self.skips])
        return built_once(self.cache / "index" / key[:32], build)

    def counts(self) -> Counts | None:
        """How much each unit holds, where the files say it; None where they do not."""
        return None

    def row_label(self, unit: int, row: int) -> str:
        """A row's file and place."""
        return f"{self.files[self.file_of(unit)].shown} ({self.row_name(unit, row)})"

    @cached_property
    def column_type(self) -> pa.DataType:
        """Type of the column, from the first unit that has rows.

        Raises:
            CorpusError: neither text nor lists of whole numbers.
        """
        found = self.first[1].type
        is_tokens = any(test(found) for test in LISTS) and pa.types.is_integer(found.value_type)
        if not is_tokens and not any(test(found) for test in TEXT + BYTES):
            raise self.unusable(str(found))
        return found

    @cached_property
    def is_text(self) -> bool:
        """Whether the column holds text; else it holds token ids."""
        found = self.once("kind", lambda: Index({}, {"is_text": is_text(self.column_type)}))
        return bool(found.notes["is_text"])

    @cached_property
    def first(self) -> tuple[int, pa.Array]:
        """The first unit with a row that is not null, and its rows."""
        for unit in range(self.num_units):
            try:
                rows = self.rows(unit, Faults())
            except BrokenUnit:
                if not self.skips:
                    raise
                continue
            if len(rows) > rows.null_count:
                return unit, rows
        return 0, pa.array([], pa.string())

    def texts(self, rows: pa.Array, unit: int, first: int, faults: Faults) -> list[str | None]:
        """The text of each row, None for one that is missing or skipped; `first` is the number of the first row.

        Raises:
            BrokenUnit: a row holds no UTF-8, and rows that cannot be used are not skipped.
        """
        if len(rows) and not is_text(rows.type):
            raise BrokenUnit(f"{self.label(unit)} holds {rows.type}, and the files before hold text")
        try:
            values = rows.to_pylist()
            return [value.decode() if isinstance(value, bytes) else value for value in values]
        except UnicodeDecodeError:
            return [self._text(rows[row], unit, first + row, faults) for row in range(len(rows))]

    def _text(self, value: pa.Scalar, unit: int, row: int, faults: Faults) -> str | None:
        try:
            text = value.as_py()
            return text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            self.refuse(f"{self.row_label(unit, row)} holds text that is not UTF-8: {one_line(error)}", faults)
            return None

    def refuse(self, message: str, faults: Faults) -> None:
        """Lists what cannot be used, or raises it as BrokenUnit."""
        if not self.skips:
            raise BrokenUnit(message)
        faults.skip(message)

    def usable(self, files: list[File], opened: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """What opening each of the files gives, with its number; files that are broken are listed and left out."""
        for number in range(len(files)):
            try:
                yield number, next(opened)
            except BrokenUnit as error:
                if not self.skips:
                    raise
                self.left_out = (*self.left_out, str(error))

    def unusable(self, found: str) -> CorpusError:
        """The error of a column of a type that is neither text nor tokens."""
        return CorpusError(
            f"{self.setting}={self.column} of {self.path} holds {found}: name a column of text, or of lists of "
            f"token ids"
        )

    def absent(self, where: str, names: Sequence[str]) -> CorpusError:
        """The error of a column that is not there."""
        return CorpusError(f"{self.setting}={self.column} is not in {where}: it has {', '.join(names)}")


def is_text(found: pa.DataType) -> bool:
    """Whether values of a type are text, or bytes that may be."""
    return any(test(found) for test in TEXT + BYTES)


def column_path(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """The names from a column of the schema down to the field that `column` means; None where there is none."""
    if column in schema.names:
        return (column,)
    words = column.split(".")
    for cut in range(len(words) - 1, 0, -1):
        name = ".".join(words[:cut])
        if name in schema.names and pa.types.is_struct(schema.field(name).type):
            rest = column_path(pa.schema(list(schema.field(name).type)), ".".join(words[cut:]))
            return None if rest is None else (name, *rest)
    return None


def take_column(table: pa.Table, path: tuple[str, ...], chat: bool = False) -> pa.Array:
    """A column, or a field of it, as one array; dictionaries spelled out, and conversations as JSON."""
    column = table.column(path[0])
    for name in path[1:]:
        column = pc.struct_field(column, name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    array = column.combine_chunks()
    array = array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)
    if not chat or is_text(array.type):
        return array
    return pa.array([None if row is None else json.dumps(row, default=str) for row in array.to_pylist()], pa.string())
