"""What a corpus is prepared from: documents in units that lie and are read together, as training reads them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from data.read.faults import Faults


class Document(NamedTuple):
    """One document. `name` tells people where it came from; `key` decides its split.

    `learned` says which of its token ids count as targets, bool [tokens]; None: all.
    """

    content: str | np.ndarray  # text, or its token ids with the end-of-document token last
    name: str
    key: bytes
    learned: np.ndarray | None = None


class Input(ABC):
    """Documents in units that can be read in any order and more than once. Picklable: worker processes get a copy.

    Attributes:
        description: goes into the manifest.
        left_out: what lies there and is not read, for people.
    """

    description: dict[str, str | int]
    left_out: tuple[str, ...] = ()

    @property
    @abstractmethod
    def identity(self) -> list[Any]:
        """Of JSON: changes whenever the documents may have changed."""

    @property
    @abstractmethod
    def sizes(self) -> np.ndarray:
        """int64 [units]: bytes of each, roughly: decides which are worked on together."""

    @abstractmethod
    def documents(self, unit: int, faults: Faults) -> Iterator[Document | None]:
        """The documents of a unit in order, None for one that is missing, blank or skipped.

        Raises:
            BrokenUnit: the unit, or a row that is not skipped, cannot be read.
        """


class DocumentsInput(Input):
    """Documents in memory, as one unit."""

    def __init__(self, description: dict[str, str | int], documents: list[Document]) -> None:
        self.description, self._documents = description, documents

    @property
    def identity(self) -> list[Any]:
        digest = sha256()
        for document in self._documents:
            digest.update(document.name.encode() + document.key + str(len(document.content)).encode())
        return [digest.hexdigest()]

    @property
    def sizes(self) -> np.ndarray:
        return np.array([sum(len(document.content) for document in self._documents)], dtype=np.int64)

    def documents(self, unit: int, faults: Faults) -> Iterator[Document | None]:
        yield from (d if not isinstance(d.content, str) or d.content.strip() else None for d in self._documents)
