"""Pairs or answers that are sampled from the policy during training, for online `dpo` and for `distill`.

One round: problems → answers → scores → the best and the worst answer of each problem → some steps → refresh the
reference.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritium.core.batch import Group, PackedBatch
from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.files import Skipped
from tritium.core.objectives.base import Objective
from tritium.core.problems import Problem, load_problems, problems_of, share
from tritium.core.reference import check_follows
from tritium.core.rewards import Reward
from tritium.core.rewards.model import open_reward
from tritium.core.rollout import Rollout, Sample, SamplingConfig, pack_updates, roll_out, sample_document
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Trainer
from tritium.parallel.data import all_reduce_counts

PAIRS = ("student", "teacher", "best")  # whose the better answer of a pair may be


@dataclass
class DrawConfig:
    """How answers are sampled and judged."""

    prompts: int = opt(16, "problems per round, over all ranks", least=1)
    k: int = opt(4, "answers per problem", least=1)
    updates: int = opt(1, "optimizer steps per round", least=1)
    refresh: int = opt(0, "copy the policy to the reference every this many rounds (0: never)", least=0)
    margin: float = opt(0.0, "keep a pair only if its scores differ by more than this")
    reward: str = opt("exact", "reward expression; see core/rewards/make.py")
    reward_model: str = opt("", "folder of a reward model; its score is added to the reward")
    sampling: SamplingConfig = opt(SamplingConfig, "how answers are sampled")

    def __post_init__(self):
        if not self.sampling.temperature:
            raise ConfigError("draw.sampling.temperature=0 makes all answers to a problem equal: set it above 0")
        check_ranges(self, "draw.")


def open_rounds(
    config: Any,
    name: str,
    networks: dict[str, nn.Module],
    objective: Objective,
    tokenizer: Tokenizer,
    kind: str = "student",
) -> "tuple[Trainer, Rounds]":
    """The trainer of stage `name`, and its rounds. Raises: ConfigError for options that don't apply to rounds."""
    draw, policy, reference = config.draw, networks["policy"], networks.get("reference")
    if config.schedule.batch_start < 1:
        raise ConfigError("schedule.batch_start does not apply: the batch is set by draw.prompts and draw.updates")
    if kind == "student" and draw.k < 2:
        raise ConfigError("draw.k=1: a pair needs two answers; set draw.k to at least 2")
    if draw.refresh:
        if reference is None:
            raise ConfigError(f"draw.refresh={draw.refresh}: this loss has no reference; set draw.refresh=0")
        check_follows(policy, reference, "draw.refresh")
    skipped = Skipped(config.data.on_error)
    problems = load_problems(config.data.sources, tokenizer, policy.config.max_positions, skipped)
    total = config.run.steps or math.ceil(config.run.epochs * len(problems) / draw.prompts) * draw.updates
    settings = {"name": name, "total_steps": total, "followers": ["reference"] if draw.refresh else []}
    reward = open_reward(draw.reward, draw.reward_model, 0.0, config.run.dtype, policy.mesh)
    trainer = Trainer(networks, objective, config, policy.mesh, **settings, tokenizer=tokenizer, skipped=skipped)
    return trainer, Rounds(trainer, tokenizer, problems, config, reward, kind)


@dataclass
class Rounds:
    """Samples the batches of each round. `settings` is the stage's config (`draw`, `data`, `run`).

    `kind`: whose answer is the better one of a pair, the "student"'s, the "teacher"'s or the "best" of both; or, for
    single answers instead of pairs, "on_policy" (the student's) or "sequence" (the teacher's).
    """

    trainer: Trainer
    tokenizer: Tokenizer
    problems: list[Problem]
    settings: Any
    reward: Reward
    kind: str

    def steps(self, step: int) -> Iterator[tuple[list[PackedBatch], dict[str, float]]]:
        """The batches of the remaining steps of `step`'s round, each with metrics: the round's, in the first step."""
        draw, trainer = self.settings.draw, self.trainer
        number, done = divmod(step, draw.updates)
        with trainer.phase("sample"), trainer.whole(layers=True):
            groups, numbers = self.pairs(number) if self.kind in PAIRS else self.single(number)
        batches = self.packed(groups)
        for i in range(done, min(draw.updates, trainer.total_steps - number * draw.updates)):
            yield batches[i :: draw.updates], numbers
            numbers = {}
        ended = trainer.index == (number + 1) * draw.updates  # else it ends when the run is extended
        if ended and "reference" in trainer.followers and (number + 1) % draw.refresh == 0:
            trainer.followers["reference"].follow(0.0)

    def answers(self, network: str, number: int, stream: int) -> Rollout:
        draw = self.settings.draw
        chosen = share(problems_of(number, self.problems, draw.prompts, self.settings.run.seed), self.trainer.mesh)
        drawn = {"n": draw.k, "seed": (self.settings.run.seed, number, stream)}
        return roll_out(self.trainer.networks[network], self.tokenizer, chosen, self.reward, draw.sampling, **drawn)

    def single(self, number: int) -> tuple[list[Group], dict[str, float]]:
        """This rank's answers of round `number`, and metrics over all ranks."""
        drawn = self.answers("teacher" if self.kind == "sequence" else "policy", number, 0)
        return [[sample_document(s, {})] for s in drawn.samples], self.numbers(drawn, {})[0]

    def numbers(self, drawn: Rollout, counts: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics, total): accuracy and the judge's failures, and the sums of `counts`, over all ranks."""
        counts |= {"samples": len(drawn.samples), "right": sum(s.right for s in drawn.samples)}
        counts["verifier_failures"] = sum(drawn.failures.values())
        total = all_reduce_counts({k: float(v) for k, v in counts.items()}, self.trainer.mesh)
        right = total["right"] / (total["samples"] or 1.0)
        return {"right": right, "verifier_failures": total["verifier_failures"]}, total

    def pairs(self, number: int) -> tuple[list[Group], dict[str, float]]:
        """This rank's pairs of round `number`, and metrics over all ranks."""
        alone = self.kind == "student"
        own = self.answers("policy", number, 0)
        theirs = Rollout([[] for _ in own.groups]) if alone else self.answers("teacher", number, 1)
        both = list(zip(own.groups, theirs.groups, strict=True))
        found = [pair_of(*answers, self.kind, self.settings.draw.margin) for answers in both]
        groups = [[sample_document(s, {}) for s in pair] for pair in found if pair]
        taught = sum(any(p[0] is s for s in t) for p, (_, t) in zip(found, both, strict=True) if p)
        numbers, total = self.numbers(own, {"tried": len(found), "kept": len(groups), "taught": taught})
        numbers["pairs_kept"] = total["kept"] / (total["tried"] or 1.0)
        if not alone:
            numbers["positives_from_teacher"] = total["taught"] / (total["kept"] or 1.0)
        return groups, numbers

    def packed(self, groups: list[Group]) -> list[PackedBatch]:
        """At least one batch per step of the round, as far as there are groups; pairs get their denominators."""
        given = (groups, self.settings.data, self.settings.draw.updates, self.trainer.mesh)
        return pack_updates(*given, pair_counts) if self.kind in PAIRS else pack_updates(*given)


def pair_counts(pairs: Sequence[Group]) -> dict[str, float]:
    tokens = [float(sum((pair[i].weights[1:] > 0).sum() for pair in pairs)) for i in (0, 1)]
    return {"pairs": float(len(pairs)), "positive_tokens": tokens[0], "negative_tokens": tokens[1]}


def pair_of(own: list[Sample], theirs: list[Sample], positive_from: str, margin: float) -> tuple[Sample, Sample] | None:
    """(the best answer among the possible positives, the student's worst) if their scores differ by more than `margin`,
    else None."""
    judged = [s for s in own if s.score is not None]
    positives = {"student": judged, "teacher": theirs, "best": [*theirs, *judged]}[positive_from]
    positives = [s for s in positives if s.score is not None]
    if not judged or not positives:
        return None
    best, worst = max(positives, key=lambda s: s.score.value), min(judged, key=lambda s: s.score.value)
    return (best, worst) if best.score.value - worst.score.value > margin else None
