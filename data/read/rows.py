"""Rows of parquet, arrow and JSON-lines files as documents: lists of token ids, or text that is tokenized here.

The type of the column decides. Whether token lists bring their end-of-document token is found out from the first
documents and then demanded of all others; where they do not, it is appended.
"""

import itertools
from abc import abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.errors import CorpusError, one_line
from data.read.faults import BrokenUnit, Faults
from data.read.readers import Reader
from data.read.remote import File
from data.read.units import Unit, ended
from data.text.tokenizer import Tokenizer

TEXT = (pa.types.is_string, pa.types.is_large_string)
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


class RowReader(Reader):
    """Rows of one column of files."""

    def __init__(self, path: str, files: list[File], column: str, tokenizer: Tokenizer) -> None:
        self.path, self.files, self.column = path, files, column
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def identity(self) -> list[Any]:
        files = [[file.path, file.size, file.version] for file in self.files]
        return ["rows", self.column, self.tokenizer.sha256, self.tokenizer.eod_id, files]

    @abstractmethod
    def rows(self, unit: int, faults: Faults) -> pa.Array:
        """The column of one unit."""

    @cached_property
    def column_type(self) -> pa.DataType:
        """Type of the column, from the first unit that has rows.

        Raises:
            CorpusError: neither text nor lists of whole numbers.
        """
        found = self._first.type
        is_tokens = any(test(found) for test in LISTS) and pa.types.is_integer(found.value_type)
        if not is_tokens and not any(test(found) for test in TEXT):
            raise CorpusError(
                f"data.column={self.column} of {self.path} holds {found}: name a column of text, or of lists of "
                f"token ids"
            )
        return found

    @property
    def is_text(self) -> bool:
        return any(test(self.column_type) for test in TEXT)

    @cached_property
    def appends_eod(self) -> bool:
        """Whether an end-of-document token is put behind each document."""
        if self.is_text:
            return True
        tokens, lengths = flat(self._first, self.label(0))
        last = tokens[np.cumsum(lengths[lengths > 0]) - 1]
        return not len(last) or last[0] != self.tokenizer.eod_id

    @cached_property
    def _first(self) -> pa.Array:
        found = (self.rows(unit, Faults()) for unit in range(self.num_units))
        return next((rows for rows in found if len(rows) > rows.null_count), pa.array([], pa.string()))

    def read(self, unit: int, faults: Faults) -> Unit:
        appends, label = self.appends_eod, self.label(unit)
        rows = self.rows(unit, faults)
        tokens, lengths = self._encode(rows, label) if self.is_text else flat(rows, label)
        lengths = lengths[lengths > 0]
        empty = len(rows) - len(lengths)
        return ended(tokens, lengths, appends, self.tokenizer.eod_id, self.vocab_size, label, empty)

    def _encode(self, rows: pa.Array, label: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every text, end to end, and the number of each; blank texts have none."""
        try:
            texts = [text for text in rows.to_pylist() if text and text.strip()]
        except UnicodeDecodeError as error:
            raise BrokenUnit(f"{label} holds text that is not UTF-8: {one_line(error)}") from error
        encoded = self.tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        tokens = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
        return tokens, lengths


def flat(rows: pa.Array, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all lists end to end, and the length of each list; a missing list is empty."""
    values = rows.flatten()
    if values.null_count:
        raise BrokenUnit(f"{label} holds lists with missing token ids")
    lengths = pc.fill_null(pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False)
    return values.to_numpy(), lengths.astype(np.int64)
