"""What is minimised. Each objective is a few lines of torch over one primitive, `model.logprob`.

An objective has three parts:

    prepare(networks, batches)   before the first backward, no gradient: reference or old log-probs → batch.fields
    outputs(networks, batch)     the forward pass
    loss(outputs, batch)         {term: Term(sum, denominator, coefficient)}, {metric: Metric(sum, denominator)}

A term is a *sum* over the batch and the name of a count in `batch.counts`. The trainer adds the counts up over
micro-batches and data-parallel ranks and minimises Σ coefficient · sum / global count: there is no mean of means.

To add one: write it here, name it in its stage's driver, and hold it to its formula in tests/core/test_objectives.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritium.core.batch import PackedBatch
from tritium.kernels import segment_sum
from tritium.kernels.linear_logprob import LogProb
from tritium.model.transformer import Transformer


class Term(NamedTuple):
    sum: Tensor  # scalar with a gradient
    denominator: str  # a name in batch.counts
    coefficient: float = 1.0


class Metric(NamedTuple):
    sum: Tensor  # scalar, detached
    denominator: str


Loss = tuple[dict[str, Term], dict[str, Metric]]
Networks = nn.ModuleDict  # "policy", and what else the stage has


class Objective:
    """The protocol; `prepare` may stay empty."""

    def prepare(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        """Fill `batch.fields`, without a gradient, with what must be fixed before the parameters move."""

    def outputs(self, networks: Networks, batch: PackedBatch) -> Any:
        """The forward pass; by default the policy's log-probs at the supervised tokens."""
        return supervised_logprob(networks["policy"], batch)

    def loss(self, outputs: Any, batch: PackedBatch) -> Loss:
        raise NotImplementedError


def supervised_logprob(model: Transformer, batch: PackedBatch, temperature: float = 1.0) -> LogProb:
    """LogProb of the supervised tokens, [N] each."""
    hidden = model.hidden(batch.tokens, batch.cu_seqlens, positions=batch.positions)
    return model.logprob(hidden, batch.targets, batch.supervised, temperature=temperature)


def sequence_sum(values: Tensor, batch: PackedBatch) -> Tensor:
    """Sum values of the supervised tokens, [N], within each document: [S]."""
    spread = values.new_zeros(len(batch.tokens)).index_copy(0, batch.supervised, values)  # [T]
    return segment_sum(spread, batch.cu_seqlens)[: batch.sequences]


def supervised(values: Tensor, batch: PackedBatch, like: Tensor) -> Tensor:
    """A per-token field [T] at the supervised tokens, [N], in the dtype of `like`."""
    return values.index_select(0, batch.supervised).to(like.dtype)


# ---------------------------------------------------------------------------------------------- cross-entropy


class CrossEntropy(Objective):
    """−Σ_t w_t log p(y_t | y_<t) / Σ_t w_t: pretraining and supervised fine-tuning."""

    def loss(self, outputs: LogProb, batch: PackedBatch) -> Loss:
        weights = supervised(batch.weights, batch, outputs.logp)
        metrics = {
            "accuracy": Metric((weights * outputs.hit).sum().detach(), "tokens"),
            "entropy": Metric((weights * outputs.entropy).sum().detach(), "tokens"),
        }
        return {"loss": Term(-(weights * outputs.logp).sum(), "tokens")}, metrics


# ---------------------------------------------------------------------------------------------- reward models


class RewardObjective(Objective):
    """Base of the reward objectives: the score of each document, [S]."""

    def outputs(self, networks: Networks, batch: PackedBatch) -> Tensor:
        return networks["reward"].scores(batch.tokens, batch.cu_seqlens, batch.positions)[: batch.sequences]


@dataclass
class Pairwise(RewardObjective):
    """Bradley-Terry: −log σ(r_chosen − r_rejected) (Ouyang et al., arXiv 2203.02155, eq. 1).

    Documents 2i and 2i+1 are the chosen and the rejected answer of pair i. `centering` · (r_c + r_r)² keeps the
    scores around 0 (Eisenstein et al., arXiv 2312.09244).
    """

    centering: float = 0.0

    def loss(self, outputs: Tensor, batch: PackedBatch) -> Loss:
        chosen, rejected = outputs.view(-1, 2).unbind(-1)  # [pairs]
        margin = chosen - rejected
        terms = {"loss": Term(-F.logsigmoid(margin).sum(), "pairs")}
        if self.centering:
            terms["centering"] = Term((chosen + rejected).square().sum(), "pairs", self.centering)
        metrics = {
            "accuracy": Metric((margin > 0).sum().detach(), "pairs"),
            "margin": Metric(margin.sum().detach(), "pairs"),
        }
        return terms, metrics


class Listwise(RewardObjective):
    """Plackett-Luce over a ranking, best first: −Σ_k [r_k − log Σ_{j ≥ k} exp r_j] (Luce 1959; Cao et al. 2007).

    `fields["rank"]` [S] counts from 0 in each ranking; documents of a ranking stand side by side, best first.
    """

    def loss(self, outputs: Tensor, batch: PackedBatch) -> Loss:
        starts = (batch.fields["rank"] == 0).nonzero()[:, 0].tolist()
        lists = [outputs[s:e] for s, e in zip(starts, [*starts[1:], len(outputs)], strict=True)]
        losses = [plackett_luce(scores) for scores in lists]
        best = [(scores[0] >= scores.max()).float() for scores in lists]
        zero = outputs.sum() * 0.0
        metrics = {"accuracy": Metric(sum(best, zero.detach()), "rankings")}
        return {"loss": Term(sum(losses, zero), "rankings")}, metrics


def plackett_luce(scores: Tensor) -> Tensor:
    """Negative log-likelihood of the order 0, 1, 2, … of `scores` [n]."""
    rest = scores.flip(0).logcumsumexp(0).flip(0)  # log Σ_{j ≥ k} exp r_j
    return (rest - scores).sum()


# ---------------------------------------------------------------------------------------------- preferences


@dataclass
class DPO(Objective):
    """−log σ(β [(π_c − ref_c) − (π_r − ref_r)]), sums of log-probs over the answer (Rafailov et al., arXiv 2305.18290).

    Documents 2i and 2i+1 are the chosen and the rejected answer of pair i. `sft` adds that much of the chosen
    answer's mean cross-entropy per token (Pang et al., arXiv 2404.19733, eq. 1).
    """

    beta: float = 0.1
    sft: float = 0.0

    @torch.no_grad()
    def prepare(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        for batch in batches:
            if "reference" in batch.fields:  # an evaluation's batch, seen before
                continue
            logp = supervised_logprob(networks["reference"], batch).logp
            batch.fields["reference"] = sequence_sum(logp, batch)  # [S]

    def loss(self, outputs: LogProb, batch: PackedBatch) -> Loss:
        policy = sequence_sum(outputs.logp, batch)  # [S]
        chosen, rejected = (self.beta * (policy - batch.fields["reference"])).view(-1, 2).unbind(-1)  # [pairs]
        terms = {"loss": Term(-F.logsigmoid(chosen - rejected).sum(), "pairs")}
        if self.sft:
            lengths = sequence_sum(torch.ones_like(outputs.logp), batch)  # [S]
            terms["sft"] = Term(-(policy / lengths).view(-1, 2)[:, 0].sum(), "pairs", self.sft)
        metrics = {
            "accuracy": Metric((chosen > rejected).sum().detach(), "pairs"),
            "margin": Metric((chosen - rejected).sum().detach(), "pairs"),
            "chosen_reward": Metric(chosen.sum().detach(), "pairs"),
            "rejected_reward": Metric(rejected.sum().detach(), "pairs"),
        }
        return terms, metrics


# ---------------------------------------------------------------------------------------------- policy gradient


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
