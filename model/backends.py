"""Implementations of the parts that the modules are made of: megatron-core's own parallel linears, in plain torch."""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.nn import functional as F


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


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole and applies to its own slice of the sequence."""

    def __init__(self, rows_in: int, rows_out: int, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows_out, rows_in, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
