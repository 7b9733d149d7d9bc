"""Tokenizers give every text back, count its bytes exactly, and train the same way each time."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from data.config import EOD_TOKEN
from data.errors import CorpusError
from data.text.tokenizer import Tokenizer, train_bpe

TEXTS = [
    "naïve façade",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧 family",
    "tabs\tand\r\nlines\n\n\n",
    "\x00control",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the quick brown fox, façade and all", *TEXTS] * 3, vocab_size=320, progress=False)


@given(text=st.text())
def test_every_text_comes_back_with_its_exact_bytes(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_batch_keeps_the_order_of_its_texts(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS


def test_end_of_document_is_special_and_never_read_from_text(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch([f"a{EOD_TOKEN}b"])
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == f"a{EOD_TOKEN}b"
    assert tokenizer.token_bytes[tokenizer.eod_id] == 0
    assert tokenizer.decode([tokenizer.eod_id]) == EOD_TOKEN


def test_an_end_of_document_that_its_file_calls_plain_is_special(tokenizer: Tokenizer) -> None:
    fields = json.loads(tokenizer.text)
    for added in fields["added_tokens"]:
        added["special"] = False
    plain = Tokenizer(json.dumps(fields))
    text = f"ends with {plain.eod_token}"
    assert plain.encode_batch([text]) == tokenizer.encode_batch([text])
    assert plain.eod_id not in plain.encode_batch([text])[0]
    assert plain.text != tokenizer.text and plain.token_bytes[plain.eod_id] == 0


def test_token_bytes_has_the_documented_shape(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert tokenizer.token_bytes.shape == (320,)
    assert tokenizer.token_bytes.dtype == np.int32
    # The 256 bytes are in every vocabulary, one byte each.
    assert (tokenizer.token_bytes == 1).sum() == 256


def test_saved_tokenizer_is_the_same_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.from_path(path)
        assert again.sha256 == tokenizer.sha256
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_training_is_the_same_in_every_process() -> None:
    # A process of its own: hash seeds, which order sets and maps, differ between processes only.
    program = (
        "import pathlib, data.text.tokenizer as t; text = pathlib.Path(t.__file__).read_text();"
        "print(t.train_bpe(text.splitlines(), 500, progress=False).sha256)"
    )
    root = Path(__file__).parents[2]
    hashes = {
        subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(hashes) == 1
    assert len(hashes.pop().strip()) == hashlib.sha256().digest_size * 2


def test_sentencepiece_markers_and_byte_tokens_count_as_the_bytes_they_spell() -> None:
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "▁a": 4, "é": 5, "<0xC3>": 6, "<0xBC>": 7}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend.to_str(), eod_token="</s>")
    text = " aaé ü"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.eod_id] == 0


def test_vocabulary_with_holes_is_as_large_as_its_largest_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    added = dict(spec["added_tokens"][0], id=400, content="<think>", special=False)
    spec["added_tokens"].append(added)
    spec["model"]["vocab"]["<think>"] = 400
    holed = Tokenizer(json.dumps(spec))
    assert holed.vocab_size == 401
    (ids,) = holed.encode_batch(["<think>"])
    assert ids == [400]
    assert holed.token_bytes[400] == len("<think>")
    assert holed.token_bytes[320:400].sum() == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), ("{", "is not a tokenizer file"), ("[1, 2]", "is not a tokenizer file")],
)
def test_unusable_file_is_named(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CorpusError, match=f"tokenizer={path} {reason}"):
        Tokenizer.from_path(path)


def test_missing_end_of_document_token_names_the_setting(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(CorpusError, match=r"eod_token=</s> is not in"):
        Tokenizer.from_path(tmp_path, eod_token="</s>")


def test_a_copy_for_another_process_takes_special_tokens_of_a_text_as_text() -> None:
    tokenizer = train_bpe(["some text"], 300, progress=False)
    text = [f"a page about {tokenizer.eod_token}"]
    ids = tokenizer.encode_batch(text)
    assert tokenizer.eod_id not in ids[0]
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(text) == ids
