"""Rotary position embedding (RoPE) of a part of each head's dimensions, stretched by YaRN for longer contexts."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig

YARN_TURNS = (32.0, 1.0)  # pairs that turn more often in the trained context are kept, less often: stretched


def rotary_frequencies(shape: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians that each pair of dimensions turns from one position to the next, float32 [rotary_dim / 2].

    YaRN divides by its factor the frequencies of pairs that never came full circle in the trained context, keeps
    those that did so many times, and mixes the two in between (Peng et al., "YaRN", 2023, section 3.2).
    """
    pairs = torch.arange(shape.rotary_dim // 2, device=device, dtype=torch.float32)
    plain = 1.0 / shape.rope_base ** (2 * pairs / max(shape.rotary_dim, 1))
    if shape.yarn_factor == 1:
        return plain
    assert shape.yarn_original_length is not None  # `check_model` wants it with a factor
    first, last = (
        shape.rotary_dim
        * math.log(shape.yarn_original_length / (turns * 2 * math.pi))
        / (2 * math.log(shape.rope_base))
        for turns in YARN_TURNS
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), shape.rotary_dim - 1)
    stretched = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return plain / shape.yarn_factor * stretched + plain * (1 - stretched)


def rotary_table(position_RL: Tensor, shape: ModelConfig) -> Tensor:
    """cos and sin of the rotary angles, float32 [2, T, rotary_dim]; both halves of the last dimension are equal.

    YaRN scales both by 0.1 ln(factor) + 1, which sharpens the attention of longer contexts ("YaRN", section 3.4).
    """
    angle = position_RL.flatten().float()[:, None] * rotary_frequencies(shape, position_RL.device)
    angle = torch.cat([angle, angle], dim=-1)
    return torch.stack([angle.cos(), angle.sin()]) * (0.1 * math.log(shape.yarn_factor) + 1)


def apply_rotary(x_TND: Tensor, table: Tensor) -> Tensor:
    """Rotates the first rotary_dim dimensions of every head (rotate-half), leaves the rest as it is."""
    rotary_dim = table.shape[-1]
    turned, kept = x_TND[..., :rotary_dim], x_TND[..., rotary_dim:]
    cos, sin = table.to(x_TND.dtype)[:, :, None, :]
    left, right = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-right, left], dim=-1) * sin, kept], dim=-1)
