"""Policy gradients on sampled answers: GRPO and its relatives, and PPO.

    estimate(networks, batches, mesh)   once per rollout: log-probs, KL, advantages → batch.fields; returns metrics
    loss(outputs, batch)                in each update: −Σ min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), + β KL, …

    ρ = π(y_t) / π_old(y_t),   A the advantage of token t

Per-token values are [N]: only the supervised (sampled) tokens, sequence after sequence, so that there are no padding
slots whose values could leak. Documents have the fields `rewards` (per token: the reward at an answer's last token, or
at the last token of each step), `scored` (1 at these) and `number` (per sequence: its place in its group, from 0).

Batches with a count "ptx" are text, whose cross-entropy over their own tokens is added to the step (InstructGPT's
PPO-ptx, arXiv 2203.02155, eq. 2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
from tritium.kernels import gae, segment_sum
from tritium.kernels.linear_logprob import LogProb
from tritium.parallel.data import all_reduce_counts
from tritium.parallel.mesh import Mesh

FARTHEST = 20.0  # nats, as in verl: beyond, exp would be infinite in fp32, and one token's NaN the whole step's


def kl_estimate(policy: Tensor, reference: Tensor, kind: str) -> Tensor:
    """KL(π ‖ ref) at tokens that π drew, from their log-probs (Schulman, "Approximating KL divergence", 2020).

    With d = log π − log ref: k1 = d, unbiased, of either sign; k2 = d² / 2, biased, small variance; k3 = e^−d − 1 + d,
    unbiased and never negative. In a *loss* their expected gradients differ: k1's is zero, k2's is that of KL(π ‖ ref),
    k3's that of KL(ref ‖ π). In the *reward*, k1 gives the gradient of KL(π ‖ ref).
    """
    difference = policy - reference
    if kind == "k1":
        return difference
    near = difference.clamp(-FARTHEST, FARTHEST)
    return difference.square() / 2 if kind == "k2" else (-near).exp() - 1.0 + near


@dataclass
class PolicyGradient(Objective):
    """Critic-free policy gradients, as combinations of these parts; see `ALGORITHMS`.

    `baseline`       subtracted from an answer's score: the "mean" of its group, the mean of the "others" in it, the
                     score of a "greedy" answer (`fields["greedy"]`), or "none"
    `scale`          of advantages: "group" divides by the standard deviation of the group's scores, "batch" whitens
                     to mean 0 and variance 1 over all tokens of the rollout, on all ranks; "none"
    `ratio`          ρ of a "token", or of a "sequence": the geometric mean over its tokens (GSPO)
    `normalization`  the loss is a mean over tokens ("token"), over sequences of their token means ("sequence"), or over
                     sequences of their token sums / `constant` ("constant")
    `beta`, `kl`     weight and estimator of the KL to the reference, in the "loss" or the "reward" (`kl_in`)
    `importance`     truncated importance sampling: weight min(π_old / π_sampler, importance) per token (0: off)
    `on_policy`      there is one update per rollout, whose own log-probs are π_old: no forward pass for them is needed
                     beforehand, unless a KL to a reference is
    """

    baseline: str = "mean"
    scale: str = "group"
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    normalization: str = "sequence"
    constant: float = 1.0
    beta: float = 0.0
    kl: str = "k3"
    kl_in: str = "loss"
    importance: float = 0.0
    entropy: float = 0.0
    temperature: float = 1.0
    ptx: float = 0.0
    on_policy: bool = False

    # ------------------------------------------------------------------------------------------ once for a rollout

    @torch.no_grad()
    def estimate(self, networks: Networks, batches: Sequence[PackedBatch], mesh: Mesh) -> dict[str, float]:
        """Fill `fields` with what the updates need; returns metrics of the whole rollout. A collective."""
        self.observe(networks, batches)
        real = [batch for batch in batches if batch.sequences]
        for batch in real:
            batch.fields["advantages"] = self.advantages(batch)  # [N]
        if self.scale == "batch":
            whiten(real, "advantages", mesh)
        return self.rollout_numbers(real, mesh)

    def observe(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        """The log-probs before the first update, of the policy and of the reference, [N]."""
        if self.on_policy and "reference" not in networks:
            return
        for batch in batches:
            batch.fields["old_logp"] = supervised_logprob(networks["policy"], batch, self.temperature).logp
            if "reference" in networks:
                reference = supervised_logprob(networks["reference"], batch, self.temperature)
                batch.fields["reference_logp"] = reference.logp

    def penalty(self, batch: PackedBatch) -> Tensor | float:
        """β · KL of each token, [N], if the KL is part of the reward; else 0."""
        if not self.beta or self.kl_in != "reward":
            return 0.0
        return self.beta * kl_estimate(batch.fields["old_logp"], batch.fields["reference_logp"], self.kl)

    def advantages(self, batch: PackedBatch) -> Tensor:
        """[N]: the sum of the answer's scores from each token on, each score relative to the baseline (Shao et al.,
        arXiv 2402.03300, section 4.1.3); with a single score, at the end, all tokens get the same advantage.

        A KL in the reward is subtracted from an answer's score (Ahmadian et al., arXiv 2402.14740), or, without a
        baseline, from each token's reward (REINFORCE++, arXiv 2501.03262).
        """
        like = batch.fields.get("old_logp", batch.fields["rewards"])
        rewards, scored = (supervised(batch.fields[name], batch, like) for name in ("rewards", "scored"))  # [N]
        cu, kl = answer_cu(batch), self.penalty(batch)
        if self.baseline == "none":
            return returns_to_go(rewards - kl, cu)
        last = scored * (returns_to_go(scored, cu) == 1)  # an answer's end, or that of its last step
        if self.baseline == "greedy":
            rewards = rewards - last * per_token(batch.fields["greedy"], batch).to(like.dtype)
        if torch.is_tensor(kl):
            rewards = rewards - last * per_token(sequence_sum(kl, batch), batch)
        if self.baseline != "greedy":
            # in fp64: the fp32 mean of equal scores of 100 can be off by 10⁻⁵, a tenth of the 10⁻⁴ in `against_group`
            rewards = self.against_group(rewards.double(), scored.double(), batch, cu).to(like.dtype) * scored
        return returns_to_go(rewards, cu)

    def against_group(self, rewards: Tensor, scored: Tensor, batch: PackedBatch, cu: Tensor) -> Tensor:
        """Scores minus their group's baseline, scaled: [N], valid where `scored`. A group with one score gives 0."""
        starts = (batch.fields["number"] == 0).nonzero()[:, 0]
        group = torch.cat([cu[starts], cu[-1:]])  # [groups + 1]
        within = lambda values: segment_sum(values, group).repeat_interleave(  # noqa: E731
            group.diff().long(), output_size=len(values)
        )
        count = within(scored).clamp_min(1.0)
        centered = rewards - within(scored * rewards) / count
        if self.baseline == "others":
            return centered * count / (count - 1.0).clamp_min(1.0)
        if self.scale != "group":
            return centered
        deviation = (within(scored * centered.square()) / (count - 1.0).clamp_min(1.0)).sqrt()
        return centered / (deviation + 1e-4)

    def rollout_numbers(self, batches: Sequence[PackedBatch], mesh: Mesh) -> dict[str, float]:
        """Means over the rollout's tokens: KL to the reference, and the gap of sampler's and trainer's log-probs.

        The gap is measured only at temperature 1, at which the sampler's log-probs are. Without a forward pass before
        the update, `loss` measures it.
        """
        sums = {"tokens": 0.0}
        for batch in batches:
            if "old_logp" not in batch.fields:
                continue
            old = batch.fields["old_logp"]
            sums["tokens"] += len(old)
            if "reference_logp" in batch.fields:
                for kind in ("k1", "k3"):
                    kl = kl_estimate(old, batch.fields["reference_logp"], kind)
                    sums[f"kl_{kind}"] = sums.get(f"kl_{kind}", 0.0) + float(kl.sum())
            if self.temperature == 1:
                gap = (old - supervised(batch.fields["sampler_logp"], batch, old)).abs()
                sums["sampler_gap"] = sums.get("sampler_gap", 0.0) + float(gap.sum())
        total = all_reduce_counts(sums, mesh)
        tokens = total.pop("tokens")
        return {name: value / tokens for name, value in total.items()} if tokens else {}

    # ------------------------------------------------------------------------------------------ in each update

    def outputs(self, networks: Networks, batch: PackedBatch) -> Any:
        return supervised_logprob(networks["policy"], batch, 1.0 if "ptx" in batch.counts else self.temperature)

    def loss(self, outputs: LogProb, batch: PackedBatch) -> Loss:
        if "ptx" in batch.counts:
            weights = supervised(batch.weights, batch, outputs.logp)
            return {"ptx": Term(-(weights * outputs.logp).sum(), "ptx", self.ptx)}, {}
        weights, denominator = self.weights(batch, outputs.logp)
        each = supervised(batch.weights, batch, outputs.logp)
        mean = lambda values: Metric((each * values).sum().detach(), "tokens")  # noqa: E731
        old = batch.fields.get("old_logp", outputs.logp.detach())  # [N]
        token_log_ratio = outputs.logp - old  # [N]
        log_ratio = self.log_ratio(token_log_ratio, batch).clamp(-FARTHEST, FARTHEST)
        ratio, advantages = log_ratio.exp(), batch.fields["advantages"]
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * advantages
        surrogate = torch.minimum(ratio * advantages, clipped)
        if self.importance:
            gap = old - supervised(batch.fields["sampler_logp"], batch, outputs.logp)
            surrogate = surrogate * gap.exp().clamp_max(self.importance)
        terms = {"loss": Term(-(weights * surrogate).sum(), denominator)}
        if self.beta and self.kl_in == "loss":
            kl = kl_estimate(outputs.logp, batch.fields["reference_logp"], self.kl)
            terms["kl"] = Term((weights * kl).sum(), denominator, self.beta)
        if self.entropy:
            terms["entropy_bonus"] = Term(-(weights * outputs.entropy).sum(), denominator, self.entropy)
        metrics = {"entropy": mean(outputs.entropy), "ratio": mean(ratio)}
        metrics["clip_fraction"] = mean(ratio * advantages > clipped)
        metrics["old_kl"] = mean(kl_estimate(-token_log_ratio, torch.zeros_like(ratio), "k3"))
        if "old_logp" not in batch.fields and self.temperature == 1:
            metrics["sampler_gap"] = mean((old - supervised(batch.fields["sampler_logp"], batch, old)).abs())
        return terms, metrics

    def weights(self, batch: PackedBatch, like: Tensor) -> tuple[Tensor, str]:
        """Each token's weight in the loss, [N], and the denominator's name, by `normalization`."""
        weights = supervised(batch.weights, batch, like)
        if self.normalization == "token":
            return weights, "tokens"
        if self.normalization == "constant":
            return weights / self.constant, "sequences"
        return weights / per_token(sequence_sum(weights, batch), batch), "sequences"

    def log_ratio(self, tokens: Tensor, batch: PackedBatch) -> Tensor:
        """log ρ, [N]. Of a sequence: the mean over its tokens (GSPO: Zheng et al., arXiv 2507.18071, eq. 7)."""
        if self.ratio == "token":
            return tokens
        return per_token(sequence_sum(tokens, batch) / sequence_sum(torch.ones_like(tokens), batch), batch)


REINFORCE = {"normalization": "constant", "scale": "none", "kl": "k1", "kl_in": "reward"}

ALGORITHMS = {
    # Shao et al., arXiv 2402.03300, eq. 3 and 4
    "grpo": PolicyGradient(),
    # without the deviation and the length, which favour long wrong answers (Liu et al., arXiv 2503.20783, section 3.2)
    "dr_grpo": PolicyGradient(scale="none", normalization="constant"),
    # Yu et al., arXiv 2503.14476, eq. 8: clip-higher, a mean over tokens; the stage adds dynamic sampling
    "dapo": PolicyGradient(clip_high=0.28, normalization="token"),
    # Zheng et al., arXiv 2507.18071, eq. 5, section 5.1
    "gspo": PolicyGradient(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    # Ahmadian et al., arXiv 2402.14740, section 3.4
    "rloo": PolicyGradient(baseline="others", **REINFORCE),
    # Li et al., arXiv 2310.10505, algorithm 2
    "remax": PolicyGradient(baseline="greedy", **REINFORCE),
    # Hu et al., arXiv 2501.03262: no baseline, k1 in each token's reward, advantages whitened over the global batch
    "reinforce++": PolicyGradient(baseline="none", **REINFORCE | {"scale": "batch", "normalization": "token"}),
}


# ---------------------------------------------------------------------------------------------- with a critic


class ActorCritic(NamedTuple):
    logprob: LogProb
    values: Tensor  # [N]


@dataclass
class PPO(PolicyGradient):
    """Proximal policy optimisation (Schulman et al., arXiv 1707.06347) of language models (Ziegler et al., arXiv
    1909.08593; "The N implementation details of RLHF with PPO", 2023; Huang et al., arXiv 2403.17031).

    Each token is an action, with reward −β KL, plus the score at the answer's end. Advantages are those of `gae`,
    whitened over all tokens of the rollout on all ranks. The loss adds value_coefficient times

        ½ max((V − R)², (V_old + clip(V − V_old, ± value_clip) − R)²),   R the returns;  value_clip 0: ½ (V − R)²
    """

    baseline: str = "none"
    scale: str = "batch"
    normalization: str = "token"
    kl: str = "k1"
    kl_in: str = "reward"
    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2
    value_coefficient: float = 0.5

    def observe(self, networks: Networks, batches: Sequence[PackedBatch]) -> None:
        super().observe(networks, batches)
        for batch in batches:
            batch.fields["old_values"] = self.values(networks, batch)

    def advantages(self, batch: PackedBatch) -> Tensor:
        values = batch.fields["old_values"]
        rewards = supervised(batch.fields["rewards"], batch, values) - self.penalty(batch)
        advantages, batch.fields["returns"] = gae(rewards, values, answer_cu(batch), self.gamma, self.lam)
        return advantages

    def rollout_numbers(self, batches: Sequence[PackedBatch], mesh: Mesh) -> dict[str, float]:
        """Also how much of the returns' variance the values explain."""
        numbers = super().rollout_numbers(batches, mesh)
        errors = [batch.fields["returns"] - batch.fields["old_values"] for batch in batches]
        _, unexplained = moments(errors, mesh)
        mean, variance = moments([batch.fields["returns"] for batch in batches], mesh)
        return numbers | {"returns": mean, "explained_variance": 1 - unexplained / variance if variance else 0.0}

    def values(self, networks: Networks, batch: PackedBatch) -> Tensor:
        values = networks["critic"].values(batch.tokens, batch.cu_seqlens, batch.positions)  # [T]
        return values.index_select(0, batch.supervised)

    def outputs(self, networks: Networks, batch: PackedBatch) -> Any:
        logprob = super().outputs(networks, batch)
        return logprob if "ptx" in batch.counts else ActorCritic(logprob, self.values(networks, batch))

    def unused_networks(self, batch: PackedBatch) -> tuple[str, ...]:
        return ("critic",) if "ptx" in batch.counts else ()

    def loss(self, outputs: Any, batch: PackedBatch) -> Loss:
        if "ptx" in batch.counts:
            return super().loss(outputs, batch)
        terms, metrics = super().loss(outputs.logprob, batch)
        values, old, returns = outputs.values, batch.fields["old_values"], batch.fields["returns"]
        error = (values - returns).square()
        if self.value_clip:
            clipped = old + (values - old).clamp(-self.value_clip, self.value_clip)
            error, free = torch.maximum(error, (clipped - returns).square()), error
            metrics["value_clip_fraction"] = Metric((error > free).to(error.dtype).sum().detach(), "tokens")
        terms["value_loss"] = Term(error.sum() / 2, "tokens", self.value_coefficient)
        return terms, metrics


def adapted(beta: float, kl: float, target: float, gain: float = 0.1) -> float:
    """β after a rollout whose KL was `kl`: e = clip(kl / target − 1, ±0.2), β (1 + gain · e) (Ziegler et al., section
    2.2, whose KL is that of a whole answer)."""
    return beta * (1.0 + gain * min(max(kl / target - 1.0, -0.2), 0.2))


# ---------------------------------------------------------------------------------------------- of sampled tokens


def answer_cu(batch: PackedBatch) -> Tensor:
    """Where each sequence's supervised tokens begin among all of them, and the last ends: [S+1] int32."""
    return torch.searchsorted(batch.supervised, batch.cu_seqlens[: batch.sequences + 1].long()).int()


def per_token(values: Tensor, batch: PackedBatch) -> Tensor:
    """A per-sequence number [S] at each of its supervised tokens, [N]."""
    return values.repeat_interleave(answer_cu(batch).diff().long(), output_size=len(batch.supervised))


def returns_to_go(rewards: Tensor, cu: Tensor) -> Tensor:
    """Σ of a sequence's rewards from each token on, [N]."""
    return gae(rewards, torch.zeros_like(rewards), cu, 1.0, 1.0)[0]


def moments(values: Sequence[Tensor], mesh: Mesh) -> tuple[float, float]:
    """Mean and variance over all elements on all ranks, in fp64; (0, 0) of none."""
    wide = [v.double() for v in values]
    total = all_reduce_counts({"n": float(sum(map(len, wide))), "sum": float(sum(v.sum() for v in wide))}, mesh)
    mean = total["sum"] / (total["n"] or 1.0)
    squares = all_reduce_counts({"s": float(sum((v - mean).square().sum() for v in wide))}, mesh)["s"]
    return mean, squares / (total["n"] or 1.0)


def whiten(batches: Sequence[PackedBatch], name: str, mesh: Mesh) -> None:
    """Shift and scale a field [N] to mean 0 and variance 1 over the tokens of all batches on all ranks."""
    mean, variance = moments([batch.fields[name] for batch in batches], mesh)
    for batch in batches:
        values = batch.fields[name]
        batch.fields[name] = ((values.double() - mean) / math.sqrt(variance + 1e-8)).to(values.dtype)


def algorithm(base: str | PolicyGradient, **options: Any) -> PolicyGradient:
    """An algorithm (by name: one of `ALGORITHMS`) with the options that are not None in place of its own; a KL that
    they put into the loss is k3, if they do not say otherwise: k1's gradient is zero in the mean there."""
    given = {k: v for k, v in options.items() if v is not None}
    base = ALGORITHMS[base] if isinstance(base, str) else base
    return replace(base, **({"kl": "k3"} if given.get("kl_in") == "loss" else {}) | given)
