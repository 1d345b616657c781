"""Distillation: a student learns the distribution of a teacher with the same vocabulary, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tritium.core.batch import PackedBatch
from tritium.core.kept import Kept, sequence_keys
from tritium.core.objectives.base import Loss, Metric, Networks, Objective, Term, sequence_sum
from tritium.core.objectives.preference import Preference
from tritium.kernels import TopK, linear_kl
from tritium.kernels.linear_logprob import LogProb
from tritium.model.transformer import HEAD_ROWS, Transformer
from tritium.parallel.context import Split, gather_results


class Taught(NamedTuple):
    """The student at the supervised tokens: log-probs, and the divergence from the teacher, [N]."""

    policy: LogProb
    kl: Tensor


@dataclass
class Distill(Objective):
    """The mean over the supervised tokens of D(teacher, student): forward KL(teacher ‖ student), "reverse", or "jsd"
    (Hinton et al., arXiv 1503.02531; Agarwal et al., arXiv 2306.13649, eq. 1 to 3), at `temperature`, without the
    factor τ². On answers that the student drew, it is on-policy distillation (GKD). `sft` adds their cross-entropy.

    With `top_k`, the teacher's k likeliest tokens are `kept` over epochs by document, and the rest is one bucket.
    """

    frozen_networks = ("teacher",)

    kind: str = "forward"
    temperature: float = 1.0
    sft: float = 0.0
    top_k: int = 0
    kept: Kept | None = None  # where, with `top_k`; by default in a temporary file

    def __post_init__(self):
        self.kept = self.kept or Kept()

    @torch.no_grad()
    def prepare(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        if self.top_k:
            ask = lambda batch: self.ask(networks["teacher"], batch)  # noqa: E731
            self.kept.fill(batches, ask, np.float32, networks["policy"].mesh)

    def ask(self, teacher: Transformer, batch: PackedBatch) -> Sequence[Tensor]:
        """The teacher's k likeliest tokens at the supervised tokens of each sequence, and their log-probs, [n, 2, k]
        fp32 (which holds ids below 2²⁴); a piece at a time."""
        hidden = teacher.hidden(batch.tokens, batch.cu_seqlens, positions=batch.positions)
        found = []
        for index in batch.supervised.split(HEAD_ROWS):
            logp = (teacher.project(hidden.index_select(0, index)).float() / self.temperature).log_softmax(-1)
            best = logp.topk(min(self.top_k, logp.shape[-1]), sorted=False)
            found.append(torch.stack([best.indices.float(), best.values], 1))  # [n, 2, k]
        lengths = sequence_sum(torch.ones(len(batch.supervised), device=hidden.device), batch).long().tolist()
        return torch.cat(found).split(lengths)

    def outputs(self, networks: Networks, batch: PackedBatch) -> Taught:
        policy, teacher = networks["policy"], networks["teacher"]
        hidden = policy.hidden(batch.tokens, batch.cu_seqlens, positions=batch.positions)
        if self.top_k:
            kept = np.concatenate(self.kept.get(sequence_keys(batch), np.float32))
            k = min(self.top_k, policy.config.vocab_size)
            ids, logp = torch.tensor(kept, device=hidden.device).view(-1, 2, k).unbind(1)  # [N, k]
            top = TopK(ids.long(), logp)
            own = hidden.index_select(0, batch.supervised)
            kl = linear_kl(own, policy.head_weight, top, None, temperature=self.temperature, kind=self.kind)
        else:
            kl = divergence(policy, hidden, teacher, batch, self.temperature, self.kind)
        return Taught(policy.logprob(hidden, batch.targets, batch.supervised), kl)

    def loss(self, outputs: Taught, batch: PackedBatch) -> Loss:
        weights = batch.weights.index_select(0, batch.supervised).to(outputs.kl.dtype)  # [N]
        terms = {"loss": Term((weights * outputs.kl).sum(), "tokens")}
        nll = -(weights * outputs.policy.logp).sum()
        if self.sft:
            terms["sft"] = Term(nll, "tokens", self.sft)
        return terms, {"nll": Metric(nll.detach(), "tokens")}


def divergence(
    policy: Transformer, hidden: Tensor, teacher: Transformer, batch: PackedBatch, temperature: float, kind: str
) -> Tensor:
    """D(teacher, policy) at the supervised tokens, [N], without logits; gradients through `hidden` and the head.

    The teacher runs here, on the same tokens: nothing of it is stored.
    """
    with torch.no_grad():
        taught = teacher.hidden(batch.tokens, batch.cu_seqlens, positions=batch.positions)
    split, index = Split.of(len(batch.tokens), policy.mesh), batch.supervised
    own = index
    if split.group is not None:
        own = split.place(index)
        own = own[own >= 0]  # here the host waits for their number
    padded = F.pad(own, (0, -len(own) % HEAD_ROWS))  # few shapes, as in `Transformer.local_logprob`
    heads = hidden.index_select(0, padded), policy.head_weight, taught.index_select(0, padded), teacher.head_weight
    kl = linear_kl(*heads, temperature=temperature, kind=kind, group=policy.mesh.tp_group)[: len(own)]
    if split.group is None:
        return kl
    local = kl.new_zeros(split.local).index_copy(0, own, kl)
    return gather_results(local, split).index_select(0, index)


@dataclass
class DualLevel(Preference):
    """Preference distillation on two levels: w₀ L_pairs / pairs + w₁ Σ KL⁺ / tokens⁺ + w₂ Σ KL⁻ / tokens⁻.

    L is a loss of pairs (`Preference`); KL(teacher ‖ student) is at the tokens of the positive (chosen) and of the
    negative answers, each with a denominator of its own: "positive_tokens" and "negative_tokens".
    """

    frozen_networks = ("teacher",)

    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    kind: str = "forward"

    def outputs(self, networks: Networks, batch: PackedBatch) -> Taught:
        policy = networks["policy"]
        hidden = policy.hidden(batch.tokens, batch.cu_seqlens, positions=batch.positions)
        kl = divergence(policy, hidden, networks["teacher"], batch, 1.0, self.kind)
        return Taught(policy.logprob(hidden, batch.targets, batch.supervised), kl)

    def loss(self, outputs: Taught, batch: PackedBatch) -> Loss:
        terms, metrics = super().loss(outputs.policy, batch)
        terms = {k: t._replace(coefficient=t.coefficient * self.weights[0]) for k, t in terms.items()}
        positive, negative = sequence_sum(outputs.kl, batch).view(-1, 2).sum(0)
        terms["kl_positive"] = Term(positive, "positive_tokens", self.weights[1])
        terms["kl_negative"] = Term(negative, "negative_tokens", self.weights[2])
        return terms, metrics
