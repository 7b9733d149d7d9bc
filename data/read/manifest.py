"""The manifest of a corpus directory: what it holds, and the hashes that prove it."""

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import CorpusError
from data.read.endings import ROW_ENDINGS, ending_of
from data.read.faults import Faults
from data.read.remote import exists, is_url, join, read_file, redacted, write_file
from data.secrets import one_line

FORMAT = "token-corpus"
MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
TRAIN, HELDOUT = SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class FileInfo:
    """A file of the corpus directory; `size` in bytes."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo(FileInfo):
    """A shard. `bytes` counts its UTF-8 text, `tokens` its end-of-document tokens too."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Totals:
    """What the shards of a split hold together; bytes of UTF-8 text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything about a corpus but its tokens.

    `token_bytes` is the file of `Tokenizer.token_bytes`; `plan` what the corpus was prepared from and how, for repairs.
    """

    vocab_size: int
    eod_token: str
    eod_id: int
    tokenizer: FileInfo
    token_bytes: FileInfo
    source: dict[str, str | int]
    splits: Mapping[str, Sequence[ShardInfo]]
    plan: dict[str, Any] | None = None

    @property
    def files(self) -> list[FileInfo]:
        return [
            self.tokenizer,
            self.token_bytes,
            *(shard for split in SPLITS for shard in self.splits[split]),
        ]

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens in equal shards, wherever they came from and wherever they lie."""
        content = [
            self.vocab_size,
            self.eod_id,
            {split: [asdict(s) for s in self.splits[split]] for split in SPLITS},
        ]
        content.append([self.tokenizer.sha256, self.token_bytes.sha256])
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def totals(self, split: str) -> Totals:
        shards = self.splits[split]
        return Totals(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
        )


def is_corpus(path: str | Path) -> bool:
    """Whether prepare has made what lies in this directory or below this URL."""
    root = str(path)
    if is_url(root) and (glob.has_magic(root) or ending_of(root) in ROW_ENDINGS):
        return False
    return exists(join(root, MANIFEST_FILE))


def file_info(path: Path) -> FileInfo:
    """A file's name, size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(path.name, path.stat().st_size, digest)


def info_of(name: str, content: bytes) -> FileInfo:
    """What a manifest says of a file with this content."""
    return FileInfo(name, len(content), hashlib.sha256(content).hexdigest())


def write_manifest(root: str, manifest: Manifest) -> None:
    """The manifest makes a directory a corpus, so it comes last and all at once."""
    fields = asdict(manifest)
    fields["splits"] = {
        split: asdict(manifest.totals(split)) | {"shards": shards} for split, shards in fields["splits"].items()
    }
    header = {"format": FORMAT, "version": MANIFEST_VERSION, "fingerprint": manifest.fingerprint}
    write_file(join(root, MANIFEST_FILE), json.dumps(header | fields, indent=1) + "\n")


def read_manifest(root: str) -> Manifest:
    """CorpusError where there is none, where another version wrote it, or where it was changed since."""
    path = join(root, MANIFEST_FILE)
    if not exists(path):
        raise CorpusError(
            f"data.corpus={redacted(root)} is no corpus ({MANIFEST_FILE} is missing): make one with prepare"
        )
    try:
        fields = json.loads(read_file(path, Faults()))
    except ValueError as error:
        raise _broken(root, one_line(error)) from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _broken(root, f"it is not the manifest of a {FORMAT}")
    version = fields.get("version")
    if version != MANIFEST_VERSION:
        raise _broken(root, f"it has version {version}, and this program reads version {MANIFEST_VERSION}")
    try:
        manifest = _from_fields(fields)
        intact = manifest.fingerprint == fields["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(root, f"a field is missing or wrong ({one_line(error)})") from error
    if not intact:
        raise _broken(root, "its fingerprint does not fit what it lists")
    return manifest


def _from_fields(fields: dict[str, Any]) -> Manifest:
    splits = {split: tuple(ShardInfo(**shard) for shard in fields["splits"][split]["shards"]) for split in SPLITS}
    return Manifest(
        vocab_size=fields["vocab_size"],
        eod_token=fields["eod_token"],
        eod_id=fields["eod_id"],
        tokenizer=FileInfo(**fields["tokenizer"]),
        token_bytes=FileInfo(**fields["token_bytes"]),
        source=fields["source"],
        splits=splits,
        plan=fields.get("plan"),
    )


def _broken(root: str, reason: str) -> CorpusError:
    return CorpusError(
        f"data.corpus={redacted(root)}: {MANIFEST_FILE} cannot be used: {reason}; prepare the corpus again"
    )
