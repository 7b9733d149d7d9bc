"""Slow twin of RoPE's frequencies and of YaRN, pair by pair (`model.reference.layers` has the table, the rotation)."""

import math

from model.config import ModelConfig


def rotary_frequency(i: int, shape: ModelConfig) -> float:
    """base^(-2i / d), d = rotary_dim: Su et al., "RoFormer", 2021, section 3.2.2. Stretched by YaRN if asked.

    With r = L / wavelength and the ramp g over dimensions (its ends, where r = 32 and r = 1, rounded outwards):
    (1 - g) theta / s + g theta. Peng et al., "YaRN", 2023, section 3.2, and its authors' code.
    """
    theta, d = shape.rope_base ** (-2 * i / shape.rotary_dim), shape.rotary_dim
    if shape.yarn_factor == 1:
        return theta
    length = shape.yarn_original_length
    assert length is not None

    def dimension(turns: float) -> float:  # the i whose wavelength 2 pi base^(2i / d) goes that often into L
        return d / 2 * math.log(length / (2 * math.pi * turns), shape.rope_base)

    first, last = max(0, math.floor(dimension(32))), min(d - 1, math.ceil(dimension(1)))
    g = 1 - min(1.0, max(0.0, (i - first) / (last - first)))
    return (1 - g) * theta / shape.yarn_factor + g * theta
