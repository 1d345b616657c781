"""Generalised advantage estimation over a packed stream (Schulman et al. 2015, arXiv 1506.02438).

    δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1},   returns = A + V;   V and A are 0 after a segment's end

A linear recurrence, hence a scan, without looking at lengths on the host: a Triton program walks a segment from its
end, a block at a time; in torch, after step d = 1, 2, 4, … each A_t holds the sum over the next 2d tokens of its
segment, in log₂ T steps over the whole stream (so that torch.compile makes a graph for each power of two).

Must move rewards and values in and two fp32 results out. The kernel reads V_t and V_{t+1}: of 5 loads and stores the
fifth is in the cache. About 8 FLOPs a token.
"""

import torch
from torch import Tensor

from tritium.kernels.backend import Target, operator, tl, triton, use_triton
from tritium.kernels.blocks import require_float
from tritium.kernels.registry import Launch, Shape, launch_of, register
from tritium.kernels.segment_sum import check_segments, example_segments, load_span, segment_of


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


# Triton ---------------------------------------------------------------------------------------------------------------

CONFIG = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _then(decay_a, sum_a, decay_b, sum_b):
    """x → sum + decay · x of a, then that of b."""
    return decay_a * decay_b, sum_a * decay_b + sum_b


@triton.jit
def _gae(
    p_rewards, p_values, p_cu, p_advantages, p_returns, stride_rewards, stride_values, S, T, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """advantages, returns [T]. Grid: (S + 2,): the segments, and what lies before and after them, which is zeros."""
    i_span = tl.program_id(0)
    start, end = load_span(p_cu, i_span, S, T)
    is_segment = (i_span > 0) & (i_span <= S)
    i_block = tl.arange(0, BLOCK)  # [BLOCK]
    b_decay = tl.zeros([BLOCK], tl.float32) + gamma * lam
    following = tl.sum(tl.zeros([BLOCK], tl.float32), 0)  # A of the token after this block
    for i_back in range(0, end - start, BLOCK):
        i = end - 1 - i_back - i_block  # [BLOCK] int64, from the last token of the block to its first
        m = (i >= start) & is_segment
        b_v = tl.load(p_values + i * stride_values, mask=m, other=0.0).to(tl.float32)
        b_next = tl.load(p_values + (i + 1) * stride_values, mask=m & (i + 1 < end), other=0.0).to(tl.float32)
        b_delta = tl.load(p_rewards + i * stride_rewards, mask=m, other=0.0).to(tl.float32) + gamma * b_next - b_v
        b_power, b_sum = tl.associative_scan((b_decay, b_delta), 0, _then)  # (γλ)^(j+1); A as if 0 followed
        b_a = b_sum + b_power * following
        following = tl.sum(tl.where(i_block == BLOCK - 1, b_a, 0.0), 0)
        tl.store(p_advantages + i, b_a, mask=i >= start)
        tl.store(p_returns + i, b_a + b_v, mask=i >= start)


def _outputs(rewards, values, cu_seqlens, gamma, lam):
    return tuple(torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2))


@operator("gae", _outputs)
def _launch(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages, returns = _outputs(rewards, values, cu_seqlens, gamma, lam)
    S, strides = len(cu_seqlens) - 1, (rewards.stride(0), values.stride(0))
    _gae[(S + 2,)](
        rewards, values, cu_seqlens.contiguous(), advantages, returns, *strides, S, len(rewards), gamma, lam, **CONFIG
    )
    return advantages, returns


# Torch ----------------------------------------------------------------------------------------------------------------
def _torch_gae(rewards, values, cu_seqlens, gamma, lam):
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


# Public ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [T], fp32 (fp64 for fp64), of rewards and values [T] in segments cu_seqlens [S+1].

    Nothing crosses a segment's end; tokens outside the segments give 0 whatever they hold. Any strides. Not
    differentiable. Raises ValueError on shapes that don't fit and (on a CPU) segments outside the stream.
    """
    check_segments(rewards, cu_seqlens)
    require_float("gae", values=values)
    if values.shape != rewards.shape:
        raise ValueError(f"rewards and values must have one shape, got {tuple(rewards.shape)}, {tuple(values.shape)}")
    run = _launch if use_triton(rewards, values, cu_seqlens) else _torch_gae
    return run(rewards, values, cu_seqlens, gamma, lam)


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    cu_seqlens = example_segments(shape, device)
    rewards, values = (torch.randn(shape["T"], dtype=dtype, device=device) for _ in range(2))
    return (rewards, values, cu_seqlens, 0.99, 0.95), {}


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(dtype):
        types = dict.fromkeys(("p_rewards", "p_values"), f"*{dtype}") | {"p_cu": "*i32"}
        return launch_of(_gae, dtype, CONFIG | {"stride_rewards": 1, "stride_values": 1}, types, ("S",))

    return launch("bf16"), launch("fp32")


register(
    name="gae",
    function=gae,
    reference=gae_reference,
    example=_example,
    shape={"T": 1 << 16, "S": 64},
    flops=lambda s: 8 * s["T"],
    bytes=lambda s, size: s["T"] * (2 * size + 8),
    launches=_launches,
    differentiable=False,
)
