"""Cross-entropy of a linear head without its logits.

    loss = Σ_t w_t [(1-ε)(lse - z_y) + ε (lse - mean_v z) + ζ lse²],   z = softcap(hidden @ weight.T)

Must spend 2·T·V·E FLOPs forward and 4·T·V·E backward (2 more to make the logits again), and move hidden, weight and
a few vectors of T; what the kernels read is derived in head_triton.py. The statistics come from head.py, the formula
from cross_entropy.py.

The gradient of a sum is known before its backward, but for one factor. So the torch path, for reduction="sum", makes
it in the forward, from the logits that are there: 6·T·V·E FLOPs for both. It walks blocks of E tokens × V: their logits
are as large as dweight, and lie in its memory until it is needed. What it costs is dweight in fp32, summed over blocks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.kernels.backend import Target, apply, require_one_device, use_triton, without_autocast
from tritium.kernels.blocks import Function
from tritium.kernels.cross_entropy import check_loss_options, cross_entropy_reference, token_loss
from tritium.kernels.head import (
    HeadOptions,
    Workspace,
    check_head,
    check_targets,
    head_statistics,
    pick,
    raw_gradient,
    vocab_size,
)
from tritium.kernels.head_triton import head_launches, matmul_fp32, tile_bytes
from tritium.kernels.linear_logprob import example
from tritium.kernels.registry import Launch, Shape, register
from tritium.kernels.wide import is_wide


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> Tensor:
    return cross_entropy_reference(hidden @ weight.t(), targets, **options)


WORDS = 2048  # of dweight at a time: the product stays in the cache
TOKENS = 256  # of a block, where no dweight gives its size


class _SummedLoss(Function):
    """The sum of the losses, with its gradients made in the forward. targets [T] are -1 where they are ignored."""

    @staticmethod
    @without_autocast
    def forward(ctx, hidden, weight, targets, weights, options, label_smoothing, z_loss):
        (T, E), V = hidden.shape, weight.shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype, kept = torch.promote_types(hidden.dtype, torch.float32), targets >= 0
        g = kept.to(dtype) if weights is None else torch.where(kept, weights.to(dtype), 0.0)
        g_picked = g[:, None] * (label_smoothing - 1)
        g_total = g * (-label_smoothing / V) if options.total else None
        lse, picked, total = (hidden.new_zeros(T, dtype=dtype) for _ in range(3))
        dhidden = hidden.new_empty(T, E) if needs_hidden else None
        length = E if needs_weight else TOKENS
        memory = weight.new_empty(length, V)
        summed = weight.new_zeros(V, E, dtype=dtype) if needs_weight else None
        height = max(1, tile_bytes(hidden.device) // (8 * V))
        work = Workspace(hidden, height * V)
        for start in range(0, T, length):
            block = slice(start, min(T, start + length))
            logits = torch.mm(hidden[block], weight.t(), out=memory[: block.stop - start])
            for row in range(start, block.stop, height):
                rows = slice(row, min(block.stop, row + height))
                raw = logits[rows.start - start : rows.stop - start]  # [≤ height, V]
                z = work.widen(raw, options)
                z_target, here, column = pick(z, targets[rows, None], options)
                p, top, total_sum = work.softmax(z)
                lse[rows] = top + total_sum.log()
                picked[rows] = z_target[:, 0]
                if options.total:
                    total[rows] = z.sum(-1)
                g_lse = g[rows] * (1 + 2 * z_loss * lse[rows])
                others = g_picked[rows], None if g_total is None else g_total[rows]
                raw.copy_(raw_gradient(z, p, here, column, g_lse, None, *others, options))  # dz in the place of z
            if needs_hidden:
                torch.mm(logits, weight, out=dhidden[block])
            for v in range(0, V if needs_weight else 0, WORDS):
                summed[v : v + WORDS] += matmul_fp32(logits[:, v : v + WORDS].t(), hidden[block])
        ctx.save_for_backward(dhidden, memory.view(V, E).copy_(summed) if needs_weight else None)
        formula = dict(vocab=V, weights=weights, label_smoothing=label_smoothing, z_loss=z_loss, reduction="sum")
        return token_loss(lse, picked, total, kept, **formula)

    @staticmethod
    def backward(ctx, grad):
        return *(None if g is None else g * grad for g in ctx.saved_tensors), *[None] * 5


def _in_forward(hidden: Tensor, weight: Tensor, weights: Tensor | None) -> bool:
    """Whether to make the gradients in the forward: on a CPU, where some are wanted, and those of the weights are not.

    Not in fp16, where the factor that only the backward knows is a loss scale that keeps dz from vanishing; nor where
    head.py multiplies bf16 in fp32: its four passes then take less time than three in bf16 (2.5 s against 3.4).
    """
    dear = hidden.dtype == torch.float16 or is_wide(hidden)
    if hidden.device.type != "cpu" or dear or use_triton(hidden, weight, weights):
        return False
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return wanted and not (weights is not None and weights.requires_grad)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, weights: Tensor | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, ignore_index: int = -100, reduction: str = "sum",
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Weighted cross-entropy of hidden [T, E] @ weight [V, E].T and targets [T]; fp32 (fp64 for fp64 inputs).

    A scalar with reduction="sum", [T] with "none"; weights [T], of any dtype, multiply each token's loss.
    Differentiable in hidden, weight and weights; ignored targets give 0, loss and gradient, whatever their weights
    hold. Dtypes, devices, `group` and what happens to targets outside the vocabulary: as in `linear_logprob`; there
    too ignored tokens' hidden states must be finite.
    Raises: ValueError for shapes, dtypes or devices that don't fit, an unknown reduction, label_smoothing outside
    [0, 1], a softcap ≤ 0. Source: arXiv 2411.09009; z-loss: arXiv 2204.02311, 5.
    """
    options = HeadOptions(softcap=softcap, total=label_smoothing > 0)
    check_head("linear_cross_entropy", hidden=hidden, weight=weight)
    require_one_device(hidden, weight, targets, weights)
    vocab, shape = vocab_size(weight, group), hidden.shape[:1]
    check_loss_options("linear_cross_entropy", shape, weights, label_smoothing, reduction)
    ids = check_targets("linear_cross_entropy", targets, shape, vocab, ignore_index)
    if reduction == "sum" and group is None and _in_forward(hidden, weight, weights):
        return apply(_SummedLoss, hidden, weight, ids, weights, options, label_smoothing, z_loss)
    lse, picked, _, total, *_ = head_statistics(hidden, weight, ids[:, None], options, group)  # -1 is on no shard
    return token_loss(
        lse, picked[:, 0], total, ids >= 0, vocab=vocab, weights=weights,
        label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction,
    )  # fmt: skip


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    inputs, options = example(shape, dtype, device)
    options |= dict(weights=torch.rand(shape["T"], device=device), label_smoothing=0.1, z_loss=1e-3)
    return inputs, options


def _launches(target: Target) -> tuple[Launch, ...]:
    return (
        *head_launches(target, "bf16"),
        *head_launches(target, "bf16", "TOTAL"),
        *head_launches(target, "bf16", "TOTAL", "HAS_CAP"),
        *head_launches(target, "fp32", "TOTAL", "HAS_CAP"),
    )


register(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    reference=linear_cross_entropy_reference,
    example=_example,
    shape={"T": 8192, "E": 4096, "V": 128256},
    flops=lambda s: 2 * s["T"] * s["V"] * s["E"],
    bytes=lambda s, size: size * s["E"] * (s["T"] + s["V"]) + s["T"] * (8 + 4),
    backward_flops=lambda s: 6 * s["T"] * s["V"] * s["E"],
    backward_bytes=lambda s, size: 2 * size * s["E"] * (s["T"] + s["V"]) + s["T"] * (8 + 4),
    launches=_launches,
)
