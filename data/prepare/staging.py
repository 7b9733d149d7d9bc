"""A corpus while it is being made, in a directory or below a URL beside where it will lie.

OUTPUT.partial/plan.json           what it is made from and how: only the same plan goes on
OUTPUT.partial/tokenizer.json      its tokenizer
OUTPUT.partial/pieces/00012.json   a record for each finished piece of the input, written after its shards
OUTPUT.partial/heldout/            the held-out documents of each piece
OUTPUT.partial/corpus/             the training shards, which become OUTPUT all at once

On a file system of objects nothing can be renamed: there the training shards lie in OUTPUT from the start, and the
manifest, which comes last, makes them a corpus. Every file is written whole, and the same piece gives the same bytes,
so that processes and machines may work on one corpus, be killed, and go on.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import CorpusError, changes
from data.files import locked
from data.read.faults import Faults
from data.read.manifest import MANIFEST_FILE, SPLITS, TRAIN, ShardInfo
from data.read.remote import exists, is_url, join, list_sizes, read_file, redacted, remove_tree, write_file
from data.secrets import one_line


@dataclass(frozen=True)
class PieceRecord:
    """What a finished piece of the input gave: shards by split, blank documents, and what was skipped, by name."""

    shards: dict[str, tuple[ShardInfo, ...]]
    blank: int
    skipped: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return sum(shard.bytes for shards in self.shards.values() for shard in shards)


class Staging:
    """A corpus that is being made. Picklable."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.root = f"{output.rstrip('/')}.partial"
        self.corpus = output if is_url(output) else join(self.root, "corpus")

    def folder(self, split: str) -> str:
        """Where the shards of a split are written."""
        return self.corpus if split == TRAIN else join(self.root, "heldout")

    def open(self, plan: dict[str, Any]) -> None:
        """Writes the plan, or finds the same one there.

        Raises:
            CorpusError: pieces of another plan are there.
        """
        before = self.plan()
        if before is not None and before != plan:
            if finished := len(list_sizes(join(self.root, "pieces"))):
                raise CorpusError(
                    f"{redacted(self.root)} holds {finished} finished pieces that were made otherwise: "
                    f"{changes(before, plan)}: set this as before to go on, or delete {redacted(self.root)} to start "
                    f"over"
                )
            self.discard()
        if before != plan:
            write_file(join(self.root, "plan.json"), json.dumps(plan, indent=1))

    def plan(self) -> dict[str, Any] | None:
        """What is being made here; None where nothing is."""
        path = join(self.root, "plan.json")
        if not exists(path):
            return None
        try:
            return json.loads(read_file(path, Faults()))
        except ValueError as error:
            raise CorpusError(
                f"{redacted(path)} is damaged ({one_line(error)}): delete {redacted(self.root)}"
            ) from error

    def note(self, piece: int, record: PieceRecord) -> None:
        """Records a finished piece."""
        write_file(join(self.root, f"pieces/{piece:05d}.json"), json.dumps(asdict(record)))

    def records(self) -> dict[int, PieceRecord]:
        """Finished pieces whose shards are all there."""
        sizes = {split: list_sizes(self.folder(split)) for split in SPLITS}
        found = {}
        for name in sorted(list_sizes(join(self.root, "pieces"))):
            fields = json.loads(read_file(join(self.root, f"pieces/{name}"), Faults()))
            shards = {split: tuple(ShardInfo(**shard) for shard in fields["shards"][split]) for split in SPLITS}
            if all(sizes[split].get(shard.file) == shard.size for split in SPLITS for shard in shards[split]):
                record = PieceRecord(shards, fields["blank"], tuple(fields["skipped"]))
                found[int(name.removesuffix(".json"))] = record
        return found

    def publish(self) -> None:
        """Gives the finished corpus its name."""
        if not is_url(self.output):
            check_free(self.output)
            for left in Path(self.corpus).glob(".*"):  # torn off by a kill while it was written
                left.unlink()
            os.rename(self.corpus, self.output)
        self.discard()

    def discard(self) -> None:
        """Deletes everything but what is published."""
        remove_tree(self.root)


@contextmanager
def staged(output: str, plan: dict[str, Any], part: str | None) -> Iterator[Staging]:
    """The place where a corpus, or a part of one, is made.

    A mistake before the first piece is finished leaves nothing behind; whatever else ends the work leaves what is
    finished, and the next call with the same plan goes on from there.

    Raises:
        CorpusError: `output` is there, is being made by another process, cannot be written, or was begun otherwise.
    """
    check_free(output)
    staging = Staging(output)
    with ExitStack() as stack:
        try:
            if not is_url(output):
                Path(staging.root).mkdir(parents=True, exist_ok=True)
                name = "lock" if part is None else f"lock-{part.replace('/', '-of-')}"
                stack.enter_context(locked(Path(staging.root) / name, wait=False))
            staging.open(plan)
            yield staging
        except BlockingIOError as error:
            raise CorpusError(f"output={output} is being made by another process: wait for it, or end it") from error
        except OSError as error:
            raise CorpusError(f"output={redacted(output)} cannot be written: {one_line(error)}") from error
        except CorpusError:
            if part is None and not is_url(output) and not list_sizes(join(staging.root, "pieces")):
                shutil.rmtree(staging.root, ignore_errors=True)
            raise
        except (KeyboardInterrupt, SystemExit):
            finished = len(list_sizes(join(staging.root, "pieces")))
            print(f"{finished} finished pieces stay in {staging.root}: the same command goes on", file=sys.stderr)
            raise


def check_free(output: str) -> None:
    """Refuses a place that holds something."""
    if is_url(output):
        taken = exists(join(output, MANIFEST_FILE))
    else:
        path = Path(output)
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken:
        raise CorpusError(f"output={redacted(output)} exists already: name a new directory, or delete it first")
