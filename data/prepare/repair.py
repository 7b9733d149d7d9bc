"""Makes files of a corpus again that are lost or damaged, from the input that it was prepared from."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from data.config import TRAIN_TOKENIZER, PrepareConfig
from data.errors import CorpusError, changes
from data.files import write_whole
from data.prepare.check import check_prepare
from data.prepare.join import merge_heldout, token_bytes_file
from data.prepare.pieces import Job, cut_into_pieces, make_pieces
from data.prepare.prepare import given_tokenizer, job_of, open_input, plan_of
from data.prepare.shard_writer import layout_of
from data.prepare.staging import Staging
from data.read.corpus import damaged_files
from data.read.manifest import HELDOUT, TRAIN, FileInfo, Manifest, info_of, read_manifest
from data.read.remote import is_url
from data.read.workers import usable_cores
from data.text.tokenizer import TOKENIZER_FILE, Tokenizer


def repair(path: str, names: Sequence[str] = ()) -> str:
    """Makes the named files of a corpus again, or all that are missing or damaged; a line about what was done.

    The input must be as it was, and so must the versions of the libraries that shape bytes: every file that is put
    back has the hash that the manifest says.

    Raises:
        CorpusError: it cannot be, and why.
    """
    if is_url(path):
        raise CorpusError(f"--repair {path} works on a directory: copy the corpus to one, repair it, and copy it back")
    directory = Path(path).expanduser()
    manifest = read_manifest(str(directory))
    wanted = _wanted(directory, manifest, names)
    if not wanted:
        return f"{directory} is whole: nothing to repair"
    staging = Staging(str(directory.with_name(f"{directory.name}.repair")))
    try:
        made = _make_again(directory, manifest, wanted, staging)
        for info in wanted:
            if made[info.file] != (info.size, info.sha256):
                raise CorpusError(
                    f"{directory}: {info.file} does not come out as its manifest says: prepare the corpus again"
                )
            write_whole(directory / info.file, _content(staging, info))
    finally:
        shutil.rmtree(staging.root, ignore_errors=True)
    return f"{directory}: made again: {', '.join(info.file for info in wanted)}"


def _wanted(directory: Path, manifest: Manifest, names: Sequence[str]) -> list[FileInfo]:
    known = {info.file: info for info in manifest.files}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CorpusError(f"{unknown[0]} is no file of {directory}: name what its manifest lists, or nothing for all")
    return [known[name] for name in names] if names else damaged_files(directory, manifest)


def _make_again(
    directory: Path, manifest: Manifest, wanted: list[FileInfo], staging: Staging
) -> dict[str, tuple[int, str]]:
    """Writes the wanted files below the staging directory; size and hash of each."""
    config, job = _job(directory, manifest, staging)
    text = job.tokenizer.text.encode()
    made = [info_of(TOKENIZER_FILE, text), info_of(manifest.token_bytes.file, token_bytes_file(job.tokenizer))]
    write_whole(_made(staging, TOKENIZER_FILE), text)
    write_whole(_made(staging, manifest.token_bytes.file), token_bytes_file(job.tokenizer))
    splits = {TRAIN: manifest.splits[TRAIN], HELDOUT: manifest.splits[HELDOUT]}
    lost = {split: {info.file for info in wanted} & {shard.file for shard in splits[split]} for split in splits}
    pieces = sorted({int(name.split("-")[1]) for name in lost[TRAIN]})
    if lost[HELDOUT]:  # they come from all of the input
        pieces = list(range(len(job.pieces)))
    processes = config.processes or usable_cores()
    records = list(make_pieces(job, pieces, processes)) if pieces else []
    made += [shard for record in records for shard in record.shards[TRAIN]]
    if lost[HELDOUT]:
        ordered = staging.records()
        in_order = [ordered[number] for number in sorted(ordered)]
        made += merge_heldout(staging, staging.corpus, in_order, config.shard_tokens, job.layout)
    found = {info.file: (info.size, info.sha256) for info in made}
    missing = [info.file for info in wanted if info.file not in found]
    if missing:
        raise CorpusError(f"{directory}: the input gives no {missing[0]} any more: prepare the corpus again")
    return found


def _job(directory: Path, manifest: Manifest, staging: Staging) -> tuple[PrepareConfig, Job]:
    """The work that made the corpus."""
    if manifest.plan is None:
        raise CorpusError(f"{directory} does not say how it was prepared, so it cannot be repaired: prepare it again")
    known = {field.name for field in fields(PrepareConfig)}
    settings = {name: value for name, value in manifest.plan.items() if name in known}
    config = PrepareConfig(output=str(directory), **settings)
    check_prepare(config)
    given = None if config.tokenizer == TRAIN_TOKENIZER else Tokenizer.from_path(config.tokenizer, config.eod_token)
    source = open_input(config, given)
    pieces = cut_into_pieces(source.sizes, config.piece_bytes, config.shuffle)
    layout = layout_of(manifest.plan)
    if changed := changes(manifest.plan, plan_of(config, source, len(pieces), given, layout)):
        raise CorpusError(f"{directory} cannot be repaired, since it was prepared otherwise: {changed}")
    _made(staging, "").mkdir(parents=True, exist_ok=True)
    whole = directory / TOKENIZER_FILE
    if whole.is_file() and info_of(TOKENIZER_FILE, whole.read_bytes()) == manifest.tokenizer:
        given = Tokenizer.from_path(whole, config.eod_token)
    print(f"making files of {directory} again from input={config.input}", file=sys.stderr)
    tokenizer = given_tokenizer(config, source, staging, given)
    return config, job_of(config, source, pieces, tokenizer, staging, layout)


def _made(staging: Staging, name: str) -> Path:
    return Path(staging.corpus) / name


def _content(staging: Staging, info: FileInfo) -> bytes:
    return _made(staging, info.file).read_bytes()
