"""Finished pieces to a corpus: the manifest, in the order of the pieces, and the held-out documents together."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data.errors import CorpusError
from data.prepare.shard_writer import ShardWriter, layout_of
from data.prepare.staging import PieceRecord, Staging, staged
from data.read.faults import Faults
from data.read.manifest import HELDOUT, TRAIN, FileInfo, Manifest, ShardInfo, info_of, write_manifest
from data.read.remote import is_url, join, read_file, redacted, write_file
from data.read.shards import learned_of
from data.text.tokenizer import TOKENIZER_FILE, Tokenizer

TOKEN_BYTES_FILE = "token_bytes.npy"
SKIPPED_FILE = "skipped.txt"
PIECES = "pieces of the input"  # in a plan: how many there are


def join_parts(output: str) -> str:
    """Makes a corpus of the pieces that `prepare part=...` has left; the line that says so.

    Raises:
        CorpusError: nothing was begun there, or pieces are missing.
    """
    place = output if is_url(output) else str(Path(output).expanduser())
    plan = Staging(place).plan()
    if plan is None:
        raise CorpusError(
            f"{redacted(place)}.partial holds no parts: make them with prepare output={output} part=1/2 ..."
        )
    with staged(place, plan, None) as staging:
        manifest = finish(staging, plan)
    totals = manifest.totals(TRAIN)
    return f"{redacted(place)}: {totals.documents:,} documents, {totals.tokens:,} tokens to train on"


def finish(staging: Staging, plan: dict[str, Any]) -> Manifest:
    """Writes what makes the finished pieces a corpus, and gives it its name.

    Raises:
        CorpusError: pieces are missing, or one of the splits came out empty that should not.
    """
    records = staging.records()
    missing = [number for number in range(plan[PIECES]) if number not in records]
    if missing:
        few = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
        raise CorpusError(
            f"{redacted(staging.root)} lacks {len(missing)} of {plan[PIECES]} pieces ({few}): give the commands of the "
            f"parts again; they make what is missing"
        )
    ordered = [records[number] for number in range(plan[PIECES])]
    tokenizer_text = read_file(join(staging.root, TOKENIZER_FILE), Faults())
    tokenizer = Tokenizer(tokenizer_text.decode(), plan["eod_token"])
    heldout = merge_heldout(staging, staging.corpus, ordered, plan["shard_tokens"], layout_of(plan))
    manifest = Manifest(
        vocab_size=tokenizer.vocab_size,
        eod_token=tokenizer.eod_token,
        eod_id=tokenizer.eod_id,
        tokenizer=write_with_info(staging.corpus, TOKENIZER_FILE, tokenizer_text),
        token_bytes=write_with_info(staging.corpus, TOKEN_BYTES_FILE, token_bytes_file(tokenizer)),
        splits={TRAIN: tuple(shard for record in ordered for shard in record.shards[TRAIN]), HELDOUT: heldout},
        source=_source(plan, ordered),
        plan=plan,
    )
    if reason := _why_useless(plan, manifest):
        staging.discard()
        raise CorpusError(reason)
    if skipped := [line for record in ordered for line in record.skipped]:
        write_file(join(staging.corpus, SKIPPED_FILE), "".join(f"{line}\n" for line in skipped))
    write_manifest(staging.corpus, manifest)
    staging.publish()
    return manifest


def merge_heldout(
    staging: Staging, folder: str, records: Sequence[PieceRecord], shard_tokens: int, layout: int
) -> tuple[ShardInfo, ...]:
    """Held-out documents of all pieces in few shards: each piece has but a few."""
    writer = ShardWriter(folder, HELDOUT, shard_tokens, layout=layout)
    for shard in (shard for record in records for shard in record.shards[HELDOUT]):
        content = read_file(join(staging.folder(HELDOUT), shard.file), Faults())
        table = pq.read_table(io.BytesIO(content))
        column = table.column("tokens").combine_chunks()
        offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
        learned = learned_of(table)
        sizes, names = table.column("bytes").to_pylist(), table.column("name").to_pylist()
        for number, (size, name) in enumerate(zip(sizes, names, strict=True)):
            own = slice(offsets[number], offsets[number + 1])
            writer.add(values[own], size, name, None if learned is None else learned[own])
    return writer.finish()


def write_with_info(folder: str, name: str, content: bytes) -> FileInfo:
    """Writes a file of a corpus; what the manifest says of it."""
    write_file(join(folder, name), content)
    return info_of(name, content)


def token_bytes_file(tokenizer: Tokenizer) -> bytes:
    """Content of the file of `Tokenizer.token_bytes`."""
    sink = io.BytesIO()
    np.save(sink, tokenizer.token_bytes)
    return sink.getvalue()


def _source(plan: dict[str, Any], records: Sequence[PieceRecord]) -> dict[str, str | int]:
    counts = {
        "blank_documents": sum(record.blank for record in records),
        "skipped": sum(len(record.skipped) for record in records),
        "split_seed": plan["seed"],
    }
    return plan["description"] | {name: count for name, count in counts.items() if count or name != "skipped"}


def _why_useless(plan: dict[str, Any], manifest: Manifest) -> str:
    """Why nothing can be trained on; an empty text where it can."""
    num_train, num_heldout = (manifest.totals(split).documents for split in (TRAIN, HELDOUT))
    if num_train + num_heldout == 0:
        return f"input={plan['input']} is empty: there is no text to prepare"
    if num_train == 0:
        return f"heldout_fraction={plan['heldout_fraction']} held out all {num_heldout} documents: lower it or add text"
    if num_heldout == 0 and plan["heldout_fraction"] > 0:
        print(f"no document of {num_train:,} is held out: training goes without evaluation, or raise heldout_fraction")
    return ""
