"""Passwords, signatures and keys, which are kept out of everything that is written or shown.

They belong into the environment or into the files of their clients (``~/.aws``, fsspec's configuration). Where one
stands in a URL of the settings all the same, it is used there and nowhere else: config.yaml, the records of a run, W&B,
the console and error texts go through here.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# ``user:password@`` of a URL; without a colon only where it is a token, not a login name (sftp://me@host).
_USER = re.compile(r"\b((?:[a-z0-9+.-]+::)*[a-z][a-z0-9+.-]*://)([^\s/?#'\"]*)@")
# What follows the question mark of a URL, if it is a query and not the sign of a pattern (part-?.parquet).
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s'\"?]*)\?[\w.%~+-]+=[^\s'\"]*")
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
SHORTEST = 8  # characters of an environment variable's value that may be a secret


def names_secret(name: str) -> bool:
    """Whether a variable of this name is taken for a secret."""
    return _SECRET_NAME.search(name) is not None


def hide(text: str) -> str:
    """The text without what URLs in it hold of logins and queries, and without the environment's keys and tokens."""
    text = _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub(_without_login, text))
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and names_secret(name) and value in text:
            text = text.replace(value, HIDDEN)
    return text


def hidden(values: Any) -> Any:
    """The same of every text in nested dicts and lists, names included."""
    if isinstance(values, str):
        return hide(values)
    if isinstance(values, Mapping):
        return {hidden(name): hidden(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [hidden(value) for value in values]
    return values


def one_line(error: object) -> str:
    """The first 300 characters of a library's message without its line breaks and secrets."""
    return hide(" ".join(str(error).split()))[:300] or type(error).__name__


def _without_login(found: re.Match[str]) -> str:
    scheme, login = found.groups()
    is_secret = ":" in login or scheme.endswith(("http://", "https://"))
    return f"{scheme}{HIDDEN}@" if is_secret else found[0]
