"""Raw text to a corpus directory: a tokenizer, token shards, and the manifest that makes them a corpus."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import tokenizers

from data.config import EMBEDDED, TRAIN_TOKENIZER, DataConfig, PrepareConfig
from data.errors import CorpusError, one_line
from data.files import locked
from data.prepare.check import check_prepare
from data.prepare.documents import Source, is_held_out
from data.prepare.embedded import embedded_source
from data.prepare.encoding import Encoder, encode_all
from data.prepare.shard_writer import ShardWriter
from data.prepare.sources import dataset_source
from data.prepare.staging import Staging, check_free, staged
from data.progress import byte_bar
from data.read.manifest import HELDOUT, MANIFEST_VERSION, SPLITS, TRAIN, Manifest, file_info, is_corpus, write_manifest
from data.read.readers import digest_of
from data.text.tokenizer import TOKENIZER_FILE, Tokenizer, train_bpe

TOKEN_BYTES_FILE = "token_bytes.npy"
# Settings that do not change what a corpus holds.
FREE = ("output", "processes")


def prepare(config: PrepareConfig) -> Path:
    """Makes the corpus `config.output`. The same input and settings give the same bytes, whatever happens on the way.

    What ends it early leaves its finished shards in `OUTPUT.partial`, from where the same call goes on.

    Raises:
        CorpusError: whatever is wrong with the settings or the text.
    """
    check_prepare(config)
    output = Path(config.output).expanduser()
    check_free(output)
    source = embedded_source() if config.input == EMBEDDED else dataset_source(config)
    return write_corpus(config, source, output)


def embedded_corpus(config: DataConfig, max_files: int | None = None) -> Path:
    """Directory of the embedded corpus in `config.cache`, prepared by the first process that asks for it.

    `max_files` takes the library's first files only, as a corpus of its own.
    """
    part = "" if max_files is None else f"-files{max_files}"
    name = f"embedded-v{MANIFEST_VERSION}-py{platform.python_version()}-vocab{config.vocab_size}{part}"
    output = Path(config.cache).expanduser() / name
    if is_corpus(output):
        return output
    settings = PrepareConfig(input=EMBEDDED, output=str(output), vocab_size=config.vocab_size)
    check_prepare(settings)
    source = embedded_source(max_files)
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
            return write_corpus(settings, source, output)
        except CorpusError:
            if is_corpus(output):  # another machine on a shared disk was faster
                return output
            raise


def write_corpus(config: PrepareConfig, source: Source, output: Path) -> Path:
    """Tokenizes `source` into the directory `output`, which appears when it is whole and not before."""
    with staged(output, _plan(config, source)) as staging:
        directory = staging.directory
        tokenizer = _tokenizer(config, source, directory / TOKENIZER_FILE)
        np.save(directory / TOKEN_BYTES_FILE, tokenizer.token_bytes)
        writers = {split: ShardWriter(staging, split, config.shard_tokens) for split in SPLITS}
        _tokenize(config, source, tokenizer, staging, writers)
        _check_splits(config, *(writers[split].documents for split in (TRAIN, HELDOUT)))
        manifest = Manifest(
            vocab_size=tokenizer.vocab_size,
            eod_token=tokenizer.eod_token,
            eod_id=tokenizer.eod_id,
            tokenizer=file_info(directory / TOKENIZER_FILE),
            token_bytes=file_info(directory / TOKEN_BYTES_FILE),
            splits={split: writer.finish() for split, writer in writers.items()},
            source=source.description
            | {"blank_documents": sum(writer.blank for writer in writers.values()), "split_seed": config.seed},
        )
        write_manifest(directory, manifest)
    return output


def _plan(config: PrepareConfig, source: Source) -> dict[str, Any]:
    """What the bytes of a corpus follow from, as JSON gives it back."""
    plan = {name: value for name, value in asdict(config).items() if name not in FREE}
    if config.tokenizer != TRAIN_TOKENIZER:
        plan["the tokenizer's content"] = Tokenizer.from_path(config.tokenizer, config.eod_token).sha256
    plan["the input's files"] = digest_of(list(source.identity))
    plan["corpus format"] = MANIFEST_VERSION
    return plan | {package.__name__: package.__version__ for package in (tokenizers, pyarrow)}


def _tokenizer(config: PrepareConfig, source: Source, file: Path) -> Tokenizer:
    """The tokenizer of the corpus, which lies in `file` from now on."""
    if not file.is_file():
        if config.tokenizer == TRAIN_TOKENIZER:
            tokenizer = train_bpe(_training_texts(config, source), config.vocab_size)
        else:
            tokenizer = Tokenizer.from_path(config.tokenizer, config.eod_token)
        temporary = file.parent.with_name(f".{file.name}.{os.getpid()}")
        tokenizer.save(temporary)
        os.replace(temporary, file)
    return Tokenizer.from_path(file, config.eod_token)


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


def _tokenize(
    config: PrepareConfig, source: Source, tokenizer: Tokenizer, staging: Staging, writers: dict[str, ShardWriter]
) -> None:
    """Encodes every document that is in no finished shard into its split's writer."""
    encoder = Encoder(tokenizer, config.heldout_fraction, config.seed, staging.cursors)
    done = sum(finished.shard.bytes for shards in staging.finished.values() for finished in shards)
    if staging.count:
        print(f"going on after {staging.count} finished shards in {staging.root}", flush=True)
    processes = config.processes or os.cpu_count() or 1
    with byte_bar("tokenizing", source.num_bytes, done=done) as bar:
        for begin, splits in encode_all(encoder, source.batches(staging.begin), processes):
            for split, encoded in splits.items():
                writers[split].add(encoded, begin)
                bar.update(sum(encoded.num_bytes))


def _check_splits(config: PrepareConfig, num_train: int, num_heldout: int) -> None:
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
