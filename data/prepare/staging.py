"""The directory in which a corpus is made: what of it is finished, for which input and settings, and its last move.

OUTPUT.partial/plan.json       what the corpus is made from
OUTPUT.partial/finished.jsonl  a line for each finished shard, written after the shard itself has reached the disk
OUTPUT.partial/corpus/         the files, which become OUTPUT all at once
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import CorpusError, changes, one_line
from data.files import locked, write_whole
from data.prepare.documents import START, Place
from data.read.manifest import SPLITS, ShardInfo


@dataclass(frozen=True)
class Finished:
    """A finished shard of a split, and what making the next one must know.

    Attributes:
        following: number of the first document that is not in this shard or those before.
        blank: documents of this split before `following` that were left out as blank.
        place: where the batch of documents begins that this shard ended in.
    """

    split: str
    shard: ShardInfo
    following: int
    blank: int
    place: Place


class Staging:
    """A corpus that is being made."""

    def __init__(self, output: Path) -> None:
        self.root = output.with_name(f"{output.name}.partial")
        self.directory = self.root / "corpus"
        self.finished: dict[str, list[Finished]] = {split: [] for split in SPLITS}

    @property
    def begin(self) -> Place:
        """Where the first document lies that may be needed."""
        return min((shards[-1].place if shards else START for shards in self.finished.values()), key=lambda p: p.number)

    @property
    def cursors(self) -> dict[str, int]:
        """For each split the number of the first document that is not in a finished shard."""
        return {split: shards[-1].following if shards else 0 for split, shards in self.finished.items()}

    @property
    def count(self) -> int:
        """Finished shards."""
        return sum(map(len, self.finished.values()))

    def open(self, plan: dict[str, Any]) -> None:
        """Makes the directory, or takes up what one with the same plan holds.

        Raises:
            CorpusError: finished shards of another plan are there.
        """
        before = self._read_plan()
        if before == plan:
            self._read_finished()
        elif before is not None:
            self._read_finished()
            if self.count:
                self._refuse(before, plan)
            self.discard()
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.root / "plan.json", json.dumps(plan))

    def note(self, finished: Finished) -> None:
        """Records a shard; its file must lie on the disk."""
        self.finished[finished.split].append(finished)
        with (self.root / "finished.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(finished)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self, output: Path) -> None:
        """Gives the finished corpus its name."""
        self.directory.rename(output)
        self.discard()

    def discard(self) -> None:
        """Deletes everything."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.finished = {split: [] for split in SPLITS}

    def _refuse(self, before: dict[str, Any], plan: dict[str, Any]) -> None:
        raise CorpusError(
            f"{self.root} holds {self.count} finished shards that were made otherwise: {changes(before, plan)}: set "
            f"this as before to go on, or delete {self.root} to start over"
        )

    def _read_plan(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.root / "plan.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _read_finished(self) -> None:
        """Shards of the journal whose files are there; a line torn off by a crash is left out, and what follows it."""
        journal = self.root / "finished.jsonl"
        lines = journal.read_text(encoding="utf-8").splitlines(keepends=True) if journal.is_file() else []
        kept = []
        for line in lines:
            if not line.endswith("\n"):
                break
            fields = json.loads(line)
            shard, place = ShardInfo(**fields.pop("shard")), Place(*fields.pop("place"))
            file = self.directory / shard.file
            if not file.is_file() or file.stat().st_size != shard.size:
                break
            self.finished[fields["split"]].append(Finished(**fields, shard=shard, place=place))
            kept.append(line)
        if len(kept) < len(lines):
            write_whole(journal, "".join(kept))


@contextmanager
def staged(output: Path, plan: dict[str, Any]) -> Iterator[Staging]:
    """The directory of a corpus that becomes `output` at the end.

    A mistake before the first shard is finished leaves nothing behind; whatever else ends the work leaves what is
    finished, and the next call with the same plan goes on from there.

    Raises:
        CorpusError: `output` is there, is being made by another process, cannot be written, or was begun otherwise.
    """
    check_free(output)
    staging = Staging(output)
    try:
        staging.root.mkdir(parents=True, exist_ok=True)
        with locked(staging.root / "lock", wait=False):
            yield from _used(staging, output, plan)
    except BlockingIOError as error:
        raise CorpusError(f"output={output} is being made by another process: wait for it, or end it") from error
    except OSError as error:
        raise CorpusError(f"output={output} cannot be written: {one_line(error)}") from error


def _used(staging: Staging, output: Path, plan: dict[str, Any]) -> Iterator[Staging]:
    staging.open(plan)
    try:
        yield staging
        check_free(output)
        staging.publish(output)
    except CorpusError:
        if not staging.count:
            staging.discard()
        raise
    except (KeyboardInterrupt, SystemExit):
        print(f"{staging.count} finished shards stay in {staging.root}: the same command goes on", file=sys.stderr)
        raise


def check_free(output: Path) -> None:
    """Refuses a directory that holds something."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CorpusError(f"output={output} exists already: name a new directory, or delete it first")
