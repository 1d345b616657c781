"""Group-relative policy optimisation: sample answers, let a verifier judge them, reinforce what beats its group.

    tritium grpo --model=runs/sft/step-00000200 --data.sources=problems.jsonl --run.out=runs/grpo

Records are {"question", "answer"}. The sampler is the policy itself; token in, token out. Groups whose answers all
score the same teach nothing and are left out (DAPO's dynamic sampling, arXiv 2503.14476, without the refill).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tritium.core.batch import Group, PackedBatch, pack, plan_bins
from tritium.core.config import REQUIRED, ConfigError, opt
from tritium.core.data import SourcesConfig
from tritium.core.formats import Skipped
from tritium.core.objectives import GRPO, group_advantages, supervised
from tritium.core.optim import OptimConfig
from tritium.core.rewards.exact import ExactMatch
from tritium.core.rollout import Problem, Rollout, SamplingConfig, load_problems, roll_out, sample_document, share
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import MeshConfig, load_model, load_tokenizer, start
from tritium.core.trainer import LoopConfig, Result, Trainer
from tritium.parallel.data import all_reduce_counts
from tritium.parallel.mesh import Mesh


@dataclass
class GRPOConfig:
    """The objective; see core/objectives/policy.py."""

    prompts: int = opt(32, "problems of a rollout, over all ranks")
    group: int = opt(8, "answers to each")
    updates: int = opt(1, "optimizer steps on each rollout")
    clip_low: float = opt(0.2, "how far below 1 the ratio counts")
    clip_high: float = opt(0.28, "how far above 1 the ratio counts (DAPO's clip-higher)")
    beta: float = opt(0.0, "weight of the KL to the starting model (k3)")
    normalization: str = opt("token", "what the loss is a mean over", choices=("token", "sequence"))
    scale: bool = opt(True, "divide advantages by the group's standard deviation (off: Dr. GRPO)")
    malformed: float = opt(-0.5, "reward of an answer that is cut off or has no answer")

    def __post_init__(self):
        if self.group < 2:
            raise ConfigError(f"grpo.group={self.group}: an advantage needs at least 2 answers to compare")
        if self.prompts < 1 or self.updates < 1:
            raise ConfigError("grpo.prompts and grpo.updates must be at least 1")


@dataclass
class ProblemsConfig(SourcesConfig):
    """Which problems, and how long the micro-batches of their answers are."""

    sources: list[str] = opt([], "files of problems")
    bin_tokens: int = opt(8192, "tokens of a micro-batch (a bin)")


@dataclass
class Config:
    model: str = opt(REQUIRED, "folder of the model to start from, with its tokenizer")
    grpo: GRPOConfig = opt(GRPOConfig, "the objective")
    sampling: SamplingConfig = opt(SamplingConfig, "how answers are drawn")
    data: ProblemsConfig = opt(ProblemsConfig, "problems")
    optim: OptimConfig = opt(OptimConfig(lr=5e-5, weight_decay=0.0), "optimizer")
    schedule: ScheduleConfig = opt(ScheduleConfig(kind="constant"), "learning rate over the run")
    run: LoopConfig = opt(LoopConfig, "the run itself; steps are optimizer steps")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")

    def __post_init__(self):
        if not self.sampling.temperature:
            raise ConfigError("sampling.temperature=0: a group of equal answers teaches nothing; it must be positive")


def train(config: Config) -> Result:
    """Reinforce right answers; `reward` and `right` (the share of right answers) are of the newest rollout."""
    mesh = start(config, "grpo")
    options, networks = config.grpo, open_networks(config, mesh)
    policy = networks["policy"]
    tokenizer = load_tokenizer(config.model, policy)
    skipped = Skipped(config.data.on_error)
    problems = load_problems(config.data.sources, tokenizer, policy.config.max_positions, skipped)
    reward = ExactMatch(malformed=options.malformed)
    clip = (options.clip_low, options.clip_high)
    objective = GRPO(*clip, options.beta, options.normalization, config.sampling.temperature)
    total_steps = rollouts_in(config, len(problems)) * options.updates
    settings = {"name": "grpo", "total_steps": total_steps, "tokenizer": tokenizer, "skipped": skipped}
    trainer = Trainer(networks, objective, config, mesh, **settings)
    for step in trainer.steps():
        number = step // options.updates
        chosen = share(problems_of(number, problems, options.prompts, config.run.seed), mesh)
        seed = (config.run.seed, number)
        with trainer.phase("sample"), trainer.whole(layers=True):
            rollout = roll_out(policy, tokenizer, chosen, reward, config.sampling, n=options.group, seed=seed)
        batches = [batch.to(mesh.device) for batch in to_batches(rollout, options, config.data)]
        # ------------------------------------------------------------------------------------------------------
        trainer.prepare(batches)  # log-probs before the first update
        numbers = summary(rollout, mesh) | sampler_gap(batches, objective, mesh)
        for i in range(options.updates):
            trainer.step(batches[i :: options.updates], numbers)  # −min(ρA, clip(ρ)A) + β KL, per token
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


def open_networks(config: Config, mesh: Mesh) -> dict[str, nn.Module]:
    """The policy, and the model that it started from where the KL to it counts."""
    networks = {"policy": load_model(config.model, config.run.dtype, mesh)}
    if config.grpo.beta:
        networks["reference"] = load_model(config.model, config.run.dtype, mesh, frozen=True)
    return networks


def rollouts_in(config: Config, problems: int) -> int:
    """How many rollouts a run has: whole ones, where `run.steps` says how many optimizer steps."""
    if config.run.steps:
        return math.ceil(config.run.steps / config.grpo.updates)
    return max(1, round(config.run.epochs * problems / config.grpo.prompts))


def problems_of(number: int, problems: list[Problem], count: int, seed: int) -> list[Problem]:
    """The problems of rollout `number`: shuffled passes over all of them, a function of (seed, number)."""
    places = range(number * count, (number + 1) * count)
    orders = {
        e: np.random.default_rng([seed, e]).permutation(len(problems)) for e in {p // len(problems) for p in places}
    }
    return [problems[orders[p // len(problems)][p % len(problems)]] for p in places]


def to_batches(rollout: Rollout, options: GRPOConfig, data: SourcesConfig) -> list[PackedBatch]:
    """Advantages, and the stream: a group is never split; what taught nothing or was not judged is left out.

    With several updates, which are dealt the batches in turn, these are small enough for each to get one, as far as
    there are groups; an update without a batch on any rank moves nothing.
    """
    groups: list[Group] = []
    for samples in rollout.groups:
        judged = [s for s in samples if s.score is not None]
        rewards = torch.tensor([s.score.value for s in judged])
        if len(judged) < 2 or rewards.max() == rewards.min():
            continue
        advantages = group_advantages(rewards, options.scale).tolist()
        groups.append([sample_document(s, {"advantages": a}) for s, a in zip(judged, advantages, strict=True)])
    lengths = [sum(map(len, group)) for group in groups]
    capacity = min(data.bin_tokens, -(-sum(lengths) // options.updates))
    bins = plan_bins(lengths, capacity)
    return [pack([groups[i] for i in members], multiple_of=data.quantum) for members in bins]


def summary(rollout: Rollout, mesh: Mesh) -> dict[str, float]:
    """What the rollout of all ranks looks like; `varied_groups` are those that teach something."""
    samples = rollout.samples
    scores = [s.score.value for s in samples if s.score is not None]
    varied = [len({s.score.value for s in group if s.score is not None}) > 1 for group in rollout.groups]
    counts = {"judged": len(scores), "samples": len(samples), "groups": len(varied)}
    sums = {  # name → (sum, what it is a mean over)
        "reward": (sum(scores), "judged"),
        "right": (sum(s.right for s in samples), "judged"),
        "length": (sum(len(s.completion.tokens) for s in samples), "samples"),
        "ended": (sum(s.completion.finish_reason == "stop" for s in samples), "samples"),
        "varied_groups": (sum(varied), "groups"),
    }
    failures = {"verifier_failures": sum(rollout.failures.values())}
    total = all_reduce_counts(counts | failures | {name: value for name, (value, _) in sums.items()}, mesh)
    means = {name: total[name] / (total[over] or 1.0) for name, (_, over) in sums.items()}
    return means | {"verifier_failures": total["verifier_failures"]}


def sampler_gap(batches: list[PackedBatch], objective: GRPO, mesh: Mesh) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's: the mean |difference| over the rollout's tokens.

    Only where both are of the same distribution: the sampler's are always those at temperature 1.
    """
    if objective.temperature != 1:
        return {}
    sums = {"gap": 0.0, "tokens": 0.0}
    for batch in batches:
        old = batch.fields["old_logp"]  # [N]
        sums["gap"] += float((old - supervised(batch.fields["sampler_logp"], batch, old)).abs().sum())
        sums["tokens"] += len(old)
    total = all_reduce_counts(sums, mesh)
    return {"sampler_gap": total["gap"] / total["tokens"]} if total["tokens"] else {}


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("grpo"))
