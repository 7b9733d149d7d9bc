"""The sizes of a source's units, from which the order of samples is computed.

Which document a sample begins with depends on the number of tokens in everything before it. So that sample 10^9 is
found at once and alike on every rank, these numbers must be there before the first step. Mostly they are: a prepared
corpus has them in its manifest, Megatron files in their index, and parquet in its footers (a list column's chunk says
how many values it holds). Where they are not - text that is tokenized here, JSON lines, best-fit
packing, which asks for the length of each document - every unit is read once, by several processes; what they have
counted stands in a journal, one line a unit, so that a killed pass goes on where it was. Either way the numbers end in
an index in `data.cache` that all processes map (`data.read.index`). The alternative, to count while training, would
make every rank read what all ranks read since the start, or tie a run to its number of ranks.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.config import BEST_FIT
from data.errors import CorpusError
from data.order.packing import best_fit
from data.progress import count_bar
from data.read.faults import BrokenUnit, Faults
from data.read.index import Index, built_once, digest_of
from data.read.readers import Reader
from data.read.units import Sizes
from data.read.workers import reader_of, start_worker, usable_cores

COUNTS_VERSION = 2
MIN_PARALLEL_BYTES = 2**26  # below, starting processes takes longer than reading


def count_units(reader: Reader, packing: str, seq_length: int, cache: Path, skips: bool = False) -> Sizes:
    """The sizes of a reader's units, with their numbers of samples for best-fit packing.

    Counted by the first process that asks, and mapped from an index by all others, in this run and later ones.

    Args:
        cache: directory that keeps the index.
        skips: leave broken units out (they hold nothing then) rather than stop at the first.
    Raises:
        BrokenUnit: a unit cannot be read.
    """
    length = seq_length if packing == BEST_FIT else 0
    key = digest_of([COUNTS_VERSION, reader.identity, length, skips])
    path = cache / "index" / key[:32]
    arrays, notes = built_once(path, lambda: _count(reader, length, cache / "sizes" / f"{key[:32]}.jsonl", skips))
    broken = [f"{reason} (to try it again, delete {path})" for reason in notes["broken"]]
    samples = arrays["samples"] if length else None
    return Sizes(arrays["documents"], arrays["tokens"], arrays["empty"], notes["digest"], samples, tuple(broken))


def _count(reader: Reader, length: int, journal: Path, skips: bool) -> Index:
    known = reader.known()
    if known is not None and not length:
        arrays = {"documents": known.documents, "tokens": known.tokens, "empty": known.empty}
        return Index(arrays, {"digest": known.digest, "broken": list(known.broken)})
    entries = _read_journal(journal)
    missing = [unit for unit in range(reader.num_units) if unit not in entries]
    broken: list[str] = []
    _open_journal(journal)
    digest = None if known is None else known.digest
    with journal.open("a", encoding="utf-8") as file, count_bar(f"counting {reader.path}", len(missing)) as bar:
        for unit, entry in _scan_all(reader, missing, length, digest):
            bar.update()
            if isinstance(entry, BrokenUnit) and not skips:
                raise entry
            if isinstance(entry, BrokenUnit):
                broken.append(str(entry))
                continue
            entries[unit] = entry
            file.write(json.dumps([unit, *entry]) + "\n")
            file.flush()
    index = _index(reader, entries, broken)
    journal.unlink()
    return index


def _index(reader: Reader, entries: dict[int, list[Any]], broken: list[str]) -> Index:
    nothing = [0, 0, 0, 0, ""]
    columns = list(zip(*(entries.get(unit, nothing) for unit in range(reader.num_units)), strict=True)) or [()] * 5
    names = ("documents", "tokens", "samples", "empty")
    arrays = {name: np.array(column, dtype=np.int64) for name, column in zip(names, columns, strict=False)}
    return Index(arrays, {"digest": sha256("".join(columns[4]).encode()).hexdigest(), "broken": broken})


def _scan(reader: Reader, unit: int, length: int, digest: str | None) -> list[Any] | BrokenUnit:
    """[documents, tokens, samples, empty documents, hash of all tokens] of a unit.

    Args:
        length: tokens of a sample of best-fit packing; 0: there are no samples to count.
        digest: of the source, where it is known: then lengths will do.
    """
    try:
        if digest is not None:
            lengths, empty = reader.lengths(unit, Faults()), 0
        else:
            documents = reader.read(unit, Faults())
            lengths, empty = documents.lengths, documents.empty
            hashed = xxhash.xxh3_64()
            for number in range(documents.num_documents):
                hashed.update(np.ascontiguousarray(documents.document(number), dtype=np.int32))
                if documents.learned is not None:
                    hashed.update(np.ascontiguousarray(documents.learned_of(number)))
            digest = hashed.hexdigest()
    except BrokenUnit as error:
        return error
    samples = len(best_fit(lengths, length).ends) if length else 0
    return [len(lengths), int(lengths.sum()), samples, empty, digest]


def _scan_here(task: tuple[int, int, str | None]) -> list[Any] | BrokenUnit:
    return _scan(reader_of(0), *task)


def _scan_all(
    reader: Reader, units: list[int], length: int, digest: str | None
) -> Iterator[tuple[int, list[Any] | BrokenUnit]]:
    processes = min(usable_cores(), len(units))
    if reader.num_bytes < MIN_PARALLEL_BYTES or processes < 2 or reader.in_process:
        for unit in units:
            yield unit, _scan(reader, unit, length, digest)
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=start_worker, initargs=([reader],)
    ) as workers:
        tasks = [(unit, length, digest) for unit in units]
        yield from zip(units, workers.map(_scan_here, tasks), strict=True)


def _read_journal(journal: Path) -> dict[int, list[Any]]:
    """What earlier passes counted; a line torn off by a crash is left out."""
    if not journal.is_file():
        return {}
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {unit: entry for unit, *entry in found}


def _open_journal(journal: Path) -> None:
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        if journal.is_file() and not journal.read_bytes().endswith(b"\n"):
            whole = journal.read_bytes().rpartition(b"\n")
            journal.write_bytes(whole[0] + whole[1])
    except OSError as error:
        raise CorpusError(f"data.cache={journal.parent.parent} cannot be written: {error.strerror}") from error
