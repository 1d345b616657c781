"""A linear layer with a low-rank adapter (LoRA, Hu et al. 2021, arXiv 2106.09685), on a dense or an NF4 base.

y = x Wᵀ + bias + scale · (dropout(x) aᵀ) bᵀ

x [T, in], W [out, in], a [r, in], b [out, r]; 2·T·(in·out + r·(in + out)) FLOPs forward; all of them moved once.
The adapter's products are accumulated into the base's by the matmul itself (addmm), so nothing of size [T, out] or
[T, in] is made twice. An NF4 base is dequantised for each use and never kept; it gets no gradient.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritium.kernels.nf4 import NF4Tensor, dequantize_nf4
from tritium.kernels.registry import OpSpec, register


def lora_linear_reference(
    x: Tensor,
    weight: Tensor | NF4Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    dense = dequantize_nf4(weight).to(x.dtype) if isinstance(weight, NF4Tensor) else weight
    adapted = torch.nn.functional.dropout(x, dropout) @ a.t() @ b.t()
    y = x @ dense.t() + scale * adapted
    return y if bias is None else y + bias


def _dense(weight: Tensor | NF4Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_nf4(weight).to(dtype) if isinstance(weight, NF4Tensor) else weight


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, bias, scale, dropout):
        # keep [T, in] bool: the mask is saved rather than the dropped input
        dropped, keep = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        y = torch.nn.functional.linear(x, _dense(weight, x.dtype), bias)
        inner = dropped @ a.t()  # [T, r]
        y.addmm_(inner, b.t(), alpha=scale)
        base = None if isinstance(weight, NF4Tensor) else weight
        ctx.save_for_backward(x, base, a, b, inner, keep)
        ctx.packed = weight if base is None else None
        ctx.scale, ctx.dropout = scale, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, base, a, b, inner, keep = ctx.saved_tensors
        needs_x, needs_weight, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:5]
        dinner = torch.mm(dy, b).mul_(ctx.scale)  # [T, r]
        dx = None
        if needs_x:
            dx = dy @ _dense(ctx.packed if base is None else base, dy.dtype)
            if keep is None:
                dx.addmm_(dinner, a)
            else:
                dx.addcmul_(dinner @ a, keep, value=1 / (1 - ctx.dropout))
        da = None
        if needs_a:
            dropped = x if keep is None else x * keep / (1 - ctx.dropout)
            da = dinner.t() @ dropped
        dweight = dy.t() @ x if needs_weight else None
        db = (dy.t() @ inner).mul_(ctx.scale) if needs_b else None
        return dx, dweight, da, db, dy.sum(0) if needs_bias else None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """x [..., in] through weight [out, in] (dense or NF4) plus scale · b a, a [r, in], b [out, r]; y [..., out].

    dropout: on the adapter's input, always active when > 0 (pass 0 in evaluation). A dense weight gets a gradient if
    it requires one. Raises ValueError on shapes that don't fit and a dropout outside [0, 1).
    """
    out_features, in_features = weight.shape
    shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}"
    if x.shape[-1] != in_features or a.shape[1:] != (in_features,) or b.shape != (out_features, a.shape[0]):
        raise ValueError(f"lora_linear needs x [..., in], weight [out, in], a [r, in], b [out, r], got {shapes}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {tuple(bias.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    y = _LoraLinear.apply(x.reshape(-1, in_features), weight, a, b, bias, scale, dropout)
    return y.view(*x.shape[:-1], out_features)


def _example(shape, dtype, device):
    T, E, F, R = (shape[x] for x in "TEFR")
    matrices = [torch.randn(m, n, device=device) / n**0.5 for m, n in ((T, E), (F, E), (R, E), (F, R))]
    return (*(x.to(dtype).requires_grad_() for x in matrices), 0.5), {}


register(
    OpSpec(
        name="lora_linear",
        function=lora_linear,
        reference=lora_linear_reference,
        example=_example,
        shapes=(
            {"T": 1, "E": 1, "F": 1, "R": 1},
            {"T": 5, "E": 48, "F": 31, "R": 4},
            {"T": 0, "E": 8, "F": 8, "R": 2},
            {"T": 4096, "E": 1024, "F": 1024, "R": 16},
        ),
        flops=lambda s: 2 * s["T"] * (s["E"] * s["F"] + s["R"] * (s["E"] + s["F"])),
        bytes=lambda s, size: size * (s["T"] * (s["E"] + s["F"]) + s["E"] * s["F"] + s["R"] * (s["E"] + s["F"])),
    )
)
