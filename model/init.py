"""How every parameter starts: one table from role to distribution.

A parameter's numbers depend only on the seed, its name in the whole model and, for experts, the expert's index. So
any layout of processes starts from the same model, and no rank draws what another one holds.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor, nn

from model.layers.deltanet import draw_decay, draw_time_step_bias
from model.layers.router import normalise_rows
from model.network import LanguageModel

ROUTER = "router.weight"


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)


def _normal(std: float) -> Callable:
    return lambda shape, generator: torch.randn(shape, generator=generator, device=generator.device) * std


def _uniform(low: float, high: float) -> Callable:
    return lambda shape, generator: low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def rules(config) -> dict[str, Callable]:
    """Name ending -> how to draw a float32 tensor of the parameter's whole shape.

    Layers that write into the residual stream start smaller by the square root of the number of writes (one a
    symbol of the pattern), so that the stream's variance does not grow with depth (GPT-2; Megatron-LM counts two
    writes a block, and so do two symbols).
    """
    std = config.shape.init_std
    residual = std / math.sqrt(config.num_layers)
    bound = config.shape.conv_kernel**-0.5
    uniform = _uniform(0.0, 1.0)
    return {
        "embedding.word_embeddings.weight": _normal(std),
        "output_layer.weight": _normal(std),
        "linear_qkv.weight": _normal(std),
        "linear_proj.weight": _normal(residual),
        "in_proj.weight": _normal(std),
        "out_proj.weight": _normal(residual),
        "conv_weight": _uniform(-bound, bound),
        "A_log": lambda shape, generator: draw_decay(uniform(shape, generator)),
        "dt_bias": lambda shape, generator: draw_time_step_bias(uniform(shape, generator)),
        ROUTER: lambda shape, generator: normalise_rows(_normal(1.0)(shape, generator), std),
        "experts.weight1": _normal(std),
        "experts.weight2": _normal(residual),
        "linear_fc1.weight": _normal(std),
        "linear_fc2.weight": _normal(residual),
        "gate_weight": _normal(std),
        "eh_proj.weight": _normal(std),
        "norm.weight": lambda shape, generator: torch.zeros(shape, device=generator.device),
        "layernorm.weight": lambda shape, generator: torch.zeros(shape, device=generator.device),
    }


def _rule_for(name: str, table: dict[str, Callable]) -> Callable:
    endings = [ending for ending in table if name.endswith(ending)]
    if not endings:
        raise KeyError(f"no initialisation rule for parameter {name}: add one to model.init.rules")
    return table[max(endings, key=len)]


def _draw(entry: ShardedTensor, draw: Callable, seed: int) -> Tensor:
    """This rank's part of a parameter: drawn whole and then cut, experts one by one."""
    device, shape = entry.data.device, entry.global_shape
    part = tuple(slice(start, start + size) for start, size in zip(entry.global_offset, entry.local_shape, strict=True))
    if ".experts." in entry.key:
        each = (_generator(seed, f"{entry.key}/{index}", device) for index in range(part[0].start, part[0].stop))
        return torch.stack([draw(shape[1:], generator)[part[1:]] for generator in each])
    return draw(shape, _generator(seed, entry.key, device))[part]


@torch.no_grad()
def initialise(model: LanguageModel, sharded: ShardedStateDict, seed: int) -> None:
    """Fills every parameter of a pipeline stage; ``sharded`` is the stage's own sharded state dict.

    Raises:
        KeyError: a parameter without a rule. RuntimeError: one that the sharded state dict does not hold.
    """
    table = rules(model.config)
    entries = {id(entry.data): entry for entry in sharded.values() if isinstance(entry, ShardedTensor)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in entries:
            raise RuntimeError(f"parameter {name} is missing from the sharded state dict")
        entry = entries[id(parameter)]
        parameter.copy_(_draw(entry, _rule_for(entry.key, table), seed))


@contextmanager
def rows_as_drawn(model: LanguageModel, sharded: ShardedStateDict, seed: int) -> Iterator[None]:
    """A new model inside has the routers that `initialise` draws before it gives their rows equal norms."""
    entries = {id(entry.data): entry for entry in sharded.values() if isinstance(entry, ShardedTensor)}
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith(ROUTER)]
    normalised = [parameter.detach().clone() for parameter in routers]
    with torch.no_grad():
        for parameter in routers:
            parameter.copy_(_draw(entries[id(parameter)], _normal(model.config.shape.init_std), seed))
        yield
        for parameter, weight in zip(routers, normalised, strict=True):
            parameter.copy_(weight)


# What stays wide whatever the model's type, by name ending: routing and decay rates do not bear bfloat16's 8 bits,
# nor counts its gaps.
WIDE = {
    ROUTER: (torch.float32, torch.float64),
    "balance.bias": (torch.float32, torch.float64),
    "balance.counts": (torch.int64,),
    "forecast.squares": (torch.float64,),
    "forecast.products": (torch.float64,),
    "A_log": (torch.float32, torch.float64),
    "dt_bias": (torch.float32, torch.float64),
}


def narrowed(model: nn.Module) -> list[str]:
    """Parameters and buffers of `WIDE` that have another type than they must, as something that wraps a model does."""
    found = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        allowed = next((types for ending, types in WIDE.items() if name.endswith(ending)), (tensor.dtype,))
        if tensor.dtype not in allowed:
            found.append(f"{name} is {tensor.dtype}, not {allowed[0]}".replace("torch.", ""))
    return found


def suspicious(model: LanguageModel) -> list[str]:
    """Parameters whose values look wrong after initialisation: not finite, all zero where they should not be, huge."""
    found = []
    for name, parameter in model.named_parameters():
        values = parameter.detach().float()
        if not values.isfinite().all():
            found.append(f"{name} holds values that are not finite")
        elif not name.endswith("norm.weight") and not values.any():
            found.append(f"{name} is all zero")
        elif values.abs().max() > 20:
            found.append(f"{name} reaches {values.abs().max().item():.1f}")
    return found
