"""Distillation: a student learns what a teacher with the same vocabulary would say.

    tritium distill --model=runs/small --teacher=runs/large --data.sources=chats.jsonl
    tritium distill --mode=on_policy --model=… --teacher=… --data.sources=problems.jsonl
    tritium distill --mode=dual --positive_from=best --model=… --teacher=… --data.sources=problems.jsonl

    logit       the teacher's distribution at each token of given answers
    on_policy   the same on answers that the student draws (GKD, arXiv 2306.13649)
    dual        student and teacher answer problems; a judge makes pairs of them; a loss of pairs, and the KL to the
                teacher on the tokens of the better and of the worse answers (core/objectives/distill.py)

Sequence-level distillation is `tritium sample --model=TEACHER`, then `tritium sft` on its sft.jsonl.
"""

import math
from dataclasses import dataclass

from torch import nn

from tritium.core.batch import Group, PackedBatch, pack, plan_bins
from tritium.core.config import REQUIRED, ConfigError, UserError, opt
from tritium.core.data import DataConfig, open_records
from tritium.core.experience import problems_of
from tritium.core.formats import Skipped
from tritium.core.groups import conversation_group
from tritium.core.objectives import Distill, DualLevel, Objective, PairOptions
from tritium.core.objectives.preference import LOSSES, REFERENCE_FREE
from tritium.core.optim import OptimConfig
from tritium.core.rewards.model import open_reward
from tritium.core.rollout import Rollout, Sample, SamplingConfig, load_problems, roll_out, sample_document, share
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import MeshConfig, load_model, load_tokenizer, start
from tritium.core.trainer import Result, RunConfig, Trainer
from tritium.kernels.linear_kl import KINDS as DIVERGENCES
from tritium.parallel.data import all_reduce_counts
from tritium.parallel.mesh import Mesh
from tritium.stages.dpo import check_same_vocabulary


@dataclass
class Config:
    model: str = opt(REQUIRED, "folder of the student, with its tokenizer")
    teacher: str = opt(REQUIRED, "folder of the teacher, with the same tokenizer")
    mode: str = opt("logit", "what is learned on", choices=("logit", "on_policy", "dual"))
    kind: str = opt("forward", "the divergence: KL(teacher ‖ student), its reverse, or JSD", choices=DIVERGENCES)
    temperature: float = opt(1.0, "of both distributions (dual: 1)")
    sft: float = opt(0.0, "logit: weight of the answers' cross-entropy")
    top_k: int = opt(0, "logit: keep only so many of the teacher's tokens, over epochs (0: the teacher runs each step)")
    prompts: int = opt(16, "on_policy, dual: problems of a step, over all ranks")
    k: int = opt(4, "on_policy, dual: answers to each")
    positive_from: str = opt("best", "dual: who gives the better answer", choices=("student", "teacher", "best"))
    margin: float = opt(0.0, "dual: by how much its score must be better, more than this")
    pairs: str = opt("dpo", "dual: the loss of pairs", choices=tuple(LOSSES))
    beta: float = opt(0.1, "dual: how strongly the student is held to the reference")
    weights: list[float] = opt([1.0, 1.0, 1.0], "dual: of the pairs, of KL on the better answers, and on the worse")
    round: int = opt(0, "dual: steps after which the reference becomes the student (0: it stays)")
    reward: str = opt("exact", "dual: judges in text; see core/rewards/make.py")
    reward_model: str = opt("", "dual: folder of a reward model; its score is added")
    sampling: SamplingConfig = opt(SamplingConfig, "how answers are drawn")
    data: DataConfig = opt(DataConfig, "conversations; on_policy, dual: problems")
    optim: OptimConfig = opt(OptimConfig(lr=5e-5), "optimizer")
    schedule: ScheduleConfig = opt(ScheduleConfig, "learning rate over the run")
    run: RunConfig = opt(RunConfig, "the run itself")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")

    def __post_init__(self):
        if not self.temperature > 0 or not self.beta > 0:
            raise ConfigError(f"temperature={self.temperature} and beta={self.beta} must be positive")
        if len(self.weights) != 3 or min(self.weights) < 0 or not any(self.weights):
            raise ConfigError(f"weights={self.weights} must be three numbers ≥ 0, not all 0")
        if self.top_k and (self.mode != "logit" or self.mesh.tp > 1 or self.mesh.cp > 1 or self.mesh.zero == 3):
            raise ConfigError(f"top_k={self.top_k} goes with --mode=logit, mesh.tp=1, mesh.cp=1 and mesh.zero < 3")
        if self.mode != "logit" and not self.sampling.temperature:
            raise ConfigError("sampling.temperature=0: equal answers teach nothing; it must be positive")
        if min(self.prompts, self.k) < 1 or min(self.top_k, self.round) < 0:
            raise ConfigError("prompts and k must be at least 1, top_k and round at least 0")


def train(config: Config) -> Result:
    """Train the student; `loss` is the divergence per token, or that of the pairs."""
    mesh = start(config, "distill")
    networks = open_networks(config, mesh)
    tokenizer = load_tokenizer(config.model, networks["policy"], config.data.template)
    skipped = Skipped(config.data.on_error)
    context = networks["policy"].config.max_positions
    settings = {"name": "distill", "tokenizer": tokenizer, "skipped": skipped}
    if config.mode == "logit":
        convert = conversation_group(tokenizer, config.data)
        bins, settings["evaluation"] = open_records(config, convert, context, mesh, skipped)
        steps = bins.steps_in(config.run.epochs)
    else:
        problems = load_problems(config.data.sources, tokenizer, context, skipped)
        steps = math.ceil(config.run.epochs * len(problems) / config.prompts)
        reward = open_reward(config.reward, config.reward_model, 0.0, config.run.dtype, mesh)
    settings["followers"] = ["reference"] if config.round and "reference" in networks else []
    trainer = Trainer(networks, objective_of(config), config, mesh, total_steps=config.run.steps or steps, **settings)
    for step in trainer.steps():
        numbers: dict[str, float] = {}
        if config.mode == "logit":
            batches = bins.step(step, trainer.ramp)
        else:
            with trainer.phase("sample"), trainer.whole(layers=True):
                groups, numbers = draw(config, networks, tokenizer, problems, reward, step)
            batches = packed(groups, config, mesh)
        # ------------------------------------------------------------------------------------------------------
        trainer.step(batches, numbers)  # D(teacher, student) / tokens; dual: pairs + KL⁺ / tokens⁺ + KL⁻ / tokens⁻
        # ------------------------------------------------------------------------------------------------------
        if settings["followers"] and (step + 1) % config.round == 0:
            trainer.followers["reference"].follow(0.0)
            trainer.objective.reference.cache.clear()
    return trainer.result()


def open_networks(config: Config, mesh: Mesh) -> dict[str, nn.Module]:
    """Student, teacher and, for a loss of pairs that wants one, the reference. Raises: UserError where the teacher has
    another vocabulary."""
    dtype = config.run.dtype
    networks = {"policy": load_model(config.model, dtype, mesh)}
    check_same_vocabulary(config.model, config.teacher, "teacher")
    networks["teacher"] = load_model(config.teacher, dtype, mesh, frozen=True)
    sizes = [networks[name].config.vocab_size for name in ("policy", "teacher")]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"teacher={config.teacher} has {sizes[1]} logits, {config.model} {sizes[0]}: they must be equal"
        )
    if config.mode == "dual" and config.pairs not in REFERENCE_FREE:
        networks["reference"] = load_model(config.model, dtype, mesh, frozen=True)
    return networks


def objective_of(config: Config) -> Objective:
    if config.mode == "dual":
        return DualLevel(config.pairs, PairOptions(config.beta), weights=tuple(config.weights), kind=config.kind)
    sft = config.sft if config.mode == "logit" else 0.0
    return Distill(config.kind, config.temperature, sft, config.top_k)


def draw(config: Config, networks, tokenizer, problems, reward, step: int) -> tuple[list[Group], dict[str, float]]:
    """This rank's groups of step `step`: the student's answers, or pairs of answers; and numbers over all ranks."""
    mesh, seed = networks["policy"].mesh, config.run.seed
    chosen = share(problems_of(step, problems, config.prompts, seed), mesh)

    def answers(name: str, stream: int) -> Rollout:
        settings = {"n": config.k, "seed": (seed, step, stream)}
        return roll_out(networks[name], tokenizer, chosen, reward, config.sampling, **settings)

    students = answers("policy", 0)
    if config.mode == "on_policy":
        return [[sample_document(s, {})] for s in students.samples], {}
    teachers = answers("teacher", 1) if config.positive_from != "student" else Rollout([[] for _ in students.groups])
    found = [
        pair_of(own, theirs, config.positive_from, config.margin)
        for own, theirs in zip(students.groups, teachers.groups, strict=True)
    ]
    groups = [[sample_document(s, {}) for s in pair] for pair in found if pair]
    counts = {"tried": len(found), "kept": len(groups), "samples": len(students.samples)}
    counts |= {"right": sum(s.right for s in students.samples), "failures": sum(students.failures.values())}
    counts["from_teacher"] = sum(
        bool(p) and any(p[0] is s for s in t) for p, t in zip(found, teachers.groups, strict=True)
    )
    total = all_reduce_counts({k: float(v) for k, v in counts.items()}, mesh)
    return groups, {
        "right": total["right"] / (total["samples"] or 1.0),
        "pairs_kept": total["kept"] / (total["tried"] or 1.0),
        "positives_from_teacher": total["from_teacher"] / (total["kept"] or 1.0),
        "verifier_failures": total["failures"],
    }


def pair_of(own: list[Sample], theirs: list[Sample], positive_from: str, margin: float) -> tuple[Sample, Sample] | None:
    """(the best answer of those that may be positive, the student's worst one) where their scores are further apart
    than `margin`; None where they are not, or no judge judged them."""
    judged = [s for s in own if s.score is not None]
    positives = {"student": judged, "teacher": theirs, "best": [*theirs, *judged]}[positive_from]
    positives = [s for s in positives if s.score is not None]
    if not judged or not positives:
        return None
    best, worst = max(positives, key=lambda s: s.score.value), min(judged, key=lambda s: s.score.value)
    return (best, worst) if best.score.value - worst.score.value > margin else None


def packed(groups: list[Group], config: Config, mesh: Mesh) -> list[PackedBatch]:
    bins = plan_bins([sum(map(len, group)) for group in groups], config.data.bin_tokens)
    batches = []
    for members in bins:
        chosen, counts = [groups[i] for i in members], {}
        if config.mode == "dual":
            tokens = [float(sum((group[i].weights[1:] > 0).sum() for group in chosen)) for i in (0, 1)]
            counts = {"pairs": float(len(chosen)), "positive_tokens": tokens[0], "negative_tokens": tokens[1]}
        batches.append(pack(chosen, counts, config.data.quantum).to(mesh.device))
    return batches


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("distill"))
