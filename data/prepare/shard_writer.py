"""Writes the shards of a corpus that is being made, each recorded when it lies on the disk."""

import os
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.prepare.documents import Place
from data.prepare.encoding import Encoded
from data.prepare.staging import Finished, Staging
from data.read.manifest import ShardInfo, file_info


class ShardWriter:
    """Collects the documents of one split and writes a shard whenever `shard_tokens` have come together.

    Documents are never cut: a shard ends after the document that fills it. Goes on after the shards that are finished.
    """

    def __init__(self, staging: Staging, split: str, shard_tokens: int) -> None:
        self._staging = staging
        self._split = split
        self._shard_tokens = shard_tokens
        finished = staging.finished[split]
        self._blank = finished[-1].blank if finished else 0
        self._start()

    def _start(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._bytes: list[int] = []
        self._names: list[str] = []
        self._pending_tokens = 0

    @property
    def blank(self) -> int:
        """Documents left out because they are blank."""
        return self._blank

    @property
    def documents(self) -> int:
        """Documents taken so far, in finished shards and since."""
        return sum(finished.shard.documents for finished in self._staging.finished[self._split]) + len(self._tokens)

    def add(self, encoded: Encoded, place: Place) -> None:
        """Takes the documents of a batch that begins at `place`, in order."""
        start = 0
        for number, length, num_bytes, name in zip(
            encoded.numbers, encoded.lengths, encoded.num_bytes, encoded.names, strict=True
        ):
            self._following, self._place = number + 1, place
            if not length:
                self._blank += 1
                continue
            self._tokens.append(encoded.tokens[start : start + length])
            self._bytes.append(num_bytes)
            self._names.append(name)
            self._pending_tokens += length
            start += length
            if self._pending_tokens >= self._shard_tokens:
                self._write()

    def finish(self) -> tuple[ShardInfo, ...]:
        """Writes what is left and lists all shards in order."""
        if self._tokens:
            self._write()
        return tuple(finished.shard for finished in self._staging.finished[self._split])

    def _write(self) -> None:
        offsets = np.cumsum([0, *map(len, self._tokens)], dtype=np.int32)
        table = pa.table(
            {
                "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._tokens))),
                "bytes": pa.array(self._bytes, type=pa.int32()),
                "name": pa.array(self._names, type=pa.string()),
            }
        )
        path = self._staging.directory / f"{self._split}-{len(self._staging.finished[self._split]):05d}.parquet"
        temporary = self._staging.root / f".{path.name}.{os.getpid()}"
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd", use_dictionary=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        documents, num_bytes = len(self._tokens), sum(self._bytes)
        info = asdict(file_info(path))
        shard = ShardInfo(**info, documents=documents, tokens=self._pending_tokens, bytes=num_bytes)
        self._staging.note(Finished(self._split, shard, self._following, self._blank, self._place))
        self._start()
