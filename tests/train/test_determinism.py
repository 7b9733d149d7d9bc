"""A deterministic run: what torch is told, what is refused, and that a CPU has nothing to time."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from parallel.topology import Topology
from train.measure.determinism import determinism_cost, make_deterministic
from train.settings.run import Config
from train.settings.tree import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ONE = Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1)


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(("device", "dtype"), [(CPU, "float32"), (CPU, "bfloat16"), (GPU, "bfloat16")])
def test_torch_is_told_and_fills_no_memory_for_it(device: torch.device, dtype: str) -> None:
    make_deterministic(Config(model=ModelConfig(dtype=dtype)), device)
    assert torch.are_deterministic_algorithms_enabled()
    # FlashAttention adds in one order only where what has no deterministic kernel raises.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_plain_modules_on_a_gpu_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"run\.deterministic=true is for GPU kernels, and model\.dtype=float32 has none"
    ):
        make_deterministic(Config(), GPU)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_cpu_and_a_model_without_attention_cost_nothing() -> None:
    bfloat16 = Config(model=ModelConfig(dtype="bfloat16"))
    assert determinism_cost(bfloat16, ONE, CPU) == ""
    alone = replace(bfloat16, model=ModelConfig(dtype="bfloat16", pattern="GE"), mtp=replace(bfloat16.mtp, steps=0))
    assert determinism_cost(alone, ONE, GPU) == ""
