"""Weights stored in FP8 (e4m3) with a scale for each block, as published ``-FP8`` checkpoints hold them.

    w[i, j] = q[i, j] * scale[i // rows, j // columns]        name of the scales: the weight's, and then _scale_inv

A weight without its scales would load as noise of the wrong size, so a checkpoint that lacks one is refused.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from train.hub.files import listed
from train.hub.safetensors_files import Entry, SafetensorsReader
from train.settings.tree import ConfigError

FP8, SCALE = "F8_E4M3", "_scale_inv"
EXPORT_BLOCK = 128
PROJECTIONS = ("_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z")


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., R, C] in FP8 and its scales [..., ceil(R / rows), ceil(C / columns)] -> float32."""
    rows, columns = weight.shape[-2:]
    whole = scale.float().repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return weight.float() * whole[..., :rows, :columns]


class Fp8Reader(SafetensorsReader):
    """A checkpoint's reader whose FP8 weights come out in float32; their scales are no tensors of their own.

    Raises:
        ConfigError: FP8 weights without scales, scales of another shape, or no block size to read them by.
    """

    def __init__(self, reader: SafetensorsReader, block: tuple[int, int] | None) -> None:
        weights = {name: entry for name, entry in reader.entries.items() if entry.dtype == FP8}
        self._block, self._scales = block, {}
        if weights and block is None:
            raise ConfigError(
                f"{len(weights)} tensors are stored in FP8 ({listed(list(weights))}), and config.json has no "
                "quantization_config that says how: without weight_block_size they cannot be read"
            )
        for name, entry in weights.items():
            assert block is not None
            scale = reader.entries.get(name + SCALE)
            *others, rows, columns = entry.shape
            wanted = (*others, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
            if scale is not None and scale.shape != wanted:
                raise ConfigError(f"{name + SCALE} has shape {list(scale.shape)}, and {name} needs {list(wanted)}")
            if scale is not None:
                self._scales[name] = scale
        if missing := [name for name in weights if name not in self._scales]:
            raise ConfigError(
                f"{len(missing)} FP8 tensors have no scales ({listed(missing)} with {SCALE} after the name): "
                "they would load as noise; copy the checkpoint again, whole"
            )
        taken = {name + SCALE for name in self._scales}
        self._reader = reader
        self.entries: dict[str, Entry] = {
            name: replace(entry, dtype="F32") if name in weights else entry
            for name, entry in reader.entries.items()
            if name not in taken
        }

    def read(self, name: str, span: slice | None = None) -> Tensor:
        """A tensor, or some of its rows (of a stack of weights: some of the weights)."""
        tensor = self._reader.read(name, span)
        if name not in self._scales:
            return tensor
        assert self._block is not None
        return dequantize(tensor, self._reader.read(name + SCALE, span if tensor.ndim > 2 else None), self._block)


def block_scales(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The opposite: [..., R, C] -> FP8, and the float32 scales that spread each block over all of FP8's range."""
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    largest = blocks.abs().amax(dim=(-3, -1)).clamp(min=torch.finfo(torch.float32).tiny)
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    quantized = (blocks / scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    return quantized.to(torch.float8_e4m3fn), scale


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an export in FP8 takes a tensor: the large projections and the experts.

    Left as they are: embedding and head, routers and gates, the narrow projections of decay and beta, convolutions,
    norms, and the MTP layer's joining projection.
    """
    kind = name.removesuffix(".weight").rpartition(".")[2]
    return len(shape) > 1 and kind.endswith(PROJECTIONS)


def quantization_config(kept: list[str]) -> dict[str, Any]:
    """What config.json says of an export in FP8.

    Args:
        kept: names of tensors that are not in FP8; modules among them are listed.
    """
    modules = sorted(name.removesuffix(".weight") for name in kept if name.endswith(".weight"))
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [EXPORT_BLOCK, EXPORT_BLOCK],
        "modules_to_not_convert": modules,
    }
