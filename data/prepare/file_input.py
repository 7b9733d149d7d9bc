"""Rows of files, or of a dataset on the hub, as the input of prepare: read by what training reads them with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.config import CHAT, SKIP, UNIT_BYTES, PrepareConfig
from data.errors import CorpusError
from data.prepare.hub import dataset_files, is_dataset_name
from data.prepare.inputs import Document, Input
from data.read.endings import ROW_ENDINGS, ending_of
from data.read.faults import Faults
from data.read.formats import TEXT_ENDING, open_rows
from data.read.listing import Listing, list_files
from data.read.remote import redacted
from data.read.row_reader import RowReader
from data.read.rows import Rows
from data.text.chat import ChatEncoder, chat_encoder
from data.text.tokenizer import Tokenizer

SHUFFLED_UNIT_BYTES = 2**20  # small, so that the documents of a shard come from many places


class RowsInput(Input):
    """Rows of a column of files: text, or lists of the ids of a given tokenizer."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer | None,
        description: dict[str, str | int],
        chat: ChatEncoder | None = None,
    ) -> None:
        self._rows, self.description, self._chat = rows, description, chat
        self._reader = None if tokenizer is None else RowReader(rows, tokenizer, chat)
        self.left_out = rows.left_out
        if self._reader is None and not rows.is_text:
            raise CorpusError(f"{rows.setting}={rows.column} holds token ids: give the tokenizer that they are of")

    @property
    def identity(self) -> list[Any]:
        return [*self._rows.identity, *([] if self._chat is None else self._chat.identity)]

    @property
    def sizes(self) -> np.ndarray:
        return self._rows.sizes

    def documents(self, unit: int, faults: Faults) -> Iterator[Document | None]:
        for first, rows in self._rows.batches(unit, faults):
            if self._chat is not None:
                yield from self._conversations(rows, unit, first, faults)
            else:
                yield from (self._texts if self._rows.is_text else self._lists)(rows, unit, first, faults)

    def _texts(self, rows: pa.Array, unit: int, first: int, faults: Faults) -> Iterator[Document | None]:
        for row, text in enumerate(self._rows.texts(rows, unit, first, faults), first):
            blank = text is None or not text.strip()
            yield None if blank or text is None else Document(text, self._name(unit, row), text.encode())

    def _conversations(self, rows: pa.Array, unit: int, first: int, faults: Faults) -> Iterator[Document | None]:
        assert self._reader is not None
        for row, found in enumerate(self._reader.conversations(rows, unit, first, faults), first):
            key = b"" if found is None else found[0].tobytes()
            yield None if found is None else Document(found[0], self._name(unit, row), key, found[1])

    def _lists(self, rows: pa.Array, unit: int, first: int, faults: Faults) -> Iterator[Document | None]:
        assert self._reader is not None
        tokens, lengths = self._reader.tokens(rows, unit, first, faults)
        end = [self._reader.tokenizer.eod_id] if self._reader.appends_eod else []
        stop = 0
        for row, length in enumerate(lengths.tolist(), first):
            stop += length
            own = np.concatenate([tokens[stop - length : stop], np.array(end, dtype=tokens.dtype)])
            yield Document(own, self._name(unit, row), own.astype(np.int64).tobytes()) if length else None

    def _name(self, unit: int, row: int) -> str:
        return f"{Path(self._rows.files[self._rows.file_of(unit)].path).name} ({self._rows.row_name(unit, row)})"


def file_input(config: PrepareConfig, tokenizer: Tokenizer | None) -> RowsInput:
    """The documents of `config.input`.

    Args:
        tokenizer: the given one; None where one is to be trained.
    Raises:
        CorpusError: there is no such input, or nothing to read in it.
    """
    listing = _listed(config)
    if config.sample_by != "document" and any(ending_of(file.path) != TEXT_ENDING for file in listing.files):
        raise CorpusError(f"sample_by={config.sample_by} is for {TEXT_ENDING} files; input={config.input} has others")
    rows = open_rows(
        f"input={redacted(config.input)}",
        listing,
        config.text_column,
        config.on_corrupt == SKIP,
        UNIT_BYTES if config.shuffle is None else SHUFFLED_UNIT_BYTES,
        setting="text_column",
        sample_by=config.sample_by,
        chat=config.format == CHAT,
    )
    chat = None if tokenizer is None else chat_encoder(tokenizer, config.tokenizer, config)
    return RowsInput(rows, tokenizer, {"input": redacted(config.input), "text_column": config.text_column}, chat)


def _listed(config: PrepareConfig) -> Listing:
    if is_dataset_name(config.input):
        return Listing(dataset_files(config))
    if config.dataset_config is not None:
        raise CorpusError(
            f"dataset_config={config.dataset_config} is for datasets of the hub: leave it out for the files of "
            f"input={config.input}"
        )
    return list_files(config.input, (*ROW_ENDINGS, TEXT_ENDING), config.dataset_split, "input")
