"""A prepared corpus whose manifest is parsed by one process and mapped by all others.

A manifest of 100,000 shards is text of 23 MB, seconds to parse, and hundreds of megabytes as objects; a stat of each
shard is as many requests to a file system. Both happen once, for the index; what it says is proved again when a shard
is read.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import overload

import numpy as np

from data.errors import CorpusError
from data.read.corpus import Corpus
from data.read.faults import Faults
from data.read.index import Index, built_once, digest_of
from data.read.manifest import MANIFEST_FILE, SPLITS, FileInfo, Manifest, ShardInfo, Totals
from data.read.remote import is_url, join, read_file

COUNTS = ("size", "documents", "tokens", "bytes")
INDEX_VERSION = 1


class ShardTable(Sequence[ShardInfo]):
    """The shards of a split, in arrays."""

    def __init__(self, index: Index, split: str) -> None:
        self.columns = {name: index.arrays[f"{split}.{name}"] for name in ("file", "sha256", *COUNTS)}

    def __len__(self) -> int:
        return len(self.columns["size"])

    @overload
    def __getitem__(self, number: int) -> ShardInfo: ...

    @overload
    def __getitem__(self, number: slice) -> list[ShardInfo]: ...

    def __getitem__(self, number: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        counts = {name: int(self.columns[name][number]) for name in COUNTS}
        file = self.columns["file"][number].decode()
        return ShardInfo(file=file, sha256=self.columns["sha256"][number].tobytes().hex(), **counts)


@dataclass(frozen=True)
class MappedManifest(Manifest):
    """A manifest whose shards are tables, and whose fingerprint is known."""

    known_fingerprint: str = ""

    @property
    def fingerprint(self) -> str:
        return self.known_fingerprint

    def totals(self, split: str) -> Totals:
        shards = self.splits[split]
        assert isinstance(shards, ShardTable)
        return Totals(*(int(shards.columns[name].sum()) for name in ("documents", "tokens", "bytes")))


def map_corpus(path: str | Path, cache: Path) -> Corpus:
    """Opens a corpus like `Corpus.open`, which only the first process calls that asks for this manifest.

    Args:
        cache: directory that keeps the index.
    """
    root = str(path).rstrip("/") if is_url(str(path)) else str(Path(path).expanduser())
    try:
        proof = sha256(read_file(join(root, MANIFEST_FILE), Faults())).hexdigest()
        # The time of a directory changes when a file comes or goes.
        changed = 0 if is_url(root) else Path(root).stat().st_mtime_ns
        where = root if is_url(root) else str(Path(root).absolute())
        place = cache / "index" / digest_of(["corpus", INDEX_VERSION, where, changed, proof])[:32]
    except (CorpusError, OSError):
        return Corpus.open(path)  # says what is wrong
    index = built_once(place, lambda: _tabulate(Corpus.open(path).manifest))
    notes = dict(index.notes)
    tokenizer, token_bytes = (FileInfo(**notes.pop(name)) for name in ("tokenizer", "token_bytes"))
    tables = {split: ShardTable(index, split) for split in SPLITS}
    manifest = MappedManifest(tokenizer=tokenizer, token_bytes=token_bytes, splits=tables, **notes)
    return Corpus(root if is_url(root) else Path(root), manifest)


def _tabulate(manifest: Manifest) -> Index:
    arrays = {}
    for split in SPLITS:
        shards = manifest.splits[split]
        arrays[f"{split}.file"] = np.array([shard.file.encode() for shard in shards], dtype=bytes)
        hashes = [np.frombuffer(bytes.fromhex(shard.sha256), dtype=np.uint8) for shard in shards]
        arrays[f"{split}.sha256"] = np.array(hashes, dtype=np.uint8).reshape(-1, 32)
        for name in COUNTS:
            arrays[f"{split}.{name}"] = np.array([vars(shard)[name] for shard in shards], dtype=np.int64)
    notes = {
        "vocab_size": manifest.vocab_size,
        "eod_token": manifest.eod_token,
        "eod_id": manifest.eod_id,
        "tokenizer": asdict(manifest.tokenizer),
        "token_bytes": asdict(manifest.token_bytes),
        "source": manifest.source,
        "known_fingerprint": manifest.fingerprint,
    }
    return Index(arrays, notes)
