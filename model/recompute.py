"""Recomputation: what a part of the network computes on its way is forgotten after the forward pass and computed again
in the backward pass, which takes time and saves memory.

The configuration names the parts, by default none; a part is a method marked `recomputable`. Nothing in the model
draws random numbers, so a second computation gives the same numbers without any care for their state.
"""

from collections.abc import Callable
from functools import partial, wraps

import torch
from torch.utils.checkpoint import checkpoint


def recomputable(part: str) -> Callable:
    """Marks a method that is computed again in the backward pass if its module's ``config.recompute`` names the part.

    Gradients flow to the positional arguments that are tensors and to the module's parameters. The forward pass runs
    without gradients, so that the router notes its losses once, when it runs with them.
    """

    def mark(method: Callable) -> Callable:
        @wraps(method)
        def run(self, *args):
            if part in self.config.recompute and torch.is_grad_enabled():
                return checkpoint(partial(method, self), *args, use_reentrant=True, preserve_rng_state=False)
            return method(self, *args)

        return run

    return mark
