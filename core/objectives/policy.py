"""Policy gradients: what rewards of sampled answers teach the policy that drew them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritium.core.batch import PackedBatch
from tritium.core.objectives.base import (
    Loss,
    Metric,
    Networks,
    Objective,
    Term,
    sequence_sum,
    supervised,
    supervised_logprob,
)
from tritium.kernels.linear_logprob import LogProb


@dataclass
class GRPO(Objective):
    """−min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) + β k3, per token (Shao et al., arXiv 2402.03300, eq. 3 and 4).

    ρ = π / π_old. A is the group's advantage, one number per sequence in `fields["advantages"]`, as is
    `normalization`: "token" divides by the batch's tokens (DAPO, arXiv 2503.14476, eq. 8), "sequence" takes the mean
    within a sequence first, as the paper does. k3 = exp(ref − π) − (ref − π) − 1 ≥ 0 is the KL's estimator
    (Schulman, "Approximating KL divergence", 2020), whose gradient here is that of the estimator itself.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    normalization: str = "token"
    temperature: float = 1.0

    @torch.no_grad()
    def prepare(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        for batch in batches:
            if "old_logp" in batch.fields:  # a later update on the same rollout
                continue
            batch.fields["old_logp"] = supervised_logprob(networks["policy"], batch, self.temperature).logp  # [N]
            if self.beta:
                reference = supervised_logprob(networks["reference"], batch, self.temperature)
                batch.fields["reference_logp"] = reference.logp  # [N]

    def outputs(self, networks: Networks, batch: PackedBatch) -> LogProb:
        return supervised_logprob(networks["policy"], batch, self.temperature)

    def loss(self, outputs: LogProb, batch: PackedBatch) -> Loss:
        weights = supervised(batch.weights, batch, outputs.logp)  # [N]
        advantages = self.per_token(batch.fields["advantages"], batch).to(outputs.logp.dtype)  # [N]
        denominator = "tokens"
        if self.normalization == "sequence":
            lengths = sequence_sum(weights, batch)
            weights, denominator = weights / self.per_token(lengths, batch), "sequences"
        log_ratio = outputs.logp - batch.fields["old_logp"]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        terms = {"loss": Term(-(weights * surrogate).sum(), denominator)}
        if self.beta:
            difference = batch.fields["reference_logp"] - outputs.logp
            k3 = difference.exp() - difference - 1.0
            terms["kl"] = Term((weights * k3).sum(), denominator, self.beta)
        outside = ratio * advantages > clipped * advantages
        metrics = {
            "entropy": Metric((weights * outputs.entropy).sum().detach(), denominator),
            "ratio": Metric((weights * ratio).sum().detach(), denominator),
            "clip_fraction": Metric((weights * outside).sum().detach(), denominator),
            "old_kl": Metric((weights * (ratio - log_ratio - 1.0)).sum().detach(), denominator),
        }
        return terms, metrics

    @staticmethod
    def per_token(values: Tensor, batch: PackedBatch) -> Tensor:
        """A per-sequence number [S] at each of its supervised tokens, [N]."""
        document = torch.searchsorted(batch.cu_seqlens[1:], batch.supervised.to(torch.int32), right=True)
        return values.index_select(0, document)


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """(r − mean) / (std + eps) within each group: rewards [groups, n] → the same shape.

    `scale=False` leaves the standard deviation out (Dr. GRPO, arXiv 2503.20783, section 3.2).
    """
    centered = rewards - rewards.mean(-1, keepdim=True)
    return centered / (rewards.std(-1, keepdim=True) + eps) if scale else centered
