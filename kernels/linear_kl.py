"""Divergence between a teacher's and a student's next-token distributions, both linear heads, without their logits.

    p = softmax(teacher @ teacher_weightᵀ / τ),   q = softmax(student @ student_weightᵀ / τ),   m = (p + q) / 2
    forward: KL(p ‖ q)      reverse: KL(q ‖ p)      jsd: ½ KL(p ‖ m) + ½ KL(q ‖ m)         no factor τ²

Gradients to the student's logits z (before / τ), with r_v = log q_v - log p_v, or ½ (log q_v - log m_v):
    forward: (q - p) / τ        reverse, jsd: q_v (r_v - Σ_u q_u r_u) / τ

Must spend 2·T·V·(E_s + E_t) FLOPs forward. The torch path walks the tiles of head.py twice, first for the two
log-sum-exps, then for the divergence, and once more backward. A top-k teacher's divergence is one over k + 1 buckets,
and needs only the student's statistics.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritium.kernels.head import HeadOptions, check_head, head_statistics, logits_tile, tiles, vocab_size
from tritium.kernels.registry import OpSpec, register

KINDS = ("forward", "reverse", "jsd")
LOG_2 = 0.6931471805599453


class TopK(NamedTuple):
    """A teacher's k most likely tokens; what is left of its probability is one further bucket."""

    ids: Tensor  # [T, k] int64, distinct in a row
    logp: Tensor  # [T, k] log-probabilities under the whole softmax


def divergence(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """Σ over the last dimension of the divergence between log-probabilities of a teacher p and a student q."""
    if kind == "forward":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - LOG_2
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


def linear_kl_reference(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopK,
    teacher_weight: Tensor | None,
    *,
    temperature: float = 1.0,
    kind: str = "forward",
) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q = ((student @ student_weight.t()).to(dtype) / temperature).log_softmax(-1)
    if not isinstance(teacher, TopK):
        return divergence(((teacher @ teacher_weight.t()).to(dtype) / temperature).log_softmax(-1), log_q, kind)
    log_p = teacher.logp.to(dtype)
    rest = torch.ones_like(log_q, dtype=torch.bool).scatter_(1, teacher.ids, False)
    log_q_rest = log_q.masked_fill(~rest, -torch.inf).logsumexp(-1, True)
    log_p_rest = (-log_p.exp().sum(-1, True)).log1p()
    return divergence(torch.cat([log_p, log_p_rest], 1), torch.cat([log_q.gather(1, teacher.ids), log_q_rest], 1), kind)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_weight, teacher, teacher_weight, lse_q, lse_p, temperature, kind, group):
        T, V = student.shape[0], student_weight.shape[0]
        options = HeadOptions(temperature)
        # the divergence, and Σ q r for the gradient (see the module's docstring)
        value, mean_r = torch.zeros_like(lse_q), torch.zeros_like(lse_q)
        for _, columns, rows in tiles(T, V, student.device):
            log_q = logits_tile(student[rows], student_weight[columns], options).sub_(lse_q[rows, None])
            log_p = logits_tile(teacher[rows], teacher_weight[columns], options).sub_(lse_p[rows, None])
            value[rows] += divergence(log_p, log_q, kind)
            if kind != "forward":
                mean_r[rows] += (log_q.exp() * _ratio(log_p, log_q, kind)).sum(-1)
        if group is not None:
            both = torch.stack([value, mean_r])
            dist.all_reduce(both, group=group)
            value, mean_r = both.unbind()
        ctx.save_for_backward(student, student_weight, teacher, teacher_weight, lse_q, lse_p, mean_r)
        ctx.options, ctx.kind = options, kind
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, student_weight, teacher, teacher_weight, lse_q, lse_p, mean_r = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(student, dtype=lse_q.dtype) if needs_hidden else None
        dweight = torch.zeros_like(student_weight, dtype=lse_q.dtype) if needs_weight else None
        grad = grad / ctx.options.temperature
        for _, columns, rows in tiles(student.shape[0], student_weight.shape[0], student.device):
            log_q = logits_tile(student[rows], student_weight[columns], ctx.options).sub_(lse_q[rows, None])
            log_p = logits_tile(teacher[rows], teacher_weight[columns], ctx.options).sub_(lse_p[rows, None])
            if ctx.kind == "forward":
                dz = log_q.exp_().sub_(log_p.exp_())
            else:
                dz = _ratio(log_p, log_q, ctx.kind).sub_(mean_r[rows, None]).mul_(log_q.exp_())
            dz = dz.mul_(grad[rows, None]).to(student.dtype)
            if needs_hidden:
                dhidden[rows] += dz @ student_weight[columns]
            if needs_weight:
                dweight[columns] += dz.t() @ student[rows]
        dhidden = dhidden.to(student.dtype) if needs_hidden else None
        return dhidden, dweight.to(student_weight.dtype) if needs_weight else None, *[None] * 7


def _ratio(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """r of the module's docstring: what a change of log q weighs in the reverse and the Jensen-Shannon divergence."""
    if kind == "reverse":
        return log_q - log_p
    return (log_q - torch.logaddexp(log_p, log_q)).add_(LOG_2).div_(2)


def _lse(hidden: Tensor, weight: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    no_targets = torch.empty(hidden.shape[0], 0, dtype=torch.int64, device=hidden.device)
    return head_statistics(hidden, weight, no_targets, HeadOptions(temperature), group).lse


def _top_k_kl(student, student_weight, teacher: TopK, temperature: float, kind: str, group) -> Tensor:
    """Buckets: the k tokens, and the rest, whose log-sum-exp is computed by itself (1 - Σ q would cancel)."""
    options = HeadOptions(temperature, exclude=True)
    rest, picked, *_ = head_statistics(student, student_weight, teacher.ids.long(), options, group)
    z = torch.cat([picked, rest[:, None]], 1)  # [T, k + 1]
    log_q = z - z.logsumexp(-1, True)
    log_p = teacher.logp.to(z.dtype)
    log_p_rest = (-log_p.exp().sum(-1, True)).clamp(min=-1).log1p().clamp_min(torch.finfo(z.dtype).min / 2)
    return divergence(torch.cat([log_p, log_p_rest], 1), log_q, kind)


def linear_kl(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopK,
    teacher_weight: Tensor | None,
    *,
    temperature: float = 1.0,
    kind: str = "forward",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Per-token divergence [T], fp32 (fp64 for fp64); see the module's docstring. Gradients to the student only.

    student [T, E_s], student_weight [V, E_s], teacher [T, E_t], teacher_weight [V, E_t], or a TopK (then the weight is
    None, and its logp are at `temperature` already). With `group` both weights are shards of the vocabulary, as in
    `linear_logprob`. Raises ValueError on shapes that don't fit and unknown kinds.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_head(student, student_weight, ("student", "student_weight"))
    if isinstance(teacher, TopK):
        if teacher_weight is not None:
            raise ValueError("a TopK teacher has no weight: pass teacher_weight=None")
        T, V = student.shape[0], vocab_size(student_weight, group)
        if teacher.ids.shape != teacher.logp.shape or teacher.ids.shape[:1] != (T,) or teacher.ids.shape[1] >= V:
            shapes = f"{tuple(teacher.ids.shape)} and {tuple(teacher.logp.shape)}"
            raise ValueError(f"TopK must hold ids and logp [{T}, k] with k < {V}, got {shapes}")
        return _top_k_kl(student, student_weight, teacher, temperature, kind, group)
    check_head(teacher, teacher_weight, ("teacher", "teacher_weight"))
    if teacher.shape[0] != student.shape[0] or teacher_weight.shape[0] != student_weight.shape[0]:
        wanted = f"{student.shape[0]} tokens and {student_weight.shape[0]} words, as the student"
        raise ValueError(f"the teacher must have {wanted}: {tuple(teacher.shape)}, {tuple(teacher_weight.shape)}")
    with torch.no_grad():
        lse_q = _lse(student, student_weight, temperature, group)
        lse_p = _lse(teacher, teacher_weight, temperature, group)
    teacher, teacher_weight = teacher.detach(), teacher_weight.detach()
    return _LinearKL.apply(student, student_weight, teacher, teacher_weight, lse_q, lse_p, temperature, kind, group)


def _example(shape, dtype, device):
    def head(width: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(shape["V"], width, device=device) / width**0.5
        return torch.randn(shape["T"], width, dtype=dtype, device=device), weight.to(dtype)

    student, student_weight = (x.requires_grad_() for x in head(shape["E"]))
    return (student, student_weight, *head(2 * shape["E"])), {"temperature": 2.0}


register(
    OpSpec(
        name="linear_kl",
        function=linear_kl,
        reference=linear_kl_reference,
        example=_example,
        shapes=(
            {"T": 1, "E": 8, "V": 2},
            {"T": 13, "E": 24, "V": 101},
            {"T": 0, "E": 8, "V": 5},
            {"T": 4096, "E": 256, "V": 8192},
        ),
        flops=lambda s: 6 * s["T"] * s["V"] * s["E"],
        bytes=lambda s, size: 3 * size * s["E"] * (s["T"] + s["V"]) + 4 * s["T"],
        tolerance=1e-4,  # a difference of log-probabilities
    )
)
