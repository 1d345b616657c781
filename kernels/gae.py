"""Generalised advantage estimation over a packed stream (Schulman et al. 2015, arXiv 1506.02438).

    δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1},   returns = A + V;   V and A are 0 after a segment's end

A linear recurrence, hence a scan: after step d = 1, 2, 4, … each A_t holds the sum over the next 2d tokens of its
segment, in log₂ T steps over the whole stream, on any device, without looking at lengths on the host.
"""

import torch
from torch import Tensor

from tritium.kernels.registry import OpSpec, register
from tritium.kernels.segment_sum import check_segments, segment_of


def gae_reference(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    r, v = rewards.to(dtype), values.to(dtype)
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    ends = cu_seqlens.tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        running, following = 0.0, 0.0
        for t in reversed(range(start, end)):
            running = r[t] + gamma * following - v[t] + gamma * lam * running
            advantages[t], returns[t], following = running, running + v[t], v[t]
    return advantages, returns


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [T], fp32 (fp64 for fp64), of rewards and values [T] in segments cu_seqlens [S+1].

    Nothing crosses a segment's end; tokens outside the segments give 0 whatever they hold. Not differentiable.
    Raises ValueError on shapes that don't fit and (on a CPU) segments outside the stream.
    """
    check_segments(rewards, cu_seqlens)
    if values.shape != rewards.shape:
        raise ValueError(f"rewards and values must have one shape, got {tuple(rewards.shape)}, {tuple(values.shape)}")
    T = len(rewards)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if T == 0 or len(cu_seqlens) == 1:
        return torch.zeros_like(rewards, dtype=dtype), torch.zeros_like(rewards, dtype=dtype)
    segment, inside = segment_of(cu_seqlens, T)
    remaining = torch.where(inside, cu_seqlens[1:][segment] - torch.arange(T, device=rewards.device), 0)  # [T] with t
    rewards, values = (torch.where(inside, x, 0.0).to(dtype) for x in (rewards, values))
    following = torch.where(remaining[:-1] > 1, values[1:], 0.0)
    advantages = rewards - values
    advantages[:-1] += gamma * following
    distance, decay = 1, gamma * lam
    while distance < T:
        later = torch.where(remaining[:-distance] > distance, advantages[distance:], 0.0)
        advantages = torch.cat([advantages[:-distance] + decay**distance * later, advantages[-distance:]])
        distance *= 2
    return advantages, advantages + values


def _example(shape, dtype, device):
    T, S = shape["T"], shape["S"]
    inner = torch.randint(0, T + 1, (S - 1,), device=device).sort().values
    cu_seqlens = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), T)]).int()
    rewards, values = (torch.randn(T, dtype=dtype, device=device) for _ in range(2))
    return (rewards, values, cu_seqlens, 0.99, 0.95), {}


register(
    OpSpec(
        name="gae",
        function=gae,
        reference=gae_reference,
        example=_example,
        shapes=({"T": 1, "S": 1}, {"T": 50, "S": 60}, {"T": 0, "S": 2}, {"T": 200, "S": 3}, {"T": 1 << 15, "S": 100}),
        flops=lambda s: 8 * s["T"],
        bytes=lambda s, size: s["T"] * (2 * size + 8),
        differentiable=False,
    )
)
