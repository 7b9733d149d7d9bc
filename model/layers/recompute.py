"""Recomputation: what a part of the network computes on its way is forgotten after the forward pass and computed again
in the backward pass, which takes time and saves memory.

The configuration names the parts, by default none; a part is a method marked `recomputable`. Nothing in the model
draws random numbers, so a second computation gives the same numbers without any care for their state.

What must happen once for each forward pass of a training step, such as counting, asks `first_time`.
"""

from collections.abc import Callable
from functools import partial, wraps

import torch
from torch.utils.checkpoint import checkpoint

_computing: list[bool] = []  # the recomputable parts that are being computed, outermost first: is it the second time?


def in_training() -> bool:
    """Whether what is being computed is for a backward pass; also the first computation of what is computed again."""
    return torch.is_grad_enabled() or bool(_computing)


def first_time() -> bool:
    """Whether what is being computed is for a backward pass, and was not computed for it before.

    The first computation of a part that will be computed again runs without gradients, as an evaluation does.
    """
    return not any(_computing) and in_training()


def _noting_turns(method: Callable) -> Callable:
    """The method, which says while it runs whether it is computed for the first or the second time."""
    again = False

    def run(*args):
        nonlocal again
        _computing.append(again)
        again = True
        try:
            return method(*args)
        finally:
            _computing.pop()

    return run


def recomputable(part: str) -> Callable:
    """Marks a method that is computed again in the backward pass if its module's ``config.recompute`` names the part.

    Gradients flow to the positional arguments that are tensors and to the module's parameters.
    """

    def mark(method: Callable) -> Callable:
        @wraps(method)
        def run(self, *args):
            if part in self.config.recompute and torch.is_grad_enabled():
                turns = _noting_turns(partial(method, self))
                return checkpoint(turns, *args, use_reentrant=True, preserve_rng_state=False)
            return method(self, *args)

        return run

    return mark
