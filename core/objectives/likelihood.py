"""Likelihood of given tokens: pretraining and supervised fine-tuning."""

import torch

from tritium.core.batch import PackedBatch
from tritium.core.objectives.base import Loss, Metric, Objective, Term, log1mexp, supervised
from tritium.kernels.linear_logprob import LogProb


class CrossEntropy(Objective):
    """−Σ_t w_t log p(y_t | y_<t) / Σ_t w_t: pretraining and supervised fine-tuning."""

    def per_token(self, outputs: LogProb, batch: PackedBatch) -> torch.Tensor:
        """The loss of each supervised token, [N]."""
        return -outputs.logp

    def loss(self, outputs: LogProb, batch: PackedBatch) -> Loss:
        weights = supervised(batch.weights, batch, outputs.logp)
        metrics = {
            "accuracy": Metric((weights * outputs.hit).sum().detach(), "tokens"),
            "entropy": Metric((weights * outputs.entropy).sum().detach(), "tokens"),
        }
        return {"loss": Term((weights * self.per_token(outputs, batch)).sum(), "tokens")}, metrics


class DynamicFineTuning(CrossEntropy):
    """−sg(p) log p per token: the gradient of cross-entropy without its 1/p (DFT, Wu et al., arXiv 2508.05629, 9)."""

    def per_token(self, outputs: LogProb, batch: PackedBatch) -> torch.Tensor:
        return -outputs.logp.detach().exp() * outputs.logp


class Unlikelihood(CrossEntropy):
    """−log p at the tokens of good answers, −log(1 − p) at those of bad ones (Welleck et al., arXiv 1908.04319, eq. 4).

    `fields["good"]` [S] is 1 or 0.
    """

    def per_token(self, outputs: LogProb, batch: PackedBatch) -> torch.Tensor:
        document = torch.searchsorted(batch.cu_seqlens[1:], batch.supervised.to(torch.int32), right=True)
        good = batch.fields["good"].index_select(0, document) > 0  # [N]
        return torch.where(good, -outputs.logp, -log1mexp(outputs.logp))
