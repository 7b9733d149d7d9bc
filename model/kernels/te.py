"""Linear layers of Transformer Engine with the parameters, names and checkpoints of `model.kernels.backends`'s.

What is multiplied in FP8 is rounded anew in each call: nothing is kept between micro-batches, so a layer may be used
several times (multi-token prediction) and computed again in the backward pass.

Shape suffixes: T tokens, K key heads, P rows of the projection for each, W of them that stay wide, H hidden.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from model.config import FP8_ALIGNED
from parallel.main_grads import add_weight_gradient

CUT = {"column": 0, "row": 1}  # the dimension of the weight that tensor parallelism cuts


def _leave(_: Tensor) -> None:
    """Parameters are drawn by `model.init`."""


class Linear(te.Linear):
    """A linear layer without bias, cut over the tensor-parallel group by its outputs (column) or inputs (row).

    In training under data parallelism its weight's gradient goes into ``main_grad`` (`parallel.main_grads.fuse`).
    """

    def __init__(self, rows_in: int, rows_out: int, config, tp_group, mode: str):
        super().__init__(
            rows_in,
            rows_out,
            sequence_parallel=config.sequence_parallel,
            tp_group=tp_group if tp_group.size() > 1 else None,
            tp_size=tp_group.size(),
            init_method=_leave,
            bias=False,
            params_dtype=config.params_dtype,
            parallel_mode=mode,
            device=torch.get_default_device().type,
        )
        self.mode, self.own_group = mode, tp_group
        self.recipe = get_fp8_recipe(config) if config.fp8 else None

    def context(self, x: Tensor) -> AbstractContextManager:
        """Where the layer computes: megatron-core's stack opens FP8 around it, but for what is computed again.

        Text that is written token by token, a last batch of an evaluation: whatever has no gradients and not as many
        rows as FP8 takes is multiplied in the model's type.
        """
        if self.recipe is None:
            return nullcontext()
        if x[..., 0].numel() % FP8_ALIGNED and not torch.is_grad_enabled():
            return te.autocast(enabled=False)
        if FP8GlobalStateManager.is_fp8_enabled():
            return nullcontext()
        return te.autocast(enabled=True, recipe=self.recipe)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[T, 1, I] -> [T, 1, O], and no bias, as megatron-core's linear layers return them."""
        with self.context(x):
            return super().forward(x), None

    def get_extra_state(self) -> None:
        """None, as of megatron-core's linear layers: a checkpoint holds nothing of FP8."""

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None):
        """That of megatron-core's linear layers."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": CUT[self.mode]},
            sharded_offsets,
            tp_group=self.own_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _WideRows(torch.autograd.Function):
    """Puts the products of some rows of a weight, in the model's type, in the place of those in FP8.

    Their gradients take the same way: of what flows back into the layer they are taken out. Whoever reads the layer's
    output must have no further use for its gradient.
    """

    @staticmethod
    def forward(ctx, out: Tensor, x_TH: Tensor, weight: Any, wide: int, per_head: int) -> Tensor:
        rows_WH = weight.view(-1, per_head, x_TH.shape[1])[:, -wide:].flatten(0, 1)
        ctx.save_for_backward(x_TH, rows_WH)
        ctx.weight, ctx.sizes = weight, (wide, per_head)
        result = out.detach()  # the same memory, which nothing else reads
        result.view(x_TH.shape[0], -1, per_head)[..., -wide:] = (x_TH @ rows_WH.t()).unflatten(-1, (-1, wide))
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        x_TH, rows_WH = ctx.saved_tensors
        weight, (wide, per_head) = ctx.weight, ctx.sizes
        grad = grad.contiguous()
        heads_TKP = grad.view(x_TH.shape[0], -1, per_head)
        own_TW = heads_TKP[..., -wide:].flatten(1).clone()
        heads_TKP[..., -wide:] = 0
        total = torch.zeros_like(rows_WH, dtype=torch.float32)
        add_weight_gradient(x_TH, own_TW, total)
        main_grad = vars(weight).get("main_grad")
        sums = torch.zeros_like(weight) if main_grad is None else main_grad
        sums.view(-1, per_head, x_TH.shape[1])[:, -wide:] += total.unflatten(0, (-1, wide))
        return grad, own_TW @ rows_WH, sums if main_grad is None else None, None, None


class HeadsLinear(Linear):
    """The projection into Gated DeltaNet's heads, whose last rows (b and a of each key head) FP8 leaves alone."""

    def __init__(self, rows_in: int, rows_out: int, config, tp_group):
        super().__init__(rows_in, rows_out, config, tp_group, "column")
        shape = config.shape
        self.wide = 2 * shape.linear_value_heads // shape.linear_key_heads
        self.per_head = rows_out // shape.linear_key_heads

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """See `Linear`."""
        out, _ = super().forward(x)
        if self.recipe is None:
            return out, None
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.own_group)
        return _WideRows.apply(out, x.flatten(0, 1), self.weight, self.wide, self.per_head), None
