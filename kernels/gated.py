"""What `swiglu` and `geglu` share: y = act(gate) · up, with gate and up apart or side by side in one tensor.

Saves the inputs only; the activation is made again backward. In bf16 each of the elementwise torch kernels computes in
fp32 and rounds once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Activation:
    name: str

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.name == "silu" else F.gelu(x, approximate="tanh")

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        if self.name == "silu":
            return torch.ops.aten.silu_backward(dy, x)
        return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return ctx.activation.backward(dy * up, gate), ctx.activation(gate).mul_(dy), None


class _GatedFused(torch.autograd.Function):
    """The same for gate_up [..., 2F]: its gradient is written in place, half by half."""

    @staticmethod
    def forward(ctx, gate_up, activation):
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, -1)
        return activation(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        dgate, dup = dgate_up.chunk(2, -1)
        dgate.copy_(ctx.activation.backward(dy * up, gate))
        dup.copy_(ctx.activation(gate).mul_(dy))
        return dgate_up, None


def gated(gate: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
    """act(gate) · up [..., F]; without `up`, gate is [gate | up] of width 2F.

    Raises ValueError on shapes or dtypes that differ, and on an odd width of the fused form.
    """
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"gate_up holds two halves of one width, got shape {tuple(gate.shape)}")
        return _GatedFused.apply(gate, activation)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        shapes = f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"gate and up must have one shape and dtype, got {shapes}")
    return _Gated.apply(gate, up, activation)


def gated_example(shape, dtype, device):
    """Example inputs for the registry: gate and up, [T, F] each."""
    return tuple(
        torch.randn(shape["T"], shape["F"], dtype=dtype, device=device, requires_grad=True) for _ in range(2)
    ), {}


GATED_SHAPES = ({"T": 1, "F": 1}, {"T": 7, "F": 33}, {"T": 0, "F": 8}, {"T": 4096, "F": 704})
