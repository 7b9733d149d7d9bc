"""The same bits each time on GPUs: which kernels torch then takes, and what they cost.

Of all that a bfloat16 model computes only the gradients of attention's queries are added up in the order in which
blocks happen to finish, in cuDNN's kernels and FlashAttention's. Told to be deterministic, torch leaves cuDNN's alone
and has FlashAttention's add in one order; cuBLAS wants fixed workspaces for it (`parallel.groups.set_cuda_variables`).
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model.documents import Documents
from model.layers.attention import packed_attention
from parallel.topology import Topology
from train.settings.run import Config
from train.settings.tree import ConfigError

TIMED, WARM_UP = 5, 2


def make_deterministic(config: Config, device: torch.device) -> None:
    """Lets torch take deterministic kernels alone; what has none raises its name.

    Raises:
        ConfigError: on a GPU, a model whose modules are plain torch, some of which have no such kernel there.
    """
    if device.type == "cuda" and config.model.dtype != "bfloat16":
        raise ConfigError(
            f"run.deterministic=true is for GPU kernels, and model.dtype={config.model.dtype} has none: choose "
            f"model.dtype=bfloat16, or run.deterministic=false"
        )
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # with NaN, a pass over memory that changes no result


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def determinism_cost(config: Config, topology: Topology, device: torch.device) -> str:
    """A line about attention's time with and without, at the model's own sizes; empty on a CPU."""
    layers = config.model.layers.count("*") + config.mtp.steps
    if device.type != "cuda" or not layers:
        return ""
    with _deterministic(False):
        fast = _attention_milliseconds(config, topology, device)
    with _deterministic(True):
        slow = _attention_milliseconds(config, topology, device)
    return (
        f"run.deterministic: attention takes {slow:.2f} ms instead of {fast:.2f}, forwards and backwards, in each of "
        f"{layers} layers for each micro-batch"
    )


def _attention_milliseconds(config: Config, topology: Topology, device: torch.device) -> float:
    """Of a layer's attention on rows of one document each, forwards and backwards."""
    model, shared = config.model, topology.tensor * topology.context
    rows, length = config.batch.micro, config.data.seq_length
    documents = Documents.from_ids(torch.zeros(rows, length)).to(device)
    heads = (model.attention_heads // shared, *[max(1, model.key_value_heads // shared)] * 2)
    q, k, v = (
        torch.randn(rows * length, number, model.head_dim, dtype=torch.bfloat16, device=device, requires_grad=True)
        for number in heads
    )
    times = []
    for _ in range(WARM_UP + TIMED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = packed_attention(q, k, v, documents)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_UP:])
