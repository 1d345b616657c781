"""Reinforcement learning without a critic: sample groups of answers, score them, and reinforce the better ones.

    tritium grpo --model=runs/sft --data.sources=problems.jsonl --run.out=runs/grpo
    tritium grpo --model=… --grpo.algorithm=rloo --grpo.beta=0.02

Records are {"question", "answer"}. The policy samples its own answers; token ids are never decoded and re-encoded.

Groups whose answers all have the same score give no gradient. They are left out of the loss and of its denominator, as
in DAPO's objective (arXiv 2503.14476, eq. 8 with its constraint), unless there is a KL or an entropy bonus, which apply
to them too. TRL always divides by all answers, as GRPO's own objective does (arXiv 2402.03300, eq. 3): without a KL its
gradients are ours times the fraction that is kept, `varied_groups` (of tokens, if the mean is over tokens). AdamW is
nearly invariant to that factor, optim.clip is not.

Several phases (mathematics first, then code, …) are several stages of a recipe, each with its own prompts, rewards and
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

    algorithm: str = opt("grpo", "algorithm", choices=tuple(ALGORITHMS))
    updates: int = opt(1, "optimizer steps per rollout", least=1)
    rounds: int = opt(1, "sample up to this often until `prompts` groups vary (DAPO's dynamic sampling)", least=1)
    clip_low: float | None = opt(None, f"clip the ratio at 1 − clip_low {ITS_OWN}", least=0, most=1)
    clip_high: float | None = opt(None, f"clip the ratio at 1 + clip_high {ITS_OWN}", least=0)
    normalization: str | None = opt(None, f"loss: a mean over {ITS_OWN}", choices=("token", "sequence", "constant"))
    constant: float | None = opt(None, "divisor of a sequence's sum (default: dr_grpo max_tokens, else 1)", above=0)
    scale: str | None = opt(None, f"what advantages are divided by {ITS_OWN}", choices=("group", "batch", "none"))

    def __post_init__(self):
        check_ranges(self, "grpo.")
        if self.group < 2 and ALGORITHMS[self.algorithm].baseline in ("mean", "others"):
            raise ConfigError(f"grpo.group=1: {self.algorithm} compares answers; set grpo.group to at least 2")
        if self.rounds > 1 and self.group < 2:
            raise ConfigError(f"grpo.rounds={self.rounds} looks for groups whose scores differ: set grpo.group above 1")
        own = ALGORITHMS[self.algorithm]
        if self.scale == "group" and own.baseline != "mean":
            raise ConfigError(f"grpo.scale=group: {self.algorithm} has no group mean; set grpo.scale to batch or none")
        if self.constant is not None and (self.normalization or own.normalization) != "constant":
            raise ConfigError(f"grpo.constant={self.constant} needs grpo.normalization=constant")


@dataclass
class Config(PolicyStage):
    reward: str = opt("exact", 'reward expression, e.g. "exact - 0.1*repetition"; see core/rewards/make.py')
    grpo: GRPOConfig = opt(GRPOConfig, "objective")
    optim: OptimConfig = opt(OptimConfig(lr=5e-5, weight_decay=0.0), "optimizer")

    def __post_init__(self):
        self.check_objective(self.grpo, "grpo")


def train(config: Config) -> Result:
    """Reinforce right answers; the metrics `reward` and `right` (accuracy) are those of the newest rollout."""
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
            numbers = {}  # logged once, with the rollout's first update
        # ------------------------------------------------------------------------------------------------------
        if trainer.index == (number + 1) * updates:  # a rollout that was cut short ends when the run is extended
            experience.follow(number)
    return trainer.result()


def objective_of(options: GRPOConfig, sampling: SamplingConfig) -> PolicyGradient:
    """The algorithm, with the given options in place of its own."""
    constant = options.constant or (sampling.max_tokens if options.algorithm == "dr_grpo" else None)
    given = options.given("clip_low", "clip_high", "normalization", "scale") | {"on_policy": options.updates == 1}
    return algorithm(options.algorithm, **given, constant=constant, temperature=sampling.temperature)


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("grpo"))
