"""Writes the shards of one split of a piece of the input."""

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.read.manifest import ShardInfo
from data.read.remote import join, write_file
from data.read.shards import shard_schema

# Of what was tried, with zstd, this is the smallest and the quickest to decode: the high bytes of ids are nearly all
# alike and lie side by side, and a large page is decompressed in one go.
ENCODING = {"tokens.list.element": "BYTE_STREAM_SPLIT"}
PAGE_BYTES = 2**23
# How the shards of a plan are written: what was begun in a layout is finished, and repaired, in it, byte for byte.
SHARD_LAYOUT = "shard layout"  # in a plan; 1, where it says none: pages of parquet's usual size and encoding
PLAIN, BESIDE = LAYOUTS = (1, 2)


def layout_of(plan: Mapping[str, Any] | None) -> int:
    """The layout of the shards of a plan; that of new ones where there is no plan, or one of a later program."""
    layout = BESIDE if plan is None else plan.get(SHARD_LAYOUT, PLAIN)
    return layout if layout in LAYOUTS else BESIDE


class ShardWriter:
    """Collects documents and writes a shard whenever `shard_tokens` have come together.

    Documents are never cut: a shard ends after the document that fills it.

    Args:
        folder: directory or URL that the shards go to; their names begin with `prefix`.
        order: seed of the order of all documents; None leaves them as they come.
        layout: of the files, one of LAYOUTS.
    """

    def __init__(
        self, folder: str, prefix: str, shard_tokens: int, order: list[int] | None = None, layout: int = BESIDE
    ) -> None:
        self._folder, self._prefix, self._shard_tokens, self._order = folder, prefix, shard_tokens, order
        own: dict[str, Any] = {"data_page_size": PAGE_BYTES, "column_encoding": ENCODING}
        self._options = own if layout == BESIDE else {}
        self._shards: list[ShardInfo] = []
        self._documents: list[tuple[np.ndarray, int, str, np.ndarray | None]] = []
        self._tokens = 0

    def add(self, tokens: np.ndarray, num_bytes: int, name: str, learned: np.ndarray | None = None) -> None:
        """Takes a document, its end-of-document token included, with the bytes of its text and what counts of it."""
        self._documents.append((tokens, num_bytes, name, learned))
        self._tokens += len(tokens)
        if self._tokens >= self._shard_tokens and self._order is None:
            self._write()

    def finish(self) -> tuple[ShardInfo, ...]:
        """Writes what is left and lists all shards in order."""
        if self._order is not None:
            self._write_shuffled(self._order)
        if self._documents:
            self._write()
        return tuple(self._shards)

    def _write_shuffled(self, seed: list[int]) -> None:
        words = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(self._documents))
        shuffled = [self._documents[number] for number in np.argsort(words, kind="stable")]
        self._order, self._documents, self._tokens = None, [], 0
        for document in shuffled:
            self.add(*document)

    def _write(self) -> None:
        parts, sizes, names, masks = zip(*self._documents, strict=True)
        tokens = np.concatenate(parts)
        lengths = np.array([len(part) for part in parts], dtype=np.int32)
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        masked = any(mask is not None for mask in masks)
        schema = shard_schema(tokens.dtype, masked)
        lists = pa.ListArray.from_arrays(pa.array(ends), tokens, type=schema.field("tokens").type)
        columns = [lists, lengths, pa.array(sizes, pa.int32()), pa.array(names, pa.string())]
        if masked:
            own = [np.ones(n, dtype=bool) if mask is None else mask for mask, n in zip(masks, lengths, strict=True)]
            learned = pa.array(np.concatenate(own))
            columns.append(pa.ListArray.from_arrays(pa.array(ends), learned, type=schema.field("learned").type))
        table = pa.table(columns, schema=schema)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", use_dictionary=False, **self._options)
        content = sink.getvalue()
        file = f"{self._prefix}-{len(self._shards):05d}.parquet"
        write_file(join(self._folder, file), content)
        digest = hashlib.sha256(content).hexdigest()
        self._shards.append(ShardInfo(file, len(content), digest, len(parts), len(tokens), sum(sizes)))
        self._documents, self._tokens = [], 0
