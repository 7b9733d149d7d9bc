"""Tokenizers: a byte-level BPE trained here, or any Hugging Face `tokenizer.json`."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data.config import EOD_TOKEN
from data.errors import CorpusError
from data.progress import byte_bar, ticking
from data.secrets import one_line

TOKENIZER_FILE = "tokenizer.json"
# 256 bytes and the end-of-document token: below this a byte-level BPE cannot spell every text.
MIN_VOCAB_SIZE = 257


class Tokenizer:
    """Text to token ids and back, from the JSON text of a `tokenizer.json`.

    Special tokens written out in a document (a web page about tokenizers, say) are ordinary text here: only
    `prepare` places an `eod_id`. `source` names it in errors.
    """

    def __init__(self, text: str, eod_token: str = EOD_TOKEN, source: str = TOKENIZER_FILE) -> None:
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises bare Exception for whatever is wrong with the file
            raise CorpusError(f"{source} is not a tokenizer file: {one_line(error)}") from error
        eod_id = backend.token_to_id(eod_token)
        if eod_id is None:
            raise CorpusError(f"eod_token={eod_token} is not in {source}: name its end-of-document token")
        added = backend.get_added_tokens_decoder().get(eod_id)
        if added is not None and not added.special:
            backend = _with_special(text, eod_id)
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._text, self._source = text, source
        self.eod_token = eod_token
        self.eod_id: int = eod_id
        # Ids can have holes, so the largest id counts, not the number of tokens.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_path(cls, path: str | Path, eod_token: str = EOD_TOKEN) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in a directory (of a Hugging Face model, or a corpus)."""
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / TOKENIZER_FILE
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"tokenizer={path} cannot be read: {one_line(error)}") from error
        return cls(text, eod_token, f"tokenizer={path}")

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, str, str]]:
        # A copy of `backend` for another process would forget that special tokens in a text are ordinary.
        return type(self), (self._text, self.eod_token, self._source)

    @property
    def text(self) -> str:
        """The very text it was read from."""
        return self._text

    def save(self, path: str | Path) -> None:
        """Writes the very text it was read from, so that an upstream tokenizer stays byte for byte itself."""
        Path(path).write_text(self._text, encoding="utf-8")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without any token at its beginning or end."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """As the backend, but special tokens written out are special; offsets are of all their characters."""
        backend = tokenizers.Tokenizer.from_str(self._text)
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None  # it would trim offsets, and add nothing that is wanted here
        return backend

    def encode_with_specials(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text whose special tokens count as such, and the characters [first, after last) of each."""
        encoding = self._with_specials.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def specials_in(self, texts: Iterable[str]) -> str:
        """The first special token that is written out in one of the texts; empty where there is none."""
        tokens = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        return next((token for text in texts for token in tokens if token in text), "")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many UTF-8 bytes of text each token stands for; special tokens none.

        Exact for byte-level BPE; the word marker of SentencePiece counts as the space it stands for.
        """
        spec = json.loads(self._backend.to_str())
        added = {token["id"]: token for token in spec["added_tokens"]}
        byte_level = '"ByteLevel"' in json.dumps([spec["pre_tokenizer"], spec["decoder"]])
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                sizes[index] = 0 if added[index]["special"] else len(token.encode())
            else:
                # Byte-level vocabularies spell each byte as one character.
                sizes[index] = len(token) if byte_level else _piece_bytes(token)
        return sizes


def check_vocab_size(setting: str, vocab_size: int) -> None:
    """Raises CorpusError where a vocabulary cannot be trained; `setting` names it."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise CorpusError(f"{setting}={vocab_size} cannot hold 256 bytes and {EOD_TOKEN}: use {MIN_VOCAB_SIZE} or more")


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = True) -> Tokenizer:
    """Trains a byte-level BPE with `EOD_TOKEN` as id 0; the same texts in the same order give the same one.

    `vocab_size` >= MIN_VOCAB_SIZE; a small text can yield fewer tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with ticking(byte_bar("training the tokenizer", show=progress)) as bar:
        backend.train_from_iterator(_counted(texts, bar), trainer)
    return Tokenizer(backend.to_str())


def _with_special(text: str, token: int) -> tokenizers.Tokenizer:
    """The tokenizer with one of its added tokens marked as special, which a file may leave out."""
    fields = json.loads(text)
    for added in fields["added_tokens"]:
        added["special"] |= added["id"] == token
    return tokenizers.Tokenizer.from_str(json.dumps(fields))


def _counted(texts: Iterable[str], bar: tqdm) -> Iterator[str]:
    for text in texts:
        bar.update(len(text.encode()))
        yield text


def _piece_bytes(token: str) -> int:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("\u2581", " ").encode())
