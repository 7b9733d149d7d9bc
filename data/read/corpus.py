"""A prepared corpus: tokenized documents in shards, proved by the hashes of its manifest."""

import hashlib
import io
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from data.errors import CorpusError
from data.progress import byte_bar
from data.read.faults import Faults
from data.read.manifest import MANIFEST_FILE, FileInfo, Manifest, Totals, file_info, read_manifest
from data.read.remote import find, is_http, is_url, join, read_file, redacted
from data.read.shards import broken_file, read_lengths, read_shard
from data.read.units import Unit
from data.secrets import one_line
from data.text.tokenizer import TOKENIZER_FILE, Tokenizer


class Corpus:
    """Reads a corpus directory. Every error that its files can cause is a CorpusError that names the file."""

    def __init__(self, path: Path | str, manifest: Manifest) -> None:
        self.path, self.root = path, str(path)
        self.manifest = manifest
        self._proved: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """Reads the manifest of a directory or URL and checks each file's size; a hash waits until its file is read."""
        if is_url(str(path)):
            root, manifest = str(path).rstrip("/"), read_manifest(str(path))
            sizes = {info.file: info.size for info in manifest.files} if is_http(root) else _sizes_at(root)
            for info in manifest.files:
                _check_size(root, info, sizes.get(info.file))
            return cls(root, manifest)
        directory = Path(path).expanduser()
        if not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            raise CorpusError(f"data.corpus={path} {what}: set it to a directory made by prepare, or to embedded")
        if not any(directory.iterdir()):
            raise CorpusError(f"data.corpus={path} is empty: set it to a directory made by prepare, or to embedded")
        manifest = read_manifest(str(directory))
        for info in manifest.files:
            _check_size(str(directory), info, _size_of(directory / info.file))
        return cls(directory, manifest)

    def file(self, name: str) -> str:
        """Path or URL of one of the corpus's files."""
        return join(self.root, name)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def eod_id(self) -> int:
        return self.manifest.eod_id

    def totals(self, split: str) -> Totals:
        """Documents, tokens and bytes of "train" or "heldout"."""
        return self.manifest.totals(split)

    def num_shards(self, split: str) -> int:
        return len(self.manifest.splits[split])

    def shard_tokens(self, split: str) -> np.ndarray:
        """int64 [shards]: tokens of each shard, known without opening one."""
        return np.array([shard.tokens for shard in self.manifest.splits[split]], dtype=np.int64)

    def shard(self, split: str, index: int, faults: Faults | None = None) -> Unit:
        """Reads one shard from disk, and proves its hash the first time; counts what it overcame in `faults`."""
        info = self.manifest.splits[split][index]
        check_hash = info.file not in self._proved
        shard = read_shard(self.root, info, self.vocab_size, check_hash, faults or Faults())
        self._proved.add(info.file)
        return shard

    def lengths(self, split: str, index: int, faults: Faults) -> np.ndarray:
        """int64 [documents] of a shard: tokens of each. Shards of earlier versions are read whole for it."""
        found = read_lengths(self.root, self.manifest.splits[split][index], faults)
        return self.shard(split, index, faults).lengths if found is None else found

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """Tokens of each document in the order of the files, the end-of-document token last."""
        for index in range(self.num_shards(split)):
            shard = self.shard(split, index)
            for document in range(shard.num_documents):
                yield shard.document(document)

    def tokenizer(self) -> Tokenizer:
        self._prove(self.manifest.tokenizer)
        if isinstance(self.path, Path):
            return Tokenizer.from_path(self.path, self.manifest.eod_token)
        text = read_file(self.file(TOKENIZER_FILE), Faults()).decode()
        return Tokenizer(text, self.manifest.eod_token, redacted(self.file(TOKENIZER_FILE)))

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each token stands for, 0 for special tokens."""
        self._prove(self.manifest.token_bytes)
        return np.load(io.BytesIO(read_file(self.file(self.manifest.token_bytes.file), Faults())))

    @property
    def num_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(info.size for info in self.manifest.files)

    def verify(self, progress: bool = True) -> None:
        """Proves the hash of every file; CorpusError names the first that is not as prepare left it."""
        files = self.manifest.files
        with byte_bar("verifying the corpus", self.num_bytes, show=progress) as bar:
            for info in files:
                self._prove(info)
                bar.update(info.size)

    def _prove(self, info: FileInfo) -> None:
        if isinstance(self.path, Path):
            found = self._local_info(self.path / info.file)
        else:
            content = read_file(self.file(info.file), Faults())
            found = FileInfo(info.file, len(content), hashlib.sha256(content).hexdigest())
        if (found.size, found.sha256) != (info.size, info.sha256):
            raise broken_file(self.root, info.file, f"is corrupt: its hash differs from the one in {MANIFEST_FILE}")
        self._proved.add(info.file)

    def _local_info(self, path: Path) -> FileInfo:
        try:
            return file_info(path)
        except OSError as error:
            raise broken_file(self.root, path.name, f"cannot be read: {one_line(error)}") from error


def damaged_files(directory: Path, manifest: Manifest) -> list[FileInfo]:
    """The files of a corpus that are missing, or are not as prepare left them."""
    found = []
    with byte_bar("proving the corpus", sum(info.size for info in manifest.files)) as bar:
        for info in manifest.files:
            path = directory / info.file
            if not path.is_file() or (file_info(path).size, file_info(path).sha256) != (info.size, info.sha256):
                found.append(info)
            bar.update(info.size)
    return found


def check_corpus(path: str) -> str:
    """A line about a corpus of which every hash, count, token and end of a document has been proved.

    Raises:
        CorpusError: the first file that is not as prepare left it, by name.
    """
    corpus = Corpus.open(path)
    corpus.verify()
    parts = []
    for split in corpus.manifest.splits:
        for index in range(corpus.num_shards(split)):
            shard = corpus.shard(split, index)
            if (shard.tokens[shard.starts + shard.lengths - 1] != corpus.eod_id).any():
                file = corpus.manifest.splits[split][index].file
                raise broken_file(corpus.root, file, f"holds a document that does not end with token {corpus.eod_id}")
        totals = corpus.totals(split)
        parts.append(f"{split} {totals.documents:,} documents, {totals.tokens:,} tokens")
    return f"{redacted(corpus.root)} is whole: {'; '.join(parts)}"


def _check_size(root: str, info: FileInfo, size: int | None) -> None:
    # A manifest from elsewhere must not reach outside its directory.
    if Path(info.file).name != info.file:
        raise CorpusError(
            f"data.corpus={redacted(root)}: {MANIFEST_FILE} lists {info.file}, which is not a plain file name"
        )
    if size is None:
        raise broken_file(root, info.file, "is missing")
    if size != info.size:
        raise broken_file(root, info.file, f"has {size} bytes, and the manifest says {info.size}")


def _sizes_at(url: str) -> dict[str, int]:
    """Sizes of the files that lie directly below a URL."""
    found = find(url, "data.corpus")
    return {file.path.removeprefix(str(found.root)).lstrip("/"): file.size for file in found.files}


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
