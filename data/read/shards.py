"""Token shards: parquet files of tokenized documents.

Columns: `tokens` list<uint16 or int32>, each document ending with the end-of-document token; `length` int32, how many
these are, for who needs no token; `bytes` int32, the UTF-8 bytes of the document's text; `name` string, where the
document came from. Corpora of conversations have a fifth, `learned` list<bool>: which tokens count as targets. None
is ever missing, and parquet is told so: it then has less to decode.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.read.faults import BrokenUnit, Faults
from data.read.manifest import ShardInfo
from data.read.remote import File, RangeFile, join, read_file, redacted
from data.read.units import Unit, token_dtype
from data.secrets import one_line


def shard_schema(dtype: np.dtype, masked: bool) -> pa.Schema:
    """The columns of a shard whose tokens are stored as `dtype`, with or without `learned`."""
    tokens = pa.list_(pa.field("element", pa.from_numpy_dtype(dtype), nullable=False))
    types = {"tokens": tokens, "length": pa.int32(), "bytes": pa.int32(), "name": pa.string()}
    if masked:
        types["learned"] = pa.list_(pa.field("element", pa.bool_(), nullable=False))
    return pa.schema([pa.field(name, own, nullable=False) for name, own in types.items()])


def read_shard(root: str | Path, info: ShardInfo, vocab_size: int, check_hash: bool, faults: Faults) -> Unit:
    """Reads a shard whole. BrokenUnit naming its file when it is missing or not what `info` promises."""
    content = read_file(join(str(root), info.file), faults)
    if len(content) != info.size:
        raise broken_file(root, info.file, f"has {len(content)} bytes, and the manifest says {info.size}")
    if check_hash and hashlib.sha256(content).hexdigest() != info.sha256:
        raise broken_file(root, info.file, "is corrupt: its hash differs from the manifest's")
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        table = parquet.read(columns=["tokens", "learned"], use_threads=False)  # what is not there is left out
        column, learned = table.column("tokens").combine_chunks(), learned_of(table)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise broken_file(root, info.file, f"is corrupt: {one_line(error)}") from error
    dtype = token_dtype(vocab_size)
    if not pa.types.is_list(column.type) or column.type.value_type != pa.from_numpy_dtype(dtype):
        raise broken_file(root, info.file, f"has tokens of type {column.type}, not list<{dtype}>")
    offsets = column.offsets.to_numpy().astype(np.int64)
    shard = Unit(column.values.to_numpy(), offsets[:-1], np.diff(offsets), learned=learned)
    if (shard.num_documents, len(shard.tokens)) != (info.documents, info.tokens):
        raise broken_file(
            root, info.file, f"holds {shard.num_documents} documents, and the manifest says {info.documents}"
        )
    if learned is not None and len(learned) != len(shard.tokens):
        raise broken_file(root, info.file, "says of other tokens than it holds which are learned")
    if shard.tokens.max() >= vocab_size or shard.tokens.min() < 0:
        raise broken_file(root, info.file, f"holds token {shard.tokens.max()}, outside the vocabulary of {vocab_size}")
    return shard


def learned_of(table: pa.Table) -> np.ndarray | None:
    """bool [tokens]: which tokens of a shard count as targets; None: all."""
    if "learned" not in table.column_names:
        return None
    return table.column("learned").combine_chunks().values.to_numpy(zero_copy_only=False)


def read_lengths(root: str | Path, info: ShardInfo, faults: Faults) -> np.ndarray | None:
    """int64 [documents]: tokens of each, read without the tokens; None of a shard that does not say them.

    Raises:
        BrokenUnit: the file is missing, or is not what `info` promises.
    """
    file = File(join(str(root), info.file), info.size, "")
    try:
        parquet = pq.ParquetFile(RangeFile(file, faults))
        if "length" not in parquet.schema_arrow.names:
            return None
        lengths = parquet.read(columns=["length"], use_threads=False).column("length").to_numpy().astype(np.int64)
    except (pa.ArrowException, OSError) as error:
        raise broken_file(root, info.file, f"is corrupt: {one_line(error)}") from error
    if (len(lengths), lengths.sum()) != (info.documents, info.tokens):
        raise broken_file(root, info.file, "has other lengths of documents than the manifest says")
    return lengths


def broken_file(root: str | Path, name: str, reason: str) -> BrokenUnit:
    """The error of a file of a prepared corpus."""
    where = redacted(str(root))
    return BrokenUnit(f"data.corpus={where}: {name} {reason}; make it again: ./launch.sh prepare --repair {where}")
