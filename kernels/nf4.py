"""4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3, appendix E).

    w ≈ NF4[code] · absmax,         one absmax per block of 64 weights
    absmax ≈ mean + q8 · scale8,    q8 in -127…127, one fp32 scale8 per block of 256 absmax

4 + 8/64 + 32/(64·256) = 4.127 bits a weight. Dequantising reads those and writes the dense weight: one byte is two
codes, so a table of 256 pairs does two weights per lookup.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.registry import OpSpec, register

BLOCK = 64  # weights that share an absmax
SCALE_BLOCK = 256  # absmax that share a scale
CODES = (  # quantiles of N(0, 1), normalised to [-1, 1], with an exact zero (appendix E)
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class NF4Tensor:
    """A quantised tensor. Two codes a byte, the first in the high half; both vectors are padded to whole blocks."""

    codes: Tensor  # [ceil(N / 64) · 32] uint8
    absmax: Tensor  # [ceil(N / 64)] int8
    absmax_scale: Tensor  # [ceil(N / 64 / 256)] fp32
    absmax_mean: Tensor  # scalar fp32
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the tensor that was quantised, and of what it dequantises to

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.codes, self.absmax, self.absmax_scale, self.absmax_mean))


def _blocks(x: Tensor, size: int) -> Tensor:
    """[ceil(N / size), size], padded with zeros."""
    flat = x.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % size)).view(-1, size)


@torch.no_grad()
def quantize_nf4(weight: Tensor) -> NF4Tensor:
    """The NF4Tensor nearest to `weight` (any shape, floating point, finite), block by block.

    Raises ValueError for integers and for values that are not finite.
    """
    if not weight.is_floating_point():
        raise ValueError(f"quantize_nf4 needs a floating point tensor, got {weight.dtype}")
    if not weight.isfinite().all():
        raise ValueError("quantize_nf4 got values that are not finite")
    blocks = _blocks(weight.float(), BLOCK)  # [B, 64]
    absmax = blocks.abs().amax(1)  # [B]
    mean = absmax.mean() if len(absmax) else absmax.new_zeros(())
    centred = _blocks(absmax - mean, SCALE_BLOCK)
    scale = centred.abs().amax(1, True) / 127
    q8 = (centred / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    table = torch.tensor(CODES, device=weight.device)
    normalised = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(normalised, (table[1:] + table[:-1]) / 2).to(torch.uint8).view(-1, 2)
    codes = nearest[:, 0] * 16 + nearest[:, 1]
    return NF4Tensor(codes, q8.view(-1)[: len(absmax)].clone(), scale[:, 0], mean, tuple(weight.shape), weight.dtype)


def dequantize_nf4_reference(packed: NF4Tensor) -> Tensor:
    table = torch.tensor(CODES, device=packed.codes.device)
    codes = torch.stack([packed.codes // 16, packed.codes % 16], 1).flatten().long()
    scale = packed.absmax_scale.repeat_interleave(SCALE_BLOCK)[: len(packed.absmax)]
    absmax = packed.absmax_mean + packed.absmax * scale
    return (table[codes] * absmax.repeat_interleave(BLOCK))[: prod(packed.shape)].view(packed.shape).to(packed.dtype)


@torch.no_grad()
def dequantize_nf4(packed: NF4Tensor) -> Tensor:
    """The dense tensor that `packed` stands for, in its shape and dtype."""
    device = packed.codes.device
    table = torch.tensor(CODES, device=device)
    pairs = torch.cartesian_prod(table, table).view(torch.int64).view(-1)  # [256]: two fp32 as one 64-bit element
    scale = packed.absmax_scale.repeat_interleave(SCALE_BLOCK)[: len(packed.absmax)]
    absmax = torch.addcmul(packed.absmax_mean, packed.absmax.float(), scale)  # [B]
    values = pairs.index_select(0, packed.codes.int()).view(torch.float32).view(-1, BLOCK)
    dense = torch.empty_like(values, dtype=packed.dtype)
    torch.mul(values, absmax[:, None], out=dense)
    return dense.view(-1)[: prod(packed.shape)].view(packed.shape)


def _example(shape, dtype, device):
    weight = torch.randn(shape["N"], shape["K"], device=device).to(dtype)
    return (quantize_nf4(weight),), {}


register(
    OpSpec(
        name="dequantize_nf4",
        function=dequantize_nf4,
        reference=dequantize_nf4_reference,
        example=_example,
        shapes=({"N": 1, "K": 1}, {"N": 3, "K": 70}, {"N": 0, "K": 64}, {"N": 300, "K": 64}, {"N": 2048, "K": 2048}),
        flops=lambda s: s["N"] * s["K"],
        bytes=lambda s, size: s["N"] * s["K"] * size + s["N"] * s["K"] // 2 + s["N"] * s["K"] // BLOCK,
        differentiable=False,
    )
)
