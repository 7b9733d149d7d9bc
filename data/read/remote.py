"""Bytes of files on local disks, over HTTP, and on whatever else fsspec knows (s3://, hf://, gs://...)."""

import glob
import io
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fsspec

from data.errors import CorpusError, one_line
from data.read.faults import Faults, retrying

TIMEOUT_S = 60
BLOCK = 2**20  # bytes that a RangeFile reads at least, so that small reads of a parser are few requests


@dataclass(frozen=True)
class File:
    """A file that data is read from; `version` changes when it is written again (time or tag)."""

    path: str
    size: int
    version: str


def is_url(path: str) -> bool:
    """Whether fsspec, not the operating system, finds the path."""
    return "://" in path


def list_files(path: str, endings: tuple[str, ...]) -> list[File]:
    """The files of a path, directory, pattern or URL that end in one of `endings`, sorted by name.

    Raises:
        CorpusError: there is none, or its file system is unknown or cannot be reached.
    """
    if path.startswith(("http://", "https://")):
        found = [_http_file(path)]
    elif is_url(path):
        found = _url_files(path)
    else:
        found = _local_files(path)
    files = sorted((f for f in found if f.path.endswith(endings) and f.size), key=lambda f: f.path)
    if not files:
        raise CorpusError(f"data.corpus={path} holds no file of {', '.join(endings)} with anything in it")
    return files


def fetch(path: str, start: int, stop: int, faults: Faults) -> bytes:
    """Bytes [start, stop) of a file, tried again where that may help. BrokenUnit names the file."""

    def read() -> bytes:
        if path.startswith(("http://", "https://")):
            content = _http_range(path, start, stop)
        elif is_url(path):
            filesystem, name = _filesystem(path)
            content = filesystem.cat_file(name, start=start, end=stop)
        else:
            with open(path, "rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        if len(content) != stop - start:
            raise EOFError(f"{len(content)} bytes came where {stop - start} were asked for from byte {start} on")
        return content

    return retrying(path, read, faults)


class RangeFile(io.RawIOBase):
    """A file of `fetch`, for parsers that want one: read only, seekable."""

    def __init__(self, file: File, faults: Faults) -> None:
        self._file, self._faults = file, faults
        self._position = self._start = 0
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._file.size if size < 0 else min(self._file.size, self._position + size)
        if not self._start <= self._position <= stop <= self._start + len(self._block):
            end = min(self._file.size, max(stop, self._position + BLOCK))
            self._start, self._block = self._position, fetch(self._file.path, self._position, end, self._faults)
        content = self._block[self._position - self._start : stop - self._start]
        self._position = max(self._position, stop)
        return content


def _local_files(path: str) -> list[File]:
    root = Path(path).expanduser()
    if root.is_dir():
        paths = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    elif root.exists():
        paths = [root]
    else:
        paths = [Path(name) for name in glob.glob(str(root), recursive=True)]
        if not paths:
            raise CorpusError(
                f"data.corpus={path} does not exist: give a corpus made by prepare, files or a URL of files"
            )
    found = [(p, p.stat()) for p in paths if p.is_file()]
    return [File(str(p.absolute()), stat.st_size, str(stat.st_mtime_ns)) for p, stat in found]


def _url_files(path: str) -> list[File]:
    def read() -> list[File]:
        filesystem, root = _filesystem(path)
        names = filesystem.glob(root) if glob.has_magic(root) else filesystem.find(root)
        infos = [(name, filesystem.info(name)) for name in names]
        return [File(filesystem.unstrip_protocol(n), info["size"], _version(info)) for n, info in infos]

    return retrying(f"data.corpus={path}", read, Faults())


def _version(info: dict[str, Any]) -> str:
    """What a file system says of a file's last change, under the names that they use."""
    known = ("ETag", "etag", "last_modified", "LastModified", "last_commit", "mtime", "created")
    return next((str(info[name]) for name in known if info.get(name)), "")


@cache
def _filesystem_of(protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise CorpusError(f"data.corpus={protocol}:// cannot be read here: {one_line(error)}") from error


def _filesystem(path: str) -> tuple[Any, str]:
    _filesystem_of(path.partition("://")[0])
    return fsspec.core.url_to_fs(path)


def _http_file(url: str) -> File:
    def read() -> File:
        with _http_answer(urllib.request.Request(url, method="HEAD")) as answer:
            headers = answer.headers
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        return File(url, int(headers["Content-Length"]), version)

    return retrying(f"data.corpus={url}", read, Faults())


def _http_range(url: str, start: int, stop: int) -> bytes:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}"})
    with _http_answer(request) as answer:
        if answer.status != 206 and (start or int(answer.headers["Content-Length"]) != stop):
            raise OSError(f"the server answered {answer.status}: it does not serve parts of files")
        return answer.read()


def _http_answer(request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404, 410):  # asking again does not help
            raise FileNotFoundError(f"the server answered {error.code} {error.reason}") from error
        raise
