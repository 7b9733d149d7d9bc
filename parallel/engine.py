"""The seam of engines: all that `train/` asks of whoever runs its training steps.

An engine is built around a process's pipeline stages, whose parameters are filled. Between two steps, once
`gather_weights` was called, the stages themselves hold whole weights, so that `parallel.stages` can run, save and fill
them without knowing the engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

type State = dict[str, Any]  # megatron-core's sharded state dict


type Accept = Callable[[list[Any], float], bool]  # whether a step of these outputs and this gradient norm is taken


@dataclass(frozen=True)
class AdamW:
    """What the optimizer needs to know; the learning rate comes with each step."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float


class Engine(Protocol):
    """Trains one process's part of the model. All ranks call each method together."""

    @property
    def chunks(self) -> Sequence[Any]:
        """The process's pipeline stages, in order."""

    @property
    def wrapped(self) -> Sequence[Any]:
        """The same as the engine runs them, with the types that it trains them in."""

    @property
    def groups(self) -> Any:
        """megatron-core's process groups."""

    def train_step(
        self, batches: Sequence[Any], tokens: int, lr: float, accept: Accept | None = None
    ) -> tuple[list[Any], float]:
        """One optimizer step over this rank's micro-batches of ``tokens`` tokens each.

        Losses arrive divided by their counts over the whole global batch: gradients are summed over ranks, not
        averaged. Each rank then needs to have its own part of the new weights only: whoever reads weights before the
        next step calls `gather_weights`.

        Args:
            accept: decides before anything changes whether the optimizer takes the step, alike on every rank; without
                it, what is not finite raises.
        Returns:
            What the network returned for each micro-batch (last pipeline stage only), and the gradient norm before
            clipping.
        Raises:
            FloatingPointError: on every rank, if a gradient of any is not finite; parameters are as before.
        """

    def compute_gradients(self, batches: Sequence[Any], tokens: int) -> list[Any]:
        """The forward and backward passes of a step alone; returns what the network returned."""

    def gradient_bits(self) -> int:
        """The bits of this process's gradients, added up: equal after equal computations."""

    def not_finite(self) -> dict[str, int]:
        """Parameters of this process whose gradients are not finite, and their places among all that it holds."""

    def damaged_replicas(self) -> list[str]:
        """Parameters that are not the same, bit for bit, on all ranks that hold them; the same answer everywhere."""

    def gather_weights(self) -> None:
        """Makes every rank's weights whole after a step."""

    def sharded_state_dict(self, is_loading: bool) -> State:
        """Model and optimizer as megatron-core's sharded state dict, for saving or as a template for loading.

        Every engine uses the same names, shapes and types, so that a run may go on with another one:
        the weights by `parallel.stages.sharded_weights`; AdamW's moments, and the float32 copy of what is not float32,
        as ``optimizer.exp_avg.NAME``, ``optimizer.exp_avg_sq.NAME`` and ``optimizer.master.NAME``;
        ``optimizer_step``.
        """

    def load_state_dict(self, state: State) -> None:
        """Takes what `sharded_state_dict` described and the checkpoint filled."""
