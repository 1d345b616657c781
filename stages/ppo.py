"""Proximal policy optimisation: reinforcement learning with a critic and a KL to the reference in the reward.

    tritium ppo --model=runs/sft --reward_model=runs/reward --data.sources=problems.jsonl --run.out=runs/ppo
    tritium ppo --model=runs/sft --reward=exact --data.sources=problems.jsonl --run.out=runs/ppo

Records are {"question", "answer"}. Whatever the reward is, a verifier measures how many answers are right. With
`text.sources`, the cross-entropy of that text is added to each step (PPO-ptx).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from tritium.core.batch import PackedBatch, pack
from tritium.core.checkpoint import model_folder
from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.data import Bins, DataConfig, record_sources, text_sources
from tritium.core.experience import PolicyOptions, PolicyStage, open_experience
from tritium.core.files import Skipped
from tritium.core.groups import conversation_group
from tritium.core.objectives.policy import PPO, adapted, algorithm
from tritium.core.optim import OptimConfig
from tritium.core.reference import open_policy
from tritium.core.run import Result
from tritium.core.setup import FinetuneConfig, check_same_vocabulary, load_tokenizer, read_model, start
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Trainer
from tritium.model.adapters import twin
from tritium.model.heads import ScalarModel
from tritium.model.hf import decoder_of
from tritium.parallel.mesh import Mesh


@dataclass
class PPOConfig(PolicyOptions):
    """The objective; see core/objectives/policy.py."""

    prompts: int = opt(64, "problems per rollout, over all ranks", least=1)
    group: int = opt(1, "answers per problem", least=1)
    epochs: int = opt(4, "passes over each rollout", least=1)
    minibatches: int = opt(1, "optimizer steps per pass", least=1)
    clip: float = opt(0.2, "clip the ratio to 1 ± this", least=0, most=1)
    beta: float = opt(0.05, "weight of the KL to the reference", least=0)
    target_kl: float = opt(0.0, "adapt beta to keep the KL per token near this (0: fixed beta)", least=0)
    stop_kl: float = opt(0.0, "stop updating on a rollout once the KL to the old policy exceeds this (0: off)", least=0)
    gamma: float = opt(1.0, "discount per token", least=0, most=1)
    lam: float = opt(0.95, "λ of generalised advantage estimation (GAE)", least=0, most=1)
    whiten: bool = opt(True, "whiten advantages to mean 0 and variance 1 over the rollout")
    value_clip: float = opt(0.2, "clip values to the old value ± this (0: off)", least=0)
    value_coefficient: float = opt(0.5, "weight of the value loss", least=0)
    value_warmup: int = opt(0, "number of first rollouts in which only the critic is trained", least=0)
    critic_lr: float = opt(1.0, "the critic's learning rate, relative to the policy's", least=0)
    ptx: float = opt(1.0, "weight of the cross-entropy on text.sources", least=0)

    def __post_init__(self):
        check_ranges(self, "ppo.")
        if self.target_kl and not self.beta:
            raise ConfigError(f"ppo.target_kl={self.target_kl} adapts ppo.beta, which must start above 0")


@dataclass
class TextConfig(DataConfig):
    """Text of the ptx term; without sources there is none."""

    holdout: float = opt(0.0, "fraction of each source that is left out")
    kind: str = opt("conversations", "what the sources hold", choices=("conversations", "text"))


@dataclass
class Config(PolicyStage):
    critic: str = opt("", "folder of the critic's initial weights (default: a fitting reward model, else the model)")
    verifier: str = opt("exact", "judge that measures accuracy only; it does not enter the reward (empty: none)")
    ppo: PPOConfig = opt(PPOConfig, "objective")
    text: TextConfig = opt(TextConfig, "text whose cross-entropy is added to each step (PPO-ptx)")
    optim: OptimConfig = opt(OptimConfig(lr=2e-5, weight_decay=0.0, eps=1e-5), "optimizer")
    finetune: FinetuneConfig = opt(FinetuneConfig, "which parameters are trained; the critic gets an adapter, too")

    def __post_init__(self):
        self.check_objective(self.ppo, "ppo")


def train(config: Config) -> Result:
    """Reinforce high scores; the metrics `reward` and `right` (accuracy) are those of the newest rollout."""
    mesh = start(config, "ppo")
    options, networks = config.ppo, open_networks(config, mesh)
    each = options.epochs * options.minibatches  # optimizer steps per rollout
    objective = objective_of(config)
    experience = open_experience(config, "ppo", networks, objective, each)
    trainer, context = experience.trainer, networks["policy"].config.max_positions
    skipped = replace(trainer.skipped, on_error=config.text.on_error)  # shares the trainer's counts
    text = open_text(config, experience.tokenizer, context, mesh, skipped)
    for step in trainer.steps():
        number, done = divmod(step, each)
        objective.beta = trainer.notes.get("beta", options.beta)
        trainer.lr_scale |= {"policy": float(number >= options.value_warmup), "critic": options.critic_lr}
        rollout, numbers = experience.collect(number)
        batches = experience.batches(rollout, options.minibatches, varied_only=False)
        # ------------------------------------------------------------------------------------------------------
        numbers |= experience.estimate(batches, done) | {"beta": objective.beta}  # r_t = score − β KL → GAE → whitened
        shown, empty = numbers, pack([]).to(mesh.device)  # a rank without answers still joins both networks' reductions
        for i in range(done, min(each, trainer.total_steps - number * each)):
            update = minibatch(batches, i, options.minibatches, config.run.seed, number) or [empty]
            extra = [as_ptx(b) for b in trainer.pad_with_empty(text.step(number * each + i))] if text else []
            trainer.step([*extra, *update], shown)  # −min(ρA, clip(ρ)A) + c (V − R)² − ptx log p
            shown = {}  # logged once, with the rollout's first update
            if too_far(trainer, options):
                break
        # ------------------------------------------------------------------------------------------------------
        trainer.index = min((number + 1) * each, trainer.total_steps)  # steps that stop_kl skipped count too
        if trainer.index < (number + 1) * each:
            continue  # a rollout that was cut short ends when the run is extended
        experience.follow(number)
        if options.target_kl:
            trainer.notes["beta"] = adapted(objective.beta, numbers.get("kl_k1", options.target_kl), options.target_kl)
    return trainer.result()


def objective_of(config: Config) -> PPO:
    options = config.ppo
    given = options.given("gamma", "lam", "value_clip", "value_coefficient", "ptx")
    given |= {"clip_low": options.clip, "clip_high": options.clip, "scale": "batch" if options.whiten else "none"}
    return algorithm(PPO(), **given, temperature=config.sampling.temperature)


def open_networks(config: Config, mesh: Mesh) -> dict[str, nn.Module]:
    """Policy, critic and, if there is a KL, the reference.

    The critic's head starts at 0. If adapters are trained and the critic starts from the same base, or from an adapter
    on it, both share one copy of that base. A reward model with another tokenizer can't be the critic's start.
    Raises: UserError if reference or critic have another vocabulary: they read the policy's tokens.
    """
    dtype, reference = config.run.dtype, config.reference if config.ppo.beta else None
    networks = open_policy(config.model, dtype, mesh, config.finetune, config.run.seed, reference)
    judge = config.reward_model
    same = judge and load_tokenizer(judge).fingerprint == load_tokenizer(config.model).fingerprint
    folder = config.critic or (judge if same else config.model)
    check_same_vocabulary(config.model, folder, "critic")
    critic = twin(networks["policy"], model_folder(folder), config.run.seed + 1) or read_model(folder, dtype, mesh)
    networks["critic"] = ScalarModel(decoder_of(critic))
    networks["critic"].score.data.zero_()
    return networks


def open_text(config: Config, tokenizer: Tokenizer, context: int, mesh: Mesh, skipped: Skipped) -> Bins | None:
    if not config.text.sources or not config.ppo.ptx:
        return None
    if config.text.kind == "text":
        train, _, weights = text_sources(config.text, tokenizer, context, f"{config.run.out}/cache", skipped)
    else:
        convert = conversation_group(tokenizer, config.text)
        train, _, weights = record_sources(config.text, convert, context, config.run.seed, skipped, atomic=False)
    return Bins(train, weights, config.text, mesh, config.run.seed)


def as_ptx(batch: PackedBatch) -> PackedBatch:
    """The batch with a denominator of its own, so that its tokens are not counted as the answers' tokens."""
    batch.counts = {"ptx": batch.counts["tokens"], "stream": batch.counts["stream"]}
    return batch


def minibatch(batches: Sequence[PackedBatch], i: int, parts: int, seed: int, number: int) -> list[PackedBatch]:
    """The batches of update `i` of rollout `number`; each pass shuffles them anew."""
    order = np.random.default_rng([seed, number, i // parts]).permutation(len(batches))
    return [batches[j] for j in order[i % parts :: parts]]


def too_far(trainer: Trainer, options: PPOConfig) -> bool:
    """Whether the KL to the policy that sampled the answers exceeded `stop_kl` in the last update."""
    if not options.stop_kl:
        return False
    trainer.flush_metrics()
    return trainer.last.get("old_kl", 0.0) > options.stop_kl


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("ppo"))
