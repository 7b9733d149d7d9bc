"""Raw text to a corpus: a tokenizer, token shards, and the manifest that makes them a corpus."""

import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import tokenizers

from data.config import CHAT, EMBEDDED, SKIP, TRAIN_TOKENIZER, DataConfig, PrepareConfig
from data.errors import CorpusError
from data.files import locked
from data.prepare.check import check_prepare, part_of
from data.prepare.embedded import embedded_input
from data.prepare.file_input import file_input
from data.prepare.heldout import heldout_share, is_held_out
from data.prepare.inputs import Input
from data.prepare.join import PIECES, finish
from data.prepare.pieces import Job, cut_into_pieces, make_pieces
from data.prepare.shard_writer import PLAIN, SHARD_LAYOUT, layout_of
from data.prepare.staging import Staging, check_free, staged
from data.progress import byte_bar
from data.read.faults import Faults
from data.read.index import digest_of
from data.read.manifest import MANIFEST_VERSION, is_corpus
from data.read.remote import exists, is_url, join, read_file, redacted, write_file
from data.read.workers import usable_cores
from data.secrets import one_line
from data.text.tokenizer import TOKENIZER_FILE, Tokenizer, train_bpe

EMBEDDED_HELDOUT = 0.05  # of a small corpus
# Settings that do not change what a corpus holds.
FREE = ("output", "part", "processes")


def prepare(config: PrepareConfig) -> str:
    """Makes the corpus `config.output`, or a part of it; returns its directory or URL.

    The same input and settings give the same bytes, whatever happens on the way. What ends it early leaves its finished
    pieces in `OUTPUT.partial`, from where the same call goes on.

    Raises:
        CorpusError: whatever is wrong with the settings or the text.
    """
    check_prepare(config)
    output = config.output if is_url(config.output) else str(Path(config.output).expanduser())
    check_free(output)
    given = None if config.tokenizer == TRAIN_TOKENIZER else Tokenizer.from_path(config.tokenizer, config.eod_token)
    return write_corpus(config, open_input(config, given), output, given)


def open_input(config: PrepareConfig, tokenizer: Tokenizer | None) -> Input:
    """The documents of `config.input`. CorpusError at once where there is no such path."""
    return embedded_input() if config.input == EMBEDDED else file_input(config, tokenizer)


def embedded_corpus(config: DataConfig, max_files: int | None = None) -> Path:
    """Directory of the embedded corpus in `config.cache`, prepared by the first process that asks for it.

    `max_files` takes the library's first files only, as a corpus of its own.
    """
    part = "" if max_files is None else f"-files{max_files}"
    name = f"embedded-v{MANIFEST_VERSION}-py{platform.python_version()}-vocab{config.vocab_size}{part}"
    output = Path(config.cache).expanduser() / name
    if is_corpus(output):
        return output
    settings = PrepareConfig(
        input=EMBEDDED, output=str(output), vocab_size=config.vocab_size, heldout_fraction=EMBEDDED_HELDOUT
    )
    check_prepare(settings)
    documents = embedded_input(max_files)
    lock = output.with_name(f".{output.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise CorpusError(f"data.cache={output.parent} cannot be written: {one_line(error)}") from error
    with locked(lock, wait=True):
        if is_corpus(output):
            return output
        try:
            write_corpus(settings, documents, str(output), None)
        except CorpusError:
            if not is_corpus(output):  # else another machine on a shared disk was faster
                raise
    return output


def write_corpus(config: PrepareConfig, source: Input, output: str, given: Tokenizer | None) -> str:
    """Tokenizes `source` into `output`, which is a corpus when it is whole and not before.

    Args:
        given: the tokenizer, where it is not to be trained.
    """
    for line in source.left_out:
        print(f"left out: {line}", flush=True)
    pieces = cut_into_pieces(source.sizes, config.piece_bytes, config.shuffle)
    plan = plan_of(config, source, len(pieces), given, layout_of(Staging(output).plan()))
    with staged(output, plan, config.part) as staging:
        tokenizer = given_tokenizer(config, source, staging, given)
        job = job_of(config, source, pieces, tokenizer, staging, layout_of(plan))
        part, parts = part_of(config.part)
        _make_missing(job, range(part, len(pieces), parts), config)
        if parts == 1:
            finish(staging, plan)
    return output


def plan_of(
    config: PrepareConfig, source: Input, num_pieces: int, given: Tokenizer | None, layout: int
) -> dict[str, Any]:
    """What the bytes of a corpus follow from, as JSON gives it back."""
    plan = {name: value for name, value in asdict(config).items() if name not in FREE}
    chat = {name: plan.pop(name) for name in ("format", "chat_template", "chat_roles")}
    if config.format == CHAT:
        plan |= chat | {"chat_roles": list(config.chat_roles)}
    plan["input"] = redacted(config.input)
    if given is not None:
        plan["the tokenizer's content"] = given.sha256
    plan["the input's files"] = digest_of(source.identity)
    plan["corpus format"] = MANIFEST_VERSION
    if layout != PLAIN:
        plan[SHARD_LAYOUT] = layout
    plan |= {package.__name__: package.__version__ for package in (tokenizers, pyarrow)}
    return plan | {PIECES: num_pieces, "description": source.description}


def job_of(
    config: PrepareConfig,
    source: Input,
    pieces: tuple[tuple[int, ...], ...],
    tokenizer: Tokenizer,
    staging: Staging,
    layout: int,
) -> Job:
    """The work that settings ask for."""
    return Job(
        source,
        pieces,
        tokenizer,
        staging,
        config.shard_tokens,
        heldout_share(config.heldout_fraction, config.heldout_tokens, int(source.sizes.sum())),
        config.seed,
        config.shuffle,
        config.on_corrupt == SKIP,
        layout,
    )


def given_tokenizer(config: PrepareConfig, source: Input, staging: Staging, given: Tokenizer | None) -> Tokenizer:
    """The tokenizer of the corpus, given or trained, which lies in the staging directory from now on."""
    path = join(staging.root, TOKENIZER_FILE)
    if not exists(path):
        write_file(path, (given or train_bpe(_training_texts(config, source), config.vocab_size)).text)
    return Tokenizer(read_file(path, Faults()).decode(), config.eod_token, f"tokenizer={config.tokenizer}")


def _training_texts(config: PrepareConfig, source: Input) -> Iterator[str]:
    """The first `train_bytes` of the training split: held-out text must not shape the tokenizer."""
    share = heldout_share(config.heldout_fraction, config.heldout_tokens, int(source.sizes.sum()))
    num_bytes = 0
    for unit in range(len(source.sizes)):
        for document in source.documents(unit, Faults()):
            if document is None or is_held_out(document.key, share, config.seed):
                continue
            yield str(document.content)
            num_bytes += len(str(document.content).encode())
            if num_bytes >= config.train_bytes:
                return


def _make_missing(job: Job, numbers: range, config: PrepareConfig) -> None:
    """Makes the pieces among `numbers` that are not finished."""
    finished = job.staging.records()
    missing = [number for number in numbers if number not in finished]
    done = sum(record.num_bytes for number, record in finished.items() if number in numbers)
    if done:
        print(
            f"going on after {len(numbers) - len(missing)} finished pieces in {redacted(job.staging.root)}", flush=True
        )
    total = int(job.input.sizes[[unit for number in numbers for unit in job.pieces[number]]].sum())
    with byte_bar("tokenizing", max(total, done), done=done) as bar:
        for record in make_pieces(job, missing, config.processes or usable_cores()):
            bar.update(record.num_bytes)
            for line in record.skipped:
                print(f"left out: {line}", flush=True)
