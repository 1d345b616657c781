"""Preference optimisation on pairs of answers, or on good and bad ones (KTO), without a reward model.

    tritium dpo --model=runs/sft/step-00000200 --data.sources=pairs.jsonl --run.out=runs/dpo
    tritium dpo --model=… --loss=simpo --beta=2 --margin=1 …
    tritium dpo --model=… --online --draw.k=8 --draw.updates=4 --draw.refresh=1 --data.sources=problems.jsonl …

The losses are in core/objectives/preference.py. The reference is the starting model, frozen (for an adapter, its base),
unless `reference` names another. Its log-prob of each answer is computed once and cached on disk over epochs.

With `online`, pairs are made during training: the policy answers problems, a judge (`draw.reward`, `draw.reward_model`)
scores the answers, and every `draw.refresh` rounds the policy becomes the reference. With many prompts and updates per
round this is iterated DPO.
"""

from dataclasses import dataclass

from torch import nn

from tritium.core.checkpoint import model_folder
from tritium.core.config import REQUIRED, ConfigError, check_ranges, check_used, opt
from tritium.core.data import DataConfig
from tritium.core.groups import feedback_group, preference_group
from tritium.core.kept import Kept, kept_file
from tritium.core.objectives.base import Objective
from tritium.core.objectives.preference import KTO, LOSSES, REFERENCE_FREE, PairOptions, Preference
from tritium.core.online import DrawConfig, open_rounds
from tritium.core.optim import OptimConfig
from tritium.core.records import open_records
from tritium.core.rewards.model import FilterConfig
from tritium.core.run import Result, TrainingConfig
from tritium.core.setup import check_same_vocabulary, load_model, load_reference, load_tokenizer, start
from tritium.parallel.mesh import Mesh

WITH_REFERENCE = tuple(name for name in (*LOSSES, "kto") if name not in REFERENCE_FREE)
NOISY = ("dpo", "dpo_norm", "robust", "simpo", "cpo")  # the losses with label smoothing


@dataclass
class Config(TrainingConfig):
    model: str = opt(REQUIRED, "model folder to start from, with its tokenizer")
    reference: str = opt("", "reference folder, same vocabulary (default: the model)", only=WITH_REFERENCE)
    loss: str = opt("dpo", "objective", choices=(*LOSSES, "kto"))
    beta: float = opt(0.1, "strength of the KL to the reference; without a reference, a scale on the margin", above=0)
    online: bool = opt(False, "sample the pairs from the policy; data.sources are problems then")
    draw: DrawConfig = opt(DrawConfig, "online: how answers are sampled and judged")
    label_smoothing: float = opt(0.0, f"share of wrong labels: {', '.join(NOISY)}", only=NOISY, least=0, below=0.5)
    margin: float = opt(1.0, "simpo's γ, slic's δ", only=("simpo", "slic"))
    penalty: float = opt(5.0, "dpop's λ: penalty for a chosen answer that becomes less likely", only=("dpop",))
    desirable: float = opt(1.0, "kto: weight of good answers", only=("kto",))
    undesirable: float = opt(1.0, "kto: weight of bad answers", only=("kto",))
    sft: float | None = opt(None, "weight of the chosen answer's NLL (default: the paper's; dpo: 0)", only=LOSSES)
    data: DataConfig = opt(DataConfig, "preference pairs; for kto, labelled answers too")
    filter: FilterConfig = opt(FilterConfig, "which pairs are dropped as noise")
    optim: OptimConfig = opt(OptimConfig(lr=2e-5), "optimizer")

    def __post_init__(self):
        check_ranges(self)
        check_used(self, "loss")
        if self.online and self.loss == "kto":
            raise ConfigError("online samples pairs, which loss=kto does not take: use another loss")
        if self.filter.models and (self.online or self.loss == "kto"):
            raise ConfigError("filter.models filters pairs from files: not with online (use draw.margin) or loss=kto")


def train(config: Config) -> Result:
    """Train on pairs; `eval_accuracy` is the fraction of held-out pairs whose chosen answer has the higher implicit
    reward β log(π / π_ref); without a reference, the higher β log π."""
    mesh = start(config, "dpo")
    networks = open_networks(config, mesh)
    tokenizer = load_tokenizer(config.model, networks["policy"], config.data.template)
    run = (config, "dpo", networks, objective_of(config, mesh), tokenizer)
    if config.online:
        trainer, rounds = open_rounds(*run)
    else:
        convert, count = (feedback_group, "groups") if config.loss == "kto" else (preference_group, "pairs")
        trainer, bins = open_records(*run, config.filter.around(convert(tokenizer), config.run.dtype, mesh), count)
    for step in trainer.steps():
        # ------------------------------------------------------------------------------------------------------
        for batches, numbers in rounds.steps(step) if config.online else [(bins.step(step, trainer.ramp), {})]:
            trainer.step(batches, numbers)  # −log σ(β [(π_c − ref_c) − (π_r − ref_r)]) / pairs, or another loss
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


def objective_of(config: Config, mesh: Mesh) -> Objective:
    kept = None
    if config.loss not in REFERENCE_FREE and not config.online:  # the same answers come again in the next epoch
        folder = model_folder(config.reference or config.model)
        kept = Kept(kept_file(config.run.out, folder, mesh, config.run.dtype))
    if config.loss == "kto":
        return KTO(config.beta, config.desirable, config.undesirable, kept)
    options = PairOptions(config.beta, config.label_smoothing, config.margin, config.penalty)
    return Preference(config.loss, options, config.sft, kept)


def open_networks(config: Config, mesh: Mesh) -> dict[str, nn.Module]:
    """The policy and, if the loss needs one, the reference. Raises: UserError if their vocabularies differ."""
    dtype = config.run.dtype
    policy = load_model(config.model, dtype, mesh, finetune=config.finetune, seed=config.run.seed)
    if config.loss in REFERENCE_FREE:
        return {"policy": policy}
    if not config.reference:
        return {"policy": policy, "reference": load_reference(config.model, dtype, mesh, policy)}
    check_same_vocabulary(config.model, config.reference, "reference")
    return {"policy": policy, "reference": load_model(config.reference, dtype, mesh, frozen=True)}


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("dpo"))
