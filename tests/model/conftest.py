"""A process group of one, and language models built in it."""

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from model.config import BalanceConfig, ModelConfig, MtpConfig
from model.network import LanguageModel
from model.stack import hybrid_config
from parallel import compat
from parallel import groups as process_groups
from parallel.topology import Topology
from tests.model.helpers import BALANCE, randomise


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    """megatron-core's groups for one process, joined over gloo; its patches are taken back at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for name in compat.CUDA_BOUND_MODULES:
            patch.setattr(importlib.import_module(name), "torch", torch)
        compat.apply(torch.device("cpu"))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield process_groups.lay_out(Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1))
        finally:
            process_groups.stop()


@pytest.fixture(scope="module")
def build(groups: ProcessGroupCollection) -> Callable[..., LanguageModel]:
    """Builds a whole model with telling weights, by default in the type that its shape names.

    float64 makes everything float64, what is otherwise kept in float32 too.
    """

    def make(
        shape: ModelConfig, mtp: MtpConfig, vocab_size: int = 40, seed: int = 0, balance: BalanceConfig = BALANCE
    ) -> LanguageModel:
        network = LanguageModel(hybrid_config(shape, mtp, balance=balance), vocab_size, groups)
        if shape.dtype == "float64":
            network.double()
        randomise(network, seed)
        return network

    return make
