"""Small parts that several ops share: checks and layouts of a launcher's tensors, and what Triton lacks."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tritium.kernels.backend import tl, triton


def require_float(op: str, **tensors: Tensor) -> None:
    """Raise ValueError, with the name, for what is no tensor of a floating-point dtype."""
    for name, x in tensors.items():
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            raise ValueError(f"{op}: {name} is {_kind(x)}, wanted a floating-point dtype")


def require_integer(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError, with the name, for what is neither an int32 nor an int64 tensor."""
    for name, x in tensors.items():
        if x is not None and not (isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)):
            raise ValueError(f"{op}: {name} is {_kind(x)}, wanted torch.int32 or torch.int64")


def require_heads(
    op: str, keys: str, q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None,
    scale: float | None = None,
) -> None:  # fmt: skip
    """Raise ValueError for what `attention` and `decode_attention` can't take; `keys`: the first dims of k and v."""
    require_float(op, q=q, k=k, v=v)
    if q.dim() != 3 or k.dim() != 3 + keys.count(",") or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"{op}: q, k, v must be [T, H, D], [{keys}, G, D], [{keys}, G, D], got {shapes}")
    (_, H, D), G = q.shape, k.shape[-2]
    if not H or not G or H % G:
        raise ValueError(f"{op}: {H} query heads do not divide into {G} key heads: q {tuple(q.shape)}")
    if D % 8 or not 8 <= D <= 256:
        raise ValueError(f"{op}: the head dim must be a multiple of 8 from 8 to 256, got {D}: q {tuple(q.shape)}")
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise ValueError(f"{op}: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"{op}: window must be an integer of at least 1 (the query's own key) or None, got {window}")
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{op}: {name} must be positive and finite or None, got {value}")


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else f"a {type(x).__name__} and no tensor"


class Function(torch.autograd.Function):
    """torch's, with what all ops need of it, in `forward` and in `backward`."""

    def __init_subclass__(cls):
        cls.forward, cls.backward = staticmethod(_fresh(cls.forward)), staticmethod(_once(cls.backward))


def _fresh(forward: Callable) -> Callable:
    """Traced by torch 2.11, an output that was last written in place has no gradient, in silence: it goes as a view."""

    def run(ctx, *arguments):
        outputs = forward(ctx, *arguments)
        return tree_map_only(Tensor, Tensor.detach, outputs) if torch.compiler.is_compiling() else outputs

    return run


def _once(backward: Callable) -> Callable:
    """Differentiable once. torch's is silent where the incoming gradient is a constant: a gradient penalty would not be
    trained."""
    once = torch.autograd.function.once_differentiable(backward)

    def run(ctx, *gradients):
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return once(ctx, *(g.detach().requires_grad_() if again and g is not None else g for g in gradients))

    return run


def unit_stride(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """x [..., E] as [M, E] with unit column stride: a view where the strides allow it."""
    return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))  # numel() would fix a dynamic M


@triton.jit
def tanh(b_x):
    """To fp32's precision: (1 - e) / (1 + e) cancels near 0, where the odd series (to x⁹) is exact."""
    b_e = tl.exp2(-2.8853900817779268 * tl.abs(b_x))  # at most 1: nothing overflows
    b_far = (1.0 - b_e) / (1.0 + b_e)
    b_s = b_x * b_x
    b_near = b_x + b_x * b_s * (-1 / 3 + b_s * (2 / 15 + b_s * (-17 / 315 + b_s * (62 / 2835))))
    return tl.where(b_s < 0.0625, b_near, tl.where(b_x < 0, -b_far, b_far))
