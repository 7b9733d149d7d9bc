"""Reads what W&B has written offline: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, FILE_HEADER = 2**15, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """Every record of a `.wandb` file."""
    content, place, parts = path.read_bytes(), FILE_HEADER, b""
    assert content[:4] == b":W&B"
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # too short for a header: filled up with zeros
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(run: Path) -> list[dict[str, float]]:
    """The logged values of a run's offline files, in the order in which they were written."""
    wandb.teardown()  # its background process has written everything when it ends
    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name):
        for record in records(path):
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            found += [values] if values else []
    return found
