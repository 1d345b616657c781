"""Rotary position embedding, half-split (Hugging Face) layout, on queries and keys together.

    [a | b] → [a cos - b sin | b cos + a sin],   a, b: the halves of a head

q [T, H, D], k [T, G, D], cos and sin [T, D/2] fp32; 3·T·(H + G)·D FLOPs. Must move q and k in and out once, and cos
and sin in once for all heads of a token. The backward is the rotation by the negative angle: the same kernel, and it
needs cos and sin only. (Su et al. 2021, arXiv 2104.09864)
"""

import torch
from torch import Tensor

from tritium.kernels.backend import Target, apply, operator, tl, triton, use_triton
from tritium.kernels.blocks import Function, require_float
from tritium.kernels.registry import Launch, Shape, launch_of, register


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        a, b = x.to(dtype).chunk(2, -1)
        c, s = cos[:, None].to(dtype), sin[:, None].to(dtype)
        return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)

    return rotated(q), rotated(k)


# Triton ---------------------------------------------------------------------------------------------------------------

TILE = 2048  # elements of half a head, by heads and tokens, that a program rotates at a time: 16 a thread


@triton.jit
def _rotate_heads(
    p_x, p_y, i_t, m_t, b_cos, b_sin, stride_xt, stride_xh, stride_xd, stride_yt,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [T, HEADS, 2·HALF] (heads side by side) from x for the tokens i_t [BLOCK_T, 1, 1]."""
    i_d = tl.arange(0, BLOCK_D)[None, None, :]  # [1, 1, BLOCK_D]
    for i_start in range(0, HEADS, BLOCK_H):
        i_h = (i_start + tl.arange(0, BLOCK_H))[None, :, None]  # [1, BLOCK_H, 1]
        m = m_t & (i_h < HEADS) & (i_d < HALF)  # [BLOCK_T, BLOCK_H, BLOCK_D]
        p_a = p_x + i_t * stride_xt + i_h.to(tl.int64) * stride_xh + i_d.to(tl.int64) * stride_xd
        b_a = tl.load(p_a, mask=m, other=0.0).to(tl.float32)
        b_b = tl.load(p_a + tl.cast(HALF, tl.int64) * stride_xd, mask=m, other=0.0).to(tl.float32)
        p_first = p_y + i_t * stride_yt + i_h * (2 * HALF) + i_d
        tl.store(p_first, (b_a * b_cos - b_b * b_sin).to(p_y.dtype.element_ty), mask=m)
        tl.store(p_first + HALF, (b_b * b_cos + b_a * b_sin).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _rope(
    p_q, p_k, p_cos, p_sin, p_q_out, p_k_out,
    stride_qt, stride_qh, stride_qd, stride_kt, stride_kh, stride_kd, stride_q_out, stride_k_out, stride_angle, T,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every head of BLOCK_T tokens, so that cos and sin [T, HALF] are read once. Grid: (cdiv(T, BLOCK_T),)."""
    i_t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]  # [BLOCK_T, 1, 1]
    i_d = tl.arange(0, BLOCK_D)[None, None, :]
    m_t = i_t < T
    m_angle = m_t & (i_d < HALF)  # [BLOCK_T, 1, BLOCK_D]
    b_cos = tl.load(p_cos + i_t * stride_angle + i_d, mask=m_angle, other=0.0)
    b_sin = tl.load(p_sin + i_t * stride_angle + i_d, mask=m_angle, other=0.0)
    if INVERSE:
        b_sin = -b_sin
    _rotate_heads(
        p_q, p_q_out, i_t, m_t, b_cos, b_sin, stride_qt, stride_qh, stride_qd, stride_q_out, H, HALF, BLOCK_H, BLOCK_D
    )
    _rotate_heads(
        p_k, p_k_out, i_t, m_t, b_cos, b_sin, stride_kt, stride_kh, stride_kd, stride_k_out, G, HALF, BLOCK_G, BLOCK_D
    )


def _config(H: int, G: int, D: int) -> dict:
    """Launch parameters: all heads of a token at a time if they fit a tile, and as many tokens as fit."""
    block_d = triton.next_power_of_2(D // 2)
    block_h, block_g = (max(1, min(triton.next_power_of_2(heads), TILE // block_d)) for heads in (H, G))
    block_t = max(1, TILE // (max(block_h, block_g) * block_d))
    blocks = {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_G": block_g, "BLOCK_D": block_d}
    return {"H": H, "G": G, "HALF": D // 2, "num_warps": 4} | blocks


def _rotate_outputs(q, k, cos, sin, inverse):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


@operator("rope", _rotate_outputs)
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated by the angles of cos and sin [T, D/2], or by their negatives."""
    q_out, k_out = _rotate_outputs(q, k, cos, sin, inverse)
    (T, H, D), G = q.shape, k.shape[1]
    if T and D:
        cos, sin, config = cos.contiguous(), sin.contiguous(), _config(H, G, D)
        _rope[(triton.cdiv(T, config["BLOCK_T"]),)](
            q, k, cos, sin, q_out, k_out, *q.stride(), *k.stride(), H * D, G * D, D // 2, T, INVERSE=inverse, **config
        )
    return q_out, k_out


# Torch ----------------------------------------------------------------------------------------------------------------
def _torch_rotate(q, k, cos, sin, inverse):
    """The same, computed in the dtype of cos and sin, rounded once."""
    cos, sin = cos[:, None], -sin[:, None] if inverse else sin[:, None]  # [T, 1, D/2]

    def rotated(x: Tensor) -> Tensor:
        a, b = x.to(cos.dtype).chunk(2, -1)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        first, second = y.chunk(2, -1)
        first.copy_((a * cos).addcmul_(b, sin, value=-1))
        second.copy_((b * cos).addcmul_(a, sin))
        return y

    return rotated(q), rotated(k)


# Autograd and the public function -------------------------------------------------------------------------------------
class _Rope(Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, kernels):
        ctx.save_for_backward(cos, sin)
        ctx.rotate = _rotate if kernels else _torch_rotate
        return ctx.rotate(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx, dq, dk):
        needs = ctx.needs_input_grad[:2]
        given = (d if need else d[:, :0] for d, need in zip((dq, dk), needs, strict=True))  # no heads: nothing to do
        gradients = ctx.rotate(*given, *ctx.saved_tensors, True)
        return *(d if need else None for d, need in zip(gradients, needs, strict=True)), None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q [T, H, D] and k [T, G, D] by the angles whose cos and sin [T, D/2] are given (fp32, not learned).

    Any strides: q and k may be slices of one projection, and nothing is copied. Raises ValueError on shapes that don't
    fit, on two dtypes, and on cos or sin that require a gradient.
    """
    require_float("rope", q=q, cos=cos, sin=sin)
    if q.dim() != 3 or k.dim() != 3 or q.shape[::2] != k.shape[::2] or q.shape[2] % 2 or q.dtype != k.dtype:
        seen = f"{tuple(q.shape)} {q.dtype}, {tuple(k.shape)} {k.dtype}"
        raise ValueError(f"q and k must be [T, H, D] and [T, G, D] of one dtype with D even, got {seen}")
    wanted = (q.shape[0], q.shape[2] // 2)
    if cos.shape != wanted or sin.shape != wanted:
        shapes = f"{tuple(cos.shape)}, {tuple(sin.shape)}"
        raise ValueError(f"cos and sin must be {wanted} for q {tuple(q.shape)}, got {shapes}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope: cos or sin requires a gradient, and gets none: detach them")
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    kernels = use_triton(q, k, cos, sin)
    if not kernels and not torch.is_grad_enabled():
        return _torch_rotate(q, k, cos, sin, False)
    return apply(_Rope, q, k, cos, sin, kernels)


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    T, H, G, D = (shape[x] for x in "THGD")
    q, k = (torch.randn(T, heads, D, dtype=dtype, device=device, requires_grad=True) for heads in (H, G))
    angle = torch.arange(T, device=device)[:, None] * 10_000.0 ** -(torch.arange(D // 2, device=device) / (D // 2))
    return (q, k, angle.cos(), angle.sin()), {}


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(H, G, D, inverse):
        config = _config(H, G, D) | {"INVERSE": inverse, "stride_qd": 1, "stride_kd": 1}
        name = f"{'backward' if inverse else 'forward'} H={H} G={G} D={D} bf16"
        return launch_of(_rope, name, config, {"p_cos": "*fp32", "p_sin": "*fp32"}, data="*bf16")

    shapes = ((32, 8, 128), (12, 12, 80), (4, 2, 64))
    return (*(launch(*shape, False) for shape in shapes), launch(32, 8, 128, True))


def _bytes(shape: Shape, itemsize: int) -> int:
    return shape["T"] * (2 * (shape["H"] + shape["G"]) * shape["D"] * itemsize + 4 * shape["D"])


def _flops(shape: Shape) -> int:
    return 3 * shape["T"] * (shape["H"] + shape["G"]) * shape["D"]


register(
    name="rope",
    function=rope,
    reference=rope_reference,
    example=_example,
    shape={"T": 8192, "H": 32, "G": 8, "D": 128},
    flops=_flops,
    bytes=_bytes,
    backward_flops=_flops,
    backward_bytes=_bytes,
    launches=_launches,
)
