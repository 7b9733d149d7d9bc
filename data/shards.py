"""Token shards: parquet files of tokenized documents.

Columns: `tokens` list<uint16 or int32>, each document ending with the end-of-document token; `bytes` int32,
the UTF-8 bytes of the document's text; `name` string, where the document came from.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import one_line
from data.faults import BrokenUnit, Faults, retrying
from data.manifest import ShardInfo, file_info
from data.units import Unit, token_dtype


class ShardWriter:
    """Collects the documents of one split and writes a shard whenever `shard_tokens` have come together.

    Documents are never cut: a shard ends after the document that fills it.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[ShardInfo] = []
        self._start()

    def _start(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._bytes: list[int] = []
        self._names: list[str] = []
        self._pending_tokens = 0

    def add(self, ids: list[int], num_bytes: int, name: str) -> None:
        self._tokens.append(np.array(ids, dtype=self._dtype))
        self._bytes.append(num_bytes)
        self._names.append(name)
        self._pending_tokens += len(ids)
        if self._pending_tokens >= self._shard_tokens:
            self._write()

    def finish(self) -> tuple[ShardInfo, ...]:
        """Writes what is left and lists all shards in order."""
        if self._tokens:
            self._write()
        return tuple(self._shards)

    def _write(self) -> None:
        offsets = np.cumsum([0, *map(len, self._tokens)], dtype=np.int32)
        table = pa.table(
            {
                "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._tokens))),
                "bytes": pa.array(self._bytes, type=pa.int32()),
                "name": pa.array(self._names, type=pa.string()),
            }
        )
        path = self._directory / f"{self._split}-{len(self._shards):05d}.parquet"
        pq.write_table(table, path, compression="zstd", use_dictionary=False)
        info = file_info(path)
        counts = {"documents": len(self._tokens), "tokens": self._pending_tokens, "bytes": sum(self._bytes)}
        self._shards.append(ShardInfo(**asdict(info), **counts))
        self._start()


def read_shard(directory: Path, info: ShardInfo, vocab_size: int, check_hash: bool, faults: Faults) -> Unit:
    """Reads a shard whole. BrokenUnit naming its file when it is missing or not what `info` promises."""
    path = directory / info.file
    content = retrying(str(path), path.read_bytes, faults)
    if len(content) != info.size:
        raise broken_file(path, f"has {len(content)} bytes, and the manifest says {info.size}")
    if check_hash and hashlib.sha256(content).hexdigest() != info.sha256:
        raise broken_file(path, "is corrupt: its hash differs from the manifest's")
    try:
        column = pq.read_table(pa.BufferReader(content), columns=["tokens"]).column("tokens").combine_chunks()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise broken_file(path, f"is corrupt: {one_line(error)}") from error
    dtype = token_dtype(vocab_size)
    if column.type != pa.list_(pa.from_numpy_dtype(dtype)):
        raise broken_file(path, f"has tokens of type {column.type}, not list<{dtype}>")
    offsets = column.offsets.to_numpy().astype(np.int64)
    shard = Unit(column.values.to_numpy(), offsets[:-1], np.diff(offsets))
    if (shard.num_documents, len(shard.tokens)) != (info.documents, info.tokens):
        raise broken_file(path, f"holds {shard.num_documents} documents, and the manifest says {info.documents}")
    if shard.tokens.max() >= vocab_size or shard.tokens.min() < 0:
        raise broken_file(path, f"holds token {shard.tokens.max()}, outside the vocabulary of {vocab_size}")
    return shard


def broken_file(path: Path, reason: str) -> BrokenUnit:
    return BrokenUnit(
        f"data.corpus={path.parent}: {path.name} {reason}; delete the directory and prepare the corpus again"
    )
