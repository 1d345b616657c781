"""Reward models: learn to score answers from preference pairs, or from rankings.

    tritium reward --model=runs/sft/step-00000200 --data.sources=pairs.jsonl --run.out=runs/reward
    tritium reward --model=… --loss=listwise --data.sources=rankings.jsonl

The score of an answer is read at its last token; it depends on nothing else in the batch.
"""

from dataclasses import dataclass

from tritium.core.config import REQUIRED, opt
from tritium.core.data import DataConfig, open_records, preference_group, ranking_group
from tritium.core.formats import Skipped
from tritium.core.objectives import Listwise, Pairwise
from tritium.core.optim import OptimConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import FinetuneConfig, MeshConfig, load_model, load_tokenizer, start
from tritium.core.trainer import Result, RunConfig, Trainer
from tritium.model.heads import ScalarModel


@dataclass
class Config:
    model: str = opt(REQUIRED, "folder of the model to start from, with its tokenizer")
    loss: str = opt("pairwise", "from pairs, or from rankings", choices=("pairwise", "listwise"))
    centering: float = opt(0.01, "pairwise: weight of (chosen + rejected)², which keeps scores around 0")
    data: DataConfig = opt(DataConfig, "preference pairs, or rankings")
    optim: OptimConfig = opt(OptimConfig(lr=1e-4), "optimizer")
    schedule: ScheduleConfig = opt(ScheduleConfig, "learning rate over the run")
    run: RunConfig = opt(RunConfig, "the run itself")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")
    finetune: FinetuneConfig = opt(FinetuneConfig, "what of the model is trained")


def train(config: Config) -> Result:
    """Train a scorer; `eval_accuracy` is the share of held-out pairs (rankings) whose best answer scores highest."""
    mesh = start(config, "reward")
    decoder = load_model(config.model, config.run.dtype, mesh, finetune=config.finetune, seed=config.run.seed)
    tokenizer = load_tokenizer(config.model, decoder, config.data.template)
    model = ScalarModel(decoder).initialize(config.run.seed)
    skipped = Skipped(config.data.on_error)
    pairwise = config.loss == "pairwise"
    convert = preference_group(tokenizer) if pairwise else ranking_group(tokenizer)
    name = "pairs" if pairwise else "rankings"
    bins, evaluation = open_records(config, convert, model.config.max_positions, mesh, skipped, name)
    trainer = Trainer(
        {"reward": model},
        Pairwise(config.centering) if pairwise else Listwise(),
        config,
        mesh,
        name="reward",
        total_steps=config.run.steps or bins.steps_in(config.run.epochs),
        tokenizer=tokenizer,
        skipped=skipped,
        evaluation=evaluation,
    )
    for step in trainer.steps():
        batches = bins.step(step)
        # ------------------------------------------------------------------------------------------------------
        trainer.step(batches)  # −log σ(r_chosen − r_rejected) / pairs, or Plackett-Luce / rankings
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("reward"))
