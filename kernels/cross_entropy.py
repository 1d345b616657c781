"""Cross-entropy of given logits, with label smoothing and z-loss; its formula also serves the linear one.

    loss_t = w_t [(1-ε)(lse - z_y) + ε (lse - mean_v z) + ζ lse²],   z = softcap(logits)
    dz_v   = w_t [p_v (1 + 2 ζ lse) - (1-ε) δ_vy - ε / V]

The op is what has to walk the logits: (lse, z_y, Σ_v z) of each token. The loss is torch's, on [T], and so are the
gradients that come back for the three, whatever is behind them; dz = g_lse p + g_target δ_y + g_total.

What it must move: forward reads the logits of the tokens that count once; backward reads them once and writes dlogits
once (zeros for ignored tokens, whose logits nobody reads). About 5 FLOPs an element, forward and backward.
"""

import torch
from torch import Tensor

from tritium.kernels.backend import Target, operator, require_one_device, tl, triton, use_triton, without_autocast
from tritium.kernels.blocks import Function, require_float, tanh, unit_stride
from tritium.kernels.head import HeadOptions, check_targets
from tritium.kernels.head_triton import LOG2_E, PROGRAMS, tile_bytes
from tritium.kernels.registry import Launch, Shape, launch_of, register


def check_loss_options(
    op: str, shape: tuple[int, ...], weights: Tensor | None, label_smoothing: float, reduction: str
) -> None:
    """Raise ValueError for options that the two cross-entropies refuse; weights must be of that shape."""
    if reduction not in ("sum", "none"):
        raise ValueError(f"{op}: reduction must be 'sum' or 'none', got {reduction!r}: divide by a known count instead")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if weights is not None and tuple(weights.shape) != tuple(shape):
        raise ValueError(f"{op}: weights must be {list(shape)}, one per token, got {list(weights.shape)}")


def token_loss(
    lse: Tensor, z_target: Tensor, z_total: Tensor | None, kept: Tensor, *, vocab: int, weights: Tensor | None,
    label_smoothing: float, z_loss: float, reduction: str,
) -> Tensor:  # fmt: skip
    """The loss from a token's statistics (all [T]; z_total = Σ_v z, needed with label smoothing only)."""
    loss = lse - z_target
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - z_total / vocab)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if weights is not None:
        loss = loss * torch.where(kept, weights.to(loss.dtype), 0.0)  # or NaN · 0 is the gradient of lse
    loss = torch.where(kept, loss, 0.0)  # not a product: what is ignored may hold anything
    return loss.sum() if reduction == "sum" else loss


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, *, weights: Tensor | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, ignore_index: int = -100, reduction: str = "sum",
) -> Tensor:  # fmt: skip
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    kept = targets != ignore_index
    lse = z.logsumexp(-1)
    z_target = z.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * (lse - z_target) + label_smoothing * (lse - z.mean(-1)) + z_loss * lse.square()
    loss = torch.where(kept, loss if weights is None else loss * weights.to(loss.dtype), 0.0)
    return loss.sum() if reduction == "sum" else loss


# Triton ---------------------------------------------------------------------------------------------------------------
#
# A program holds a tile [ROWS, BLOCK] of the logits. The forward walks along its rows; where rows are few and long,
# each is split among programs, whose partial results are merged. The backward is one program per tile.

TILE = 2048  # elements: 8 for each thread of 8 warps


@triton.jit
def _load_logits(p, m, softcap, HAS_CAP: tl.constexpr):
    """z in fp32, 0 where masked."""
    b_z = tl.load(p, mask=m, other=0.0).to(tl.float32)
    return softcap * tanh(b_z / softcap) if HAS_CAP else b_z


@triton.jit(do_not_specialize=["T"])
def _cross_entropy_forward(
    p_logits, p_targets, p_top, p_sum, p_total, p_picked, stride_logits, T, V, columns, softcap,
    HAS_CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """top = max z, Σ e^(z - top) and Σ z [splits, T], and picked [T], of logits [T, V] and targets [T].

    A target outside [0, V) gives lse = picked = 0, and its logits are not read. Grid: (cdiv(T, ROWS), splits); each
    program walks `columns` columns of its rows.
    """
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    i_split = tl.program_id(1)
    m_row = i_row < T
    b_target = tl.load(p_targets + i_row, mask=m_row, other=-1)
    m_kept = (b_target >= 0) & (b_target < V)
    p_row = p_logits + (i_row * stride_logits)[:, None]  # [ROWS, 1]

    # Each lane has a log-sum-exp of its own, so that no step waits for a reduction. One of the two exponentials of the
    # online formula is always 1: where z is the new maximum, the old sum is scaled by 2^(old - z); else 2^(z - max).
    b_max = tl.full([ROWS, BLOCK], -1e30, tl.float32)  # not -inf: -inf - -inf is NaN
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    b_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_start in range(i_split * columns, min(V, (i_split + 1) * columns), BLOCK):
        i_col = (i_start + tl.arange(0, BLOCK))[None, :]  # [1, BLOCK]
        m = m_kept[:, None] & (i_col < V)  # [ROWS, BLOCK]
        b_z = _load_logits(p_row + i_col, m, softcap, HAS_CAP)
        b_total += b_z
        b_z = tl.where(m, b_z, -float("inf"))
        b_less = tl.exp2(tl.abs(b_z - b_max) * -LOG2_E)
        b_sum = tl.where(b_z > b_max, b_sum * b_less + 1.0, b_sum + b_less)
        b_max = tl.maximum(b_max, b_z)
    b_top = tl.max(b_max, 1)  # [ROWS]
    b_sum = tl.sum(b_sum * tl.exp2((b_max - b_top[:, None]) * LOG2_E), 1)
    i_out = i_split.to(tl.int64) * T + i_row
    tl.store(p_top + i_out, tl.where(m_kept, b_top, 0.0), mask=m_row)
    tl.store(p_sum + i_out, tl.where(m_kept, b_sum, 1.0 if i_split == 0 else 0.0), mask=m_row)  # log of all: 0
    tl.store(p_total + i_out, tl.sum(b_total, 1), mask=m_row)
    if i_split == 0:
        b_picked = _load_logits(p_logits + i_row * stride_logits + b_target, m_kept, softcap, HAS_CAP)
        tl.store(p_picked + i_row, tl.where(m_kept, b_picked, 0.0), mask=m_row)


@triton.jit(do_not_specialize=["T"])
def _cross_entropy_backward(
    p_logits, p_targets, p_top, p_log_sum, p_g_lse, p_g_picked, p_g_total, p_dlogits, stride_logits, T, V, softcap,
    HAS_CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits [T, V] from the gradients [T] of lse, picked and total. Grid: (cdiv(T, ROWS), cdiv(V, BLOCK))."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    i_col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]  # [1, BLOCK]
    b_target = tl.load(p_targets + i_row, mask=i_row < T, other=-1)
    m_kept = (b_target >= 0) & (b_target < V)
    b_top, b_log_sum, b_g_lse, b_g_picked, b_g_total = (
        tl.load(p_top + i_row, mask=m_kept, other=0.0)[:, None],  # [ROWS, 1]
        tl.load(p_log_sum + i_row, mask=m_kept, other=0.0)[:, None],
        tl.load(p_g_lse + i_row, mask=m_kept, other=0.0)[:, None],
        tl.load(p_g_picked + i_row, mask=m_kept, other=0.0)[:, None],
        tl.load(p_g_total + i_row, mask=m_kept, other=0.0)[:, None],
    )
    m = m_kept[:, None] & (i_col < V)  # [ROWS, BLOCK]
    b_z = _load_logits(p_logits + (i_row * stride_logits)[:, None] + i_col, m, softcap, HAS_CAP)
    # Not z - lse: what rounding takes from lse = top + log Σ is more than what a sure target has left, 1 - p.
    b_dz = tl.exp2((b_z - b_top - b_log_sum) * LOG2_E) * b_g_lse + b_g_total
    b_dz += tl.where(i_col == b_target[:, None], b_g_picked, 0.0)  # p - 1, in fp32
    if HAS_CAP:
        b_dz *= 1.0 - (b_z / softcap) * (b_z / softcap)
    b_dz = tl.where(m, b_dz, 0.0).to(p_dlogits.dtype.element_ty)
    p_out = p_dlogits + (i_row * V)[:, None] + i_col
    tl.store(p_out, b_dz, mask=(i_row < T)[:, None] & (i_col < V))


def _config(V: int) -> dict:
    """Launch parameters for rows of V elements."""
    block = min(triton.next_power_of_2(V), TILE)
    return {"ROWS": TILE // block, "BLOCK": block, "num_warps": 8}


def _statistics_outputs(logits, targets, softcap):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(5))


@operator("cross_entropy_statistics", _statistics_outputs)
def _statistics(
    logits: Tensor, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, the target's logit, Σ z, and lse's parts, max z and log Σ e^(z - max): [T] fp32.

    All 0 for targets outside the vocabulary.
    """
    (T, V), rows, config = logits.shape, unit_stride(logits), _config(logits.shape[1])
    programs, blocks = triton.cdiv(T, config["ROWS"]), triton.cdiv(V, config["BLOCK"])
    columns = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, max(1, programs)))) * config["BLOCK"]
    splits = triton.cdiv(V, columns)
    picked = logits.new_empty(T, dtype=torch.float32)
    tops, sums, totals = (picked.new_empty(splits, T) for _ in range(3))
    if T:
        _cross_entropy_forward[(programs, splits)](
            rows, targets.contiguous(), tops, sums, totals, picked, rows.stride(0), T, V, columns, softcap or 0.0,
            HAS_CAP=softcap is not None, **config,
        )  # fmt: skip
    top = tops.amax(0)
    log_sum = (sums * (tops - top).exp()).sum(0).log()
    return top + log_sum, picked, totals.sum(0), top, log_sum


def _backward_outputs(logits, *rest):
    return logits.new_empty(logits.shape)


@operator("cross_entropy_backward", _backward_outputs)
def _backward(
    logits: Tensor, targets: Tensor, top: Tensor, log_sum: Tensor, g_lse: Tensor, g_picked: Tensor, g_total: Tensor,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """dlogits [T, V] in the dtype of the logits."""
    (T, V), rows, config = logits.shape, unit_stride(logits), _config(logits.shape[1])
    dlogits = logits.new_empty(T, V)
    if T:
        _cross_entropy_backward[(triton.cdiv(T, config["ROWS"]), triton.cdiv(V, config["BLOCK"]))](
            rows, *(x.contiguous() for x in (targets, top, log_sum, g_lse, g_picked, g_total)), dlogits,
            rows.stride(0), T, V, softcap or 0.0, HAS_CAP=softcap is not None, **config,
        )  # fmt: skip
    return dlogits


# Torch ----------------------------------------------------------------------------------------------------------------
def _row_blocks(logits: Tensor) -> list[slice]:
    """Blocks of rows whose fp32 copy stays in the cache."""
    rows = max(1, tile_bytes(logits.device) // (4 * logits.shape[1]))
    return [slice(row, row + rows) for row in range(0, logits.shape[0], rows)]


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return HeadOptions(softcap=softcap).from_raw(logits.to(wide, copy=softcap is not None))  # in place


def _torch_statistics(logits, targets, softcap):
    """The same; of targets that are -1 nobody reads the results."""
    T, dtype = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    lse, picked, total, top, log_sum = (logits.new_empty(T, dtype=dtype) for _ in range(5))
    for rows in _row_blocks(logits):
        z = _capped(logits[rows], softcap)  # [rows, V]
        top[rows] = z.amax(-1)
        log_sum[rows] = -z.softmax(-1).amax(-1).log()  # 3 × faster than torch.logsumexp
        picked[rows] = z.gather(1, targets[rows, None].clamp_min(0))[:, 0]
        total[rows] = z.sum(-1)
    return torch.add(top, log_sum, out=lse), picked, total, top, log_sum


def _torch_backward(logits, targets, top, log_sum, g_lse, g_picked, g_total, softcap):
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _row_blocks(logits):
        z, y = _capped(logits[rows], softcap), targets[rows, None]
        dz = z.softmax(-1).mul_(g_lse[rows, None]).add_(g_total[rows, None])
        dz.scatter_add_(1, y.clamp_min(0), g_picked[rows, None])  # p - 1, in fp32
        dlogits[rows] = HeadOptions(softcap=softcap).to_raw(dz, z).masked_fill_(y < 0, 0.0)  # not 0 · NaN
    return dlogits


# Autograd and the public function -------------------------------------------------------------------------------------
class _Statistics(Function):
    """lse, the target's logit and Σ z of each token; the softmax is made again backward."""

    @staticmethod
    @without_autocast
    def forward(ctx, logits, targets, softcap, kernels):
        *results, top, log_sum = (_statistics if kernels else _torch_statistics)(logits, targets, softcap)
        ctx.save_for_backward(logits, targets, top, log_sum)
        ctx.softcap, ctx.kernels = softcap, kernels
        return tuple(results)

    @staticmethod
    @without_autocast
    def backward(ctx, *gradients):
        by = _backward if ctx.kernels else _torch_backward
        return by(*ctx.saved_tensors, *gradients, ctx.softcap), None, None, None


def cross_entropy(
    logits: Tensor, targets: Tensor, *, weights: Tensor | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, ignore_index: int = -100, reduction: str = "sum",
) -> Tensor:  # fmt: skip
    """Weighted cross-entropy of logits [T, V] and targets [T]; a scalar ("sum") or [T] ("none"), fp32 (fp64 for fp64).

    logits of any float dtype and any strides, V ≥ 1; targets int32 or int64; weights [T], of any dtype, multiply each
    token's loss; all on one device. Differentiable in logits and weights. Ignored targets give 0, loss and gradient,
    whatever their logits and weights hold. Targets outside the vocabulary raise on a CPU; on a GPU, where looking
    would make the host wait, they are ignored and counted (`head.invalid_targets`), or stop the program with
    TRITIUM_DEBUG=1.
    Raises: ValueError for shapes, dtypes or devices that don't fit, an unknown reduction, label_smoothing outside
    [0, 1], a softcap ≤ 0. Source: label smoothing, arXiv 1512.00567, 7; z-loss, arXiv 2204.02311, 5.
    """
    HeadOptions(softcap=softcap)  # raises
    require_float("cross_entropy", logits=logits)
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"cross_entropy: logits must be [T, V] with V ≥ 1, got {list(logits.shape)}")
    require_one_device(logits, targets, weights)
    check_loss_options("cross_entropy", logits.shape[:1], weights, label_smoothing, reduction)
    ids = check_targets("cross_entropy", targets, logits.shape[:1], logits.shape[1], ignore_index)
    lse, z_target, total = _Statistics.apply(logits, ids, softcap, use_triton(logits))
    return token_loss(
        lse, z_target, total, ids >= 0, vocab=logits.shape[1], weights=weights,
        label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction,
    )  # fmt: skip


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    logits = (3 * torch.randn(shape["T"], shape["V"], device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, shape["V"], (shape["T"],), device=device)
    targets[1::5] = -100
    weights = torch.rand(shape["T"], device=device)
    softcap = float(shape["softcap"]) if "softcap" in shape else None
    return (logits, targets), dict(weights=weights, label_smoothing=0.1, z_loss=1e-3, softcap=softcap)


def _logit_bytes(shape: Shape, itemsize: int) -> int:
    """Of the logits that count: a fifth of the example's targets are ignored."""
    return itemsize * shape["V"] * (shape["T"] - (shape["T"] + 3) // 5)


def _forward_bytes(shape: Shape, itemsize: int) -> int:
    return _logit_bytes(shape, itemsize) + (8 + 4 * 4) * shape["T"]  # targets, four statistics


def _backward_bytes(shape: Shape, itemsize: int) -> int:
    return _logit_bytes(shape, itemsize) + itemsize * shape["V"] * shape["T"] + (8 + 5 * 4) * shape["T"]


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(kernel, V, dtype, cap):
        config = _config(V) | {"HAS_CAP": cap}
        types = dict.fromkeys(("p_logits", "p_dlogits"), f"*{dtype}") | {"p_targets": "*i64"}
        odd = ("V", "stride_logits") if V % 16 else ()
        name = f"{kernel.__name__.split('_')[-1]} V={V} {dtype}" + cap * " softcap"
        return launch_of(kernel, name, config, types, odd)

    cases = (131072, "bf16", False), (131072, "bf16", True), (131072, "fp32", False), (64, "bf16", False)
    cases += (50257, "bf16", True), (50257, "fp32", False)  # rows that begin anywhere
    kernels = (_cross_entropy_forward, _cross_entropy_backward)
    return tuple(launch(kernel, *case) for kernel in kernels for case in cases)


register(
    name="cross_entropy",
    function=cross_entropy,
    reference=cross_entropy_reference,
    example=_example,
    shape={"T": 8192, "V": 128256},
    flops=lambda shape: 5 * shape["T"] * shape["V"],
    bytes=_forward_bytes,
    backward_flops=lambda shape: 5 * shape["T"] * shape["V"],
    backward_bytes=_backward_bytes,
    launches=_launches,
)
