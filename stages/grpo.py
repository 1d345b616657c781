"""Group-relative policy optimisation: sample answers, let a verifier judge them, reinforce what beats its group.

    tritium grpo --model=runs/sft/step-00000200 --data.sources=problems.jsonl --run.out=runs/grpo

Records are {"question", "answer"}. The sampler is the policy itself; token in, token out. Groups whose answers all
score the same teach nothing and are left out (DAPO's dynamic sampling, arXiv 2503.14476, without the refill).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from tritium.core.batch import Group, PackedBatch, pack, plan_bins
from tritium.core.config import REQUIRED, ConfigError, opt
from tritium.core.data import DataConfig
from tritium.core.formats import Skipped
from tritium.core.objectives import GRPO, group_advantages
from tritium.core.optim import OptimConfig
from tritium.core.rewards.exact import ExactMatch
from tritium.core.rollout import Problem, Rollout, SamplingConfig, load_problems, roll_out, sample_document, share
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import MeshConfig, load_model, load_tokenizer, start
from tritium.core.trainer import Result, RunConfig, Trainer


@dataclass
class GRPOConfig:
    """The objective; see core/objectives.py."""

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
class Config:
    model: str = opt(REQUIRED, "folder of the model to start from, with its tokenizer")
    grpo: GRPOConfig = opt(GRPOConfig, "the objective")
    sampling: SamplingConfig = opt(SamplingConfig, "how answers are drawn")
    data: DataConfig = opt(DataConfig(bin_tokens=8192), "problems")
    optim: OptimConfig = opt(OptimConfig(lr=5e-5, weight_decay=0.0), "optimizer")
    schedule: ScheduleConfig = opt(ScheduleConfig(kind="constant"), "learning rate over the run")
    run: RunConfig = opt(RunConfig, "the run itself; steps are optimizer steps")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")


def train(config: Config) -> Result:
    """Reinforce right answers; `reward` and `right` (the share of right answers) are of the newest rollout."""
    mesh = start(config, "grpo")
    options = config.grpo
    policy = load_model(config.model, config.run.dtype, mesh)
    networks = {"policy": policy}
    if options.beta:
        networks["reference"] = load_model(config.model, config.run.dtype, mesh, frozen=True)
    tokenizer = load_tokenizer(config.model, policy)
    skipped = Skipped(config.data.on_error)
    problems = load_problems(config.data.sources, tokenizer, policy.config.max_positions, skipped)
    reward = ExactMatch(malformed=options.malformed)
    temperature = config.sampling.temperature or 1.0
    clip = (options.clip_low, options.clip_high)
    objective = GRPO(*clip, options.beta, options.normalization, temperature)
    rollouts = max(1, round(config.run.epochs * len(problems) / options.prompts))
    if config.run.steps:
        rollouts = math.ceil(config.run.steps / options.updates)  # whole ones
    trainer = Trainer(
        networks,
        objective,
        config,
        mesh,
        name="grpo",
        total_steps=rollouts * options.updates,
        tokenizer=tokenizer,
        skipped=skipped,
    )
    for step in trainer.steps():
        number = step // options.updates
        chosen = share(problems_of(number, problems, options.prompts, config.run.seed), mesh)
        seed = (config.run.seed, number)
        with trainer.clock("sample"):
            rollout = roll_out(policy, tokenizer, chosen, reward, config.sampling, n=options.group, seed=seed)
        batches = to_batches(rollout, options, config.data)
        batches = [batch.to(mesh.device) for batch in batches]
        # ------------------------------------------------------------------------------------------------------
        objective.prepare(trainer.networks, batches)  # log-probs before the first update
        for i in range(options.updates):
            trainer.step(batches[i :: options.updates], summary(rollout))  # −min(ρA, clip(ρ)A) + β KL, per token
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


def problems_of(number: int, problems: list[Problem], count: int, seed: int) -> list[Problem]:
    """The problems of rollout `number`: shuffled passes over all of them, a function of (seed, number)."""
    places = range(number * count, (number + 1) * count)
    orders = {
        e: np.random.default_rng([seed, e]).permutation(len(problems)) for e in {p // len(problems) for p in places}
    }
    return [problems[orders[p // len(problems)][p % len(problems)]] for p in places]


def to_batches(rollout: Rollout, options: GRPOConfig, data: DataConfig) -> list[PackedBatch]:
    """Advantages, and the stream: a group is never split; what taught nothing or was not judged is left out.

    With several updates, the batches are dealt to them in turn, and there are at least as many.
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


def summary(rollout: Rollout) -> dict[str, float]:
    """What this rank's rollout looks like; `varied_groups` are those that teach something."""
    samples = rollout.samples
    scores = [s.score.value for s in samples if s.score is not None]
    varied = [len({s.score.value for s in group if s.score is not None}) > 1 for group in rollout.groups]
    return {
        "reward": float(np.mean(scores)) if scores else 0.0,
        "right": float(np.mean([s >= 1.0 for s in scores])) if scores else 0.0,
        "length": float(np.mean([len(s.completion.tokens) for s in samples])),
        "ended": float(np.mean([s.completion.finish_reason == "stop" for s in samples])),
        "varied_groups": float(np.mean(varied)),
        "verifier_failures": float(sum(rollout.failures.values())),
    }


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("grpo"))
