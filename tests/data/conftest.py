"""Small corpora that the data tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import PrepareConfig
from data.prepare.inputs import Document, DocumentsInput
from data.prepare.prepare import write_corpus
from data.read.corpus import Corpus
from data.text.tokenizer import Tokenizer, train_bpe

WORDS = [
    "packing",
    "keeps",
    "the",
    "boundaries",
    "of",
    "documents",
    "and",
    "every",
    "token",
    "has",
    "a",
    "target",
    "in",
    "its",
    "own",
    "document",
]


def text_of(number: int) -> str:
    """A text of its own for every number, of very different lengths."""
    return f"document {number}: " + " ".join(WORDS[(number + i) % len(WORDS)] for i in range(number * 7 % 40))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of at most 400 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([text_of(number) for number in range(50)], vocab_size=400, progress=False).save(path)
    return path


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer_file: Path) -> Callable[..., Corpus]:
    """Makes the corpus `name` of the documents text_of(0), text_of(1), ... in shards of about 500 tokens."""

    def make(name: str = "corpus", num_documents: int = 120, shard_tokens: int = 500) -> Corpus:
        documents = [Document(text_of(n), f"text {n}", key=str(n).encode()) for n in range(num_documents)]
        config = PrepareConfig(
            input=name,
            output=str(tmp_path / name),
            tokenizer=str(tokenizer_file),
            shard_tokens=shard_tokens,
            heldout_fraction=0.2,
        )
        source = DocumentsInput({"input": "made up"}, documents)
        return Corpus.open(write_corpus(config, source, config.output, Tokenizer.from_path(tokenizer_file)))

    return make


@pytest.fixture
def corpus(make_corpus: Callable[..., Corpus]) -> Corpus:
    return make_corpus()
