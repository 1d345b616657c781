"""Reinforcement learning without a critic: sample answers, judge them, reinforce what beats its group.

    tritium grpo --model=runs/sft --data.sources=problems.jsonl --run.out=runs/grpo
    tritium grpo --model=… --grpo.algorithm=rloo --grpo.beta=0.02

Records are {"question", "answer"}. The sampler is the policy itself; token in, token out. Groups whose answers all
score the same teach nothing and are left out, of the loss and of what it is divided by, as in DAPO's objective (arXiv
2503.14476, eq. 8, and its condition on the groups); a KL or an entropy bonus, which holds for them, too, keeps them.
TRL divides by all answers always, as GRPO's own objective (arXiv 2402.03300, eq. 3): without a KL its gradients are
those here times the share that is kept, `varied_groups` (of tokens, where the mean is over these). AdamW's steps hardly
depend on that, optim.clip does.

Several phases (first mathematics, then code, …) are several stages of a recipe, each with its own prompts, rewards and
KL: see stages/recipes/ladder.toml.
"""

from dataclasses import dataclass

from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.experience import PolicyOptions, PolicyStage, open_experience
from tritium.core.objectives.policy import ALGORITHMS, PolicyGradient, algorithm
from tritium.core.optim import OptimConfig
from tritium.core.reference import open_policy
from tritium.core.rollout import SamplingConfig
from tritium.core.run import Result
from tritium.core.setup import start

ITS_OWN = "(default: the algorithm's)"


@dataclass
class GRPOConfig(PolicyOptions):
    """The objective; see core/objectives/policy.py."""

    algorithm: str = opt("grpo", "whose formula", choices=tuple(ALGORITHMS))
    updates: int = opt(1, "optimizer steps on each rollout", least=1)
    rounds: int = opt(1, "tries with other problems until `prompts` groups differ (DAPO's dynamic sampling)", least=1)
    clip_low: float | None = opt(None, f"how far below 1 the ratio counts {ITS_OWN}", least=0, most=1)
    clip_high: float | None = opt(None, f"how far above 1 the ratio counts {ITS_OWN}", least=0)
    normalization: str | None = opt(
        None, f"what the loss is a mean over {ITS_OWN}", choices=("token", "sequence", "constant")
    )
    constant: float | None = opt(None, "divides a sequence's sum (default: dr_grpo max_tokens, else 1)", above=0)
    scale: str | None = opt(None, f"what divides advantages {ITS_OWN}", choices=("group", "batch", "none"))

    def __post_init__(self):
        check_ranges(self, "grpo.")
        if self.group < 2 and ALGORITHMS[self.algorithm].baseline in ("mean", "others"):
            raise ConfigError(f"grpo.group=1: an advantage of {self.algorithm} needs at least 2 answers to compare")
        if self.rounds > 1 and self.group < 2:
            raise ConfigError(f"grpo.rounds={self.rounds} looks for groups that differ: grpo.group must be above 1")
        own = ALGORITHMS[self.algorithm]
        if self.scale == "group" and own.baseline != "mean":
            raise ConfigError(f"grpo.scale=group: {self.algorithm} has no group's mean to go with it; batch, or none")
        if self.constant is not None and (self.normalization or own.normalization) != "constant":
            raise ConfigError(f"grpo.constant={self.constant} goes with grpo.normalization=constant")


@dataclass
class Config(PolicyStage):
    reward: str = opt("exact", 'judges in text, e.g. "exact - 0.1*repetition"; see core/rewards/make.py')
    grpo: GRPOConfig = opt(GRPOConfig, "the objective")
    optim: OptimConfig = opt(OptimConfig(lr=5e-5, weight_decay=0.0), "optimizer")

    def __post_init__(self):
        self.check_objective(self.grpo, "grpo")


def train(config: Config) -> Result:
    """Reinforce right answers; `reward` and `right` (the share of right answers) are of the newest rollout."""
    mesh = start(config, "grpo")
    options, updates = config.grpo, config.grpo.updates
    reference = config.reference if options.beta else None
    networks = open_policy(config.model, config.run.dtype, mesh, config.finetune, config.run.seed, reference)
    objective = objective_of(options, config.sampling)
    varied = objective.baseline in ("mean", "others") and not (options.beta or options.entropy)
    experience = open_experience(config, "grpo", networks, objective, updates)
    trainer = experience.trainer
    for step in trainer.steps():
        number, done = divmod(step, updates)
        rollout, numbers = experience.collect(number)
        batches = experience.batches(rollout, updates, varied_only=varied)
        # ------------------------------------------------------------------------------------------------------
        numbers |= experience.estimate(batches, done)  # advantages; log-probs before the first of several updates, KL
        for i in range(done, min(updates, trainer.total_steps - number * updates)):
            trainer.step(batches[i::updates], numbers)  # −min(ρA, clip(ρ)A) + β KL
            numbers = {}  # a rollout's: with its first update
        # ------------------------------------------------------------------------------------------------------
        if trainer.index == (number + 1) * updates:  # one that was cut short ends when the run is extended
            experience.follow(number)
    return trainer.result()


def objective_of(options: GRPOConfig, sampling: SamplingConfig) -> PolicyGradient:
    """The algorithm, with the options that were given in place of its own."""
    constant = options.constant or (sampling.max_tokens if options.algorithm == "dr_grpo" else None)
    given = options.given("clip_low", "clip_high", "normalization", "scale") | {"on_policy": options.updates == 1}
    return algorithm(options.algorithm, **given, constant=constant, temperature=sampling.temperature)


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("grpo"))
