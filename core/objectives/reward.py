"""Reward models: scores from pairs, rankings, scores, and steps that are right or wrong."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tritium.core.batch import PackedBatch
from tritium.core.objectives.base import Loss, Metric, Networks, Objective, Term, smoothed, supervised


class RewardObjective(Objective):
    """Base of the reward objectives: the score of each document, [S]."""

    def outputs(self, networks: Networks, batch: PackedBatch) -> Tensor:
        return networks["reward"].scores(batch.tokens, batch.cu_seqlens, batch.positions)[: batch.sequences]


@dataclass
class Pairwise(RewardObjective):
    """Bradley-Terry: −log σ(r_chosen − r_rejected − m) (Ouyang et al., arXiv 2203.02155, eq. 1).

    Documents 2i and 2i+1 are the chosen and the rejected answer of pair i. The margin m is `fields["margin"]` of the
    chosen one, where there is that field (Llama 2, arXiv 2307.09288, eq. 2). `centering` · (r_c + r_r)² keeps the
    scores around 0 (Eisenstein et al., arXiv 2312.09244); a share `label_smoothing` of the labels is taken to be wrong.
    """

    centering: float = 0.0
    label_smoothing: float = 0.0

    def loss(self, outputs: Tensor, batch: PackedBatch) -> Loss:
        chosen, rejected = outputs.view(-1, 2).unbind(-1)  # [pairs]
        margin = chosen - rejected
        wanted = batch.fields["margin"].view(-1, 2)[:, 0].to(margin.dtype) if "margin" in batch.fields else 0.0
        terms = {"loss": Term(smoothed(margin - wanted, self.label_smoothing).sum(), "pairs")}
        if self.centering:
            terms["centering"] = Term((chosen + rejected).square().sum(), "pairs", self.centering)
        return terms, margin_metrics(margin)


def margin_metrics(margin: Tensor) -> dict[str, Metric]:
    return {"accuracy": Metric((margin > 0).sum().detach(), "pairs"), "margin": Metric(margin.sum().detach(), "pairs")}


class Comparison(RewardObjective):
    """A model that sees both answers: −½ log σ(s(c, r)) − ½ log σ(−s(r, c)), s the log-odds that the first is better
    (PairRM, Jiang et al., arXiv 2306.02561, section 3.2): both orders, so that no place is favoured.

    Documents 2i and 2i+1 show pair i, the chosen answer first, then the rejected one first.
    """

    def loss(self, outputs: Tensor, batch: PackedBatch) -> Loss:
        first, second = outputs.view(-1, 2).unbind(-1)  # [pairs]
        losses = -(F.logsigmoid(first) + F.logsigmoid(-second)) / 2
        return {"loss": Term(losses.sum(), "pairs")}, margin_metrics((first - second) / 2)


@dataclass
class Scoring(RewardObjective):
    """(σ(r) − s)², s in [0, 1] being `fields["score"]` [S]: a score that somebody gave. Of several heads, the mean,
    each with its own score (HelpSteer, arXiv 2311.09528, section 3.1)."""

    heads: tuple[str, ...] = ("score",)

    def loss(self, outputs: Tensor, batch: PackedBatch) -> Loss:
        given = torch.stack([batch.fields[name] for name in self.heads], -1)  # [S, K]
        error = outputs.view(given.shape).sigmoid() - given.to(outputs.dtype)
        metrics = {"error": Metric(error.abs().mean(-1).sum().detach(), "sequences")}
        if len(self.heads) > 1:
            each = error.abs().sum(0).detach()
            metrics |= {f"error/{name}": Metric(e, "sequences") for name, e in zip(self.heads, each, strict=True)}
        return {"loss": Term(error.square().mean(-1).sum(), "sequences")}, metrics


class Process(Objective):
    """Cross-entropy of each step being right, read at its last token (Lightman et al., arXiv 2305.20050, section 2.3).

    The weights mark the last tokens of steps; `fields["label"]` [T] is 1 or 0 there.
    """

    def outputs(self, networks: Networks, batch: PackedBatch) -> Tensor:
        values = networks["reward"].values(batch.tokens, batch.cu_seqlens, batch.positions)  # [T]
        return values.index_select(0, batch.supervised)

    def loss(self, outputs: Tensor, batch: PackedBatch) -> Loss:
        labels = supervised(batch.fields["label"], batch, outputs)  # [N]
        losses = F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")
        right = ((outputs > 0) == (labels > 0)).to(outputs.dtype)
        return {"loss": Term(losses, "tokens")}, {"accuracy": Metric(right.sum(), "tokens")}


@dataclass
class Listwise(RewardObjective):
    """Plackett-Luce over a ranking, best first (`plackett_luce`); or with `pairs`, Bradley-Terry's mean over all its
    pairs of unequal answers (Ouyang et al., eq. 1).

    `fields["rank"]` [S] counts from 0 in each ranking, equal answers having the same; documents of a ranking stand
    side by side, best first.
    """

    pairs: bool = False

    def loss(self, outputs: Tensor, batch: PackedBatch) -> Loss:
        ranks = batch.fields["rank"]
        first = (ranks == 0) & (F.pad(ranks, (1, 0), value=1.0)[:-1] != 0)  # of a ranking
        together = first.cumsum(0)
        same = together[:, None] == together[None, :]  # [S, S]
        worse = same & (ranks[:, None] < ranks[None, :])
        scores = outputs.detach()[None]
        best, most = (scores.masked_fill(~of, -torch.inf).amax(1) for of in (same & (ranks == 0), same))  # [S]
        metrics = {"accuracy": Metric((first & (best >= most)).sum().to(outputs.dtype), "rankings")}
        loss = all_pairs(outputs, worse, same) if self.pairs else luce(outputs, worse)
        return {"loss": Term(loss, "rankings")}, metrics


def plackett_luce(scores: Tensor, ranks: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the order of `ranks` [n], ascending (default: 0, 1, 2, …), of `scores` [n]."""
    ranks = torch.arange(len(scores), device=scores.device) if ranks is None else ranks
    return luce(scores, ranks[:, None] < ranks[None, :])


def luce(scores: Tensor, worse: Tensor) -> Tensor:
    """−Σ_k [r_k − log(exp r_k + Σ_j exp r_j)] over the answers j that are worse than k, `worse` [k, j] (Luce 1959; Cao
    et al. 2007). Equal answers are not compared: each is drawn from itself and what is worse (a partial order)."""
    seen = worse | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return (scores[None].masked_fill(~seen, -torch.inf).logsumexp(1) - scores).sum()


def all_pairs(scores: Tensor, worse: Tensor, same: Tensor) -> Tensor:
    """Σ over rankings of the mean of −log σ(r_i − r_j) over their pairs where i is better than j."""
    pairs = (same * worse.sum(1)).sum(1, keepdim=True).clamp(min=1)  # [S, 1]: of the ranking that i is in
    return (-F.logsigmoid(scores[:, None] - scores[None, :]) * worse / pairs).sum()
