"""Preferences: what pairs of answers teach a policy, without a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from tritium.core.batch import PackedBatch
from tritium.core.objectives.base import Loss, Metric, Networks, Objective, Term, sequence_sum, supervised_logprob
from tritium.kernels.linear_logprob import LogProb


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
