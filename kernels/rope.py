"""Rotary position embedding, half-split (Hugging Face) layout, on queries and keys together.

[a | b] → [a cos - b sin | b cos + a sin],   a, b: the halves of a head

q [T, H, D], k [T, G, D], cos and sin [T, D/2] fp32; 3·T·(H + G)·D FLOPs, q and k moved in and out once.
The backward is the rotation by the negative angle: it needs cos and sin only. (Su et al. 2021, arXiv 2104.09864)
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritium.kernels.registry import OpSpec, register


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        a, b = x.to(dtype).chunk(2, -1)
        c, s = cos[:, None].to(dtype), sin[:, None].to(dtype)
        return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)

    return rotated(q), rotated(k)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] rotated; computed in the dtype of cos and sin [T, 1, D/2], rounded once."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = y.chunk(2, -1)
    first.copy_((a * cos).addcmul_(b, sin, value=-1))
    second.copy_((b * cos).addcmul_(a, sin))
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return _rotate(dq, cos, -sin), _rotate(dk, cos, -sin), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q [T, H, D] and k [T, G, D] by the angles whose cos and sin [T, D/2] are given (fp32, not learned).

    Raises ValueError on shapes that don't fit.
    """
    if q.dim() != 3 or k.dim() != 3 or q.shape[::2] != k.shape[::2] or q.shape[2] % 2:
        raise ValueError(f"q and k must be [T, H, D] and [T, G, D] with D even, got {tuple(q.shape)}, {tuple(k.shape)}")
    wanted = (q.shape[0], q.shape[2] // 2)
    if cos.shape != wanted or sin.shape != wanted:
        shapes = f"{tuple(cos.shape)}, {tuple(sin.shape)}"
        raise ValueError(f"cos and sin must be {wanted} for q {tuple(q.shape)}, got {shapes}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _Rope.apply(q, k, cos[:, None].to(dtype), sin[:, None].to(dtype))


def _example(shape, dtype, device):
    T, H, G, D = (shape[x] for x in "THGD")
    q, k = (torch.randn(T, heads, D, dtype=dtype, device=device, requires_grad=True) for heads in (H, G))
    angle = torch.arange(T, device=device)[:, None] * 10_000.0 ** -(torch.arange(D // 2, device=device) / (D // 2))
    return (q, k, angle.cos(), angle.sin()), {}


register(
    OpSpec(
        name="rope",
        function=rope,
        reference=rope_reference,
        example=_example,
        shapes=(
            {"T": 1, "H": 1, "G": 1, "D": 2},
            {"T": 9, "H": 6, "G": 2, "D": 40},
            {"T": 0, "H": 2, "G": 1, "D": 8},
            {"T": 4096, "H": 4, "G": 2, "D": 64},
        ),
        flops=lambda s: 3 * s["T"] * (s["H"] + s["G"]) * s["D"],
        bytes=lambda s, size: s["T"] * (2 * (s["H"] + s["G"]) * s["D"] * size + 4 * s["D"]),
    )
)
