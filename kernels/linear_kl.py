"""Divergence between the next-token distributions of a teacher and a student, without materialising their logits.

    p = softmax(teacher @ teacher_weightᵀ / τ),   q = softmax(student @ student_weightᵀ / τ),   m = (p + q) / 2
    forward: KL(p ‖ q)      reverse: KL(q ‖ p)      jsd: ½ KL(p ‖ m) + ½ KL(q ‖ m)         no factor τ²

Gradients to the student's logits z (before / τ), with r_v = log q_v - log p_v, or ½ (log q_v - log m_v):
    forward: (q - p) / τ        reverse, jsd: q_v (r_v - Σ_u q_u r_u) / τ

Minimum work: 2·T·V·(E_s + E_t) FLOPs forward; backward as much again to recompute the logits, and 4·T·V·E_s for the two
products with dz. The logits are never whole in memory. The Triton path computes their tiles

    forward, reverse    once, keeping per token the maximum and Σ exp of both heads' logits and, with a and b the logits
                        minus their maxima, D = Σ_v e^(a_v) (a_v - b_v). Shares of the vocabulary, on other programs or
                        other ranks, merge exactly, as D can be moved to a new maximum like the sums. At the end
                        KL(a ‖ b) = D / Σ e^a + log(Σ e^b / Σ e^a), to which a common offset of the logits is harmless
    jsd                 twice: with the same kernel for the log-sum-exps, then for the two sums
    backward            once, by chunks of the vocabulary: dz [T, chunk], then dhidden += dz @ W, dW = dzᵀ @ h

Each time, the operands of each tile of BLOCK_T × BLOCK_V logits are read once, nearly all from the L2, as in
head_triton.py: ⌈T / BLOCK_T⌉·⌈V / BLOCK_V⌉·(BLOCK_T + BLOCK_V)·(E_s + E_t) elements. The backward also writes dz, T·V.

The torch path computes the tiles of head.py twice forward (log-sum-exps, then the divergence) and once backward. For a
top-k teacher see divergence.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.kernels.backend import (
    Target,
    operator,
    require_one_device,
    target_of,
    tl,
    triton,
    use_triton,
    without_autocast,
)
from tritium.kernels.blocks import Function
from tritium.kernels.divergence import KINDS, TopK, check_top_k, divergence, log_ratio, log_rest, top_k_kl
from tritium.kernels.head import HeadOptions, check_head, head_statistics, logits_tile, tiles, vocab_size
from tritium.kernels.head_triton import (
    EXCLUDED,
    aligned,
    gradients_by_chunks,
    head_launches,
    logits_block,
    shares_of,
    tile_of,
)
from tritium.kernels.registry import Launch, Shape, launch_of, register
from tritium.kernels.wide import widened


def linear_kl_reference(
    student: Tensor, student_weight: Tensor, teacher: Tensor | TopK, teacher_weight: Tensor | None, *,
    temperature: float = 1.0, kind: str = "forward",
) -> Tensor:  # fmt: skip
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q = ((student @ student_weight.t()).to(dtype) / temperature).log_softmax(-1)
    if not isinstance(teacher, TopK):
        return divergence(((teacher @ teacher_weight.t()).to(dtype) / temperature).log_softmax(-1), log_q, kind)
    log_p = teacher.logp.to(dtype)
    rest = torch.ones_like(log_q, dtype=torch.bool).scatter_(1, teacher.ids, False)
    log_q_rest = log_q.masked_fill(~rest, -torch.inf).logsumexp(-1, True)
    log_p = torch.cat([log_p, log_rest(teacher.logp)], 1)
    return divergence(log_p, torch.cat([log_q.gather(1, teacher.ids), log_q_rest], 1), kind)


# Triton ---------------------------------------------------------------------------------------------------------------

_OUTSIDE = tl.constexpr(EXCLUDED)  # logit beyond the vocabulary, and initial maximum: -inf would give NaN
SHARE = 32  # most blocks of the vocabulary in a program's share


@triton.jit
def _masked_logits(
    p_h, p_w, i_t, i_v, stride_h, stride_w, T, V, temperature,
    E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """z [BLOCK_T, BLOCK_V] of tokens i_t and vocabulary entries i_v; _OUTSIDE beyond the vocabulary."""
    b_z = logits_block(
        p_h, p_w, i_t, i_v, stride_h, stride_w, T, V, 0.0, temperature, E, False, BLOCK_T, BLOCK_V, BLOCK_E
    )
    return tl.where((i_v < V)[None, :], b_z, _OUTSIDE)


@triton.jit
def _log_probabilities(
    p_h, p_w, p_norm, i_t, i_v, stride_h, stride_w, T, V, temperature,
    E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """z - max - log Σ e^(z - max)  [BLOCK_T, BLOCK_V]; norm [2, T] holds the max and the log.

    The two are subtracted separately: their sum, the log-sum-exp, would be rounded at its own magnitude.
    """
    b_z = _masked_logits(p_h, p_w, i_t, i_v, stride_h, stride_w, T, V, temperature, E, BLOCK_T, BLOCK_V, BLOCK_E)
    b_top = tl.load(p_norm + i_t, mask=i_t < T, other=0.0)[:, None]
    return b_z - b_top - tl.load(p_norm + T + i_t, mask=i_t < T, other=0.0)[:, None]


@triton.jit(do_not_specialize=["T", "V", "shares", "blocks_per_share"])
def _linear_kl_online(
    p_a, p_a_weight, p_b, p_b_weight, p_parts,
    stride_a, stride_a_weight, stride_b, stride_b_weight, T, V, shares, blocks_per_share, temperature,
    E_A: tl.constexpr, E_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """parts [5, shares, T]: the maxima of a's and b's logits, both Σ exp, and D, of a share of the vocabulary.

    a [T, E_A], its weight [V, E_A]; b likewise. Grid: (cdiv(T, BLOCK_T) · shares,).
    """
    i_tile, i_share = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), shares)
    i_t = i_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    b_max_a = tl.full([BLOCK_T], _OUTSIDE, tl.float32)
    b_max_b = tl.full([BLOCK_T], _OUTSIDE, tl.float32)
    b_sum_a = tl.zeros([BLOCK_T], tl.float32)
    b_sum_b = tl.zeros([BLOCK_T], tl.float32)
    b_d = tl.zeros([BLOCK_T], tl.float32)
    first = i_share * blocks_per_share * BLOCK_V
    for i_start in range(first, tl.minimum(V, first + blocks_per_share * BLOCK_V), BLOCK_V):
        i_v = (i_start + tl.arange(0, BLOCK_V)).to(tl.int64)  # [BLOCK_V]
        b_a = _masked_logits(
            p_a, p_a_weight, i_t, i_v, stride_a, stride_a_weight, T, V, temperature, E_A, BLOCK_T, BLOCK_V, BLOCK_E
        )  # [BLOCK_T, BLOCK_V]
        b_b = _masked_logits(
            p_b, p_b_weight, i_t, i_v, stride_b, stride_b_weight, T, V, temperature, E_B, BLOCK_T, BLOCK_V, BLOCK_E
        )
        b_top_a = tl.maximum(b_max_a, tl.max(b_a, 1))  # [BLOCK_T]
        b_top_b = tl.maximum(b_max_b, tl.max(b_b, 1))
        b_shift_a, b_shift_b = b_max_a - b_top_a, b_max_b - b_top_b  # what was summed, relative to the new maxima
        b_d = tl.exp(b_shift_a) * (b_d + b_sum_a * (b_shift_a - b_shift_b))
        b_sum_a *= tl.exp(b_shift_a)
        b_sum_b *= tl.exp(b_shift_b)
        b_max_a, b_max_b = b_top_a, b_top_b
        b_a -= b_max_a[:, None]
        b_b -= b_max_b[:, None]
        b_d += tl.sum(tl.exp(b_a) * (b_a - b_b), 1)
        b_sum_a += tl.sum(tl.exp(b_a), 1)
        b_sum_b += tl.sum(tl.exp(b_b), 1)
    m_t, i_part, size = i_t < T, i_share.to(tl.int64) * T + i_t, shares * tl.cast(T, tl.int64)
    tl.store(p_parts + i_part, b_max_a, mask=m_t)
    tl.store(p_parts + i_part + size, b_max_b, mask=m_t)
    tl.store(p_parts + i_part + 2 * size, b_sum_a, mask=m_t)
    tl.store(p_parts + i_part + 3 * size, b_sum_b, mask=m_t)
    tl.store(p_parts + i_part + 4 * size, b_d, mask=m_t)


@triton.jit
def _log_over_mean(b_x):
    """log(q / m), where b_x = log(q / p): m / q = ½ + ½ p / q. Where p / q would overflow, q = 0."""
    return -tl.log(0.5 + 0.5 * tl.exp(tl.minimum(-b_x, 80.0)))


@triton.jit(do_not_specialize=["T", "V", "shares", "blocks_per_share"])
def _linear_kl_jsd(
    p_s, p_s_weight, p_t, p_t_weight, p_norm_q, p_norm_p, p_parts,
    stride_s, stride_s_weight, stride_t, stride_t_weight, T, V, shares, blocks_per_share, temperature,
    E_S: tl.constexpr, E_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """parts [2, shares, T]: Σ ½ q log(q / m) and Σ ½ p log(p / m). Grid: (cdiv(T, BLOCK_T) · shares,)."""
    i_tile, i_share = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), shares)
    i_t = i_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    b_of_q = tl.zeros([BLOCK_T], tl.float32)
    b_of_p = tl.zeros([BLOCK_T], tl.float32)
    first = i_share * blocks_per_share * BLOCK_V
    for i_start in range(first, tl.minimum(V, first + blocks_per_share * BLOCK_V), BLOCK_V):
        i_v = (i_start + tl.arange(0, BLOCK_V)).to(tl.int64)  # [BLOCK_V]
        b_q = _log_probabilities(
            p_s, p_s_weight, p_norm_q, i_t, i_v, stride_s, stride_s_weight, T, V, temperature,
            E_S, BLOCK_T, BLOCK_V, BLOCK_E,
        )  # [BLOCK_T, BLOCK_V]  # fmt: skip
        b_p = _log_probabilities(
            p_t, p_t_weight, p_norm_p, i_t, i_v, stride_t, stride_t_weight, T, V, temperature,
            E_T, BLOCK_T, BLOCK_V, BLOCK_E,
        )  # fmt: skip
        b_of_q += tl.sum(tl.exp(b_q) * _log_over_mean(b_q - b_p), 1)
        b_of_p += tl.sum(tl.exp(b_p) * _log_over_mean(b_p - b_q), 1)
    m_t, i_part = i_t < T, i_share.to(tl.int64) * T + i_t
    tl.store(p_parts + i_part, b_of_q / 2, mask=m_t)
    tl.store(p_parts + i_part + shares * tl.cast(T, tl.int64), b_of_p / 2, mask=m_t)


@triton.jit(do_not_specialize=["T", "V"])
def _linear_kl_dz(
    p_s, p_s_weight, p_t, p_t_weight, p_norm_q, p_norm_p, p_mean_r, p_grad, p_dz,
    stride_s, stride_s_weight, stride_t, stride_t_weight, stride_dz, T, V, temperature, KIND: tl.constexpr,
    E_S: tl.constexpr, E_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dz [T, whole blocks of V]: the gradient of the student's logits, for the V rows of the weights passed in.

    Grid: (cdiv(T, BLOCK_T) · cdiv(V, BLOCK_V),).
    """
    i_tile, i_block = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V))
    i_t = i_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    i_v = i_block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    m_t = i_t < T
    b_q = _log_probabilities(
        p_s, p_s_weight, p_norm_q, i_t, i_v, stride_s, stride_s_weight, T, V, temperature,
        E_S, BLOCK_T, BLOCK_V, BLOCK_E,
    )  # [BLOCK_T, BLOCK_V]  # fmt: skip
    b_p = _log_probabilities(
        p_t, p_t_weight, p_norm_p, i_t, i_v, stride_t, stride_t_weight, T, V, temperature,
        E_T, BLOCK_T, BLOCK_V, BLOCK_E,
    )  # fmt: skip
    if KIND == "forward":
        b_dz = tl.exp(b_q) - tl.exp(b_p)
    else:
        b_mean_r = tl.load(p_mean_r + i_t, mask=m_t, other=0.0)[:, None]
        b_r = b_q - b_p if KIND == "reverse" else _log_over_mean(b_q - b_p) / 2
        b_dz = tl.exp(b_q) * (b_r - b_mean_r)
    b_dz *= tl.load(p_grad + i_t, mask=m_t, other=0.0)[:, None]
    p_out = p_dz + (i_t * stride_dz)[:, None] + i_v[None, :]
    tl.store(p_out, b_dz.to(p_dz.dtype.element_ty), mask=m_t[:, None])


def _config(itemsize: int, target: Target) -> dict:
    """Launch parameters: the largest tiles of which two, and what is computed from them, fit into registers."""
    if itemsize == 4:  # "ieee" products run outside the tensor cores
        return {"BLOCK_T": 64, "BLOCK_V": 32, "BLOCK_E": 32, "num_warps": 4, "num_stages": 2}
    # Hopper and Blackwell read matmul operands from shared memory; on other GPUs they take registers too.
    block_v, block_e = (128, 64) if target.shared_bytes >= 200 << 10 else (64, 32)
    stages = 4 if target.backend == "cuda" else 2
    return {"BLOCK_T": 128, "BLOCK_V": block_v, "BLOCK_E": block_e, "num_warps": 8, "num_stages": stages}


def _operands(*tensors: Tensor) -> tuple[list[Tensor], list[int], dict]:
    """The tensors with aligned rows, their row strides, and the launch parameters."""
    rows = [aligned(x) for x in tensors]
    config = _config(max(x.itemsize for x in tensors), target_of(tensors[0].device))
    return rows, [x.stride(0) for x in rows], config


def _statistics_outputs(a, a_weight, b, b_weight, temperature):
    return tuple(a.new_empty(n, a.shape[0], dtype=torch.float32) for n in (2, 3))


@operator("linear_kl_statistics", _statistics_outputs)
def _statistics(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Maxima [2, T] of the logits of a and b, and the sums [3, T] relative to them: Σ e^a, Σ e^b and D."""
    T, V = a.shape[0], b_weight.shape[0]
    if not T:
        return _statistics_outputs(a, a_weight, b, b_weight, temperature)
    rows, strides, config = _operands(a, a_weight, b, b_weight)
    shares, blocks_per_share = shares_of(T, V, config, SHARE)
    parts = a.new_empty(5, shares, T, dtype=torch.float32)
    _linear_kl_online[(shares * triton.cdiv(T, config["BLOCK_T"]),)](
        *rows, parts, *strides, T, V, shares, blocks_per_share, temperature,
        E_A=rows[0].shape[1], E_B=rows[2].shape[1], **config,
    )  # fmt: skip
    maxima = parts[:2].amax(1)
    return maxima, _relative_to(maxima[:, None], parts[:2], parts[2:]).sum(1)


def _relative_to(new: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
    """The sums Σ e^a, Σ e^b and D [3, …, T], which are relative to their `maxima` [2, …, T], relative to `new` ones."""
    shift = maxima - new
    share_a, share_b = shift.exp()
    sum_a, sum_b, d = sums
    return torch.stack([share_a * sum_a, share_b * sum_b, share_a * (d + sum_a * (shift[0] - shift[1]))])


def _jsd_output(student, *_):
    return student.new_empty(2, student.shape[0], dtype=torch.float32)


@operator("linear_kl_jsd", _jsd_output)
def _jsd(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, norm_q: Tensor, norm_p: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Σ ½ q log(q / m) and Σ ½ p log(p / m)  [2, T], over the words that the weights hold."""
    T, V = student.shape[0], teacher_weight.shape[0]
    if not T:
        return _jsd_output(student)
    rows, strides, config = _operands(student, student_weight, teacher, teacher_weight)
    shares, blocks_per_share = shares_of(T, V, config, SHARE)
    parts = student.new_empty(2, shares, T, dtype=torch.float32)
    _linear_kl_jsd[(shares * triton.cdiv(T, config["BLOCK_T"]),)](
        *rows, norm_q.contiguous(), norm_p.contiguous(), parts, *strides, T, V, shares, blocks_per_share, temperature,
        E_S=rows[0].shape[1], E_T=rows[2].shape[1], **config,
    )  # fmt: skip
    return parts.sum(1)


def _backward_outputs(student, student_weight, *rest):
    needs = zip((student, student_weight), rest[-1], strict=True)
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in needs)


@operator("linear_kl_backward", _backward_outputs)
def _backward(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, norm_q: Tensor, norm_p: Tensor,
    mean_r: Tensor, grad: Tensor, temperature: float, kind: str, needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dhidden [T, E_s] and dweight [V, E_s] of the student; [0] where not needed."""
    T = student.shape[0]
    (h, weight, h_t, weight_t), strides, config = _operands(student, student_weight, teacher, teacher_weight)
    vectors = [x.contiguous() for x in (norm_q, norm_p, mean_r, grad / temperature)]

    def make_dz(entries: slice, dz: Tensor) -> None:
        V = entries.stop - entries.start
        _linear_kl_dz[(triton.cdiv(T, config["BLOCK_T"]) * triton.cdiv(V, config["BLOCK_V"]),)](
            h, weight[entries], h_t, weight_t[entries], *vectors, dz, *strides, dz.stride(0), T, V, temperature,
            KIND=kind, E_S=h.shape[1], E_T=h_t.shape[1], **config,
        )  # fmt: skip

    return gradients_by_chunks(make_dz, student, student_weight, config["BLOCK_V"], *needs)


def _triton_values(student, student_weight, teacher, teacher_weight, temperature, kind, group):
    """The divergence [T], (max, log Σ) [2, T] of q and of p, and Σ q r [T], which the forward kind does not use."""
    heads = (student, student_weight), (teacher, teacher_weight)
    first, second = reversed(heads) if kind == "forward" else heads
    maxima, sums = _statistics(*first, *second, temperature)
    if group is not None:
        high = maxima.clone()
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
        sums, maxima = _relative_to(high, maxima, sums), high
        dist.all_reduce(sums, group=group)
    norms = torch.stack([maxima, sums[:2].log()], 1)
    norm_q, norm_p = norms.flip(0) if kind == "forward" else norms
    if kind != "jsd":
        value = sums[2] / sums[0] + (sums[1] / sums[0]).log()
        return value, norm_q, norm_p, value
    parts = _jsd(student, student_weight, teacher, teacher_weight, norm_q, norm_p, temperature)
    if group is not None:
        dist.all_reduce(parts, group=group)
    return parts.sum(0), norm_q, norm_p, parts[0]


# Torch ----------------------------------------------------------------------------------------------------------------
def _torch_values(student, student_weight, teacher, teacher_weight, temperature, kind, group):
    """`_triton_values` in torch, by the tiles of head.py."""
    heads = student, student_weight, teacher, teacher_weight
    norm_q, norm_p = (_norm(hidden, weight, temperature, group) for hidden, weight in (heads[:2], heads[2:]))
    value, mean_r = torch.zeros_like(norm_q)
    for rows, _, log_p, log_q in _tiles_of_both(*heads, norm_q, norm_p, temperature):
        value[rows] += divergence(log_p, log_q, kind)
        if kind == "jsd":
            mean_r[rows] += (log_q.exp() * log_ratio(log_p, log_q, kind)).sum(-1)
    if group is not None:
        both = torch.stack([value, mean_r])
        dist.all_reduce(both, group=group)
        value, mean_r = both
    return value, norm_q, norm_p, mean_r if kind == "jsd" else value  # Σ q r of the reverse kind is its value


def _torch_gradients(
    student, student_weight, teacher, teacher_weight, norm_q, norm_p, mean_r, grad, temperature, kind, needs
):
    heads = student, student_weight, teacher, teacher_weight
    wanted = zip((student, student_weight), needs, strict=True)
    dhidden, dweight = (x.new_zeros(x.shape if needed else 0, dtype=norm_q.dtype) for x, needed in wanted)
    grad = grad / temperature
    for rows, columns, log_p, log_q in _tiles_of_both(*heads, norm_q, norm_p, temperature):
        if kind == "forward":
            dz = log_q.exp_().sub_(log_p.exp_())
        else:
            dz = log_ratio(log_p, log_q, kind).sub_(mean_r[rows, None]).mul_(log_q.exp_())
        hidden, weight = widened(student[rows]), widened(student_weight[columns])
        dz = dz.mul_(grad[rows, None]).to(hidden.dtype)
        if needs[0]:
            dhidden[rows] += dz @ weight
        if needs[1]:
            dweight[columns] += dz.t() @ hidden
    return dhidden.to(student.dtype), dweight.to(student_weight.dtype)


def _tiles_of_both(student, student_weight, teacher, teacher_weight, norm_q, norm_p, temperature):
    """(rows, columns, log p, log q) of every tile."""
    options = HeadOptions(temperature)

    def tile(hidden, weight, norm):
        top, log_sum = norm[:, rows, None]
        return logits_tile(hidden[rows], weight[columns], options).sub_(top).sub_(log_sum)

    for _, columns, rows in tiles(student.shape[0], student_weight.shape[0], student.device):
        yield rows, columns, tile(teacher, teacher_weight, norm_p), tile(student, student_weight, norm_q)


def _norm(hidden: Tensor, weight: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """The maximum and log Σ e^(z - max) of each token's logits, [2, T]."""
    no_targets = torch.empty(hidden.shape[0], 0, dtype=torch.int64, device=hidden.device)
    s = head_statistics(hidden, weight, no_targets, HeadOptions(temperature), group)
    return torch.stack([s.top, s.mass.log()])


# Public ---------------------------------------------------------------------------------------------------------------
class _LinearKL(Function):
    """The divergence of two whole heads, by the Triton kernels or by tiles in torch."""

    @staticmethod
    @without_autocast
    def forward(ctx, student, student_weight, teacher, teacher_weight, temperature, kind, group, kernels):
        heads = student, student_weight, teacher, teacher_weight
        value, *statistics = (_triton_values if kernels else _torch_values)(*heads, temperature, kind, group)
        ctx.save_for_backward(*heads, *statistics)
        ctx.options, ctx.gradients = (temperature, kind), _backward if kernels else _torch_gradients
        return value.clone()  # the caller may change it in place

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:2]
        gradients = ctx.gradients(*ctx.saved_tensors, grad, *ctx.options, needs)
        return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), *[None] * 6


def linear_kl(
    student: Tensor, student_weight: Tensor, teacher: Tensor | TopK, teacher_weight: Tensor | None, *,
    temperature: float = 1.0, kind: str = "forward", group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Per-token divergence [T], fp32 (fp64 for fp64); see the module's docstring. Gradients to the student only.

    student [T, E_s] and student_weight [V, E_s] of one float dtype, teacher [T, E_t] and teacher_weight [V, E_t] of
    one, possibly another; all on one device, any strides. With `group` both weights are shards of the vocabulary, as in
    `linear_logprob`.

    The teacher may also be a TopK, with teacher_weight None and its logp already at `temperature`. Ids that are out of
    range or repeated raise on a CPU; on a GPU, where checking would be a sync, they join the bucket for the rest and
    are counted (`head.invalid_targets`). That bucket's probability is at least the resolution of fp32; a logp of -inf
    counts as the log of the smallest number.
    Raises: ValueError for shapes, dtypes or devices that don't fit, unknown kinds, a temperature ≤ 0.
    Source: reverse and Jensen-Shannon divergence in distillation, arXiv 2306.13649.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    HeadOptions(temperature)  # raises
    check_head("linear_kl", student=student, student_weight=student_weight)
    T, V = student.shape[0], student_weight.shape[0]
    if isinstance(teacher, TopK):
        if teacher_weight is not None:
            raise ValueError("with a TopK teacher, teacher_weight must be None")
        require_one_device(student, student_weight, *teacher)
        ids = check_top_k(teacher, T, vocab_size(student_weight, group))
        return top_k_kl(student, student_weight, ids, teacher.logp.detach(), temperature, kind, group)
    if teacher_weight is None:
        raise ValueError(f"teacher_weight is None, wanted [V, E_t]: teacher is a {type(teacher)}, not a TopK")
    check_head("linear_kl", teacher=teacher, teacher_weight=teacher_weight)
    if teacher.shape[0] != T or teacher_weight.shape[0] != V:
        seen = f"{list(teacher.shape)}, {list(teacher_weight.shape)}"
        raise ValueError(f"teacher and teacher_weight are {seen}, wanted [{T}, E_t] and [{V}, E_t], as the student's")
    heads = student, student_weight, teacher.detach(), teacher_weight.detach()
    return _LinearKL.apply(*heads, temperature, kind, group, use_triton(*heads))


def _example(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    def head(width: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(shape["V"], width, device=device) / width**0.5
        return torch.randn(shape["T"], width, dtype=dtype, device=device), weight.to(dtype)

    student, student_weight = (x.requires_grad_() for x in head(shape["E"]))
    kind = KINDS[shape.get("kind", 0)]
    return (student, student_weight, *head(2 * shape["E"])), {"temperature": 0.5, "kind": kind}


def _launches(target: Target) -> tuple[Launch, ...]:
    def launch(kernel, dtype, **constexprs):
        widths = {"E_A": 2048, "E_B": 4096} if "E_A" in kernel.arg_names else {"E_S": 2048, "E_T": 4096}
        config = constexprs | widths | _config(4 if dtype == "fp32" else 2, target)
        types = dict.fromkeys(("p_a", "p_b", "p_s", "p_t"), f"*{dtype}")
        types |= {f"{name}_weight": kind for name, kind in types.items()} | {"p_dz": f"*{dtype}"}
        return launch_of(kernel, " ".join((*constexprs.values(), dtype)), config, types)

    return (
        *(launch for K in (8, 64) for launch in head_launches(target, "bf16", "EXCLUDE", K=K)),  # a top-k teacher
        *(launch(kernel, dtype) for kernel in (_linear_kl_online, _linear_kl_jsd) for dtype in ("bf16", "fp32")),
        *(launch(_linear_kl_dz, "bf16", KIND=kind) for kind in KINDS),
        launch(_linear_kl_dz, "fp32", KIND="jsd"),
    )


register(
    name="linear_kl",
    function=linear_kl,
    reference=linear_kl_reference,
    example=_example,
    shape={"T": 4096, "E": 2048, "V": 128256},
    flops=lambda s: 6 * s["T"] * s["V"] * s["E"],
    bytes=lambda s, size: 3 * size * s["E"] * (s["T"] + s["V"]) + 4 * s["T"],
    backward_flops=lambda s: 10 * s["T"] * s["V"] * s["E"],
    backward_bytes=lambda s, size: 4 * size * s["E"] * (s["T"] + s["V"]) + 4 * s["T"],
    launches=_launches,
)
