"""Experience collection for `grpo` and `ppo`: problems → sampled, scored answers → batches of a policy gradient.

choose problems     shuffled passes over all, or only those with a pass rate within a band
sample, score       core/rollout.py; repeated if too few groups have different scores (DAPO's dynamic sampling)
shape               reward = clip(scale · score) − penalties for a missing end token and for length
pack                a group is never split; answers without a score, and groups without a signal, are left out
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from tritium.core.batch import Group, PackedBatch
from tritium.core.config import REQUIRED, ConfigError, check_ranges, opt
from tritium.core.data import SourcesConfig
from tritium.core.files import Skipped
from tritium.core.health import BLOWN_UP, diagnose
from tritium.core.metrics import read_lines
from tritium.core.objectives.policy import PolicyGradient
from tritium.core.problems import Problem, load_problems, problems_of, share
from tritium.core.reference import ReferenceConfig
from tritium.core.rewards import Reward
from tritium.core.rewards.make import make_reward
from tritium.core.rewards.model import open_reward
from tritium.core.rollout import Rollout, Sample, SamplingConfig, pack_updates, roll_out, sample_document
from tritium.core.run import LoopConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import FinetuneConfig, MeshConfig, load_tokenizer
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Trainer, TrainingError
from tritium.parallel.data import all_reduce_counts
from tritium.parallel.mesh import Mesh


@dataclass
class ShapingConfig:
    """How a score becomes a reward: clip(scale · score) minus the penalties."""

    scale: float = opt(1.0, "factor on the scores")
    clip: float = opt(0.0, "then clip to ± this (0: off)", least=0)
    missing_eos: float = opt(0.0, "penalty for an answer without an end token", least=0)
    overlong: int = opt(0, "length penalty, rising to 1 over so many tokens before sampling.max_tokens (DAPO)", least=0)

    def __post_init__(self):
        check_ranges(self, "shaping.")


@dataclass
class ProblemsConfig(SourcesConfig):
    """Which problems, and how long the micro-batches of their answers are."""

    sources: list[str] = opt([], "problem files")
    bin_tokens: int = opt(8192, "tokens per micro-batch (a bin)")
    band: list[float] = opt([0.0, 1.0], "train on problems whose pass rate is between these two")

    def __post_init__(self):
        super().__post_init__()
        if len(self.band) != 2 or not 0 <= self.band[0] < self.band[1] <= 1:
            raise ConfigError(f"data.band={self.band} must be two pass rates, the lower one first, e.g. 0.1,0.9")


@dataclass
class PolicyOptions:
    """The settings of every objective on sampled answers."""

    prompts: int = opt(32, "problems per rollout, over all ranks", least=1)
    group: int = opt(8, "answers per problem", least=1)
    beta: float = opt(0.0, "weight of the KL to the reference", least=0)
    kl: str | None = opt(None, "KL estimator (default: the algorithm's; k3 in the loss)", choices=("k1", "k2", "k3"))
    kl_in: str | None = opt(None, "where the KL goes (default: the algorithm's)", choices=("loss", "reward"))
    importance: float = opt(0.0, "truncation of importance weights for sampler-trainer mismatch (0: off)", least=0)
    entropy: float = opt(0.0, "weight of the entropy bonus", least=0)
    malformed: float = opt(-0.5, "score that exact, number and math give where there is no answer (cut off, say)")

    def given(self, *names: str) -> dict[str, Any]:
        """The objective's options: those here, and of these names."""
        return {name: getattr(self, name) for name in ("beta", "kl", "kl_in", "importance", "entropy", *names)}


@dataclass
class PolicyStage:
    """The settings of every stage that trains a policy on its own samples."""

    model: str = opt(REQUIRED, "model folder to start from, with its tokenizer")
    reference: ReferenceConfig = opt(ReferenceConfig, "reference policy of the KL")
    reward: str = opt("", 'reward expression, e.g. "exact - 0.1*repetition"; see core/rewards/make.py')
    reward_model: str = opt("", "folder of a reward model, with its tokenizer; its score is added to the reward")
    model_weight: float = opt(1.0, "weight of the reward model's score")
    verifier: str = opt("", "judge that measures accuracy only; it does not enter the reward")
    sampling: SamplingConfig = opt(SamplingConfig, "how answers are sampled")
    shaping: ShapingConfig = opt(ShapingConfig, "how a score becomes a reward")
    data: ProblemsConfig = opt(ProblemsConfig, "problems")
    schedule: ScheduleConfig = opt(ScheduleConfig(kind="constant"), "learning-rate schedule")
    run: LoopConfig = opt(LoopConfig, "the run itself; steps are optimizer steps")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")
    finetune: FinetuneConfig = opt(FinetuneConfig, "which parameters of the policy are trained")

    def check_objective(self, options: PolicyOptions, name: str) -> None:
        """Check options against each other; `name` is the objective's section ("grpo", "ppo").

        Raises: ConfigError for sampling that gives no learning signal or whose log-probs importance weights can't
        compare, and for a reference or a KL that beta=0 would never use.
        """
        sampling, importance = self.sampling, options.importance
        if not options.beta and (self.reference != ReferenceConfig() or options.kl or options.kl_in):
            told = "reference" if self.reference != ReferenceConfig() else f"{name}.kl" + "_in" * bool(options.kl_in)
            raise ConfigError(f"{told} has no effect without a KL to the reference: set {name}.beta above 0")
        if not sampling.temperature:
            raise ConfigError("sampling.temperature=0 makes all answers of a group equal: set it above 0")
        if self.data.band != [0.0, 1.0] and not self.reward and not self.verifier:
            raise ConfigError("data.band needs pass rates, which a reward model does not give: set --verifier")
        cut = sampling.top_k or sampling.top_p < 1 or sampling.min_p
        if importance and (sampling.temperature != 1 or cut or sampling.options().edits):
            needs = "sampling.temperature=1, and no top_k, top_p, min_p, penalties or no_repeat_ngram"
            raise ConfigError(f"{name}.importance={importance} compares the sampler's log-probs: it needs {needs}")


def open_experience(
    config: PolicyStage, name: str, networks: dict[str, nn.Module], objective: PolicyGradient, updates: int
) -> "Experience":
    """The trainer of stage `name` and its source of experience, with `updates` steps per rollout. The config's section
    of that name has `prompts`, `group`, `beta`, `malformed`, and possibly `rounds`."""
    policy, data, options = networks["policy"], config.data, getattr(config, name)
    tokenizer, skipped = load_tokenizer(config.model, policy, data.template), Skipped(data.on_error)
    problems = load_problems(data.sources, tokenizer, policy.config.max_positions, skipped)
    total = config.run.steps or max(1, round(config.run.epochs * len(problems) / options.prompts)) * updates
    followers = ["reference"] if options.beta and config.reference.every else []
    settings = {"name": name, "total_steps": total, "followers": followers}
    judged_by = (config.reward, config.reward_model, options.malformed, config.run.dtype, policy.mesh)
    reward = open_reward(*judged_by, config.model_weight, policy)
    verifier = make_reward(config.verifier, options.malformed) if config.verifier else None
    trainer = Trainer(networks, objective, config, policy.mesh, **settings, tokenizer=tokenizer, skipped=skipped)
    sizes = (options.prompts, options.group, getattr(options, "rounds", 1))
    return Experience(trainer, tokenizer, problems, reward, config, *sizes, objective.baseline == "greedy", verifier)


@dataclass
class Experience:
    """Collects a stage's rollouts: `group` answers to each of `prompts` problems.

    With `rounds` > 1, more problems are tried until `prompts` groups have different scores. `verifier` measures
    accuracy only; it does not enter the reward.
    """

    trainer: Trainer
    tokenizer: Tokenizer
    problems: list[Problem]
    reward: Reward
    settings: PolicyStage
    prompts: int
    group: int = 1
    rounds: int = 1
    greedy: bool = False
    verifier: Reward | None = None

    def __post_init__(self):
        file = self.trainer.out / "metrics.jsonl"
        self.history, last = [], {}
        for _, row in read_lines(file) if file.exists() else ():
            last |= row
            self.history += [last.copy()] if "reward" in row else []
        self.warned: set[str] = set()

    def collect(self, number: int) -> tuple[Rollout, dict[str, float]]:
        """This rank's part of rollout `number`, and the metrics of the whole rollout. A collective."""
        trainer, mesh, start = self.trainer, self.trainer.mesh, time.perf_counter()
        rollout = Rollout([])
        with trainer.phase("sample"), trainer.whole(layers=True):
            for attempt in range(self.rounds):
                drawn = self.draw(number * self.rounds + attempt)
                rollout = Rollout(rollout.groups + drawn.groups, rollout.failures + drawn.failures)
                if self.rounds == 1 or self.varied(rollout) >= self.prompts:
                    break
            greedy = self.greedy_scores(rollout, number) if self.greedy else None
        seconds = time.perf_counter() - start
        numbers = summary(rollout, *self.shaping, mesh)
        numbers["sampled_tokens_per_second"] = numbers["length"] * numbers.pop("samples") / seconds
        if not self.settings.reward and not self.verifier:
            del numbers["right"]  # a reward model does not judge right or wrong
        self.remember(rollout, number)
        self.warn(numbers)
        rollout.greedy = greedy
        return rollout, numbers

    def varied(self, rollout: Rollout) -> float:
        """The number of groups with different rewards, over all ranks."""
        found = sum(differs(group, *self.shaping) for group in rollout.groups)
        return all_reduce_counts({"varied": float(found)}, self.trainer.mesh)["varied"]

    def warn(self, numbers: dict[str, float]) -> None:
        """Print the warnings that the run's history so far gives rise to, each kind once."""
        self.history.append(self.trainer.last | numbers)
        for kind, sentence in diagnose(self.history).items():
            if kind not in self.warned:
                self.trainer.say(f"health: {sentence}")
                self.warned.add(kind)

    def draw(self, number: int) -> Rollout:
        data, seed = self.settings.data, self.settings.run.seed
        rates = None if data.band == [0.0, 1.0] else self.trainer.notes.get("pass_rates", {})
        chosen = share(problems_of(number, self.problems, self.prompts, seed, rates, data.band), self.trainer.mesh)
        return self.answers(chosen, self.settings.sampling, self.group, (seed, number))

    def answers(self, chosen: Sequence[Problem], sampling: SamplingConfig, n: int, seed: Sequence[int]) -> Rollout:
        policy = self.trainer.networks["policy"]
        return roll_out(policy, self.tokenizer, chosen, self.reward, sampling, n=n, seed=seed, verifier=self.verifier)

    def greedy_scores(self, rollout: Rollout, number: int) -> list[float]:
        """The reward of the greedy answer to each group's problem (0 if the judge failed)."""
        likeliest = replace(self.settings.sampling, temperature=0.0)
        found = self.answers([group[0].problem for group in rollout.groups], likeliest, 1, (number,))
        rollout.failures.update(found.failures)
        return [sum(shaped(s, *self.shaping)) if s.score else 0.0 for (s,) in found.groups]

    @property
    def shaping(self) -> tuple[ShapingConfig, int]:
        return self.settings.shaping, self.settings.sampling.max_tokens

    def estimate(self, batches: Sequence[PackedBatch], done: int) -> dict[str, float]:
        """`Trainer.estimate`, which also counts the rollouts whose KL to the reference blew up. A rollout that is
        resumed after `done` of its updates is not counted twice.

        Raises: TrainingError if the KL is above `reference.max_kl`.
        """
        numbers, notes, limit = self.trainer.estimate(batches), self.trainer.notes, self.settings.reference.max_kl
        if "kl_k3" in numbers:
            kl = numbers["kl_k3"]
            blown_up = not (done or kl <= BLOWN_UP)
            numbers["kl_blowups"] = notes["kl_blowups"] = notes.get("kl_blowups", 0.0) + float(blown_up)
            if limit and not kl <= limit:
                self.trainer.finish_save()
                raise TrainingError(
                    f"after step {self.trainer.index} the KL to the reference is {kl:.3g} per token, above "
                    f"reference.max_kl={limit}: raise beta, or lower optim.lr; checkpoints are in {self.trainer.out}"
                )
        return numbers

    def follow(self, number: int) -> None:
        """Update the reference after rollout `number`, if it is due."""
        if "reference" in self.trainer.followers and (number + 1) % self.settings.reference.every == 0:
            self.trainer.followers["reference"].follow(self.settings.reference.decay)

    def remember(self, rollout: Rollout, number: int) -> None:
        """Note each problem's pass rate, and in which draw it was measured; saved in checkpoints."""
        if self.settings.data.band != [0.0, 1.0]:
            last = number * self.rounds + self.rounds - 1
            judged = [[s for s in group if s.score is not None] for group in rollout.groups]
            rates = {str(g[0].problem.index): [float(np.mean([s.right for s in g])), last] for g in judged if g}
            notes = self.trainer.notes.setdefault("pass_rates", {})
            for part in self.trainer.mesh.gather_objects(rates):
                notes |= part

    def batches(self, rollout: Rollout, updates: int, varied_only: bool) -> list[PackedBatch]:
        """This rank's answers in at least `updates` batches, as far as there are groups. Updates take them in turn; one
        that has no batch on any rank changes nothing."""
        groups: list[Group] = []
        for i, samples in enumerate(rollout.groups):
            judged = [s for s in samples if s.score is not None]
            if not judged or (varied_only and not differs(judged, *self.shaping)):
                continue
            extra = {} if rollout.greedy is None else {"greedy": rollout.greedy[i]}
            groups.append([self.document(s, {"number": float(j)} | extra) for j, s in enumerate(judged)])
        return pack_updates(groups, self.settings.data, updates, self.trainer.mesh)

    def document(self, sample: Sample, fields: dict[str, float]):
        """A sample's document, with its reward at the last token, or the rewards of its steps at the end of each; if
        that is a tool's token, at the last token that the policy sampled before it."""
        answer, score = sample.completion, sample.score
        rewards = np.zeros(len(answer.tokens), np.float32)
        scored = np.zeros_like(rewards)
        drawn = np.flatnonzero(answer.weights or np.ones(len(rewards)))
        for at, value in zip(score.ends or [len(rewards) - 1], shaped(sample, *self.shaping), strict=True):
            place = drawn[max(np.searchsorted(drawn, at, "right") - 1, 0)]
            rewards[place] += value
            scored[place] = 1.0
        return sample_document(sample, fields, {"rewards": rewards, "scored": scored})


def shaped(sample: Sample, shaping: ShapingConfig, max_tokens: int) -> list[float]:
    """The rewards of a scored answer: one, or one per step, of which the last takes the penalties. `overlong` is DAPO's
    soft overlong punishment (Yu et al., arXiv 2503.14476, eq. 13)."""
    score, answer = sample.score, sample.completion
    values = np.array(score.steps if score.ends else [score.value]) * shaping.scale
    values = values.clip(-shaping.clip, shaping.clip) if shaping.clip else values
    if answer.finish_reason != "stop":
        values[-1] -= shaping.missing_eos
    if shaping.overlong:
        values[-1] -= max(0.0, 1.0 - (max_tokens - len(answer.tokens)) / shaping.overlong)
    return values.tolist()


def differs(group: Sequence[Sample], shaping: ShapingConfig, max_tokens: int) -> bool:
    """Whether the group's rewards (of answers, or of their steps) differ, so that there is a signal."""
    return len({value for s in group if s.score is not None for value in shaped(s, shaping, max_tokens)}) > 1


def summary(rollout: Rollout, shaping: ShapingConfig, max_tokens: int, mesh: Mesh) -> dict[str, float]:
    """Metrics of the whole rollout, over all ranks: `varied_groups` is the fraction of groups whose rewards differ,
    reward/NAME the mean of one component of the reward, before its weight."""
    samples = rollout.samples
    judged = [s for s in samples if s.score is not None]
    values: dict[str, list[float]] = {
        "reward": [s.score.value for s in judged],
        "shaped_reward": [sum(shaped(s, shaping, max_tokens)) for s in judged],
        "right": [s.right for s in judged],
        "length": [len(s.completion.tokens) for s in samples],
        "ended": [s.completion.finish_reason == "stop" for s in samples],
        "varied_groups": [differs(group, shaping, max_tokens) for group in rollout.groups],
    }
    counts = {f"{name} n": float(len(own)) for name, own in values.items()}
    for name in dict.fromkeys(name for s in judged for name in s.score.parts):
        values[f"reward/{name}"] = [s.score.parts.get(name, 0.0) for s in judged]
    sums = {name: float(sum(own)) for name, own in values.items()}
    total = all_reduce_counts(sums | counts | {"verifier_failures": float(sum(rollout.failures.values()))}, mesh)
    failures, counts = total.pop("verifier_failures"), {name: total.pop(name) for name in counts}
    # A component's mean is over all scored answers, also those of ranks that have not seen it.
    means = {name: value / (counts.get(f"{name} n", counts["reward n"]) or 1.0) for name, value in total.items()}
    return means | {"verifier_failures": failures, "samples": counts["length n"]}
