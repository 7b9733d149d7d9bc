"""The reader of a corpus made by prepare."""

from typing import Any

import numpy as np

from data.read.corpus import Corpus
from data.read.faults import Faults
from data.read.readers import Reader
from data.read.remote import redacted
from data.read.units import Sizes, Unit


class PreparedReader(Reader):
    """A split of a corpus made by prepare; a unit is a shard."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        self.corpus, self.split = corpus, split
        self.path, self.vocab_size = f"the {split} split of {redacted(corpus.root)}", corpus.vocab_size
        self._shards = corpus.manifest.splits[split]

    @property
    def num_units(self) -> int:
        return len(self._shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.size for shard in self._shards)

    @property
    def identity(self) -> list[Any]:
        return ["prepared", self.corpus.fingerprint, self.split]

    def label(self, unit: int) -> str:
        return redacted(self.corpus.file(self._shards[unit].file))

    def read(self, unit: int, faults: Faults) -> Unit:
        return self.corpus.shard(self.split, unit, faults)

    def lengths(self, unit: int, faults: Faults) -> np.ndarray:
        return self.corpus.lengths(self.split, unit, faults)

    def known(self) -> Sizes:
        counts = [(shard.documents, shard.tokens) for shard in self._shards]
        documents, tokens = np.array(counts, dtype=np.int64).reshape(-1, 2).T
        return Sizes(documents, tokens, np.zeros_like(tokens), self.corpus.fingerprint)
