"""Raw text to a corpus directory: a tokenizer, token shards, and the manifest that makes them a corpus."""

import errno
import fcntl
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.config import TRAIN_TOKENIZER, DataConfig, PrepareConfig, check_prepare
from data.documents import Document, Source, is_held_out
from data.embedded import EMBEDDED, embedded_source
from data.errors import CorpusError, one_line
from data.manifest import HELDOUT, TRAIN, VERSION, Manifest, file_info, is_corpus, write_manifest
from data.progress import byte_bar
from data.shards import ShardWriter
from data.sources import dataset_source
from data.tokenizer import TOKENIZER_FILE, Tokenizer, train_bpe
from data.units import token_dtype

TOKEN_BYTES_FILE = "token_bytes.npy"
# Documents are encoded together, by all cores, until they hold this many characters.
BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 1024


def prepare(config: PrepareConfig) -> Path:
    """Makes the corpus `config.output`. The same input and settings give the same bytes.

    CorpusError for whatever is wrong with the settings or the text, with nothing left behind.
    """
    check_prepare(config)
    output = Path(config.output).expanduser()
    _check_free(output)
    source = embedded_source() if config.input == EMBEDDED else dataset_source(config)
    return write_corpus(config, source, output)


def embedded_corpus(config: DataConfig, max_files: int | None = None) -> Path:
    """Directory of the embedded corpus in `config.cache`, prepared by the first process that asks for it.

    `max_files` takes the library's first files only, as a corpus of its own.
    """
    part = "" if max_files is None else f"-files{max_files}"
    name = f"embedded-v{VERSION}-py{platform.python_version()}-vocab{config.vocab_size}{part}"
    output = Path(config.cache).expanduser() / name
    if is_corpus(output):
        return output
    settings = PrepareConfig(input=EMBEDDED, output=str(output), vocab_size=config.vocab_size)
    check_prepare(settings)
    source = embedded_source(max_files)
    with _locked(output):
        if is_corpus(output):
            return output
        try:
            return write_corpus(settings, source, output)
        except CorpusError:
            if is_corpus(output):  # another machine on a shared disk was faster
                return output
            raise


def write_corpus(config: PrepareConfig, source: Source, output: Path) -> Path:
    """Tokenizes `source` into the directory `output`, which appears when it is whole and not before."""
    with _staged(output) as directory:
        tokenizer = _tokenizer(config, source)
        tokenizer.save(directory / TOKENIZER_FILE)
        np.save(directory / TOKEN_BYTES_FILE, tokenizer.token_bytes)
        writers = {
            split: ShardWriter(directory, split, token_dtype(tokenizer.vocab_size), config.shard_tokens)
            for split in (TRAIN, HELDOUT)
        }
        num_blank = _tokenize(config, source, tokenizer, writers)
        manifest = Manifest(
            vocab_size=tokenizer.vocab_size,
            eod_token=tokenizer.eod_token,
            eod_id=tokenizer.eod_id,
            tokenizer=file_info(directory / TOKENIZER_FILE),
            token_bytes=file_info(directory / TOKEN_BYTES_FILE),
            source=source.description | {"blank_documents": num_blank, "split_seed": config.seed},
            splits={split: writer.finish() for split, writer in writers.items()},
        )
        _check_splits(config, manifest)
        write_manifest(directory, manifest)
    return output


def _tokenizer(config: PrepareConfig, source: Source) -> Tokenizer:
    if config.tokenizer == TRAIN_TOKENIZER:
        return train_bpe(_training_texts(config, source), config.vocab_size)
    return Tokenizer.from_path(config.tokenizer, config.eod_token)


def _training_texts(config: PrepareConfig, source: Source) -> Iterator[str]:
    """The first `train_bytes` of the training split: held-out text must not shape the tokenizer."""
    num_bytes = 0
    for document in source.documents():
        if is_held_out(document, config.heldout_fraction, config.seed):
            continue
        yield document.text
        num_bytes += len(document.text.encode())
        if num_bytes >= config.train_bytes:
            return


def _tokenize(config: PrepareConfig, source: Source, tokenizer: Tokenizer, writers: dict[str, ShardWriter]) -> int:
    """Encodes every document into its split's writer; returns how many were left out as blank."""
    num_blank = 0
    with byte_bar("tokenizing", source.num_bytes) as bar:
        for batch in _batches(source.documents()):
            filled = [document for document in batch if document.text.strip()]
            num_blank += len(batch) - len(filled)
            encoded = tokenizer.encode_batch([document.text for document in filled])
            for document, ids in zip(filled, encoded, strict=True):
                num_bytes = len(document.text.encode())
                split = HELDOUT if is_held_out(document, config.heldout_fraction, config.seed) else TRAIN
                writers[split].add([*ids, tokenizer.eod_id], num_bytes, document.name)
                bar.update(num_bytes)
    return num_blank


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _check_splits(config: PrepareConfig, manifest: Manifest) -> None:
    num_train, num_heldout = (manifest.totals(split).documents for split in (TRAIN, HELDOUT))
    if num_train + num_heldout == 0:
        raise CorpusError(f"input={config.input} is empty: there is no text to prepare")
    if num_train == 0:
        raise CorpusError(
            f"heldout_fraction={config.heldout_fraction} held out all {num_heldout} documents: lower it or add text"
        )
    if num_heldout == 0 and config.heldout_fraction > 0:
        raise CorpusError(
            f"heldout_fraction={config.heldout_fraction} held out none of {num_train} documents: "
            "raise it, or set it to 0 for a corpus without evaluation"
        )


def _check_free(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CorpusError(f"output={output} exists already: name a new directory, or delete it first")


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A directory beside `output` that takes its name at the end, and is deleted when anything goes wrong."""
    _check_free(output)
    # Processes of several machines can share a disk, so the process id alone is not unique.
    staging = output.with_name(f"{output.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process that had this process id
        staging.mkdir()
    except OSError as error:
        raise CorpusError(f"output={output} cannot be written: {one_line(error)}") from error
    try:
        yield staging
        _check_free(output)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Lets one process of this machine at a time make `output`; the others wait for it."""
    lock = output.with_name(f".{output.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise CorpusError(f"data.cache={output.parent} cannot be written: {one_line(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some cluster disks know no locks: then each process makes a corpus, and the first to end wins.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
