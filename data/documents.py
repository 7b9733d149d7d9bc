"""Documents before tokenization, and which of them are held out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Document(NamedTuple):
    """One text. `name` tells people where it came from; `split_key` decides its split."""

    text: str
    name: str
    split_key: str


@dataclass(frozen=True)
class Source:
    """Documents that can be read more than once, always in the same order.

    `description` goes into the manifest; `num_bytes` is the amount of text where it is known, for progress.
    """

    description: dict[str, str | int]
    documents: Callable[[], Iterator[Document]]
    num_bytes: int | None = None


def is_held_out(document: Document, fraction: float, seed: int) -> bool:
    """Depends on the document alone: neither its position nor the rest of the corpus can move it."""
    digest = hashlib.blake2b(f"{seed}:{document.split_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
