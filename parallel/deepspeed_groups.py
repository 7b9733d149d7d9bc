"""How DeepSpeed is told of megatron-core's process groups and of its expert parameters.

DeepSpeed asks an ``mpu`` for the groups of dense parameters, and finds expert parameters by the attribute that
megatron-core gives them (``allreduce=False``). Their group it takes from a module of its own MoE class: `ExpertGroups`
stands for that module and computes nothing.
"""

from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn


class Mpu:
    """The groups that DeepSpeed asks for. Context-parallel processes hold the same parameters: data parallel to it."""

    def __init__(self, groups: ProcessGroupCollection) -> None:
        self._model, self._data, self._pipeline = groups.tp, groups.dp_cp, groups.pp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_model_parallel_rank(self) -> int:
        return self._model.rank()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_tensor_model_parallel_rank(self) -> int:
        return self._model.rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data)

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._pipeline.size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._pipeline.rank()


class ExpertGroups(MoE):
    """Registers megatron-core's groups of experts under the name that expert parameters carry."""

    def __init__(self, groups: ProcessGroupCollection, num_experts: int) -> None:
        nn.Module.__init__(self)
        self._parallel, self._data = groups.tp_ep, groups.expt_dp
        self.num_experts, self.ep_size = num_experts, self._parallel.size()
        self.num_local_experts = num_experts // self.ep_size
        self.expert_group_name = f"ep_size_{self.ep_size}"

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed while it sets up its engine."""
        name = self.expert_group_name
        known = deepspeed_groups
        known._EXPERT_PARALLEL_GROUP[name] = self._parallel
        known._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(self._parallel)
        known._EXPERT_DATA_PARALLEL_GROUP[name] = self._data
        known._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(self._data)

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("it stands for groups and computes nothing")
