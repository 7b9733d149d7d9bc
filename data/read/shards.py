"""Token shards: parquet files of tokenized documents.

Columns: `tokens` list<uint16 or int32>, each document ending with the end-of-document token; `bytes` int32,
the UTF-8 bytes of the document's text; `name` string, where the document came from.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.read.faults import BrokenUnit, Faults
from data.read.manifest import ShardInfo
from data.read.remote import join, read_file, redacted
from data.read.units import Unit, token_dtype
from data.secrets import one_line


def read_shard(root: str | Path, info: ShardInfo, vocab_size: int, check_hash: bool, faults: Faults) -> Unit:
    """Reads a shard whole. BrokenUnit naming its file when it is missing or not what `info` promises."""
    content = read_file(join(str(root), info.file), faults)
    if len(content) != info.size:
        raise broken_file(root, info.file, f"has {len(content)} bytes, and the manifest says {info.size}")
    if check_hash and hashlib.sha256(content).hexdigest() != info.sha256:
        raise broken_file(root, info.file, "is corrupt: its hash differs from the manifest's")
    try:
        column = pq.read_table(pa.BufferReader(content), columns=["tokens"]).column("tokens").combine_chunks()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise broken_file(root, info.file, f"is corrupt: {one_line(error)}") from error
    dtype = token_dtype(vocab_size)
    if column.type != pa.list_(pa.from_numpy_dtype(dtype)):
        raise broken_file(root, info.file, f"has tokens of type {column.type}, not list<{dtype}>")
    offsets = column.offsets.to_numpy().astype(np.int64)
    shard = Unit(column.values.to_numpy(), offsets[:-1], np.diff(offsets))
    if (shard.num_documents, len(shard.tokens)) != (info.documents, info.tokens):
        raise broken_file(
            root, info.file, f"holds {shard.num_documents} documents, and the manifest says {info.documents}"
        )
    if shard.tokens.max() >= vocab_size or shard.tokens.min() < 0:
        raise broken_file(root, info.file, f"holds token {shard.tokens.max()}, outside the vocabulary of {vocab_size}")
    return shard


def broken_file(root: str | Path, name: str, reason: str) -> BrokenUnit:
    """The error of a file of a prepared corpus."""
    where = redacted(str(root))
    return BrokenUnit(f"data.corpus={where}: {name} {reason}; make it again: ./launch.sh prepare --repair {where}")
