"""The dense feed-forward network: SwiGLU, as a layer of its own and as the core of the shared expert."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from model.kernels.backends import accelerated


@accelerated("model.kernels.experts")
def swiglu_pairs(mixed: Tensor) -> Tensor:
    """SiLU(gate) * up, where the last dimension interleaves gate and up values: [..., 2F] -> [..., F]."""
    gate, up = mixed.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up


@dataclass
class SwiGLUSubmodules:
    """The parts that a backend chooses."""

    linear_fc1: Callable[..., nn.Module]
    linear_fc2: Callable[..., nn.Module]


class SwiGLU(MegatronModule):
    """W_down [SiLU(W_gate x) * W_up x] (Shazeer, "GLU Variants Improve Transformer", 2020), cut over tensor ranks.

    The fused projection interleaves gate rows and up rows, so that a cut of the rows keeps the pairs
    together.
    """

    def __init__(self, config, width: int, submodules: SwiGLUSubmodules, pg_collection):
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.linear_fc1 = submodules.linear_fc1(config.hidden_size, 2 * width, config, pg_collection.tp)
        self.linear_fc2 = submodules.linear_fc2(width, config.hidden_size, config, pg_collection.tp)

    def forward(self, hidden_T1H: Tensor) -> Tensor:
        """[T, 1, H] -> [T, 1, H]."""
        return self.down(self.up_gate(hidden_T1H))

    def up_gate(self, hidden_T1H: Tensor) -> Tensor:
        """SiLU(gate) * up of this rank's columns: [T, 1, H] -> [T, 1, F]."""
        mixed, _ = self.linear_fc1(hidden_T1H)
        return swiglu_pairs(mixed)

    def down(self, activation: Tensor) -> Tensor:
        """The down projection: [T, 1, F] -> [T, 1, H]."""
        out, _ = self.linear_fc2(activation)
        return out


class Dense(SwiGLU):
    """The layer ``-`` of a pattern: one SwiGLU of width dense_size that every token goes through."""

    def __init__(self, config, submodules, pg_collection, is_mtp_layer: bool = False, name=None):
        super().__init__(config, config.shape.dense_size, submodules, pg_collection)

    @classmethod
    def builder(cls, submodules: SwiGLUSubmodules):
        """What megatron-core's layer calls to build its MLP."""
        return partial(cls, submodules=submodules)

    def forward(  # type: ignore[override]  # megatron-core calls the MLP of a layer so
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """hidden [T, 1, H] -> [T, 1, H]; the padding mask is for mixtures of experts."""
        return super().forward(hidden_states), None
