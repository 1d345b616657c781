"""The language-model head without materialised logits, shared by linear_logprob, linear_cross_entropy and linear_kl.

    z = softcap(hidden @ weight.T) / temperature          [T, V], never whole in memory

z is computed in tiles of (a block of tokens) × (a chunk of the vocabulary). Each tile gives per-token statistics that
merge exactly (online log-sum-exp), and the backward recomputes it. A vocabulary shard on another rank is one more chunk
to merge.

               chunk 0    chunk 1    …
    rows 0   [ tile ] → [ tile ] → merge: lse, expected z, Σz, max      forward   2·T·V·E FLOPs
    rows 1   [ tile ] → [ tile ] → …                                    backward  6·T·V·E (a third: the tiles again)

Precision in bf16: a target's gradient, p - 1, is formed in fp32 and then rounded, since bf16(p) is 1 from p = 0.998 on
and the gradient would be lost. dhidden and dweight are accumulated in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.kernels.backend import apply, device_assert, use_triton, without_autocast
from tritium.kernels.blocks import Function, require_float, require_integer
from tritium.kernels.head_triton import EXCLUDED, head_backward, head_forward, matmul_fp32, tile_bytes
from tritium.kernels.wide import widened

TILE_ROWS = 1024
_INVALID: dict[torch.device, Tensor] = {}


class HeadStatistics(NamedTuple):
    """Per-token statistics of the logits, fp32 (fp64 for fp64 inputs). All but `top` and `mass` are differentiable."""

    lse: Tensor  # [T] log Σ_v exp z_v
    picked: Tensor  # [T, K] the logits of the targets; 0 where a target is outside the vocabulary
    expected: Tensor | None  # [T] Σ_v p_v z_v, so that entropy = lse - expected
    total: Tensor | None  # [T] Σ_v z_v
    top: Tensor  # [T] max_v z_v
    mass: Tensor  # [T] Σ_v exp(z_v - top), more precise than lse, which is rounded at its own magnitude


@dataclass(frozen=True)
class HeadOptions:
    """How logits are made of hidden @ weight.T, and which statistics are wanted.

    Raises: ValueError for a temperature or softcap that is not positive, and for options that exclude each other.
    """

    temperature: float = 1.0
    softcap: float | None = None
    expected: bool = False  # whether to compute Σ p z
    total: bool = False  # whether to compute Σ z
    exclude: bool = False  # leave the targets out of every statistic but `picked`

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap}")
        if self.exclude and (self.softcap is not None or self.total):
            raise ValueError("exclude can't be combined with softcap or total: excluded logits are not finite numbers")

    def from_raw(self, z: Tensor) -> Tensor:
        """Apply softcap and temperature to fp32 logits, in place."""
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z if self.temperature == 1.0 else z.div_(self.temperature)

    def to_raw(self, dz: Tensor, z: Tensor) -> Tensor:
        """The gradient of the logits before softcap and temperature, from dz, in place."""
        if self.softcap is not None:  # d tanh(x) = 1 - tanh(x)²
            dz *= 1 - (z * (self.temperature / self.softcap)).square_()
        return dz if self.temperature == 1.0 else dz.div_(self.temperature)


def check_head(op: str, **operands: Tensor) -> None:
    """Raise ValueError unless the two operands are hidden [T, E] and weight [V, E], of one float dtype, with V ≥ 1."""
    require_float(op, **operands)
    names, (hidden, weight) = " and ".join(operands), operands.values()
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{op}: {names} must be [T, E] and [V, E] with V ≥ 1, got {shapes}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{op}: {names} are {hidden.dtype} and {weight.dtype}: cast one of them")


def check_targets(
    op: str, targets: Tensor, shape: tuple[int, ...], vocab: int, ignore_index: int, name: str = "targets"
) -> Tensor:
    """The targets as int64, with -1 in place of those equal to ignore_index.

    Raises: ValueError for another shape, a dtype that is no integer and, on a CPU, ids out of range. On a GPU, where
    checking values would be a sync, ids out of range are ignored and counted: see `invalid_targets`.
    """
    require_integer(op, **{name: targets})
    if tuple(targets.shape) != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, one id for each token, got {list(targets.shape)}")
    ids = targets.long()
    kept, valid = ids != ignore_index, (ids >= 0) & (ids < vocab)
    refuse(ids, kept & ~valid, f"{op}: {name} hold {{}}: ids must be in [0, {vocab}) or {ignore_index}")
    return torch.where(kept & valid, ids, -1)


def refuse(ids: Tensor, bad: Tensor, message: str) -> None:
    """On a CPU, raise ValueError with the first bad id in the message; on a GPU, add them to `invalid_targets`."""
    real = type(ids) is Tensor  # not a tracer's stand-in, which a counter must not become
    compiling = torch.compiler.is_compiling()
    if real and ids.device.type == "cpu" and not compiling:
        if bad.any():
            raise ValueError(message.format(int(ids[bad][0])))
        return
    count = bad.sum()
    device_assert(lambda: count == 0, message.format("others"))
    # Memory allocated during the capture of a CUDA graph belongs to the graph: use only a counter that exists already.
    capturing = ids.is_cuda and not compiling and torch.cuda.is_current_stream_capturing()
    if real and (ids.device in _INVALID or not capturing):
        invalid_targets(ids.device).add_(count)


def invalid_targets(device: torch.device | str) -> Tensor:
    """How many targets on this device were ever out of range and therefore ignored: a live int64 scalar on the device.

    Reading it (`int(invalid_targets("cuda"))`) is a device sync. Under TRITIUM_DEBUG=1 the first one stops the program.
    """
    device = torch.empty(0, device=device).device  # "cuda" with its index
    if device not in _INVALID:
        with torch.inference_mode(False):  # the counter outlives that mode
            _INVALID[device] = torch.zeros((), dtype=torch.int64, device=device)
    return _INVALID[device]


def _tile_shape(tokens: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    rows = max(1, min(tokens, TILE_ROWS))
    return rows, min(vocab, max(1, tile_bytes(device) // (4 * rows)))


def tiles(tokens: int, vocab: int, device: torch.device) -> Iterator[tuple[int, slice, slice]]:
    """(chunk number, columns, rows) of every tile; chunks are the outer loop, so that a chunk of weight stays hot."""
    rows, columns = _tile_shape(tokens, vocab, device)
    for chunk, column in enumerate(range(0, vocab, columns)):
        for row in range(0, tokens, rows):
            yield chunk, slice(column, min(vocab, column + columns)), slice(row, min(tokens, row + rows))


class Workspace:
    """The memory of one tile of logits, reused for the next: page faults on new memory cost more than the softmax."""

    def __init__(self, like: Tensor, elements: int):
        wide = torch.promote_types(like.dtype, torch.float32)
        self.z, self.p = (like.new_empty(elements, dtype=wide) for _ in range(2))
        self.raw = self.z if like.dtype == wide else like.new_empty(elements)

    def logits(self, hidden: Tensor, weight: Tensor, options: HeadOptions) -> Tensor:
        """z of one tile, in `self.z`."""
        raw = torch.mm(hidden, weight.t(), out=_shaped(self.raw, (hidden.shape[0], weight.shape[0])))
        return options.from_raw(raw) if self.raw is self.z else self.widen(raw, options)

    def narrow(self, dz: Tensor) -> Tensor:
        """dz in the dtype of the matmuls."""
        return dz if self.raw is self.z else _shaped(self.raw, dz.shape).copy_(dz)

    def widen(self, raw: Tensor, options: HeadOptions) -> Tensor:
        """z, in `self.z`, from raw = hidden @ weight.T."""
        return options.from_raw(_shaped(self.z, raw.shape).copy_(raw))

    def softmax(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(p, max z, Σ e^(z - max)) of z's rows; p is in `self.p`. 3 × faster than torch.logsumexp."""
        p = torch.softmax(z, -1, out=_shaped(self.p, z.shape))
        return p, z.amax(-1), 1 / p.amax(-1)


def _shaped(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    return memory[: shape[0] * shape[1]].view(shape)


def logits_tile(hidden: Tensor, weight: Tensor, options: HeadOptions) -> Tensor:
    """z of one tile in at least fp32: the matmul is in the inputs' dtype, everything after it in fp32."""
    z = widened(hidden) @ widened(weight).t()
    return options.from_raw(z.to(torch.promote_types(z.dtype, torch.float32)))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype (at least fp32)."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)  # addmm_ is not counted by FlopCounterMode
    else:
        total += matmul_fp32(a, b)


def pick(z: Tensor, targets: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(picked, here, column), each [rows, K]: the targets' logits, whether the target is one of z's columns, and which.

    `picked` is 0 where it is not. With `exclude`, the targets' logits are set to about -inf in z.
    """
    here = (targets >= 0) & (targets < z.shape[1])
    column = torch.where(here, targets, 0)
    picked = torch.where(here, z.gather(1, column), 0.0)
    if options.exclude:
        z.scatter_add_(1, column, here.to(z.dtype) * EXCLUDED)
    return picked, here, column


def raw_gradient(
    z: Tensor, p: Tensor, here: Tensor, column: Tensor, g_lse: Tensor, g_expected: Tensor | None,
    g_picked: Tensor | None, g_total: Tensor | None, options: HeadOptions,
) -> Tensor:  # fmt: skip
    """The gradient of hidden @ weight.T, in p's memory, from those of the statistics; `here`, `column` from `pick`.

    d lse / dz_v = p_v,   d expected / dz_v = p_v (1 + z_v - expected); the part without z_v is already in g_lse.
    """
    dz = p.mul_(g_lse[:, None] if g_expected is None else torch.addcmul(g_lse[:, None], z, g_expected[:, None]))
    if g_total is not None:
        dz += g_total[:, None]
    if g_picked is not None:
        dz.scatter_add_(1, column, torch.where(here, g_picked, 0.0))  # p - 1, in fp32
    return options.to_raw(dz, z)


def _torch_forward(hidden, weight, targets, temperature, softcap, with_expected, with_total, exclude):
    """HeadStatistics by tiles: head_triton's head_forward in plain torch. Targets outside [0, V) pick 0."""
    (T, _), V, options = hidden.shape, weight.shape[0], HeadOptions(temperature, softcap, exclude=exclude)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    picked = hidden.new_zeros(targets.shape, dtype=dtype)
    height, width = _tile_shape(T, V, hidden.device)
    tops, sums, means, totals = hidden.new_empty(4, -(-V // width), T, dtype=dtype)  # of each chunk
    wide = widened(hidden)
    work = Workspace(wide, height * width)
    for chunk, columns, rows in tiles(T, V, hidden.device):
        if rows.start == 0:
            words = widened(weight[columns])
        z = work.logits(wide[rows], words, options)
        picked[rows] += pick(z, targets[rows] - columns.start, options)[0]
        p, tops[chunk, rows], sums[chunk, rows] = work.softmax(z)
        if with_expected:
            means[chunk, rows] = p.mul_(z).sum(-1)
        if with_total:
            totals[chunk, rows] = z.sum(-1)
    top = tops.amax(0)
    masses = (tops - top).exp_().mul_(sums)
    mass = masses.sum(0)
    expected = masses.mul_(means).sum(0).div_(mass) if with_expected else None
    return top + mass.log(), picked, expected, totals.sum(0) if with_total else None, top, mass


def _torch_backward(
    g_lse, g_picked, g_expected, g_total, hidden, weight, targets, expected, top, mass, temperature, softcap, exclude,
    needs_hidden, needs_weight,
):  # fmt: skip
    """dhidden and dweight, None where not needed."""
    (T, E), V, options = hidden.shape, weight.shape[0], HeadOptions(temperature, softcap, exclude=exclude)
    height, width = _tile_shape(T, V, hidden.device)
    wide = widened(hidden)
    work = Workspace(wide, height * width)
    dhidden = hidden.new_zeros(T, E, dtype=top.dtype) if needs_hidden else None
    dweight = weight.new_zeros(V, E) if needs_weight else None
    summed = weight.new_empty(width, E, dtype=top.dtype)  # dweight of one chunk, summed over blocks of tokens
    g_lse = top.new_zeros(T) if g_lse is None else g_lse
    if g_expected is not None:
        g_lse = g_lse + g_expected * (1 - expected)
    of_p = [None if g is None else g / mass for g in (g_lse, g_expected)]  # since p below is not normalised
    for _, columns, rows in tiles(T, V, hidden.device):
        if rows.start == 0:
            words = widened(weight[columns])
        z = work.logits(wide[rows], words, options)
        _, here, column = pick(z, targets[rows] - columns.start, options)
        p = torch.sub(z, top[rows, None], out=_shaped(work.p, z.shape)).exp_()
        gradients = [None if g is None else g[rows] for g in (*of_p, g_picked, g_total)]
        dz = work.narrow(raw_gradient(z, p, here, column, *gradients, options))
        if needs_hidden:
            add_product(dhidden[rows], dz, words)
        if needs_weight:
            sums = summed[: z.shape[1]]
            add_product(sums.zero_() if rows.start == 0 else sums, dz.t(), wide[rows])
            if rows.stop == T:
                dweight[columns] = sums
    return dhidden.to(hidden.dtype) if needs_hidden else None, dweight


class _Head(Function):
    """HeadStatistics of a whole vocabulary or of one shard."""

    @staticmethod
    @without_autocast
    def forward(ctx, hidden, weight, targets, options, kernels):
        flags = options.expected, options.total, options.exclude
        by = head_forward if kernels else _torch_forward
        lse, picked, expected, total, top, mass = by(
            hidden, weight, targets, options.temperature, options.softcap, *flags
        )
        ctx.save_for_backward(hidden, weight, targets, expected, top, mass)
        ctx.options, ctx.kernels = (options.temperature, options.softcap, options.exclude), kernels
        ctx.mark_non_differentiable(top, mass)
        ctx.set_materialize_grads(False)
        return lse, picked, expected if options.expected else None, total if options.total else None, top, mass

    @staticmethod
    @without_autocast
    def backward(ctx, g_lse, g_picked, g_expected, g_total, *_):
        needs, by = ctx.needs_input_grad[:2], head_backward if ctx.kernels else _torch_backward
        gradients = by(g_lse, g_picked, g_expected, g_total, *ctx.saved_tensors, *ctx.options, *needs)
        return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), None, None, None


class _AllReduceSum(torch.autograd.Function):
    """Sum over a group whose ranks all use the result alike: each summand's gradient is the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _merge_shards(s: HeadStatistics, group: dist.ProcessGroup) -> HeadStatistics:
    """The statistics of the whole vocabulary from those of its shards, by one all-reduce MAX and one SUM."""
    bounds = torch.stack([s.lse.detach(), s.top])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    high, top = bounds
    share = (s.lse - high).exp()
    own = dict(share=share, mass=s.mass * (s.top - top).exp(), total=s.total)
    own["expected"] = None if s.expected is None else share * s.expected
    own = {name: x for name, x in own.items() if x is not None}
    merged = _AllReduceSum.apply(torch.cat([s.picked, *(x[:, None] for x in own.values())], 1), group)
    K = s.picked.shape[1]
    sums = dict(zip(own, merged[:, K:].unbind(1), strict=True))
    expected = None if s.expected is None else sums["expected"] / sums["share"]
    return HeadStatistics(
        high + sums["share"].log(), merged[:, :K], expected, sums.get("total"), top, sums["mass"].detach()
    )


def head_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions, group: dist.ProcessGroup | None = None
) -> HeadStatistics:
    """HeadStatistics of z = softcap(hidden @ weight.T) / temperature.

    hidden [T, E] and weight [V, E] of one dtype; targets [T, K] int64 are global ids (those outside the vocabulary pick
    0). With a group, weight is this rank's V / world_size rows, and dhidden is only this shard's part of the gradient.
    """
    own = targets if group is None else targets - dist.get_rank(group) * weight.shape[0]
    kernels = use_triton(hidden, weight, targets)
    statistics = HeadStatistics(*apply(_Head, hidden, weight, own, options, kernels))
    return statistics if group is None else _merge_shards(statistics, group)


def vocab_size(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """The vocabulary size of the whole head, of which weight may be a shard."""
    return weight.shape[0] * (1 if group is None else dist.get_world_size(group))
