"""What `swiglu` and `geglu` share: y = act(gate) · up, with gate and up apart or side by side in one tensor.

Both activations are x · σ(z(x)) with the logistic σ, so that neither needs a tanh:

    silu(x) = x · σ(x)          gelu(x) = x/2 · (1 + tanh u) = x · σ(2u),   u = √(2/π) (x + 0.044715 x³)
    dgate = dy · up · (σ + x · σ · (1 − σ) · z'(x))         dup = dy · x · σ        at x = gate

gate, up [..., F], or gate_up [..., 2F] and then one gradient [..., 2F]. Only the inputs are saved, the activation is
made again backward. Must move three elements forward (gate, up, y) and five backward (dy, gate, up, dgate, dup), in
one launch each. fp32 between a load and a store.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.backend import apply, operator, tl, triton, use_triton
from tritium.kernels.blocks import Function, as_rows, require_float
from tritium.kernels.registry import Launch, Shape, launch_of

# Triton ---------------------------------------------------------------------------------------------------------------
#
# gate, up and y are [M, F] with unit column stride; side by side, gate and up are two views of the same rows.

TILE = 2048  # elements of each tensor that a program takes: two 16-byte loads of bf16 a thread


@triton.jit
def _sigma(b_x, GELU: tl.constexpr):
    """σ(z(x)), 1 − σ(z(x)) and z'(x)."""
    if GELU:
        b_square = tl.minimum(b_x * b_x, 1024.0)  # σ is 0 or 1 long before: no x overflows
        b_z = b_x * (1.5957691216057308 + 0.07135481627159676 * b_square)  # 2√(2/π), and 0.044715 of it
        b_slope = 1.5957691216057308 + 0.21406444881479028 * b_square
    else:
        b_z, b_slope = b_x, 1.0
    b_t = tl.exp2(-1.4426950408889634 * tl.abs(b_z))
    b_near, b_far = 1.0 / (1.0 + b_t), b_t / (1.0 + b_t)  # a difference 1 - σ would keep no digits of a small one
    return tl.where(b_z > 0, b_near, b_far), tl.where(b_z > 0, b_far, b_near), b_slope


@triton.jit
def _tile(M, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program's tile: along the columns first, as the memory runs."""
    i_tile, columns = tl.program_id(0), tl.cdiv(F, BLOCK)
    i_row = (i_tile // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    i_col = i_tile % columns * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    return i_row, i_col, (i_row < M) & (i_col < F)


@triton.jit
def _gated_forward(
    p_gate, p_up, p_y, stride_gate, stride_up, stride_y, M, F,
    GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, F]. Grid: (cdiv(M, ROWS) · cdiv(F, BLOCK),)."""
    i_row, i_col, m = _tile(M, F, ROWS, BLOCK)
    b_gate = tl.load(p_gate + i_row * stride_gate + i_col, mask=m, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    b_up = tl.load(p_up + i_row * stride_up + i_col, mask=m, other=0.0).to(tl.float32)
    b_sigma, _, _ = _sigma(b_gate, GELU)
    tl.store(p_y + i_row * stride_y + i_col, (b_gate * b_sigma * b_up).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _gated_backward(
    p_dy, p_gate, p_up, p_dgate, p_dup, stride_dy, stride_gate, stride_up, stride_dgate, stride_dup, M, F,
    GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate and dup [M, F]. Grid: (cdiv(M, ROWS) · cdiv(F, BLOCK),)."""
    i_row, i_col, m = _tile(M, F, ROWS, BLOCK)
    b_dy = tl.load(p_dy + i_row * stride_dy + i_col, mask=m, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    b_gate = tl.load(p_gate + i_row * stride_gate + i_col, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * stride_up + i_col, mask=m, other=0.0).to(tl.float32)
    b_sigma, b_rest, b_slope = _sigma(b_gate, GELU)
    b_dup = b_dy * b_gate * b_sigma
    b_dgate = b_dy * b_up * (b_sigma + b_gate * (b_sigma * b_rest * b_slope))
    tl.store(p_dgate + i_row * stride_dgate + i_col, b_dgate.to(p_dgate.dtype.element_ty), mask=m)
    tl.store(p_dup + i_row * stride_dup + i_col, b_dup.to(p_dup.dtype.element_ty), mask=m)


def _config(width: int) -> dict:
    """Launch parameters for rows of `width` elements."""
    block = min(triton.next_power_of_2(width), 1024)
    return {"ROWS": TILE // block, "BLOCK": block, "num_warps": 4}


def _grid(M: int, width: int, config: dict) -> tuple[int]:
    return (triton.cdiv(M, config["ROWS"]) * triton.cdiv(width, config["BLOCK"]),)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up, or the halves of gate_up, as rows [M, F]."""
    return as_rows(gate).chunk(2, -1) if up is None else (as_rows(gate), as_rows(up))


def _forward_outputs(gate, up, gelu):
    width = gate.shape[-1] // (2 if up is None else 1)
    return torch.empty((*gate.shape[:-1], width), dtype=gate.dtype, device=gate.device)


@operator("gated", _forward_outputs)
def _forward(gate: Tensor, up: Tensor | None, gelu: bool) -> Tensor:
    """y [..., F]; without `up`, gate is gate_up [..., 2F]."""
    y = _forward_outputs(gate, up, gelu)
    gate, up = _halves(gate, up)
    if y.numel():
        (M, width), config = gate.shape, _config(y.shape[-1])
        _gated_forward[_grid(M, width, config)](
            gate, up, y, gate.stride(0), up.stride(0), width, M, width, GELU=gelu, **config
        )
    return y


def _backward_outputs(dy, gate, up, gelu):
    shapes = gate.shape, (0,) if up is None else up.shape
    return tuple(torch.empty(shape, dtype=gate.dtype, device=gate.device) for shape in shapes)


@operator("gated_backward", _backward_outputs)
def _backward(dy: Tensor, gate: Tensor, up: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    """dgate and dup [..., F]; without `up`, dgate_up [..., 2F] and an empty tensor."""
    gradients = _backward_outputs(dy, gate, up, gelu)
    dgate, dup = _halves(gradients[0], None if up is None else gradients[1])
    (gate, up), dy = _halves(gate, up), as_rows(dy)
    if dy.numel():
        (M, width), config = dy.shape, _config(dy.shape[-1])
        _gated_backward[_grid(M, width, config)](
            dy, gate, up, dgate, dup, *(x.stride(0) for x in (dy, gate, up, dgate, dup)), M, width, GELU=gelu, **config
        )
    return gradients


# Torch ----------------------------------------------------------------------------------------------------------------
def _activation(x: Tensor, gelu: bool) -> Tensor:
    return F.gelu(x, approximate="tanh") if gelu else F.silu(x)


def _torch_forward(gate, up, gelu):
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return _activation(gate, gelu).mul_(up)


def _torch_backward(dy, gate, up, gelu):
    fused, (gate, up) = up is None, gate.chunk(2, -1) if up is None else (gate, up)
    aten, options = torch.ops.aten, {"approximate": "tanh"} if gelu else {}
    dgate = (aten.gelu_backward if gelu else aten.silu_backward)(dy * up, gate, **options)
    dup = _activation(gate, gelu).mul_(dy)
    return (torch.cat([dgate, dup], -1), None) if fused else (dgate, dup)


# Autograd and what is public ------------------------------------------------------------------------------------------
class _Gated(Function):
    @staticmethod
    def forward(ctx, gate, up, gelu, kernels):
        ctx.save_for_backward(gate, up)
        ctx.gelu, ctx.kernels = gelu, kernels
        return (_forward if kernels else _torch_forward)(gate, up, gelu)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = (_backward if ctx.kernels else _torch_backward)(dy, gate, up, ctx.gelu)
        return dgate, None if up is None else dup, None, None


def gated(gate: Tensor, up: Tensor | None, gelu: bool) -> Tensor:
    """act(gate) · up [..., F]; without `up`, gate is [gate | up] of width 2F.

    Raises ValueError on shapes or dtypes that differ, and on an odd width of the fused form.
    """
    require_float("gated", gate=gate)
    if up is None and (gate.dim() == 0 or gate.shape[-1] % 2):
        raise ValueError(f"gate_up holds two halves of one width, got shape {tuple(gate.shape)}")
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() == 0):
        shapes = f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"gate and up must have one shape [..., F] and dtype, got {shapes}")
    kernels = use_triton(gate, up)
    if not kernels and not torch.is_grad_enabled():
        return _torch_forward(gate, up, gelu)
    return apply(_Gated, gate, up, gelu, kernels)


# The registry's entries -----------------------------------------------------------------------------------------------
def gated_example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    """Example inputs: gate and up, [T, F] each, or with "fused" one gate_up [T, 2F]."""
    widths = (2 * shape["F"],) if shape.get("fused") else (shape["F"],) * 2
    return tuple(torch.randn(shape["T"], F, dtype=dtype, device=device, requires_grad=True) for F in widths), {}


def gated_launches(gelu: bool) -> tuple[Launch, ...]:
    def launch(kernel, width):
        name = f"{kernel.__name__[7:]} F={width} bf16"
        return launch_of(kernel, name, _config(width) | {"GELU": gelu}, {}, data="*bf16")

    return tuple(launch(kernel, width) for kernel in (_gated_forward, _gated_backward) for width in (128, 14336))


def gated_costs(flops: int) -> dict:
    """What the entries of `swiglu` and `geglu` say alike; about `flops` an element forward, twice that backward."""
    return {
        "shape": {"T": 8192, "F": 14336},
        "flops": lambda shape: flops * shape["T"] * shape["F"],
        "bytes": lambda shape, itemsize: 3 * shape["T"] * shape["F"] * itemsize,
        "backward_flops": lambda shape: 2 * flops * shape["T"] * shape["F"],
        "backward_bytes": lambda shape, itemsize: 5 * shape["T"] * shape["F"] * itemsize,
    }
