"""Rows as documents: token lists as they are, or text that is tokenized here.

Conversations are rendered by a chat template, and bring which of their tokens count as targets.
Whether token lists bring their end-of-document token is found out from the first documents and then demanded of all
others; where they do not, it is appended.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.read.faults import BrokenUnit, Faults
from data.read.index import Index
from data.read.readers import Reader, cut_by
from data.read.rows import Rows, is_text
from data.read.units import Sizes, Unit, ended
from data.secrets import one_line
from data.text.chat import ChatEncoder
from data.text.tokenizer import Tokenizer


class RowReader(Reader):
    """The documents of a column of files."""

    def __init__(self, rows: Rows, tokenizer: Tokenizer, chat: ChatEncoder | None = None) -> None:
        self._rows, self.tokenizer, self.chat = rows, tokenizer, chat
        self.path, self.vocab_size, self.left_out = rows.path, tokenizer.vocab_size, rows.left_out

    @property
    def num_units(self) -> int:
        return self._rows.num_units

    @property
    def num_bytes(self) -> int:
        return self._rows.num_bytes

    @property
    def identity(self) -> list[Any]:
        chat, tokenizer = [] if self.chat is None else self.chat.identity, self.tokenizer
        return [*self._rows.identity, tokenizer.sha256, tokenizer.eod_id, *chat, *cut_by(self._rows.unit_bytes)]

    def label(self, unit: int) -> str:
        return self._rows.label(unit)

    def known(self) -> Sizes | None:
        counts = None if self._rows.is_text else self._rows.counts()
        if counts is None:
            return None
        documents = counts.rows - counts.nulls
        tokens = counts.values - counts.nulls + (documents if self.appends_eod else 0)
        return Sizes(documents, tokens, counts.nulls, counts.digest)

    @cached_property
    def appends_eod(self) -> bool:
        """Whether an end-of-document token is put behind each document."""
        what = f"documents without {self.tokenizer.eod_id} at their end"
        return self._rows.is_text or bool(self._rows.once(what, self._look_for_eod).notes["appends"])

    def _look_for_eod(self) -> Index:
        rows = self._rows.first[1]
        filled = rows.filter(pc.greater(pc.fill_null(pc.list_value_length(rows), 0), 0)).slice(0, 1)
        return Index({}, {"appends": not len(filled) or filled.flatten()[-1].as_py() != self.tokenizer.eod_id})

    def read(self, unit: int, faults: Faults) -> Unit:
        appends, label = self.appends_eod, self.label(unit)
        rows = self._rows.rows(unit, faults)
        if self.chat is not None:
            return self._read_conversations(rows, unit, label, faults)
        if self._rows.is_text:
            texts = [text for text in self._rows.texts(rows, unit, 0, faults) if text and text.strip()]
            tokens, lengths = self._encode(texts)
        else:
            tokens, lengths = self.tokens(rows, unit, 0, faults)
        lengths = lengths[lengths > 0]
        empty = len(rows) - len(lengths)
        return ended(tokens, lengths, appends, self.tokenizer.eod_id, self.vocab_size, label, empty)

    def conversations(
        self, rows: pa.Array, unit: int, first: int, faults: Faults
    ) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
        """Tokens of each row, and which of them are learned; None for one that is missing or skipped.

        Raises:
            BrokenUnit: a row is no conversation that can be rendered, and such rows are not skipped.
        """
        assert self.chat is not None
        for row, content in enumerate(self._rows.texts(rows, unit, first, faults), first):
            found = None
            try:
                found = self.chat.encode(content) if content and content.strip() else None
            except ValueError as error:
                self._rows.refuse(f"{self._rows.row_label(unit, row)} {one_line(error)}", faults)
            yield None if found is None else (np.array(found[0], dtype=np.int32), np.array(found[1], dtype=bool))

    def _read_conversations(self, rows: pa.Array, unit: int, label: str, faults: Faults) -> Unit:
        found = [own for own in self.conversations(rows, unit, 0, faults) if own is not None]
        lengths = np.array([len(tokens) for tokens, _ in found], dtype=np.int64)
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *(tokens for tokens, _ in found)])
        learned = np.concatenate([np.zeros(0, dtype=bool), *(learned for _, learned in found)])
        empty = len(rows) - len(found)
        read = ended(tokens, lengths, False, self.tokenizer.eod_id, self.vocab_size, label, empty)
        return replace(read, learned=learned)

    def tokens(self, rows: pa.Array, unit: int, first: int, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all rows end to end, and the number of each row's; rows that are missing or skipped have none.

        Raises:
            BrokenUnit: a row cannot be trained on, and such rows are not skipped.
        """
        if not len(rows):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if is_text(rows.type) or not pa.types.is_integer(rows.type.value_type):
            raise BrokenUnit(
                f"{self._rows.label(unit)} holds {rows.type}, and the files before hold lists of token ids"
            )
        values = rows.flatten()
        lengths = pc.fill_null(pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        gaps = np.zeros(0, dtype=np.int64)
        if values.null_count:
            gaps = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
            values = pc.fill_null(values, 0)
        tokens = values.to_numpy(zero_copy_only=False)
        wrong = self._wrong_rows(tokens, lengths, gaps)
        if not wrong:
            return tokens, lengths
        for row, reason in sorted(wrong.items()):
            self._rows.refuse(f"{self._rows.row_label(unit, first + row)} {reason}", faults)
        dropped = np.isin(np.arange(len(lengths)), list(wrong))
        return tokens[~np.repeat(dropped, lengths)], np.where(dropped, 0, lengths)

    def _wrong_rows(self, tokens: np.ndarray, lengths: np.ndarray, gaps: np.ndarray) -> dict[int, str]:
        """Row -> what is wrong with it."""
        ends = np.cumsum(lengths)
        filled = np.flatnonzero(lengths)
        has_eod = tokens[ends[filled] - 1] == self.tokenizer.eod_id
        mixed = filled[has_eod if self.appends_eod else ~has_eod]
        reason = (
            f"is one of documents with and without the end-of-document token {self.tokenizer.eod_id} as their last: "
            f"all must have it, or none"
        )
        wrong = dict.fromkeys(mixed.tolist(), reason)
        for place in np.flatnonzero((tokens >= self.vocab_size) | (tokens < 0)):
            row = int(np.searchsorted(ends, place, side="right"))
            wrong[row] = f"holds token {tokens[place]}, outside the vocabulary of {self.vocab_size}"
        for place in gaps:
            wrong[int(np.searchsorted(ends, place, side="right"))] = "holds lists with missing token ids"
        return wrong

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every text, end to end, and the number of each."""
        encoded = self.tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        tokens = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
        return tokens, lengths
