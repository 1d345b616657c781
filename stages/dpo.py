"""Direct preference optimisation: align a model with preference pairs, without a reward model.

    tritium dpo --model=runs/sft/step-00000200 --data.sources=pairs.jsonl --run.out=runs/dpo

The reference is the starting model, frozen; its log-probs are computed once per batch, before the backward.
"""

from dataclasses import dataclass

from tritium.core.config import REQUIRED, opt
from tritium.core.data import DataConfig, open_records, preference_group
from tritium.core.formats import Skipped
from tritium.core.objectives import DPO
from tritium.core.optim import OptimConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import FinetuneConfig, MeshConfig, load_model, load_reference, load_tokenizer, start
from tritium.core.trainer import Result, RunConfig, Trainer


@dataclass
class Config:
    model: str = opt(REQUIRED, "folder of the model to start from, with its tokenizer; also the reference")
    beta: float = opt(0.1, "how strongly the policy is held to the reference")
    sft: float = opt(0.0, "weight of the chosen answer's cross-entropy per token")
    data: DataConfig = opt(DataConfig, "preference pairs")
    optim: OptimConfig = opt(OptimConfig(lr=2e-5), "optimizer")
    schedule: ScheduleConfig = opt(ScheduleConfig, "learning rate over the run")
    run: RunConfig = opt(RunConfig, "the run itself")
    mesh: MeshConfig = opt(MeshConfig, "parallelism")
    finetune: FinetuneConfig = opt(FinetuneConfig, "what of the model is trained")


def train(config: Config) -> Result:
    """Train on pairs; `eval_accuracy` is the share of held-out pairs where the policy moved towards the chosen one."""
    mesh = start(config, "dpo")
    policy = load_model(config.model, config.run.dtype, mesh, finetune=config.finetune, seed=config.run.seed)
    reference = load_reference(config.model, config.run.dtype, mesh, policy)
    tokenizer = load_tokenizer(config.model, policy, config.data.template)
    skipped = Skipped(config.data.on_error)
    convert = preference_group(tokenizer)
    bins, evaluation = open_records(config, convert, policy.config.max_positions, mesh, skipped, "pairs")
    trainer = Trainer(
        {"policy": policy, "reference": reference},
        DPO(config.beta, config.sft),
        config,
        mesh,
        name="dpo",
        total_steps=config.run.steps or bins.steps_in(config.run.epochs),
        tokenizer=tokenizer,
        skipped=skipped,
        evaluation=evaluation,
    )
    for step in trainer.steps():
        batches = bins.step(step)
        # ------------------------------------------------------------------------------------------------------
        trainer.step(batches)  # −log σ(β [(π_c − ref_c) − (π_r − ref_r)]) / pairs
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("dpo"))
