"""Keeps what torch and megatron-core say about their own insides off the user's screen.

Called before they are imported, since they speak at import. Errors are still raised and shown.
"""

import logging
import warnings

UPSTREAM = (r"torch\b", r"megatron\b")
# Who logs what at import: missing CUDA tools, missing optional packages, deprecations inside checkpoints.
LOGGERS = ("torch.utils.cpp_extension", "megatron")


def quiet_upstream() -> None:
    """Drops warnings raised inside torch and megatron-core, and their log lines below an error."""
    for module in UPSTREAM:
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
