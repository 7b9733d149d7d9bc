"""What the endings of files say: what is stored in them, and how it is compressed."""

from pathlib import PurePosixPath

ROW_ENDINGS = (".parquet", ".jsonl", ".json", ".arrow")  # of files that training reads as they are
# File ending -> arrow's name of the codec; xz is Python's.
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": ""}


def is_compressed(path: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return PurePosixPath(path).suffix in CODECS


def ending_of(name: str) -> str:
    """A file's ending without the one of its compression: ".jsonl" of "a.jsonl.gz"."""
    path = PurePosixPath(name)
    return PurePosixPath(path.stem).suffix if path.suffix in CODECS else path.suffix
