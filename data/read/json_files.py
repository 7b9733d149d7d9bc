"""JSON lines, and `.json` files that hold lines or one list of objects.

Only the column that is asked for is parsed, so others may hold what they like. Arrow parses; where it cannot, the
lines are read one by one, so that the one at fault is named.
"""

import io
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj

from data.errors import CorpusError
from data.read.compressed import line_blocks, unpacked
from data.read.endings import ending_of, is_compressed
from data.read.faults import BrokenUnit, Faults
from data.read.index import Index
from data.read.remote import File, fetch
from data.read.rows import Rows, take_column
from data.secrets import one_line

PACKED = 3  # bytes of text in a byte of a compressed file, roughly
COUNTED_BYTES = 2**30  # lines of a file are counted so far when one is named; further on its byte has to do


class JsonRows(Rows):
    """A unit is what begins in a piece of `unit_bytes`, to the end of its last line; what is compressed is whole."""

    def __init__(self, path: str, files: list[File], *arguments: Any, **settings: Any) -> None:
        super().__init__(path, files, *arguments, **settings)
        index = self.once("pieces", self._cut)
        self._pieces = index.arrays["pieces"]  # int64 [units, 2]: file, first byte
        self._lists = set(index.notes["lists"])  # files that hold one list of objects
        self._wholes = self._lists | {number for number, file in enumerate(files) if is_compressed(file.path)}
        self.left_out = tuple(index.notes["left_out"])

    def _cut(self) -> Index:
        lists: list[int] = []
        pieces: list[tuple[int, int]] = []
        for number, is_list in self.usable(self.files, map(_is_list, self.files)):
            lists += [number] if is_list else []
            stop = 1 if is_list or is_compressed(self.files[number].path) else self.files[number].size
            pieces += [(number, start) for start in range(0, stop, self.unit_bytes)]
        arrays = {"pieces": np.array(pieces, dtype=np.int64).reshape(-1, 2)}
        return Index(arrays, {"lists": lists, "left_out": self.left_out})

    @property
    def num_units(self) -> int:
        return len(self._pieces)

    @property
    def sizes(self) -> np.ndarray:
        numbers, starts = self._pieces.T
        lengths = np.array([file.size for file in self.files], dtype=np.int64)
        parts = np.minimum(self.unit_bytes, lengths[numbers] - starts)
        return np.where(np.isin(numbers, list(self._wholes)), PACKED * lengths[numbers], parts)

    def file_of(self, unit: int) -> int:
        return int(self._pieces[unit][0])

    def label(self, unit: int) -> str:
        number, start = self._pieces[unit].tolist()
        return f"{self.files[number].shown} (from byte {start})"

    def row_name(self, unit: int, row: int) -> str:
        start = int(self._pieces[unit][1])
        return f"row {row} from byte {start}" if start else f"row {row}"

    def batches(self, unit: int, faults: Faults) -> Iterator[tuple[int, pa.Array]]:
        first = 0
        for block, line in self._blocks(unit, faults):
            if not block.strip():
                continue
            rows = self._parsed(block, unit, line, faults)
            yield first, rows
            first += len(rows)

    def _blocks(self, unit: int, faults: Faults) -> Iterator[tuple[bytes, int]]:
        """Whole lines of a unit, and the number of lines of the unit before them."""
        number, start = self._pieces[unit].tolist()
        file, line = self.files[number], 0
        if number in self._lists:
            yield from self._list_as_lines(file, faults)
        elif is_compressed(file.path):
            for block in line_blocks(file, self.unit_bytes, faults):
                yield block, line
                line += block.count(b"\n")
        else:
            yield self._lines(file, start, faults), 0

    def _list_as_lines(self, file: File, faults: Faults) -> Iterator[tuple[bytes, int]]:
        with unpacked(file, faults) as stream:
            content = stream.read()
        try:
            objects = json.loads(content)
        except ValueError as error:
            raise BrokenUnit(f"{file.shown} is not a JSON list: {one_line(error)}") from error
        yield b"".join(json.dumps(one).encode() + b"\n" for one in objects), 0

    @cached_property
    def _schema(self) -> tuple[pa.Schema, tuple[str, ...]]:
        """What arrow looks for, and the names down to the column."""
        notes = self.once("column", self._find_column).notes
        return _nested_schema(notes["path"], pa.string() if notes["is_text"] else pa.list_(pa.int64())), tuple(
            notes["path"]
        )

    def _find_column(self) -> Index:
        """From the first row that has the column."""
        seen, other = list[str](), ""
        for row in self._objects():
            seen = seen or list(row)
            path, value = find_value(row, self.column)
            kind = _kind(value, self.chat)
            if kind is not None and path is not None:
                return Index({}, {"path": path, "is_text": kind == pa.string()})
            other = other or ("" if value is None else type(value).__name__)
        if not seen:  # no line can be read: the first is named when it is parsed
            return Index({}, {"path": [self.column], "is_text": True})
        raise self.unusable(other) if other else self._nothing(seen)

    def _objects(self) -> Iterator[dict[str, Any]]:
        """Every row that can be read."""
        for unit in range(self.num_units):
            try:
                for block, _ in self._blocks(unit, Faults()):
                    yield from filter(None, map(_object, block.split(b"\n")))
            except BrokenUnit:
                if not self.skips:
                    raise

    def _nothing(self, names: list[str]) -> CorpusError:
        if names and self.column not in names:
            return self.absent(self.path, names)
        return CorpusError(f"{self.setting}={self.column} of {self.path} holds nothing: there is no row with it")

    def _parsed(self, block: bytes, unit: int, line: int, faults: Faults) -> pa.Array:
        """The column of whole lines that begin so many lines after the beginning of the unit."""
        schema, path = self._schema
        read = pj.ReadOptions(block_size=max(2**20, len(block) + 1), use_threads=False)
        parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            if self.chat:  # messages may have fields of any kind, which arrow's tables do not take
                raise pa.ArrowInvalid("is not read by arrow")
            rows = take_column(pj.read_json(io.BytesIO(block), read, parse), path)
            rows.validate(full=True)  # arrow takes bytes that are no UTF-8 for text until then
        except (pa.ArrowException, UnicodeDecodeError):
            rows = self._parsed_one_by_one(block, unit, line, faults)
        if rows.null_count == len(rows):
            first = next((row for row in map(_object, block.split(b"\n")) if row), {})
            if first and find_value(first, self.column)[0] is None:
                raise self.absent(self.label(unit), list(first))
        return rows

    def _parsed_one_by_one(self, block: bytes, unit: int, line: int, faults: Faults) -> pa.Array:
        kind = _leaf(self._schema[0].field(0).type)
        values: list[Any] = []
        for number, text in enumerate(block.split(b"\n"), line):
            if not text.strip():
                continue
            try:
                values.append(_value(text, self.column, kind, self.chat))
            except ValueError as error:
                self.refuse(f"{self._line_label(unit, number)} {one_line(error)}", faults)
                values.append(None)
        return pa.array(values, kind)

    def _line_label(self, unit: int, line: int) -> str:
        number, start = self._pieces[unit].tolist()
        file = self.files[number]
        if start > COUNTED_BYTES:
            return f"{file.shown} (line {line + 1} from byte {start})"
        begins = 0 if not start else fetch(file.path, 0, start, Faults()).count(b"\n")
        if start and fetch(file.path, start - 1, start, Faults()) != b"\n":
            begins += 1  # the line that this piece begins within belongs to the one before
        return f"{file.shown} (line {begins + line + 1})"

    def _lines(self, file: File, start: int, faults: Faults) -> bytes:
        """The lines that begin in [start, start + unit_bytes)."""
        stop = min(file.size, start + self.unit_bytes)
        begin = max(0, start - 1)
        content = fetch(file.path, begin, stop, faults)
        if start:  # a line that began before belongs to the piece before, unless it ended just there
            border = content.find(b"\n")
            if border < 0:
                return b""
            content = content[border + 1 :]
            if not content:
                return b""
        parts = [content]
        while stop < file.size and not parts[-1].endswith(b"\n"):
            more = fetch(file.path, stop, min(file.size, stop + 2**20), faults)
            border = more.find(b"\n")
            parts.append(more if border < 0 else more[: border + 1])
            stop += len(more)
        return b"".join(parts)


def _is_list(file: File) -> bool:
    """Whether a file holds one list of objects."""
    if ending_of(file.path) != ".json":
        return False
    with unpacked(file, Faults()) as stream:
        return stream.read(64).lstrip()[:1] == b"["


def find_value(row: dict[str, Any], column: str) -> tuple[tuple[str, ...] | None, Any]:
    """The names down to a column or nested field and its value; (None, None) where the row has none."""
    if column in row:
        return (column,), row[column]
    words = column.split(".")
    for cut in range(len(words) - 1, 0, -1):
        name = ".".join(words[:cut])
        if isinstance(row.get(name), dict):
            path, value = find_value(row[name], ".".join(words[cut:]))
            return (None, None) if path is None else ((name, *path), value)
    return None, None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _kind(value: Any, chat: bool) -> pa.DataType | None:
    """The type of a column that holds such a value: text or token ids; None where it says nothing."""
    if isinstance(value, str) or (chat and value):
        return pa.string()
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return pa.list_(pa.int64())
    return None


def _nested_schema(path: Sequence[str], kind: pa.DataType) -> pa.Schema:
    for name in reversed(path[1:]):
        kind = pa.struct([(name, kind)])
    return pa.schema([(path[0], kind)])


def _leaf(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_struct(kind):
        kind = kind.field(0).type
    return kind


def _value(line: bytes, column: str, kind: pa.DataType, chat: bool) -> Any:
    """The column of one line. ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {one_line(error)}") from error
    if not isinstance(row, dict):
        raise ValueError(f"is not an object but {type(row).__name__}")
    value = find_value(row, column)[1]
    if value is None:
        return None
    if chat and not isinstance(value, str):
        value = json.dumps(value)
    if kind == pa.string():
        if not isinstance(value, str):
            raise ValueError(f"holds {type(value).__name__} instead of text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"holds text that is not UTF-8: {one_line(error)}") from error
    elif not isinstance(value, list) or not all(isinstance(item, int) or item is None for item in value):
        raise ValueError("holds no list of token ids")
    return value
