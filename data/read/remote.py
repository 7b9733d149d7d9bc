"""Bytes of files on local disks, over HTTP, and on whatever else fsspec knows (s3://, hf://, gs://...)."""

import glob
import io
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fsspec

from data.errors import CorpusError
from data.files import write_whole
from data.read.faults import Faults, retrying
from data.secrets import one_line

TIMEOUT_S = 60
BLOCK = 2**20  # bytes that a RangeFile reads at least, so that small reads of a parser are few requests


@dataclass(frozen=True)
class File:
    """A file that data is read from; `version` changes when it is written again (time or tag)."""

    path: str
    size: int
    version: str

    @property
    def shown(self) -> str:
        """The path for messages."""
        return redacted(self.path)


def relative_names(paths: Iterable[str]) -> list[str]:
    """Names below the folder that all paths share: the same wherever that folder lies."""
    known = list(paths)
    if not known:
        return []
    first, last = min(known), max(known)  # what these share all share
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    cut = first.rfind("/", 0, same) + 1
    return [path[cut:] for path in known]


def is_url(path: str) -> bool:
    """Whether fsspec, not the operating system, finds the path."""
    return "://" in path


def is_http(path: str) -> bool:
    """Whether a plain web server holds the file; it cannot list others."""
    return path.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Found:
    """The files of a path; `root` is the directory or prefix they lie in, None for a file or a pattern."""

    root: str | None
    files: list[File]


def find(path: str, setting: str) -> Found:
    """Every file of a path, directory, pattern or URL, hidden ones left out.

    Raises:
        CorpusError: there is nothing, or its file system is unknown or cannot be reached.
    """
    if is_http(path):
        return Found(None, [_http_file(path, setting)])
    if is_url(path):
        return _find_url(path, setting)
    return _find_local(path, setting)


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if not is_url(path):
        return Path(path).expanduser().is_file()

    def ask() -> bool:
        if is_http(path):
            try:
                with _http_answer(urllib.request.Request(path, method="HEAD")):
                    return True
            except FileNotFoundError:
                return False
        filesystem, name = _filesystem(path)
        return bool(filesystem.isfile(name))

    return retrying(redacted(path), ask, Faults(), _renewal(path))


def read_file(path: str, faults: Faults) -> bytes:
    """A whole file, tried again where that may help. BrokenUnit names it."""
    if is_http(path):
        return fetch(path, 0, _http_file(path, "").size, faults)
    if is_url(path):
        name = _filesystem(path)[1]
        return retrying(redacted(path), lambda: _filesystem(path)[0].cat_file(name), faults, _renewal(path))
    return retrying(path, Path(path).expanduser().read_bytes, faults)


def write_file(path: str, content: bytes | str) -> None:
    """Writes a file so that it is there whole or not at all, with the directories above it."""
    if is_url(path):
        filesystem, name = _filesystem(path)
        written = content.encode() if isinstance(content, str) else content
        retrying(redacted(path), lambda: filesystem.pipe_file(name, written), Faults())
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), content)


def list_sizes(folder: str) -> dict[str, int]:
    """Name and size of each file directly in a directory or below a URL; nothing where there is none."""
    if not is_url(folder):
        found = os.scandir(folder) if os.path.isdir(folder) else ()
        return {entry.name: entry.stat().st_size for entry in found if entry.is_file() and entry.name[0] != "."}
    filesystem, name = _filesystem(folder)

    def read() -> dict[str, int]:
        filesystem.invalidate_cache()
        try:
            infos = filesystem.ls(name, detail=True)
        except FileNotFoundError:
            return {}
        return {info["name"].rpartition("/")[2]: info["size"] for info in infos if info["type"] == "file"}

    return retrying(redacted(folder), read, Faults())


def remove_tree(folder: str) -> None:
    """Deletes a directory, or everything below a URL."""
    if not is_url(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    filesystem, name = _filesystem(folder)
    if filesystem.exists(name):
        filesystem.rm(name, recursive=True)


def join(root: str, name: str) -> str:
    """A file in a directory or below a URL."""
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root) / name)


def redacted(path: str) -> str:
    """A path for messages: a URL without what may be secret in it, user, password and query."""
    if not is_url(path):
        return path
    protocol, _, rest = path.partition("://")
    host, slash, name = rest.partition("?")[0].partition("/")
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{name}"


def fetch(path: str, start: int, stop: int, faults: Faults) -> bytes:
    """Bytes [start, stop) of a file, tried again where that may help. BrokenUnit names the file."""

    def read() -> bytes:
        if is_http(path):
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

    return retrying(redacted(path), read, faults, _renewal(path))


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


def _find_local(path: str, setting: str) -> Found:
    root = Path(path).expanduser()
    if root.is_dir():
        paths = [p for p in root.rglob("*") if not _is_hidden(p.relative_to(root).parts)]
    elif root.exists():
        paths = [root]
    else:
        paths = [Path(name) for name in glob.glob(str(root), recursive=True)]
        if not paths:
            raise CorpusError(f"{setting}={path} does not exist: give a directory, files or a URL of files")
    found = [(p, p.stat()) for p in paths if p.is_file()]
    files = [File(str(p.absolute()), stat.st_size, str(stat.st_mtime_ns)) for p, stat in found]
    return Found(str(root.absolute()) if root.is_dir() else None, files)


def _find_url(path: str, setting: str) -> Found:
    def read() -> Found:
        filesystem, root = _filesystem(path)
        if glob.has_magic(root):
            found, top = filesystem.glob(root, detail=True), None
        else:
            found, top = filesystem.find(root, detail=True), filesystem.unstrip_protocol(root).rstrip("/")
        infos = {filesystem.unstrip_protocol(name): info for name, info in found.items()}
        if top in infos:
            top = None
        files = [
            File(name, info["size"], _version(info))
            for name, info in infos.items()
            if top is None or not _is_hidden(name.removeprefix(top).strip("/").split("/"))
        ]
        return Found(top, files)

    found = retrying(f"{setting}={redacted(path)}", read, Faults(), _renewal(path))
    if not found.files:
        raise CorpusError(f"{setting}={redacted(path)} does not exist, or holds no file")
    return found


def _is_hidden(parts: Sequence[str]) -> bool:
    """Files and folders that begin with a dot or two underscores are no data."""
    return any(part.startswith((".", "__")) for part in parts)


def _version(info: dict[str, Any]) -> str:
    """What a file system says of a file's last change, under the names that they use."""
    known = ("ETag", "etag", "last_modified", "LastModified", "blob_id", "last_commit", "mtime", "created")
    return next((str(info[name]) for name in known if info.get(name)), "")


@cache
def _filesystem_of(protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise CorpusError(f"{protocol}:// cannot be read here: {one_line(error)}") from error


def _filesystem(path: str) -> tuple[Any, str]:
    _filesystem_of(path.partition("://")[0])
    return fsspec.core.url_to_fs(path)


def _renewal(path: str) -> Callable[[], None] | None:
    """What makes a URL's file system read its credentials again; None for files and plain web servers."""
    if not is_url(path) or is_http(path):
        return None
    return fsspec.get_filesystem_class(path.partition("://")[0]).clear_instance_cache


def _http_file(url: str, setting: str) -> File:
    def read() -> File:
        with _http_answer(urllib.request.Request(url, method="HEAD")) as answer:
            headers = answer.headers
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        return File(url, int(headers["Content-Length"]), version)

    return retrying(f"{setting}={redacted(url)}".lstrip("="), read, Faults())


def _http_range(url: str, start: int, stop: int) -> bytes:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}"})
    with _http_answer(request) as answer:
        if answer.status != 206 and (start or int(answer.headers["Content-Length"]) != stop):
            raise ValueError(f"the server answered {answer.status}: it does not serve parts of files")
        return answer.read()


def _http_answer(request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404, 410):  # asking again does not help
            raise FileNotFoundError(f"the server answered {error.code} {error.reason}") from error
        raise
