"""Rotary position embedding's frequencies (RoFormer, arXiv 2104.09864) and how they are stretched to longer contexts.

    linear     positions divided by the factor (position interpolation, arXiv 2306.15595)
    dynamic    a base that grows with the document beyond the original context (NTK-aware; as transformers has it)
    yarn       high frequencies kept, low ones interpolated, cos and sin scaled (YaRN, arXiv 2309.00071)
    llama3     the same by wavelength, with a smooth step between (Llama 3.1)

A larger `rope_theta` alone is ABF (arXiv 2309.16039).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How far and in which way; the names are those of a Hugging Face config."""

    rope_type: str
    factor: float
    original_max_position_embeddings: int  # the context before
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in KINDS:
            raise ValueError(f"rope_type={self.rope_type!r} is not supported; these are: {', '.join(KINDS)}")
        if self.factor < 1:
            raise ValueError(f"rope scaling's factor={self.factor} must be at least 1")


def frequencies(theta: float, dim: int, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """(angle per position [dim / 2] fp64, what cos and sin are multiplied with)."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    inverse = theta**-exponent
    if scaling is None or scaling.rope_type == "dynamic":
        return inverse, 1.0
    if scaling.rope_type == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.rope_type == "yarn":
        return inverse * (1 - (1 - 1 / scaling.factor) * yarn_ramp(theta, dim, scaling)), yarn_magnitude(scaling)
    turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (kept + (1 - kept) / scaling.factor), 1.0


def yarn_ramp(theta: float, dim: int, scaling: RopeScaling) -> Tensor:
    """How much of each frequency is interpolated, 0 … 1, [dim / 2] (YaRN, eq. 13, over the dimension)."""

    def dimension(turns: float) -> float:  # of the pair that turns so often within the original context
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    low, high = (math.floor(low), math.ceil(high)) if scaling.truncate else (low, high)
    low, high = max(low, 0), min(high, dim - 1)
    return ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)


def yarn_magnitude(scaling: RopeScaling) -> float:
    """√(1/t) of YaRN, eq. 15: what keeps attention's entropy."""

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def rope_table(theta: float, dim: int, positions: int, scaling: RopeScaling | None) -> Tensor:
    """cos and sin of each position: [2, positions, dim / 2] fp32, from fp64 angles."""
    inverse, magnitude = frequencies(theta, dim, scaling)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return (torch.stack([angle.cos(), angle.sin()]) * magnitude).float()


def dynamic_rope(theta: float, dim: int, positions: Tensor, lengths: Tensor, scaling: RopeScaling) -> Tensor:
    """cos and sin at `positions` [T] of documents of `lengths` [T] tokens: [2, T, dim / 2] fp32.

    A decoding step sees the length so far; keys that are in the cache keep the base of theirs, as in transformers.
    """
    stretch = scaling.factor * lengths.double() / scaling.original_max_position_embeddings - (scaling.factor - 1)
    base = theta * stretch.clamp_min(1.0) ** (dim / (dim - 2))  # [T]
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angle = positions[:, None] * base[:, None] ** -exponent
    return torch.stack([angle.cos(), angle.sin()]).float()
