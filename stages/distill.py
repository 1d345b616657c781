"""Distillation: a student learns from a teacher with the same vocabulary.

    tritium distill --model=runs/small --teacher=runs/large --data.sources=chats.jsonl
    tritium distill --mode=on_policy --model=… --teacher=… --data.sources=problems.jsonl
    tritium distill --mode=dual --positive_from=best --model=… --teacher=… --data.sources=problems.jsonl

    logit       divergence from the teacher's distribution at each token of given answers
    on_policy   the same, on answers sampled from the student (GKD, arXiv 2306.13649)
    sequence    cross-entropy on answers sampled from the teacher (Kim & Rush, arXiv 1606.07947, section 3.2)
    dual        student and teacher answer problems, and a judge makes pairs of the answers; the loss is a preference
                loss plus the KL to the teacher on the better and on the worse answers (core/objectives/distill.py)

To learn only the teacher's right answers, use `tritium sample --model=TEACHER` and then `tritium sft`.
"""

from dataclasses import dataclass

from torch import nn

from tritium.core.checkpoint import model_folder
from tritium.core.config import REQUIRED, ConfigError, UserError, check_ranges, check_used, opt
from tritium.core.data import DataConfig
from tritium.core.groups import conversation_group
from tritium.core.kept import Kept, kept_file
from tritium.core.objectives.base import Objective
from tritium.core.objectives.distill import Distill, DualLevel
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.objectives.preference import LOSSES, REFERENCE_FREE, PairOptions
from tritium.core.online import PAIRS, DrawConfig, open_rounds
from tritium.core.optim import OptimConfig
from tritium.core.records import open_records
from tritium.core.run import Result, TrainingConfig
from tritium.core.setup import check_same_vocabulary, load_model, load_reference, load_tokenizer, start
from tritium.kernels.linear_kl import KINDS as DIVERGENCES
from tritium.parallel.mesh import Mesh

MODES = ("logit", "on_policy", "sequence", "dual")
DIVERGING = ("logit", "on_policy", "dual")  # the modes with a divergence from the teacher


@dataclass
class Config(TrainingConfig):
    model: str = opt(REQUIRED, "folder of the student, with its tokenizer")
    teacher: str = opt(REQUIRED, "folder of the teacher, with the same tokenizer")
    mode: str = opt("logit", "form of distillation", choices=MODES)
    kind: str = opt("forward", "KL(teacher ‖ student), its reverse, or JSD", choices=DIVERGENCES, only=DIVERGING)
    temperature: float = opt(1.0, "temperature of both distributions", only=("logit", "on_policy"), above=0)
    sft: float = opt(0.0, "logit: weight of the answers' cross-entropy", only=("logit",))
    top_k: int = opt(0, "logit: cache the teacher's k likeliest tokens (0: run it each step)", only=("logit",), least=0)
    positive_from: str = opt("best", "dual: whose answer is the better one of a pair", choices=PAIRS, only=("dual",))
    pairs: str = opt("dpo", "dual: preference loss", choices=tuple(LOSSES), only=("dual",))
    beta: float = opt(0.1, "dual: β of the preference loss", only=("dual",), above=0)
    weights: list[float] = opt([1.0] * 3, "dual: weights of pairs, KL on better, KL on worse answers", only=("dual",))
    draw: DrawConfig = opt(DrawConfig, "all but logit: how answers are sampled and judged")
    data: DataConfig = opt(DataConfig, "logit: conversations; otherwise problems")
    optim: OptimConfig = opt(OptimConfig(lr=5e-5), "optimizer")

    def __post_init__(self):
        check_ranges(self)
        if len(self.weights) != 3 or min(self.weights) < 0 or not any(self.weights):
            raise ConfigError(f"weights={self.weights} must be three numbers ≥ 0, not all 0")
        check_used(self, "mode")
        if self.top_k and (self.mesh.tp > 1 or self.mesh.cp > 1 or self.mesh.zero == 3):
            raise ConfigError(f"top_k={self.top_k} needs mesh.tp=1, mesh.cp=1 and mesh.zero below 3")


def train(config: Config) -> Result:
    """Train the student; the metric `loss` is the divergence or cross-entropy per token, or the preference loss."""
    mesh = start(config, "distill")
    networks = open_networks(config, mesh)
    tokenizer = load_tokenizer(config.model, networks["policy"], config.data.template)
    run = (config, "distill", networks, objective_of(config, mesh), tokenizer)
    if given := config.mode == "logit":
        trainer, bins = open_records(*run, conversation_group(tokenizer, config.data))
    else:
        trainer, rounds = open_rounds(*run, config.positive_from if config.mode == "dual" else config.mode)
    for step in trainer.steps():
        # ------------------------------------------------------------------------------------------------------
        for batches, numbers in [(bins.step(step, trainer.ramp), {})] if given else rounds.steps(step):
            trainer.step(batches, numbers)  # D(teacher, student) / tokens; dual: pairs + KL⁺ / tokens⁺ + KL⁻ / tokens⁻
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


def open_networks(config: Config, mesh: Mesh) -> dict[str, nn.Module]:
    """Student, teacher and, if the preference loss needs one, the reference.

    Raises: UserError if the vocabularies differ, or if student or teacher soft-cap their logits (Gemma 2).
    """
    dtype = config.run.dtype
    policy = load_model(config.model, dtype, mesh, finetune=config.finetune, seed=config.run.seed)
    networks = {"policy": policy}
    check_same_vocabulary(config.model, config.teacher, "teacher")
    networks["teacher"] = load_model(config.teacher, dtype, mesh, frozen=True)
    sizes = [networks[name].config.vocab_size for name in ("policy", "teacher")]
    if sizes[0] != sizes[1]:
        raise UserError(f"teacher={config.teacher} has {sizes[1]} logits, {config.model} {sizes[0]}: they must agree")
    if config.mode != "sequence" and any(networks[name].config.head_softcap for name in ("policy", "teacher")):
        raise UserError(
            f"mode={config.mode} does not support models that soft-cap their logits, as Gemma 2 does: use "
            "--mode=sequence, which learns from the teacher's answers"
        )
    if config.mode == "dual" and config.pairs not in REFERENCE_FREE:
        networks["reference"] = load_reference(config.model, dtype, mesh, policy)
    return networks


def objective_of(config: Config, mesh: Mesh) -> Objective:
    if config.mode == "dual":
        return DualLevel(config.pairs, PairOptions(config.beta), weights=tuple(config.weights), kind=config.kind)
    if config.mode == "sequence":
        return CrossEntropy()
    sft = config.sft if config.mode == "logit" else 0.0
    asked = (config.run.dtype, config.top_k, config.temperature)
    kept = Kept(kept_file(config.run.out, model_folder(config.teacher), mesh, *asked)) if config.top_k else None
    return Distill(config.kind, config.temperature, sft, config.top_k, kept)


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("distill"))
