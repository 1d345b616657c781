"""Supervised fine-tuning of a model on conversations.

    tritium sft --model=runs/pretrain/step-00001000 --data.sources=chats.jsonl --run.out=runs/sft

By default every assistant turn is trained on, its end token included (see `data.turns`). Documents are packed without
padding and do not attend to each other. core/formats.py lists the record formats.
"""

from dataclasses import dataclass

from tritium.core.config import REQUIRED, ConfigError, opt
from tritium.core.data import DataConfig
from tritium.core.groups import conversation_group, feedback_group
from tritium.core.objectives.likelihood import CrossEntropy, DynamicFineTuning, Unlikelihood
from tritium.core.records import open_records
from tritium.core.run import Result, TrainingConfig
from tritium.core.setup import load_model, load_tokenizer, start
from tritium.model.surgery import with_wider_mlps

LOSSES = {"cross_entropy": CrossEntropy, "dft": DynamicFineTuning, "unlikelihood": Unlikelihood}


@dataclass
class Config(TrainingConfig):
    model: str = opt(REQUIRED, "model folder to start from, with its tokenizer")
    loss: str = opt("cross_entropy", "loss per token; unlikelihood learns from bad answers too", choices=tuple(LOSSES))
    widen: int = opt(1, "first make the MLPs this many times as wide, without changing the model's function")
    data: DataConfig = opt(DataConfig, "conversations; for unlikelihood, labelled answers or pairs")

    def __post_init__(self):
        if self.widen < 1 or (self.widen > 1 and self.finetune.kind != "full"):
            raise ConfigError(f"widen={self.widen} must be at least 1, and above 1 needs finetune.kind=full")


def train(config: Config) -> Result:
    """Fine-tune `config.model` on conversations; the result's metrics hold `eval_loss` per supervised token."""
    mesh = start(config, "sft")
    model = load_model(config.model, config.run.dtype, mesh, finetune=config.finetune, seed=config.run.seed)
    if config.widen > 1:
        if mesh.world_size > 1:
            raise ConfigError(f"widen={config.widen} needs a single process: widen there first, then use the mesh")
        model = with_wider_mlps(model, config.widen)
    tokenizer = load_tokenizer(config.model, model, config.data.template)
    bad_too = config.loss == "unlikelihood"
    convert = feedback_group(tokenizer) if bad_too else conversation_group(tokenizer, config.data)
    networks, objective = {"policy": model}, LOSSES[config.loss]()
    trainer, bins = open_records(config, "sft", networks, objective, tokenizer, convert, atomic=False)
    for step in trainer.steps():
        batches = bins.step(step, trainer.ramp)
        # ------------------------------------------------------------------------------------------------------
        trainer.step(batches)  # Σ cross-entropy over the assistant's tokens / their number in the global batch
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("sft"))
