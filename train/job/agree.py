"""What all processes of a job must have in common, compared by its hash."""

import hashlib
import json

import torch

from parallel.collectives import gather_numbers


def require_alike(what: str, value: object, device: torch.device) -> None:
    """Compares something on all processes by its hash (one small gather).

    Raises:
        RuntimeError: on every process, it is not the same everywhere; the processes are named.
    """
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    numbers = gather_numbers(int.from_bytes(digest[:8], "big", signed=True), device)
    apart = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
    if apart:
        names = ", ".join(map(str, apart[:8])) + ("..." if len(apart) > 8 else "")
        raise RuntimeError(f"process {names} has other {what} than process 0: nothing is trained or saved like this")


def require_repeated(same: bool, device: torch.device) -> None:
    """Raises RuntimeError, on every process, where one did not get the same gradients twice; it is named."""
    apart = [rank for rank, equal in enumerate(gather_numbers(int(same), device)) if not equal]
    if apart:
        raise RuntimeError(
            f"process {', '.join(map(str, apart))} computed a step twice and got other gradients: its hardware is "
            f"damaged, or a kernel adds in no fixed order (run.verify_every=0 does not look)"
        )
