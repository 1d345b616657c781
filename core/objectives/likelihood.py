"""Likelihood of given tokens: pretraining and supervised fine-tuning."""

from tritium.core.batch import PackedBatch
from tritium.core.objectives.base import Loss, Metric, Objective, Term, supervised
from tritium.kernels.linear_logprob import LogProb


class CrossEntropy(Objective):
    """−Σ_t w_t log p(y_t | y_<t) / Σ_t w_t: pretraining and supervised fine-tuning."""

    def loss(self, outputs: LogProb, batch: PackedBatch) -> Loss:
        weights = supervised(batch.weights, batch, outputs.logp)
        metrics = {
            "accuracy": Metric((weights * outputs.hit).sum().detach(), "tokens"),
            "entropy": Metric((weights * outputs.entropy).sum().detach(), "tokens"),
        }
        return {"loss": Term(-(weights * outputs.logp).sum(), "tokens")}, metrics
