"""Divergences between a teacher's distribution p and a student's q; also of a teacher cut to its k likeliest tokens.

    forward: KL(p ‖ q)      reverse: KL(q ‖ p)      jsd: ½ KL(p ‖ m) + ½ KL(q ‖ m),  m = (p + q) / 2

Of a top-k teacher the k tokens are k buckets, and what is left is one more: Σ over k + 1 buckets, a lower bound of the
divergence over the vocabulary. It needs only statistics of the student's logits (head.py): those of the k, and the
log-sum-exp of all others.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.blocks import require_float
from tritium.kernels.head import HeadOptions, check_targets, head_statistics, refuse

KINDS = ("forward", "reverse", "jsd")
LOG_2 = 0.6931471805599453


class TopK(NamedTuple):
    """A teacher's k most likely tokens; what is left of its probability is one further bucket."""

    ids: Tensor  # [T, k] int32 or int64, distinct in a row; -1 is none
    logp: Tensor  # [T, k] log-probabilities under the whole softmax, of any float dtype


def log_ratio(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """log q - log p, or for the Jensen-Shannon divergence ½ (log q - log m): what a change of log q weighs."""
    if kind != "jsd":
        return log_q - log_p
    return (log_q - torch.logaddexp(log_p, log_q)).add_(LOG_2).div_(2)


def divergence(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """Σ over the last dimension of the divergence between log-probabilities of a teacher p and a student q."""
    terms = {"forward": [(log_p, log_q)], "reverse": [(log_q, log_p)], "jsd": [(log_p, log_q), (log_q, log_p)]}
    return sum((own.exp() * log_ratio(other, own, kind)).sum(-1) for own, other in terms[kind])


def log_rest(logp: Tensor) -> Tensor:
    """log(1 - Σ e^logp) [T, 1]. What is left below the resolution of fp32 is taken to be just that."""
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    return (-logp.exp().sum(-1, True)).clamp_min(torch.finfo(logp.dtype).eps - 1).log1p()


def check_top_k(teacher: TopK, tokens: int, vocab: int) -> Tensor:
    """The ids that count, and -1 for the others; raises and counts as `check_targets`, repeated ones too."""
    require_float("linear_kl", **{"TopK.logp": teacher.logp})
    shape = tuple(teacher.logp.shape)
    if len(shape) != 2 or shape[0] != tokens or shape[1] >= vocab or tuple(teacher.ids.shape) != shape:
        shapes = f"{list(teacher.ids.shape)} and {list(shape)}"
        raise ValueError(f"linear_kl: TopK must hold ids and logp [{tokens}, k] with k < {vocab}, got {shapes}")
    ids = check_targets("linear_kl", teacher.ids, shape, vocab, -1, "TopK.ids")
    ordered, order = ids.sort(-1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    repeated = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, order[:, 1:], again)
    refuse(ids, repeated, "linear_kl: TopK.ids hold {} twice for one token")
    return ids.masked_fill(repeated, -1)


def top_k_kl(student, student_weight, ids, logp, temperature: float, kind: str, group) -> Tensor:
    """Buckets: the k tokens, and the rest, whose log-sum-exp is computed by itself (1 - Σ q would cancel)."""
    rest, picked, *_ = head_statistics(student, student_weight, ids, HeadOptions(temperature, exclude=True), group)
    here = F.pad(ids >= 0, (0, 1), value=True)  # [T, k + 1]; what is not here has p = q
    low = math.log(torch.finfo(rest.dtype).tiny)  # what is less likely than that, has p = 0
    logp = logp.masked_fill(~here[:, :-1], -torch.inf)
    log_p = torch.cat([logp.to(rest.dtype).clamp_min(low), log_rest(logp).to(rest.dtype)], 1)
    z = torch.cat([picked, rest[:, None]], 1).masked_fill(~here, -torch.inf)
    return divergence(log_p, torch.where(here, z.log_softmax(-1), low), kind)
