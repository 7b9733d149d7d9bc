"""The error that every user mistake with data ends in, and how values stand in messages."""

from collections.abc import Mapping
from typing import Any


class CorpusError(ValueError):
    """A user's mistake with data. The message is one line: the setting, its value, why, how to mend it."""


class StorageError(OSError):
    """A storage that stayed away: no mistake of the user, and nothing is damaged. The run can go on later."""


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The names whose values differ, with both values: "seed (was 0, is 1), ..."; empty where none does."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} (was {_shown(before.get(name))}, is {_shown(after.get(name))})" for name in names)


def _shown(value: object) -> str:
    """A value in a message; hashes by their beginning."""
    text = "unset" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text


def check_choice(setting: str, value: str, choices: tuple[str, ...], error: type[ValueError] = CorpusError) -> None:
    """Raises the error of a setting's owner where it is none of its choices."""
    if value not in choices:
        known = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
        raise error(f"{setting}={value!r} is not known: choose {known}")
