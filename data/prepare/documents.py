"""Documents before tokenization, the batches that they are read in, and which of them are held out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

# Documents are encoded together until they hold this many characters.
BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 1024


class Document(NamedTuple):
    """One text. `name` tells people where it came from; `split_key` decides its split."""

    text: str
    name: str
    split_key: str


class Place(NamedTuple):
    """Where reading goes on: the number of the next document, and what its source needs to find it (JSON)."""

    number: int
    state: dict[str, Any] | None


START = Place(0, None)


class Batch(NamedTuple):
    """Neighbouring documents, the first of them at `begin`."""

    begin: Place
    documents: list[Document]


@dataclass(frozen=True)
class Source:
    """Documents that can be read more than once, always in the same order.

    Attributes:
        description: goes into the manifest.
        batches: all documents from a place on.
        num_bytes: the amount of text where it is known, for progress.
        identity: of JSON: changes whenever the documents may have changed.
    """

    description: dict[str, str | int]
    batches: Callable[[Place], Iterator[Batch]]
    num_bytes: int | None = None
    identity: tuple[Any, ...] = ()

    @classmethod
    def of(
        cls,
        description: dict[str, str | int],
        documents: Callable[[], Iterator[Document]],
        num_bytes: int | None = None,
    ) -> "Source":
        """Documents that cost nothing to pass over."""

        def batches(begin: Place) -> Iterator[Batch]:
            return in_batches(islice(documents(), begin.number, None), begin, lambda: None)

        return cls(description, batches, num_bytes)

    def documents(self) -> Iterator[Document]:
        """All documents."""
        for batch in self.batches(START):
            yield from batch.documents


def in_batches(
    documents: Iterator[Document], begin: Place, state: Callable[[], dict[str, Any] | None]
) -> Iterator[Batch]:
    """Documents from `begin` on; `state` says where their source stands after the last one that it gave."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            following = Place(begin.number + len(batch), state())
            yield Batch(begin, batch)
            begin, batch, num_characters = following, [], 0
    if batch:
        yield Batch(begin, batch)


def is_held_out(document: Document, fraction: float, seed: int) -> bool:
    """Depends on the document alone: neither its position nor the rest of the corpus can move it."""
    digest = hashlib.blake2b(f"{seed}:{document.split_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
