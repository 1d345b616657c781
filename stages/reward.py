"""Train a reward model on preference pairs, rankings, scores, or labelled steps.

    tritium reward --model=runs/sft/step-00000200 --data.sources=pairs.jsonl --run.out=runs/reward
    tritium reward --model=… --loss=listwise --data.sources=rankings.jsonl

    pairwise     pairs (Bradley-Terry); a record may have a "margin"
    listwise     rankings, possibly with ties (Plackett-Luce); all_pairs: Bradley-Terry on all their pairs
    score        regression: σ(output) approaches the record's "score" in [0, 1]; `heads` names several scores
    process      steps of an answer, each right or wrong, read at a step's last token (a process reward model)
    comparison   pairs, both answers in one prompt: the output says how much better the first is. Such a model filters
                 pairs (filter.models), and compares with a reference: --reward='judge("runs/reward", pairwise=True)'

The score of an answer is read at its last token, and depends on nothing else in the batch. If `model` is a reward model
with the same heads, training continues from them, e.g. on answers of a newer policy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tritium.core.batch import Convert, PackedBatch
from tritium.core.config import REQUIRED, ConfigError, check_ranges, check_used, opt
from tritium.core.data import DataConfig
from tritium.core.groups import comparison_group, preference_group, ranking_group, score_group, step_group
from tritium.core.objectives.base import Objective
from tritium.core.objectives.reward import Comparison, Listwise, Pairwise, Process, Scoring
from tritium.core.optim import OptimConfig
from tritium.core.records import open_records
from tritium.core.rewards.model import FilterConfig
from tritium.core.rewards.scorer import COMPARISON, STEPS
from tritium.core.run import Result, TrainingConfig
from tritium.core.setup import load_tokenizer, prepare_training, read_model, start
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Trainer
from tritium.model.heads import ScalarModel
from tritium.model.hf import decoder_of
from tritium.model.prompts import PEFT_TYPES
from tritium.parallel.data import all_reduce_counts
from tritium.parallel.mesh import Mesh

KINDS: dict[str, tuple[Callable, str]] = {  # loss → (what turns a record into a group, the groups' denominator)
    "pairwise": (preference_group, "pairs"),
    "listwise": (ranking_group, "rankings"),
    "all_pairs": (ranking_group, "rankings"),
    "score": (score_group, "groups"),
    "process": (step_group, "groups"),
    "comparison": (comparison_group, "pairs"),
}
WHOLE = tuple(loss for loss in KINDS if loss != "process")  # the losses of whole answers


@dataclass
class Config(TrainingConfig):
    model: str = opt(REQUIRED, "model folder to start from, with its tokenizer")
    loss: str = opt("pairwise", "objective", choices=tuple(KINDS))
    centering: float = opt(0.01, "pairwise: weight of (chosen + rejected)², for scores near 0", only=("pairwise",))
    label_smoothing: float = opt(0.0, "pairwise: share of wrong labels", only=("pairwise",), least=0, below=0.5)
    heads: list[str] = opt(["score"], "score: keys of the scores, e.g. helpfulness,verbosity", only=("score",))
    highest: float = opt(1.0, "score: the highest possible score; the lowest is 0", only=("score",), above=0)
    pooling: str = opt("last", "read the score at the last token, or average", choices=("last", "mean"), only=WHOLE)
    data: DataConfig = opt(DataConfig, "records in the format that the loss takes")
    filter: FilterConfig = opt(FilterConfig, "which pairs are dropped as noise")
    optim: OptimConfig = opt(OptimConfig(lr=1e-4), "optimizer")

    def __post_init__(self):
        if self.finetune.kind in PEFT_TYPES:
            raise ConfigError(f"finetune.kind={self.finetune.kind} is for language models: use lora, freeze or full")
        check_ranges(self)
        check_used(self, "loss")
        if not self.heads or len(set(self.heads)) < len(self.heads) or not all(h.isidentifier() for h in self.heads):
            raise ConfigError(f"heads={','.join(self.heads)} must be one or more different names, each an identifier")
        if self.filter.models and KINDS[self.loss][1] != "pairs":
            raise ConfigError(f"filter.models filters pairs, which --loss={self.loss} does not take")


def train(config: Config) -> Result:
    """Train a scorer; `eval_accuracy`: the fraction of held-out pairs or rankings whose best answer scores highest."""
    mesh = start(config, "reward")
    model = open_model(config, mesh)
    tokenizer = load_tokenizer(config.model, model, config.data.template)
    networks, objective, convert = {"reward": model}, objective_of(config), converter_of(config, tokenizer)
    run = (config, "reward", networks, objective, tokenizer)
    trainer, bins = open_records(*run, config.filter.around(convert, config.run.dtype, mesh), KINDS[config.loss][1])
    for step in trainer.steps():
        batches = bins.step(step, trainer.ramp)
        # ------------------------------------------------------------------------------------------------------
        trainer.step(batches)  # −log σ(r_chosen − r_rejected) / pairs, or Plackett-Luce / rankings
        # ------------------------------------------------------------------------------------------------------
    if config.loss == "pairwise" and trainer.evaluation:
        trainer.say(calibration(trainer, trainer.evaluation))
    return trainer.result()


def open_model(config: Config, mesh: Mesh) -> ScalarModel:
    """The reward model in the folder if it has the wanted heads, else a new one on the folder's decoder."""
    heads = {"score": config.heads, "comparison": [COMPARISON], "process": [STEPS]}.get(config.loss, ["reward"])
    found = read_model(config.model, config.run.dtype, mesh, streamed=config.finetune.kind != "qlora")
    prepare_training(decoder_of(found), config.finetune, config.model, config.run.seed)
    if isinstance(found, ScalarModel) and (list(found.heads), found.pooling) == (heads, config.pooling):
        return found
    return ScalarModel(decoder_of(found), heads, config.pooling).initialize(config.run.seed)


def converter_of(config: Config, tokenizer: Tokenizer) -> Convert:
    """What turns a record into a group of documents."""
    scored = (config.heads, config.highest) if config.loss == "score" else ()
    return KINDS[config.loss][0](tokenizer, *scored)


def objective_of(config: Config) -> Objective:
    if config.loss == "pairwise":
        return Pairwise(config.centering, config.label_smoothing)
    if config.loss in ("listwise", "all_pairs"):
        return Listwise(pairs=config.loss == "all_pairs")
    if config.loss == "score":
        return Scoring(tuple(config.heads))
    return {"process": Process, "comparison": Comparison}[config.loss]()


@torch.no_grad()
def calibration(trainer: Trainer, batches: Sequence[PackedBatch]) -> str:
    """A table of the held-out pairs by confidence σ|margin|, which is how often the model should be right."""
    sums: dict[str, float] = {}
    objective = Pairwise()
    with trainer.averaged(), trainer.whole():
        for batch in trainer.pad_with_empty(batches):
            if not batch.sequences and trainer.mesh.zero < 3:
                continue
            margins = objective.outputs(trainer.networks, batch).view(-1, 2).diff(dim=1)[:, 0].neg().tolist()
            for margin in margins:
                sure = 1 / (1 + math.exp(-min(abs(margin), 50.0)))
                bin = min(int(sure * 10), 9)
                for key, value in (("n", 1.0), ("sure", sure), ("right", float(margin > 0))):
                    sums[f"{bin} {key}"] = sums.get(f"{bin} {key}", 0.0) + value
    sums = all_reduce_counts(sums, trainer.mesh)
    lines = ["calibration on held-out pairs: confidence, accuracy, number of pairs"]
    for bin in range(5, 10):
        if n := sums.get(f"{bin} n"):
            lines.append(f"  {sums[f'{bin} sure'] / n:6.1%} {sums[f'{bin} right'] / n:6.1%} {n:6.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("reward"))
