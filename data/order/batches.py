"""How many samples each step takes, and how long its sequences are: pure functions of the step.

So the samples of any step are known without replaying those before it, and a run's state stays its step.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings are read and checked without torch, which takes seconds to import
    import torch


@dataclass(frozen=True)
class Batch:
    """One microbatch. Rows that only fill it up have documents of -1: no valid token."""

    tokens: "torch.Tensor"  # int64 [micro, s + 1]
    documents: "torch.Tensor"  # int32 [micro, s + 1]
    learned: "torch.Tensor | None" = None  # bool [micro, s + 1]: which tokens count as targets; None: all

    @property
    def num_samples(self) -> int:
        """Rows that are real."""
        return int((self.documents[:, 0] >= 0).sum())

    def cut(self, length: int) -> "Batch":
        """The same tokens in shorter rows: [micro, s + 1] -> [micro * s / length, length + 1].

        Every token but a sample's last is read once, so neighbouring rows share the token at their border: the one's
        last target is the other's first input.
        """

        def rows(x: "torch.Tensor") -> "torch.Tensor":
            return x.unfold(1, length + 1, length).flatten(0, 1)

        return Batch(rows(self.tokens), rows(self.documents), None if self.learned is None else rows(self.learned))


@dataclass(frozen=True)
class BatchSchedule:
    """Phases of a run, each from so many samples behind it on: (samples behind, value), the first from 0.

    A phase begins with the first step that has so many samples behind it, so no step is cut in two.

    Attributes:
        sizes: samples of a step.
        lengths: tokens of a sequence, which samples are cut into; empty leaves samples whole.
    """

    sizes: tuple[tuple[int, int], ...]
    lengths: tuple[tuple[int, int], ...] = ()

    @classmethod
    def constant(cls, size: int) -> "BatchSchedule":
        """The same size for every step."""
        return cls(((0, size),))

    def samples(self, step: int) -> range:
        """Numbers of the samples of a step; steps count from 0."""
        first_step, behind, size = 0, 0, self.sizes[0][1]
        for begin, next_size in self.sizes[1:]:
            steps = max(0, -(-(begin - behind) // size))
            if first_step + steps > step:
                break
            first_step, behind, size = first_step + steps, behind + steps * size, next_size
        first = behind + (step - first_step) * size
        return range(first, first + size)

    def length(self, step: int) -> int | None:
        """Tokens of a step's sequences, or None for whole samples."""
        behind = self.samples(step).start
        reached = [length for begin, length in self.lengths if begin <= behind]
        return reached[-1] if reached else None
