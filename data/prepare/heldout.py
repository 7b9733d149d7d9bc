"""Which documents are held out for evaluation: a property of each document, whatever else there is."""

import hashlib

BYTES_PER_TOKEN = 4  # of usual text and vocabularies, to tell tokens from bytes before there are any


def heldout_share(fraction: float, max_tokens: int, num_bytes: int) -> float:
    """The share of documents to hold out: `fraction`, or less where that would be more than about `max_tokens`."""
    return min(fraction, max_tokens / max(1, num_bytes / BYTES_PER_TOKEN))


def is_held_out(key: bytes, share: float, seed: int) -> bool:
    """Depends on the key alone (the text, so that a document that occurs twice never stands in both splits)."""
    digest = hashlib.blake2b(f"{seed}:".encode() + key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
