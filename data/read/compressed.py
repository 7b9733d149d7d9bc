"""Compressed files as streams of bytes: gzip, bzip2, xz and zstd, without a package of their own."""

import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from data.read.endings import CODECS
from data.read.faults import BrokenUnit, Faults
from data.read.remote import File, RangeFile
from data.secrets import one_line


@contextmanager
def unpacked(file: File, faults: Faults) -> Iterator[Any]:
    """The plain content of a file, to be read from its start.

    Raises:
        BrokenUnit: it is damaged or cut off; names the file.
    """
    codec, raw = CODECS.get(PurePosixPath(file.path).suffix), RangeFile(file, faults)
    try:
        if codec is None:
            yield raw
        elif codec:
            yield pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)
        else:
            with lzma.LZMAFile(pa.PythonFile(raw, mode="r")) as stream:
                yield stream
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise BrokenUnit(f"{file.shown} is corrupt: {one_line(error)}") from error


def line_blocks(file: File, block_bytes: int, faults: Faults) -> Iterator[bytes]:
    """Whole lines of a file's plain content, about `block_bytes` of them at a time."""
    with unpacked(file, faults) as stream:
        parts: list[bytes] = []
        while chunk := stream.read(block_bytes):
            head, newline, tail = chunk.rpartition(b"\n")
            if not newline:
                parts.append(chunk)
                continue
            yield b"".join([*parts, head, newline])
            parts = [tail]
        if any(parts):
            yield b"".join(parts)
