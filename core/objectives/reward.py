"""Reward models: scores from pairs and rankings."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from tritium.core.batch import PackedBatch
from tritium.core.objectives.base import Loss, Metric, Networks, Objective, Term


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
