"""Trees of settings: frozen dataclasses built strictly from plain dicts or from text, and turned back.

A setting is a leaf of the tree, known by its path: ``run.steps``. A field that would be a Python keyword ends
in an underscore, which the path drops: ``BatchConfig.global_`` is ``batch.global``.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

INT64 = 2**63  # whole numbers lie below: it counts steps, samples and tokens
MISSING = "???"  # what a recipe writes where the user must give a value


class ConfigError(ValueError):
    """A user's mistake with a setting or a command; one line: what, its value, why, how to mend it."""


@dataclass(frozen=True)
class Setting:
    """One leaf of a tree: where it stands, what it takes and what it means."""

    path: str
    annotation: Any
    default: Any
    help: str


def settings(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Every leaf of a tree of dataclasses, in the order of the fields: ``name: Annotated[type, "help"] = default``."""
    hints = typing.get_type_hints(cls)
    texts = typing.get_type_hints(cls, include_extras=True)
    for item in dataclasses.fields(cls):
        path = prefix + item.name.removesuffix("_")
        if dataclasses.is_dataclass(hints[item.name]):
            yield from settings(hints[item.name], path + ".")
        else:
            yield Setting(path, hints[item.name], _default(item), help_of(texts[item.name]))


def help_of(annotation: Any) -> str:
    """What an annotation says of its setting."""
    text: str = annotation.__metadata__[0]
    return text


def from_dict[T](cls: type[T], values: Mapping[str, Any]) -> T:
    """The frozen tree of ``cls`` with ``values`` in it, and the defaults where ``values`` says nothing.

    Raises:
        ConfigError: an unknown setting, a value of the wrong type, or one still to be given (``???``).
    """
    known = [setting.path for setting in settings(cls)]
    for path, value in leaves(values):
        inside = [setting for setting in known if setting.startswith(f"{path}.")]
        if inside:
            raise ConfigError(f"{path}={value} cannot be used: {path} is a section: set {inside[0]} or so")
        if path not in known:
            raise ConfigError(f"unknown setting {path}={value}: {hint(path, known)}")
    return _build(cls, values, "")


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain dicts, lists and scalars, fit for YAML; ``from_dict`` turns it back."""
    values = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        values[item.name.removesuffix("_")] = list(value) if isinstance(value, tuple) else value
    return values


def over(defaults: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with other values over them, section by section; a value that is to be given (???) is one, too.

    Raises:
        ConfigError: a value in place of a section.
    """
    sections = [name for name in values if isinstance(defaults.get(name), dict)]
    for name in sections:
        if not isinstance(values[name], Mapping):
            raise ConfigError(f"{name}={values[name]} cannot be used: {name} is a section: set one of its settings")
    return defaults | dict(values) | {name: over(defaults[name], values[name]) for name in sections}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of nested dicts."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def hint(name: str, known: list[str]) -> str:
    """How to mend an unknown name: the nearest known ones, or where the list is."""
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    near = near or [path for path in known if path.rpartition(".")[2] == last][:3]
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists all that are known"


def hint_known(name: str, known: list[str]) -> str:
    """How to mend an unknown name of a short list: the nearest known ones if any is near, and all of them."""
    nearest = hint(name, known)
    return f"{nearest if nearest.startswith('did') else ''} Known: {', '.join(known)}".lstrip()


def from_text[T](cls: type[T], arguments: list[str]) -> T:
    """The tree of ``cls`` from ``key=value`` arguments. Text is taken as it stands, quotes included.

    Raises:
        ConfigError: what is not ``key=value``, and all that ``from_dict`` refuses.
    """
    return from_dict(cls, values_of(cls, arguments))


def values_of(cls: type, arguments: list[str]) -> dict[str, Any]:
    """What ``key=value`` arguments set of the tree of ``cls``, as nested dicts, and nothing else.

    Raises:
        ConfigError: what is not ``key=value``, or no setting of the tree.
    """
    known = {setting.path: setting for setting in settings(cls)}
    values: dict[str, Any] = {}
    for argument in arguments:
        path, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not a setting: write key=value, as in {min(known)}=...")
        if path not in known:
            raise ConfigError(f"unknown setting {argument}: {hint(path, list(known))}")
        *sections, last = path.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = _parse(known[path].annotation, text)
    return values


def wanted(annotation: Any) -> str:
    """A type in the user's words: ``int | None`` is "a whole number or null"."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if annotation in words:
        return words[annotation]
    if typing.get_origin(annotation) is tuple:
        items = ['"text"' if item is str else wanted(item) for item in typing.get_args(annotation) if item is not ...]
        return f"a list such as [{', '.join(items)}]"
    return " or ".join(wanted(option) for option in typing.get_args(annotation))


def takes_text(annotation: Any) -> bool:
    """Whether every value but null is text."""
    return set(_options(annotation)) - {type(None)} == {str}


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return MISSING if item.default is dataclasses.MISSING else item.default


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints, texts = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    built = {}
    for item in dataclasses.fields(cls):
        key, annotation = item.name.removesuffix("_"), hints[item.name]
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            built[item.name] = _build(annotation, values.get(key, {}), f"{prefix}{key}.")
            continue
        value = values.get(key, _default(item))
        if isinstance(value, str) and value == MISSING:
            raise ConfigError(f"{prefix}{key} must be given: {prefix}{key}=... ({help_of(texts[item.name])})")
        built[item.name] = _convert(annotation, value, prefix + key)
    return cls(**built)


def _convert(annotation: Any, value: Any, path: str) -> Any:
    """``value`` as one of the types of ``annotation``; a number that is whole is as good as a whole number: 1e12."""
    for option in _options(annotation):
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            items = typing.get_args(option)
            items = items[:1] * len(value) if items[-1] is ... else items
            if len(items) == len(value):
                return tuple(_convert(item, entry, path) for item, entry in zip(items, value, strict=True))
        elif option is float and type(value) in (int, float):
            return float(value)
        elif option is int and (type(value) is int or (type(value) is float and value.is_integer())):
            if abs(value) >= INT64:
                raise ConfigError(f"{path}={value} cannot be used: {path} takes a whole number below 2^63")
            return int(value)
        elif type(value) is option:
            return value
    shown = "null" if value is None else repr(value)
    raise ConfigError(f"{path}={shown} cannot be used: {path} takes {wanted(annotation)}")


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _parse(annotation: Any, text: str) -> Any:
    """Text as the first type that it reads as; what reads as none stays text, for ``from_dict`` to refuse."""
    words = {"true": True, "false": False}
    for option in _options(annotation):
        if option is type(None) and text == "null":
            return None
        if option is bool and text.lower() in words:
            return words[text.lower()]
        if option in (int, float):
            try:
                number = int(text) if text.lstrip("+-").isdecimal() else float(text)
            except ValueError:
                continue
            if option is float or isinstance(number, int) or number.is_integer():
                return number
        if typing.get_origin(option) is tuple:
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                continue
    return text
