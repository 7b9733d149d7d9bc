"""Conversations as documents: a tokenizer's chat template renders them, and marks which of their text is learned.

Templates are Jinja programs that come with a model, from anybody, so they run in a sandbox, with what `transformers`
gives them (`apply_chat_template`): `{% generation %}` around what the model says, `raise_exception`, `tojson`,
`break` and `continue`; but no clock (`strftime_now`), so that the same text comes out on every day. Where a template
marks nothing, a message is what the rendered conversation gains by it: so a template that renders earlier messages
otherwise once later ones follow has to mark them itself.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.config import CHAT, DataConfig, PrepareConfig
from data.errors import CorpusError
from data.secrets import one_line
from data.text.tokenizer import Tokenizer

TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
ASSISTANT = "assistant"
# Stand around what a template marks while it renders: of the private use area, so no text that people write holds them.
OPEN, CLOSE = "\ue0f0\uf8f0", "\ue0f1\uf8f1"

type Span = tuple[int, int]  # first character, and the one after the last


class Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, whose text is put between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """What the block becomes."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (OPEN, CLOSE)]
        return [marks[0], *body, marks[1]]


class ChatTemplate:
    """Renders conversations. Picklable.

    Args:
        text: the template.
        names: special tokens by the names that templates know them by (`bos_token`, ...).
        roles: whose messages are learned.
        source: names it in errors.
    """

    def __init__(self, text: str, names: dict[str, str], roles: Sequence[str], source: str) -> None:
        self.text, self.names, self.roles, self.source = text, names, tuple(roles), source
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise CorpusError(f"{source} is no chat template: {one_line(error)}") from error
        if not self.roles:
            raise CorpusError(f"chat_roles=[] names nobody, so nothing would be learned: name {ASSISTANT}, or others")
        self.marks = "endgeneration" in text
        if self.marks and self.roles != (ASSISTANT,):
            raise CorpusError(
                f"chat_roles={list(self.roles)}, but {source} marks what is learned itself ({{% generation %}}): leave "
                f"{ASSISTANT} alone, or name another chat_template"
            )

    def __reduce__(self) -> tuple[type["ChatTemplate"], tuple[str, dict[str, str], tuple[str, ...], str]]:
        return type(self), (self.text, self.names, self.roles, self.source)

    @classmethod
    def from_path(cls, tokenizer: str, template: str, roles: Sequence[str]) -> "ChatTemplate":
        """The template in a file, or the one beside a tokenizer; names of special tokens come from there.

        Raises:
            CorpusError: there is none, or it cannot be read.
        """
        place = Path(tokenizer).expanduser()
        folder = place if place.is_dir() else place.parent
        settings = _json_of(folder / SETTINGS_FILE) if tokenizer else {}
        words = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
        names = {name: word for name, word in words.items() if word is not None}
        file = Path(template).expanduser() if template else folder / TEMPLATE_FILE
        if template or (tokenizer and file.is_file()):
            try:
                return cls(file.read_text(encoding="utf-8"), names, roles, f"chat_template={file}")
            except (OSError, UnicodeDecodeError) as error:
                raise CorpusError(f"chat_template={file} cannot be read: {one_line(error)}") from error
        found = settings.get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((one["template"] for one in found if one["name"] == "default"), None)
        if not isinstance(found, str):
            raise CorpusError(
                f"format=chat needs a chat template, and tokenizer={tokenizer} has none beside it ({TEMPLATE_FILE}, or "
                f"chat_template in {SETTINGS_FILE}): name one with chat_template="
            )
        return cls(found, names, roles, f"chat_template of {folder / SETTINGS_FILE}")

    @cached_property
    def identity(self) -> str:
        """Changes whenever conversations may come out otherwise."""
        return sha256(json.dumps([self.text, self.names, self.roles], sort_keys=True).encode()).hexdigest()

    def render(self, messages: Any) -> tuple[str, list[Span]]:
        """A conversation's text, and what of it is learned.

        Raises:
            ValueError: what is wrong with it.
        """
        found = _checked(messages)
        if any(mark in word for word in _words(found) for mark in (OPEN, CLOSE)):
            raise ValueError("holds characters of the private use area that stand for marks here")
        text = self._rendered(found)
        if self.marks:
            return _without_marks(text)
        return text, list(self._gained(found, text))

    def _gained(self, messages: list[dict[str, Any]], text: str) -> Iterator[Span]:
        """What each message of the chosen roles adds; of the assistant's, without what asks it to speak."""
        for number, message in enumerate(messages):
            if message["role"] not in self.roles:
                continue
            asks = message["role"] == ASSISTANT
            before = self._rendered(messages[:number], asks) if number or asks else ""
            after = text if number + 1 == len(messages) else self._rendered(messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"is rendered otherwise once message {number + 1} has others after it, so what it adds cannot be "
                    f"told: name a chat_template that marks it with {{% generation %}}"
                )
            yield len(before), len(after)

    def _rendered(self, messages: list[dict[str, Any]], asks: bool = False) -> str:
        if not messages and not asks:
            return ""
        try:
            return self._template.render(messages=messages, add_generation_prompt=asks, tools=None, **self.names)
        except Exception as error:  # a template is a program: it may fail in any way
            raise ValueError(f"cannot be rendered: {one_line(error)}") from error


class ChatEncoder:
    """Conversations to tokens, with what of them is learned. Picklable."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template

    @property
    def identity(self) -> list[str]:
        return [self.tokenizer.sha256, self.template.identity]

    def encode(self, content: str) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, given as JSON, and which are learned; its end-of-document token comes last.

        That one is learned where the token before it is. A special token counts as such where the template writes it;
        messages that spell one out are refused, since nothing would tell it from the template's.

        Raises:
            ValueError: what is wrong with it.
        """
        messages = json.loads(content)
        spelled = self.tokenizer.specials_in(_words(messages))
        if spelled:
            raise ValueError(f"spells the special token {spelled} in a message")
        text, spans = self.template.render(messages)
        text.encode()  # half a surrogate pair is no text
        ids, offsets = self.tokenizer.encode_with_specials(text)
        learned = [any(first < stop and start < end for first, end in spans) for start, stop in offsets]
        return [*ids, self.tokenizer.eod_id], [*learned, bool(learned and learned[-1])]


def chat_encoder(tokenizer: Tokenizer, path: str, settings: DataConfig | PrepareConfig) -> ChatEncoder | None:
    """What settings with format=chat ask for; None with another format.

    Args:
        path: where the tokenizer was read from, for the template beside it.
    """
    if settings.format != CHAT:
        return None
    return ChatEncoder(tokenizer, ChatTemplate.from_path(path, settings.chat_template, settings.chat_roles))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages, without fields that hold nothing: a table has every field for every message."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("holds no list of messages")
    found = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("holds a message without a role")
        found.append({name: value for name, value in message.items() if value is not None})
    return found


def _words(value: Any) -> Iterator[str]:
    """Every text in a conversation."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _words(one)
    elif isinstance(value, list):
        for one in value:
            yield from _words(one)


def _without_marks(text: str) -> tuple[str, list[Span]]:
    """The text without OPEN and CLOSE, and what stood between them."""
    first, *others = text.split(OPEN)
    parts, length, spans = [first], len(first), []
    for other in others:
        inside, _, outside = other.partition(CLOSE)
        spans.append((length, length + len(inside)))
        parts += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(parts), spans


def _json_of(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise CorpusError(f"{file} cannot be read: {one_line(error)}") from error
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str | None:
    """A special token's text, which may stand in an object; None of what is no token."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
