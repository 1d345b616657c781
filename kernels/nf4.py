"""4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3, appendix E).

    w ≈ NF4[code] · absmax,         one absmax per block of 64 weights
    absmax ≈ mean + q8 · scale8,    q8 in -127…127, one fp32 scale8 per block of 256 absmax

4 + 8/64 + 32/(64·256) = 4.127 bits a weight. Dequantising reads those once and writes the dense weight once; two FLOPs
an absmax, one a weight. Products and sums are fp32, whatever dtype comes out.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.backend import Target, operator, tl, triton, use_triton
from tritium.kernels.registry import Launch, launch_of, register

BLOCK = 64  # weights that share an absmax
SCALE_BLOCK = 256  # absmax that share a scale
CODES = (  # quantiles of N(0, 1), normalised to [-1, 1], with an exact zero (appendix E)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4Tensor:
    """A quantised tensor. Two codes a byte, the first in the high half; both vectors are padded to whole blocks.

    In an nn.Module: register the four `parts` as buffers, which its state_dict and `.to` take along, and make
    `NF4Tensor(*buffers, shape, dtype)` of them where a weight is wanted: that copies nothing.
    Raises: ValueError for parts whose shapes don't fit `shape`.
    """

    codes: Tensor  # [ceil(N / 64) · 32] uint8
    absmax: Tensor  # [ceil(N / 64)] int8
    absmax_scale: Tensor  # [ceil(N / 64 / 256)] fp32
    absmax_mean: Tensor  # scalar fp32
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the tensor that was quantised, and of what it dequantises to

    def __post_init__(self):
        blocks = -(-prod(self.shape) // BLOCK)
        seen = [tuple(x.shape) for x in self.parts]
        wanted = [(blocks * 32,), (blocks,), (-(-blocks // SCALE_BLOCK),), ()]
        if seen != wanted:
            raise ValueError(f"NF4Tensor of shape {self.shape}: its parts have shapes {seen}, wanted {wanted}")

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.codes, self.absmax, self.absmax_scale, self.absmax_mean

    def to(self, device: torch.device | str) -> "NF4Tensor":
        """The same on another device. Its dtype stays: the codes stand for the same weights."""
        return NF4Tensor(*(part.to(device) for part in self.parts), self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.parts)


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


# Triton ---------------------------------------------------------------------------------------------------------------
#
# The unit is a block: 32 bytes of codes, 64 weights, one absmax. lora_linear's matmul makes its tiles of the same two
# functions, from the blocks of several rows.


@triton.jit
def nf4_table(CODES: tl.constexpr):
    """The 16 values of a code, [16] fp32: selects between constants, nothing is loaded."""
    i_code = tl.arange(0, 16)
    b_table = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        b_table = tl.where(i_code == i, CODES[i], b_table)
    return b_table


@triton.jit
def nf4_tile(p_codes, p_absmax, p_absmax_scale, absmax_mean, b_table, i_block, m_block):
    """The weights [M, 64·N] fp32 of the blocks i_block [M, N] int64; finite where the mask is false."""
    M: tl.constexpr = i_block.shape[0]
    N: tl.constexpr = i_block.shape[1]
    i_byte = i_block[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]  # [M, N, 32]
    b_pair = tl.load(p_codes + i_byte, mask=m_block[:, :, None], other=0)
    b_code = tl.join(b_pair >> 4, b_pair & 15).to(tl.int32)  # [M, N, 32, 2]: the first code is in the high half
    b_value = tl.gather(b_table, tl.reshape(b_code, [M * N * 64]), 0)
    b_scale = tl.load(p_absmax_scale + i_block // 256, mask=m_block, other=0.0)  # [M, N]
    b_absmax = absmax_mean + tl.load(p_absmax + i_block, mask=m_block, other=0).to(tl.float32) * b_scale
    return tl.reshape(tl.reshape(b_value, [M, N, 64]) * b_absmax[:, :, None], [M, N * 64])


@triton.jit
def _dequantize_nf4(
    p_codes, p_absmax, p_absmax_scale, p_absmax_mean, p_out, size, CODES: tl.constexpr, ROWS: tl.constexpr
):
    """out [size] from codes [32·B], absmax [B], absmax_scale [B / 256], B = size / 64. Grid: (cdiv(B, ROWS),)."""
    i_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    i_out = i_block[:, None] * 64 + tl.arange(0, 64)[None, :]  # [ROWS, 64]
    m_block = (i_block * 64 < size)[:, None]
    b_out = nf4_tile(
        p_codes, p_absmax, p_absmax_scale, tl.load(p_absmax_mean), nf4_table(CODES), i_block[:, None], m_block
    )
    tl.store(p_out + i_out, b_out.to(p_out.dtype.element_ty), mask=i_out < size)


CONFIG = {"CODES": CODES, "ROWS": 64, "num_warps": 4}  # 4096 weights: 16 bytes of codes a thread


def _dequantize_output(parts, shape, dtype):
    return parts[0].new_empty(shape, dtype=dtype)


@operator("dequantize_nf4", _dequantize_output)
def _dequantize(parts: list[Tensor], shape: list[int], dtype: torch.dtype) -> Tensor:
    """The dense tensor of (codes, absmax, absmax_scale, absmax_mean)."""
    out = parts[0].new_empty(shape, dtype=dtype)
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK * CONFIG["ROWS"]),)
        _dequantize_nf4[grid](*(part.contiguous() for part in parts), out, out.numel(), **CONFIG)
    return out


# Torch ----------------------------------------------------------------------------------------------------------------
def _torch_dequantize(parts: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A byte is two codes, so a table of 256 pairs does two weights per lookup."""
    codes, absmax, absmax_scale, absmax_mean = parts
    table = torch.tensor(CODES, device=codes.device)
    pairs = torch.cartesian_prod(table, table).view(torch.int64).view(-1)  # [256]: two fp32 as one 64-bit element
    scale = absmax_scale.repeat_interleave(SCALE_BLOCK)[: len(absmax)]
    absmax = torch.addcmul(absmax_mean, absmax.float(), scale)  # [B]
    values = pairs.index_select(0, codes.int()).view(torch.float32).view(-1, BLOCK)
    dense = torch.empty_like(values, dtype=dtype)
    torch.mul(values, absmax[:, None], out=dense)
    return dense.view(-1)[: prod(shape)].view(shape)


# Public ---------------------------------------------------------------------------------------------------------------
def dequantize_parts(parts: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`dequantize_nf4` of an NF4Tensor's `parts`, in any shape of as many elements and in any dtype."""
    if use_triton(*parts) and dtype != torch.float64:
        return _dequantize(list(parts), list(shape), dtype)
    return _torch_dequantize(parts, shape, dtype)


@torch.no_grad()
def dequantize_nf4(packed: NF4Tensor) -> Tensor:
    """The dense tensor that `packed` stands for, in its shape and dtype; no gradient."""
    return dequantize_parts(packed.parts, packed.shape, packed.dtype)


def _example(shape, dtype, device):
    weight = torch.randn(shape["N"], shape["K"], device=device).to(dtype)
    return (quantize_nf4(weight),), {}


def _launches(target: Target) -> tuple[Launch, ...]:
    types = {"p_codes": "*u8", "p_absmax": "*i8"}
    return tuple(launch_of(_dequantize_nf4, x, CONFIG, types | {"p_out": f"*{x}"}) for x in ("bf16", "fp32"))


def _must_move(shape, itemsize: int) -> int:
    return shape["N"] * shape["K"] * itemsize + shape["N"] * shape["K"] // 2 + shape["N"] * shape["K"] // BLOCK


register(
    name="dequantize_nf4",
    function=dequantize_nf4,
    reference=dequantize_nf4_reference,
    example=_example,
    shape={"N": 4096, "K": 14336},
    flops=lambda s: s["N"] * s["K"],
    bytes=_must_move,
    launches=_launches,
    differentiable=False,
)
