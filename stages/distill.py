"""Distillation: a student learns what a teacher with the same vocabulary would say.

    tritium distill --model=runs/small --teacher=runs/large --data.sources=chats.jsonl
    tritium distill --mode=on_policy --model=… --teacher=… --data.sources=problems.jsonl
    tritium distill --mode=dual --positive_from=best --model=… --teacher=… --data.sources=problems.jsonl

    logit       the teacher's distribution at each token of given answers
    on_policy   the same on answers that the student draws (GKD, arXiv 2306.13649)
    sequence    the cross-entropy of answers that the teacher draws (Kim & Rush, arXiv 1606.07947, section 3.2)
    dual        student and teacher answer problems; a judge makes pairs of them; a loss of pairs, and the KL to the
                teacher on the tokens of the better and of the worse answers (core/objectives/distill.py)

Of a sequence's answers only the right ones are learned by `tritium sample --model=TEACHER`, then `tritium sft`.
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
DIVERGING = ("logit", "on_policy", "dual")  # with a divergence from the teacher


@dataclass
class Config(TrainingConfig):
    model: str = opt(REQUIRED, "folder of the student, with its tokenizer")
    teacher: str = opt(REQUIRED, "folder of the teacher, with the same tokenizer")
    mode: str = opt("logit", "what is learned on", choices=MODES)
    kind: str = opt("forward", "KL(teacher ‖ student), its reverse, or JSD", choices=DIVERGENCES, only=DIVERGING)
    temperature: float = opt(1.0, "of both distributions (dual: 1)", only=("logit", "on_policy"), above=0)
    sft: float = opt(0.0, "logit: weight of the answers' cross-entropy", only=("logit",))
    top_k: int = opt(0, "logit: the teacher's tokens kept over epochs (0: it runs each step)", only=("logit",), least=0)
    positive_from: str = opt("best", "dual: who gives the better answer", choices=PAIRS, only=("dual",))
    pairs: str = opt("dpo", "dual: the loss of pairs", choices=tuple(LOSSES), only=("dual",))
    beta: float = opt(0.1, "dual: how strongly the student is held to the reference", only=("dual",), above=0)
    weights: list[float] = opt([1.0, 1.0, 1.0], "dual: of pairs, KL on better, KL on worse answers", only=("dual",))
    draw: DrawConfig = opt(DrawConfig, "all but logit: how answers come about, and who judges them")
    data: DataConfig = opt(DataConfig, "logit: conversations; else problems")
    optim: OptimConfig = opt(OptimConfig(lr=5e-5), "optimizer")

    def __post_init__(self):
        check_ranges(self)
        if len(self.weights) != 3 or min(self.weights) < 0 or not any(self.weights):
            raise ConfigError(f"weights={self.weights} must be three numbers ≥ 0, not all 0")
        check_used(self, "mode")
        if self.top_k and (self.mesh.tp > 1 or self.mesh.cp > 1 or self.mesh.zero == 3):
            raise ConfigError(f"top_k={self.top_k} goes with mesh.tp=1, mesh.cp=1 and mesh.zero < 3")


def train(config: Config) -> Result:
    """Train the student; `loss` is the divergence or cross-entropy per token, or that of the pairs."""
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
    """Student, teacher and, for a loss of pairs that wants one, the reference. Raises: UserError where the teacher has
    another vocabulary, or one of the two cuts its logits."""
    dtype = config.run.dtype
    policy = load_model(config.model, dtype, mesh, finetune=config.finetune, seed=config.run.seed)
    networks = {"policy": policy}
    check_same_vocabulary(config.model, config.teacher, "teacher")
    networks["teacher"] = load_model(config.teacher, dtype, mesh, frozen=True)
    sizes = [networks[name].config.vocab_size for name in ("policy", "teacher")]
    if sizes[0] != sizes[1]:
        raise UserError(f"teacher={config.teacher} has {sizes[1]} logits, {config.model} {sizes[0]}: take equal ones")
    if config.mode != "sequence" and any(networks[name].config.head_softcap for name in ("policy", "teacher")):
        raise UserError(
            "a divergence does not know the softcap of Gemma 2's logits, of model or teacher: take --mode=sequence, "
            "which learns the teacher's answers"
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
