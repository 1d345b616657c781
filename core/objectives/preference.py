"""Preferences: what pairs of answers, or answers marked good and bad, teach a policy without a reward model.

A loss of pairs is a function (pairs, options) → [pairs], of the log-probs that policy and reference give the two
answers: π and ref are sums over an answer's tokens, |y| is their number, and in what follows
Δ = (π_c − ref_c) − (π_r − ref_r) for the chosen answer c and the rejected one r.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tritium.core.batch import Document, PackedBatch, pack
from tritium.core.kept import Kept, sequence_keys
from tritium.core.objectives.base import (
    Loss,
    Metric,
    Networks,
    Objective,
    Term,
    log1mexp,
    sequence_sum,
    smoothed,
    supervised_logprob,
)
from tritium.kernels.linear_logprob import LogProb
from tritium.parallel.data import all_reduce_counts


class Pairs(NamedTuple):
    """What a loss of pairs is a function of: [pairs, 2] each, the chosen answer first."""

    policy: Tensor  # π: with a gradient
    reference: Tensor  # zeros where the loss needs none
    lengths: Tensor  # |y|

    @property
    def ratios(self) -> Tensor:
        return self.policy - self.reference

    @property
    def means(self) -> Tensor:
        """The policy's log-prob per token."""
        return self.policy / self.lengths


@dataclass
class PairOptions:
    """`margin` is SimPO's γ and SLiC's δ, `penalty` DPOP's λ, `label_smoothing` the share of labels that are wrong."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 1.0
    penalty: float = 5.0


def difference(values: Tensor) -> Tensor:
    """Chosen − rejected: [pairs, 2] → [pairs]."""
    return values[:, 0] - values[:, 1]


def dpo(pairs: Pairs, o: PairOptions) -> Tensor:
    """−log σ(β Δ) (Rafailov et al., arXiv 2305.18290, eq. 7), with label smoothing (their cDPO note)."""
    return smoothed(o.beta * difference(pairs.ratios), o.label_smoothing)


def dpo_norm(pairs: Pairs, o: PairOptions) -> Tensor:
    """DPO on log-ratios per token (length-normalised; Tülu 3, arXiv 2411.15124, section 5.1.2)."""
    return smoothed(o.beta * difference(pairs.ratios / pairs.lengths), o.label_smoothing)


def robust(pairs: Pairs, o: PairOptions) -> Tensor:
    """[(1 − ε) L(c, r) − ε L(r, c)] / (1 − 2ε): unbiased under flips (Chowdhury et al., arXiv 2403.00409, eq. 12)."""
    logits, e = o.beta * difference(pairs.ratios), o.label_smoothing
    return (-(1 - e) * F.logsigmoid(logits) + e * F.logsigmoid(-logits)) / (1 - 2 * e)


def ipo(pairs: Pairs, o: PairOptions) -> Tensor:
    """(Δ − 1/(2β))², of sums as in the paper (Azar et al., arXiv 2310.12036, eq. 17; β is its τ)."""
    return (difference(pairs.ratios) - 1 / (2 * o.beta)) ** 2


def ipo_mean(pairs: Pairs, o: PairOptions) -> Tensor:
    """IPO on log-ratios per token, as TRL computes it, and as the paper's authors say that they did."""
    return (difference(pairs.ratios / pairs.lengths) - 1 / (2 * o.beta)) ** 2


def dpop(pairs: Pairs, o: PairOptions) -> Tensor:
    """−log σ(β [Δ − λ max(0, ref_c − π_c)]): the chosen answer shall not lose (Pal et al., arXiv 2402.13228, eq. 3)."""
    lost = F.relu(-pairs.ratios[:, 0])
    return -F.logsigmoid(o.beta * (difference(pairs.ratios) - o.penalty * lost))


def hinge(pairs: Pairs, o: PairOptions) -> Tensor:
    """max(0, 1 − β Δ) (SLiC's loss on ratios; Liu et al., arXiv 2309.06657, eq. 9)."""
    return F.relu(1 - o.beta * difference(pairs.ratios))


def apo_zero(pairs: Pairs, o: PairOptions) -> Tensor:
    """1 − σ(β ratio_c) + σ(β ratio_r): chosen up, rejected down (D'Oosterlinck et al., arXiv 2408.06266, eq. 7)."""
    chosen, rejected = (o.beta * pairs.ratios).sigmoid().unbind(1)
    return 1 - chosen + rejected


def apo_down(pairs: Pairs, o: PairOptions) -> Tensor:
    """σ(β ratio_c) + 1 − σ(β Δ): both down, the rejected one more (eq. 8): for chosen ones worse than the model's."""
    return (o.beta * pairs.ratios[:, 0]).sigmoid() + 1 - (o.beta * difference(pairs.ratios)).sigmoid()


def orpo(pairs: Pairs, o: PairOptions) -> Tensor:
    """−β log σ(log odds_c − log odds_r), odds = p / (1 − p), p = exp(π/|y|) (Hong et al., arXiv 2403.07691, 7)."""
    odds = pairs.means - log1mexp(pairs.means)
    return -o.beta * F.logsigmoid(difference(odds))


def simpo(pairs: Pairs, o: PairOptions) -> Tensor:
    """−log σ(β [π_c/|c| − π_r/|r|] − γ) (Meng et al., arXiv 2405.14734, eq. 6)."""
    return smoothed(o.beta * difference(pairs.means) - o.margin, o.label_smoothing)


def cpo(pairs: Pairs, o: PairOptions) -> Tensor:
    """−log σ(β [π_c − π_r]) (Xu et al., arXiv 2401.08417, eq. 3)."""
    return smoothed(o.beta * difference(pairs.policy), o.label_smoothing)


def slic(pairs: Pairs, o: PairOptions) -> Tensor:
    """max(0, δ − π_c + π_r) (Zhao et al., arXiv 2305.10425, eq. 1)."""
    return F.relu(o.margin - difference(pairs.policy))


def rrhf(pairs: Pairs, o: PairOptions) -> Tensor:
    """max(0, π_r/|r| − π_c/|c|) (Yuan et al., arXiv 2304.05302, eq. 2)."""
    return F.relu(-difference(pairs.means))


LOSSES: dict[str, Callable[[Pairs, PairOptions], Tensor]] = {
    f.__name__: f
    for f in (dpo, dpo_norm, robust, ipo, ipo_mean, dpop, hinge, apo_zero, apo_down, orpo, simpo, cpo, slic, rrhf)
}
REFERENCE_FREE = frozenset({"orpo", "simpo", "cpo", "slic", "rrhf"})
SFT_WEIGHT = {"orpo": 1.0, "cpo": 1.0, "rrhf": 1.0}  # of the chosen answer's −log-prob, by the papers; of others 0
PER_TOKEN = frozenset({"dpo_norm", "ipo_mean", "orpo", "simpo", "rrhf"})  # compare means: so do the rewards shown
SFT_SUMS = frozenset({"cpo", "slic", "rrhf"})  # it is the answer's sum there, else its mean per token


@torch.no_grad()
def reference_logprob(networks: Networks, batches: Sequence[PackedBatch], kept: Kept | None) -> None:
    """The reference's log-prob of each sequence as `fields["reference"]` [S], computed once where it can be kept."""

    def ask(batch: PackedBatch) -> Tensor:
        return sequence_sum(supervised_logprob(networks["reference"], batch).logp, batch).double()

    if kept:
        kept.fill(batches, ask, np.float64, networks["policy"].mesh)
    for batch in batches:
        if kept:
            values = np.array(kept.get(sequence_keys(batch), np.float64)).flatten()
            batch.fields["reference"] = torch.tensor(values, device=batch.tokens.device)
        else:
            batch.fields["reference"] = ask(batch)


@dataclass
class Preference(Objective):
    """A loss of pairs by name (`LOSSES`), and `sft` times the chosen answer's −log-prob (Pang et al.,
    arXiv 2404.19733, eq. 1); by default, what the loss's paper says.

    Documents 2i and 2i+1 are the chosen and the rejected answer of pair i.
    """

    name: str = "dpo"
    options: PairOptions = field(default_factory=PairOptions)
    sft: float | None = None
    kept: Kept | None = None  # the reference's log-probs of earlier epochs

    @property
    def sft_weight(self) -> float:
        return SFT_WEIGHT.get(self.name, 0.0) if self.sft is None else self.sft

    def prepare(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        if self.name not in REFERENCE_FREE:
            reference_logprob(networks, batches, self.kept)

    def loss(self, outputs: LogProb, batch: PackedBatch) -> Loss:
        policy = sequence_sum(outputs.logp, batch)  # [S]
        reference = batch.fields.get("reference", torch.zeros_like(policy)).to(policy.dtype)
        lengths = sequence_sum(torch.ones_like(outputs.logp), batch)
        pairs = Pairs(*(values.view(-1, 2) for values in (policy, reference, lengths)))
        terms = {"loss": Term(LOSSES[self.name](pairs, self.options).sum(), "pairs")}
        if self.sft_weight:
            likelihood = pairs.policy if self.name in SFT_SUMS else pairs.means
            terms["sft"] = Term(-likelihood[:, 0].sum(), "pairs", self.sft_weight)
        ratios = pairs.ratios / pairs.lengths if self.name in PER_TOKEN else pairs.ratios
        rewards = self.options.beta * ratios.detach()
        margin = difference(rewards)
        metrics = {"accuracy": (margin > 0).sum(), "margin": margin.sum()}
        metrics |= {"chosen_reward": rewards[:, 0].sum(), "rejected_reward": rewards[:, 1].sum()}
        return terms, {name: Metric(value, "pairs") for name, value in metrics.items()}


@dataclass
class KTO(Objective):
    """λ_D (1 − σ(β (r − z₀))) for a good answer, λ_U (1 − σ(β (z₀ − r))) for a bad one, r = π − ref (Ethayarajh et al.,
    arXiv 2402.01306, eq. 8).

    z₀ = max(0, mean of π − ref over the global batch's prompts, each with the answer before it, of another prompt),
    without a gradient (their section 4.2). `fields["good"]` is 1 or 0; `fields["index"]` orders the step's sequences.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    kept: Kept | None = None

    @torch.no_grad()
    def prepare(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        reference_logprob(networks, batches, self.kept)
        policy, reference = networks["policy"], networks["reference"]
        sums = {"kl": 0.0, "sequences": 0.0}
        for batch in mismatched(batches, policy):
            gap = [supervised_logprob(network, batch).logp for network in (policy, reference)]
            sums["kl"] += float((gap[0] - gap[1]).sum())
            sums["sequences"] += batch.sequences
        total = all_reduce_counts(sums, policy.mesh)
        z0 = max(0.0, total["kl"] / (total["sequences"] or 1.0))
        for batch in batches:
            batch.fields["z0"] = torch.tensor(z0, dtype=torch.float64, device=batch.tokens.device)

    def loss(self, outputs: LogProb, batch: PackedBatch) -> Loss:
        policy = sequence_sum(outputs.logp, batch)  # [S]
        ratios, good = policy - batch.fields["reference"].to(policy.dtype), batch.fields["good"].to(policy.dtype)
        above = self.beta * (ratios - batch.fields["z0"].to(policy.dtype))
        losses = good * self.desirable * (-above).sigmoid() + (1 - good) * self.undesirable * above.sigmoid()
        rewards = self.beta * ratios.detach()
        metrics = {
            "accuracy": Metric(((rewards > 0) == (good > 0)).to(policy.dtype).sum(), "sequences"),
            "kl": Metric(batch.fields["z0"] * batch.sequences, "sequences"),
        }
        return {"loss": Term(losses.sum(), "sequences")}, metrics


def mismatched(batches: Sequence[PackedBatch], policy) -> list[PackedBatch]:
    """As many batches, of the same prompts, each with the answer to another prompt before it in the whole step.

    Which is before which depends on `fields["index"]` alone, not on bins or ranks. What is longer than the context is
    cut off at its end.
    """
    own = [split_sequences(batch) for batch in batches]
    ranks = policy.mesh.gather_objects({index: (prompt.tolist(), a) for split in own for index, prompt, a in split})
    step = {index: found for rank in ranks for index, found in rank.items()}
    order, made = sorted(step), []
    for split in own:
        documents = []
        for index, prompt, _ in split:
            at = bisect_left(order, index)
            # The nearest first, round the step's end.
            before = (step[i] for i in (*order[:at][::-1], *order[at:][::-1]))
            answer = next((a for other, a in before if other != prompt.tolist()), step[order[at - 1]][1])
            ids = torch.cat([prompt, answer]).to(torch.int32).numpy()
            on = torch.cat([torch.zeros(len(prompt)), torch.ones(len(answer))]).numpy()
            documents.append([Document(ids, on).first(policy.config.max_positions)])
        made.append(pack(documents, multiple_of=64).to(policy.mesh.device))
    return made


def split_sequences(batch: PackedBatch) -> list[tuple[float, Tensor, Tensor]]:
    """(index, prompt's ids, answer's ids) of each sequence, on the host; the answer is what is supervised and after."""
    ends, tokens, weights = batch.cu_seqlens.tolist(), batch.tokens.cpu(), batch.weights.cpu()
    split = []
    for i, index in enumerate(batch.fields["index"].tolist() if batch.sequences else []):
        ids, on = tokens[ends[i] : ends[i + 1]], weights[ends[i] : ends[i + 1]]
        first = int(on.nonzero()[0]) + 1  # weights[t] is that of predicting token t + 1
        last = int(on.nonzero()[-1]) + 2
        split.append((index, ids[:first], ids[first:last]))
    return split
