"""Cross-entropy of given logits, with label smoothing and z-loss; its formula also serves the linear one.

    loss_t = w_t [(1-ε)(lse - z_y) + ε (lse - mean_v z) + ζ lse²],   z = softcap(logits)
    dz_v   = w_t [p_v (1 + 2 ζ lse) - (1-ε) δ_vy - ε / V]

Must move the logits once forward, and once in and once out backward; about 5·T·V FLOPs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritium.kernels.head import TILE_BYTES, check_targets
from tritium.kernels.registry import OpSpec, register


def check_loss_options(
    tokens: int, weights: Tensor | None, label_smoothing: float, softcap: float | None, reduction: str
) -> None:
    """Raise ValueError for options that the two cross-entropies refuse."""
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none', got {reduction!r}: divide by a known count instead")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if weights is not None and weights.shape != (tokens,):
        raise ValueError(f"weights must be [{tokens}], one per token, got {tuple(weights.shape)}")


def token_loss(
    lse: Tensor,
    z_target: Tensor,
    z_total: Tensor | None,
    kept: Tensor,
    *,
    vocab: int,
    weights: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """The loss from a token's statistics (all [T]; z_total = Σ_v z, needed with label smoothing only)."""
    loss = lse - z_target
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - z_total / vocab)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if weights is not None:
        loss = loss * weights.to(loss.dtype)
    loss = torch.where(kept, loss, 0.0)  # not a product: what is ignored may hold anything
    return loss.sum() if reduction == "sum" else loss


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    kept = targets != ignore_index
    lse = z.logsumexp(-1)
    z_target = z.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * (lse - z_target) + label_smoothing * (lse - z.mean(-1)) + z_loss * lse.square()
    loss = torch.where(kept, loss if weights is None else loss * weights.to(loss.dtype), 0.0)
    return loss.sum() if reduction == "sum" else loss


def _row_blocks(logits: Tensor) -> list[slice]:
    """Blocks of rows whose fp32 copy stays in the cache."""
    rows = max(1, TILE_BYTES.get(logits.device.type, TILE_BYTES["cuda"]) // (4 * max(1, logits.shape[1])))
    return [slice(row, row + rows) for row in range(0, logits.shape[0], rows)]


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if softcap is None else torch.tanh(z / softcap) * softcap


class _LogitStatistics(torch.autograd.Function):
    """lse, the target's logit and the sum of the logits, [T] in fp32 at least; the softmax is made again backward."""

    @staticmethod
    def forward(ctx, logits, targets, softcap):
        T = logits.shape[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse, z_target, total = (logits.new_empty(T, dtype=dtype) for _ in range(3))
        for rows in _row_blocks(logits):
            z = _capped(logits[rows], softcap)  # [rows, V]
            lse[rows] = z.amax(-1) - z.softmax(-1).amax(-1).log()  # 3 × faster than torch.logsumexp
            z_target[rows] = z.gather(1, targets[rows, None])[:, 0]
            total[rows] = z.sum(-1)
        ctx.save_for_backward(logits, targets)
        ctx.softcap = softcap
        return lse, z_target, total

    @staticmethod
    @once_differentiable
    def backward(ctx, g_lse, g_target, g_total):
        logits, targets = ctx.saved_tensors
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in _row_blocks(logits):
            z = _capped(logits[rows], ctx.softcap)
            dz = z.softmax(-1).mul_(g_lse[rows, None]).add_(g_total[rows, None])
            dz.scatter_add_(1, targets[rows, None], g_target[rows, None])  # p - 1, in fp32
            if ctx.softcap is not None:
                dz *= 1 - (z / ctx.softcap).square_()
            dlogits[rows] = dz
        return dlogits, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
) -> Tensor:
    """Weighted cross-entropy of logits [T, V] and targets [T]; a scalar ("sum") or [T] ("none"), fp32 (fp64 for fp64).

    weights [T] multiply each token's loss; ignored targets give 0, loss and gradient.
    Raises ValueError on shapes that don't fit, unknown reductions and (on a CPU) targets outside the vocabulary.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be [T, V], got {tuple(logits.shape)}")
    check_targets(targets, logits.shape[0], logits.shape[1], ignore_index)
    check_loss_options(logits.shape[0], weights, label_smoothing, softcap, reduction)
    kept = targets != ignore_index
    lse, z_target, total = _LogitStatistics.apply(logits, torch.where(kept, targets, 0).long(), softcap)
    return token_loss(
        lse,
        z_target,
        total,
        kept,
        vocab=logits.shape[1],
        weights=weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
    )


def _example(shape, dtype, device):
    logits = (3 * torch.randn(shape["T"], shape["V"], device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, shape["V"], (shape["T"],), device=device)
    targets[::5] = -100
    options = dict(weights=torch.rand(shape["T"], device=device), label_smoothing=0.1, z_loss=1e-3)
    return (logits, targets), options


register(
    OpSpec(
        name="cross_entropy",
        function=cross_entropy,
        reference=cross_entropy_reference,
        example=_example,
        shapes=({"T": 1, "V": 2}, {"T": 13, "V": 101}, {"T": 0, "V": 5}, {"T": 4096, "V": 8192}),
        flops=lambda s: 5 * s["T"] * s["V"],
        bytes=lambda s, size: s["T"] * (size * s["V"] + 8 + 4),
    )
)
