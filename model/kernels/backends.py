"""Implementations of the parts that the modules are made of: megatron-core's own parallel linears, and the choice
between a plain function and its GPU kernel, which is made here and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.nn import functional as F


def on_kernels(x: Tensor) -> bool:
    """Whether work on this tensor runs on GPU kernels: bfloat16 on a GPU. All else is plain torch."""
    return x.is_cuda and x.dtype == torch.bfloat16


def accelerated(module: str, applies: Callable[[Tensor], bool] = on_kernels) -> Callable:
    """Marks a plain function that has a kernel of the same name and arguments in ``module``.

    The kernel runs where ``applies`` to the first argument. Its module is imported then, so that machines without a
    GPU need none of its libraries. The plain function, ``__wrapped__``, is the twin of ``kernel()`` in tests and
    preflight.
    """

    def mark(plain: Callable) -> Callable:
        @wraps(plain)
        def run(x: Tensor, *args, **others):
            return (run.kernel() if applies(x) else run.__wrapped__)(x, *args, **others)

        run.kernel = lambda: vars(import_module(module))[plain.__name__]

        return run

    return mark


def column_linear(rows_in: int, rows_out: int, config, tp_group) -> ColumnParallelLinear:
    """A linear layer without bias whose outputs are cut over the tensor-parallel group."""
    return ColumnParallelLinear(
        rows_in,
        rows_out,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        tp_group=tp_group,
    )


def row_linear(rows_in: int, rows_out: int, config, tp_group) -> RowParallelLinear:
    """A linear layer without bias whose inputs are cut over the tensor-parallel group and whose outputs are summed."""
    return RowParallelLinear(
        rows_in,
        rows_out,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tp_group,
    )


def te_column_linear(rows_in: int, rows_out: int, config, tp_group) -> nn.Module:
    """Transformer Engine's, in place of `column_linear`; it need not be installed for the others."""
    from model.kernels.te import Linear

    return Linear(rows_in, rows_out, config, tp_group, "column")


def te_row_linear(rows_in: int, rows_out: int, config, tp_group) -> nn.Module:
    """Transformer Engine's, in place of `row_linear`."""
    from model.kernels.te import Linear

    return Linear(rows_in, rows_out, config, tp_group, "row")


def te_heads_linear(rows_in: int, rows_out: int, config, tp_group) -> nn.Module:
    """Transformer Engine's projection into the heads of Gated DeltaNet."""
    from model.kernels.te import HeadsLinear

    return HeadsLinear(rows_in, rows_out, config, tp_group)


@dataclass(frozen=True)
class Linears:
    """The linear layers of a backend: cut by outputs, cut by inputs, and into the heads of Gated DeltaNet."""

    column: Callable[..., nn.Module]
    row: Callable[..., nn.Module]
    heads: Callable[..., nn.Module]


LINEARS = {
    "torch": Linears(column_linear, row_linear, column_linear),
    "te": Linears(te_column_linear, te_row_linear, te_heads_linear),
}


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole and applies to its own slice of the sequence."""

    def __init__(self, rows_in: int, rows_out: int, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows_out, rows_in, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
