"""A model's parameters piece by piece, each with the tensors that it is in a Hugging Face checkpoint.

What is what over there stands in `model.hf.names`; this turns numbers into theirs and back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import ModelConfig
from model.hf.families import QWEN3_NEXT, Family
from model.hf.names import (
    EMBEDDING,
    EXPERTS,
    FEED_FORWARD,
    FINAL_NORM,
    FLAT_IN_PROJ,
    FUSED_IN_PROJ,
    HEAD,
    IN_PROJ,
    MIXERS,
    MTP_ENDS,
    Rule,
)


@dataclass(frozen=True)
class Part:
    """One of their tensors: its whole shape, and the rows of it that a piece is about (None: all)."""

    name: str
    shape: tuple[int, ...]
    span: slice | None = None


@dataclass(frozen=True)
class Piece:
    """One of our parameters (or some experts of one), and the tensors that it is over there.

    Attributes:
        ours: name. whole: shape of the whole parameter. shape: of this piece, whose first row is ``first``.
        parts: theirs. rows: see `Rule.rows`.
    """

    ours: str
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    first: int = 0
    rows: tuple[Tensor, ...] | None = field(default=None, compare=False)
    shift: float = 0.0
    float32: bool = False

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """Our numbers as their tensors (or those rows of them), in the order of ``parts``; mostly views."""
        if self.rows is not None:
            tensors = [ours[rows] for rows in self.rows]
        elif len(self.parts) > 1:  # experts: gate and up of each, or each
            tensors = list(ours.flatten(0, len(self.shape) - len(self.parts[0].shape) - 1))
        else:
            tensors = [ours + self.shift if self.shift else ours]
        shapes = [part.shape if part.span is None else (-1, *part.shape[1:]) for part in self.parts]
        return [tensor.reshape(shape) for tensor, shape in zip(tensors, shapes, strict=True)]

    def to_ours(self, theirs: list[Tensor], exact: Tensor | None = None) -> Tensor:
        """Their tensors (those rows of them that ``parts`` say) as our numbers.

        Args:
            exact: what ours was before it was shifted, if that was noted; taken if it leads to what is there.
        """
        if self.shift:
            (stored,) = theirs
            if exact is not None and torch.equal((exact + self.shift).to(stored.dtype), stored):
                return exact
            return stored.float() - self.shift
        flat = torch.cat([tensor.reshape(-1, self.shape[-1]) for tensor in theirs]) if len(theirs) > 1 else theirs[0]
        if self.rows is None:
            return flat.reshape(self.shape)
        flat = flat.reshape(self.shape)
        ours = torch.empty_like(flat)
        ours[torch.cat(self.rows)] = flat
        return ours


def _plain(rule: Rule, shape: ModelConfig, ours: str, theirs: str) -> Piece:
    size = rule.size(shape)
    rows = rule.rows(shape) if rule.rows else None
    counts = [len(part) for part in rows] if rows else [size[0]]
    parts = tuple(
        Part(theirs + name, (count, *[1] * rule.inner, *size[1:]))
        for name, count in zip(rule.theirs, counts, strict=True)
    )
    return Piece(ours + rule.ours, size, size, parts, 0, rows, rule.shift, rule.float32)


def _experts(rule: Rule, shape: ModelConfig, ours: str, theirs: str, stacked: bool, at_once: int) -> Iterator[Piece]:
    """Pieces of ``at_once`` experts each."""
    size, names = rule.size(shape), rule.theirs
    for first in range(0, shape.experts, at_once):
        count = min(at_once, shape.experts - first)
        if stacked:
            whole = (size[0], size[1] * size[2], size[3]) if len(size) == 4 else size
            span = None if count == shape.experts else slice(first, first + count)
            parts: tuple[Part, ...] = (Part(f"{theirs}{EXPERTS}{names[0]}", whole, span),)
        else:
            each = range(first, first + count)
            parts = tuple(Part(f"{theirs}{EXPERTS}{i}.{name}", size[-2:]) for i in each for name in names[1:])
        yield Piece(ours + rule.ours, size, (count, *size[1:]), parts, first)


def layer_pieces(
    rules: tuple[Rule, ...],
    shape: ModelConfig,
    ours: str = "",
    theirs: str = "",
    stacked: bool = False,
    experts_at_once: int | None = None,
) -> Iterator[Piece]:
    """The parameters that some rules are about, under the starts of their names on either side."""
    for rule in rules:
        if ".experts." in rule.ours:
            yield from _experts(rule, shape, ours, theirs, stacked, experts_at_once or shape.experts)
        else:
            yield _plain(rule, shape, ours, theirs)


def pieces(
    shape: ModelConfig,
    mtp: bool,
    stacked: Callable[[str], bool],
    experts_at_once: int | None = None,
    family: Family = QWEN3_NEXT,
    wrapped: bool = False,
) -> Iterator[Piece]:
    """Every parameter of a model, in the order of its layers; ``shape.vocab_size`` is set.

    Args:
        mtp: with the multi-token-prediction layer.
        stacked: whether the experts of a layer of theirs, given the start of its names, are one tensor each.
        experts_at_once: experts of one piece; None: all.
        family: the model type over there. wrapped: inside a model that also sees.
    """
    trunk, in_proj = family.trunk(wrapped), FLAT_IN_PROJ if family.flat_in_proj else FUSED_IN_PROJ
    mixers = {
        kind: tuple(in_proj if rule.ours == IN_PROJ else rule for rule in rules) for kind, rules in MIXERS.items()
    }

    def block(kinds: str, number: int, ours: str, theirs: str) -> Iterator[Piece]:
        mixer, feed_forward = kinds[0], kinds[1]
        yield from layer_pieces(mixers[mixer], shape, f"{ours}{number}.", theirs)
        rules = FEED_FORWARD[feed_forward]
        yield from layer_pieces(rules, shape, f"{ours}{number + 1}.", theirs, stacked(theirs), experts_at_once)

    yield from layer_pieces((EMBEDDING,), shape, theirs=trunk)
    for index in range(len(shape.layers) // 2):
        kinds = shape.layers[2 * index : 2 * index + 2]
        yield from block(kinds, 2 * index, "decoder.layers.", f"{trunk}layers.{index}.")
    yield from layer_pieces((FINAL_NORM,), shape, theirs=trunk)
    if not shape.tied_embeddings:
        yield from layer_pieces((HEAD,), shape)
    if mtp:
        yield from layer_pieces(MTP_ENDS, shape, "mtp.layers.0.", "mtp.")
        yield from block(shape.mtp_layers, 0, "mtp.layers.0.mtp_model_layer.layers.", "mtp.layers.0.")
