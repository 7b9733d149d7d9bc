"""The same documents in every format that training reads."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.text.tokenizer import Tokenizer


def write_parquet_tokens(path: Path, documents: list[list[int]], rows_per_group: int = 7) -> Path:
    table = pa.table({"tokens": pa.array(documents, pa.list_(pa.int32()))})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_parquet_text(path: Path, texts: list[str], rows_per_group: int = 7) -> Path:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows_per_group)
    return path


def write_jsonl(path: Path, column: str, rows: list) -> Path:
    path.write_text("".join(json.dumps({column: row, "other": number}) + "\n" for number, row in enumerate(rows)))
    return path


def write_arrow(path: Path, documents: list[list[int]]) -> Path:
    table = pa.table({"tokens": pa.array(documents, pa.list_(pa.int64()))})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return path


def write_megatron(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> Path:
    """The pair of files in Megatron's layout, written out from its description rather than by its own writer."""
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    itemsize = np.dtype(dtype).itemsize
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    Path(f"{prefix}.bin").write_bytes(np.concatenate([np.array(d, dtype) for d in documents]).tobytes())
    code = {np.int32: 4, np.uint16: 8}[dtype]
    header = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([code])
    counts = np.array([len(documents), len(documents) + 1], "<u8").tobytes()
    borders = np.arange(len(documents) + 1, dtype=np.int64)
    Path(f"{prefix}.idx").write_bytes(header + counts + lengths.tobytes() + pointers.tobytes() + borders.tobytes())
    return prefix


def encoded(tokenizer: Tokenizer, texts: list[str], with_eod: bool = False) -> list[list[int]]:
    ids = tokenizer.encode_batch(texts)
    return [[*document, tokenizer.eod_id] for document in ids] if with_eod else ids


# Kind -> writes texts into a directory and returns (path, column).
type Writer = Callable[[Path, Tokenizer, list[str]], tuple[Path, str]]
WRITERS: dict[str, Writer] = {
    "parquet tokens": lambda d, t, x: (write_parquet_tokens(d / "tokens.parquet", encoded(t, x)), "tokens"),
    "parquet tokens with eod": lambda d, t, x: (write_parquet_tokens(d / "eod.parquet", encoded(t, x, True)), "tokens"),
    "parquet text": lambda d, t, x: (write_parquet_text(d / "text.parquet", x), "text"),
    "jsonl text": lambda d, t, x: (write_jsonl(d / "text.jsonl", "text", x), "text"),
    "jsonl tokens": lambda d, t, x: (write_jsonl(d / "tokens.jsonl", "tokens", encoded(t, x)), "tokens"),
    "arrow tokens": lambda d, t, x: (write_arrow(d / "tokens.arrow", encoded(t, x)), "tokens"),
    "megatron": lambda d, t, x: (write_megatron(d / "mega", encoded(t, x, True)), "tokens"),
}
