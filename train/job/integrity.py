"""Whether a checkpoint is what was written: `integrity.json`, the hash and size of each of its files. No torch.

The format is megatron-core's (its `verify_integrity` reads it), with sizes beside the hashes
and a hash of its own. There every file is hashed by the first process, once when all is written, once before loading;
here each writer hashes what it writes while it writes it, and the processes of a job share out the reading.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.secrets import one_line
from parallel.checkpoint.digest import Digest, digest_of, read_digest

MANIFEST_FILE = "integrity.json"
ALGORITHM = "sha256"
SMALL_BYTES = 2**20  # files up to this size are hashed by whoever looks at a checkpoint


def manifest(digests: Mapping[str, Digest]) -> bytes:
    """The contents of `integrity.json`."""
    files = {name: digests[name].sha256 for name in sorted(digests)}
    sizes = {name: digests[name].size for name in sorted(digests)}
    own = digest_of(json.dumps([files, sizes]).encode()).sha256
    content = {"algorithm": ALGORITHM, "files": files, "sizes": sizes, "self": own}
    return (json.dumps(content, indent=1) + "\n").encode()


def read_manifest(checkpoint: Path) -> dict[str, Digest]:
    """What each file of a checkpoint must be.

    Raises:
        ValueError: `integrity.json` is not there, or not as it was written.
    """
    try:
        content = (checkpoint / MANIFEST_FILE).read_bytes()
        values: dict[str, Any] = json.loads(content)
        digests = {name: Digest(digest, values["sizes"][name]) for name, digest in values["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_FILE} cannot be read: {one_line(error)}") from error
    if any(Path(name).name != name for name in digests) or manifest(digests) != content:
        raise ValueError(f"{MANIFEST_FILE} is not as it was written")
    return digests


def faults(checkpoint: Path, deep: bool = False, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, in words; nothing if it is as it was written.

    Args:
        deep: hashes every file, not only looks for it, its size and the hashes of small ones.
        part, parts: hashes the part-th of so many shares of the large files.
    """
    try:
        wanted = read_manifest(checkpoint)
    except ValueError as error:
        return [str(error)]
    found = []
    for number, (name, digest) in enumerate(sorted(wanted.items(), key=lambda item: -item[1].size)):
        try:
            size = (checkpoint / name).stat().st_size
            hashed = digest.size <= SMALL_BYTES or (deep and number % parts == part)
            if size != digest.size:
                found.append(f"{name} has {size:,} bytes instead of {digest.size:,}")
            elif hashed and read_digest(checkpoint / name) != digest:
                found.append(f"{name} is not as it was written (its SHA-256 differs)")
        except OSError as error:
            found.append(f"{name} cannot be read: {one_line(error)}")
    return found
