"""Supervised fine-tuning: teach a model to answer, from conversations.

    tritium sft --model=runs/pretrain/step-00001000 --data.sources=chats.jsonl --run.out=runs/sft

Every assistant turn of every conversation is trained on, its end token included, in one pass (`data.turns`);
documents are packed without padding and do not see each other. See core/formats.py for the records that are understood.
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
    model: str = opt(REQUIRED, "folder of the model to start from, with its tokenizer")
    loss: str = opt("cross_entropy", "of a token; unlikelihood: of good and bad answers", choices=tuple(LOSSES))
    widen: int = opt(1, "train a model whose MLPs are so many times as wide, and that begins as the same function")
    data: DataConfig = opt(DataConfig, "conversations; unlikelihood: answers with a label, or pairs")

    def __post_init__(self):
        if self.widen < 1 or (self.widen > 1 and self.finetune.kind != "full"):
            raise ConfigError(f"widen={self.widen} must be at least 1, and goes with finetune.kind=full")


def train(config: Config) -> Result:
    """Fine-tune `config.model` on conversations; the result's metrics hold `eval_loss` per supervised token."""
    mesh = start(config, "sft")
    model = load_model(config.model, config.run.dtype, mesh, finetune=config.finetune, seed=config.run.seed)
    if config.widen > 1:
        if mesh.world_size > 1:
            raise ConfigError(f"widen={config.widen} is for one process: train it there first, then on the mesh")
        model = with_wider_mlps(model, config.widen)
    tokenizer = load_tokenizer(config.model, model, config.data.template)
    bad_too = config.loss == "unlikelihood"
    convert = feedback_group(tokenizer) if bad_too else conversation_group(tokenizer, config.data)
    networks, objective = {"policy": model}, LOSSES[config.loss]()
    trainer, bins = open_records(config, "sft", networks, objective, tokenizer, convert, atomic=False)
    for step in trainer.steps():
        batches = bins.step(step, trainer.ramp)
        # ------------------------------------------------------------------------------------------------------
        trainer.step(batches)  # cross-entropy over the assistant's tokens / their number in the whole step
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("sft"))
