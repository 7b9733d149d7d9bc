"""Megatron's `.bin` and `.idx` files, through megatron-core's own reader: the only file of `data` that imports it."""

from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np

from data.config import UNIT_BYTES
from data.errors import CorpusError
from data.read.faults import BrokenUnit, Faults, retrying
from data.read.index import digest_of
from data.read.readers import Reader, cut_by
from data.read.units import Sizes, Unit, ended
from data.secrets import one_line
from data.text.tokenizer import Tokenizer


def megatron_prefix(path: str) -> Path | None:
    """The common name of a pair of files, given that name or one of the two; None where there is no such pair."""
    prefix = Path(path).expanduser()
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    pair = [Path(f"{prefix}{ending}") for ending in (".bin", ".idx")]
    return prefix if all(file.is_file() for file in pair) else None


class MegatronReader(Reader):
    """A unit is a run of documents of `unit_bytes` (4 a token) or more.

    The index holds all lengths, so nothing is ever scanned.

    Args:
        trusts: files of this name and these sizes are known, whatever their times.
    """

    in_process = True

    def __init__(
        self, path: str, prefix: Path, tokenizer: Tokenizer, unit_bytes: int = UNIT_BYTES, trusts: bool = False
    ) -> None:
        self.path, self.vocab_size = path, tokenizer.vocab_size
        self._trusts, self._unit_bytes = trusts, unit_bytes
        self._prefix, self._eod_id, self._tokenizer = prefix, tokenizer.eod_id, tokenizer.sha256
        lengths = self._document_lengths
        filled = np.flatnonzero(lengths)
        if not len(filled):
            raise CorpusError(f"data.corpus={path} holds no token")
        self._appends = self._tokens(int(filled[0]), int(filled[0]) + 1, Faults())[-1] != self._eod_id
        number = (np.cumsum(lengths) - lengths) // max(1, unit_bytes // 4)
        self._firsts = np.flatnonzero(np.diff(number, prepend=-1))

    @cached_property
    def _dataset(self) -> Any:
        # Here: megatron-core takes seconds to import, and only these files need it.
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        try:
            return IndexedDataset(str(self._prefix), mmap=True)
        except (AssertionError, OSError, ValueError, RuntimeError) as error:
            raise BrokenUnit(f"{self._prefix}.idx is corrupt: {one_line(error)}") from error

    @cached_property
    def _sequence_ends(self) -> np.ndarray:
        """int64 [sequences]: tokens before the end of each sequence."""
        return np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)

    @cached_property
    def _document_lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each; a document is one sequence or several."""
        borders = self._dataset.document_indices
        return np.diff(np.concatenate([[0], self._sequence_ends])[borders])

    @cached_property
    def _index_hash(self) -> str:
        with Path(f"{self._prefix}.idx").open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    @property
    def num_units(self) -> int:
        return len(self._firsts)

    @property
    def num_bytes(self) -> int:
        return Path(f"{self._prefix}.bin").stat().st_size

    @property
    def identity(self) -> list[Any]:
        stats = [Path(f"{self._prefix}{ending}").stat() for ending in (".bin", ".idx")]
        files = [[stat.st_size, 0 if self._trusts else stat.st_mtime_ns] for stat in stats]
        return ["megatron", self._prefix.name, self._tokenizer, self._eod_id, files, *cut_by(self._unit_bytes)]

    def label(self, unit: int) -> str:
        return f"{self._prefix}.bin (from document {self._firsts[unit]})"

    def lengths(self, unit: int, faults: Faults) -> np.ndarray:
        first, last = self._documents(unit)
        lengths = self._document_lengths[first:last]
        return lengths[lengths > 0] + self._appends

    def read(self, unit: int, faults: Faults) -> Unit:
        first, last = self._documents(unit)
        tokens, label = self._tokens(first, last, faults), self.label(unit)
        lengths = self._document_lengths[first:last]
        empty, lengths = int((lengths == 0).sum()), lengths[lengths > 0]
        return ended(tokens, lengths, self._appends, self._eod_id, self.vocab_size, label, empty)

    def known(self) -> Sizes:
        firsts = self._firsts
        documents = np.add.reduceat(self._document_lengths > 0, firsts, dtype=np.int64)
        empty = np.add.reduceat(self._document_lengths == 0, firsts, dtype=np.int64)
        tokens = np.add.reduceat(self._document_lengths, firsts) + (documents if self._appends else 0)
        return Sizes(documents, tokens, empty, digest_of([self._index_hash, self.num_bytes, *cut_by(self._unit_bytes)]))

    def _documents(self, unit: int) -> tuple[int, int]:
        last = self._firsts[unit + 1] if unit + 1 < self.num_units else len(self._document_lengths)
        return int(self._firsts[unit]), int(last)

    def _tokens(self, first: int, last: int, faults: Faults) -> np.ndarray:
        """Tokens of the documents [first, last), which lie end to end in the file."""
        dataset = self._dataset
        begin, end = (int(dataset.document_indices[document]) for document in (first, last))
        count = int(self._sequence_ends[end - 1] - (self._sequence_ends[begin - 1] if begin else 0))
        start = int(dataset.index.sequence_pointers[begin])

        def read() -> np.ndarray:
            return dataset.bin_reader.read(dtype=dataset.index.dtype, count=count, offset=start)

        try:
            return retrying(f"{self._prefix}.bin", read, faults)
        except ValueError as error:
            raise BrokenUnit(f"{self._prefix}.bin is shorter than its index says: {one_line(error)}") from error
