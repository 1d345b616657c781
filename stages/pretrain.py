"""Pretraining: next-token prediction on raw text, from scratch or from a model's folder (continued pretraining).

    tritium pretrain --data.sources=book.txt --run.out=runs/pretrain
    tritium pretrain --init=runs/pretrain/step-00001000 --data.sources=new.txt --replay=book.txt --replay_share=0.1

Without `tokenizer`, one is trained on the sources first. In continued pretraining, mixing in old text (`replay`)
prevents forgetting (Ibrahim et al., arXiv 2403.08763).
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tritium.core.batch import PackedBatch
from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.data import Bins, DataConfig, Source, open_bins, parse_sources, text_sources
from tritium.core.files import Skipped
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.optim import OptimConfig
from tritium.core.run import Result, TrainingConfig
from tritium.core.schedule import decay_start
from tritium.core.setup import load_model, load_tokenizer, parameter_dtype, start
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Trainer
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer, full_shape
from tritium.parallel.mesh import Mesh
from tritium.stages import tokenizer as tokenizer_stage

# Options that ModelConfig has under other names.
NAMES = {"layers": "num_layers", "heads": "num_heads", "kv_heads": "num_kv_heads", "context": "max_positions"}


@dataclass
class ShapeConfig:
    """The decoder's shape, unless `init` gives it. The vocabulary is the tokenizer's."""

    layers: int = opt(6, "number of decoder layers")
    hidden_size: int = opt(256, "width of the residual stream", least=1)
    intermediate_size: int = opt(704, "hidden width of the MLP (SwiGLU)")
    heads: int = opt(4, "number of query heads")
    kv_heads: int = opt(2, "number of key/value heads; each serves heads / kv_heads query heads")
    head_dim: int = opt(64, "dimension of a head")
    context: int = opt(512, "context length in tokens", least=8)
    rope_theta: float = opt(10000.0, "base of the rotary embedding")
    tie_embeddings: bool = opt(True, "share one matrix between embedding and head")
    qkv_bias: bool = opt(False, "biases on q, k and v (Qwen2)")
    qk_norm: bool = opt(False, "RMSNorm on the heads of q and k (Qwen3)")
    init_std: float | None = opt(None, "standard deviation of the initial weights (default: hidden_size^-½)")
    embedding_scale: float = opt(1.0, "factor on the embeddings (MiniCPM: 12)")
    residual_depth: float | None = opt(None, "scale the blocks' outputs by this / √layers (MiniCPM: 1.4)")
    width_base: int | None = opt(None, "muP: the width for which the learning rate was tuned (MiniCPM: 256)")

    def __post_init__(self):
        check_ranges(self, "model.")
        scaled = self.embedding_scale != 1 or (self.residual_depth, self.width_base) != (None, None)
        if self.qkv_bias + self.qk_norm + scaled > 1:
            raise ConfigError(
                "model.qkv_bias (Qwen2), model.qk_norm (Qwen3) and MiniCPM's scales (embedding_scale, residual_depth, "
                "width_base) can't be combined: no published architecture has more than one of them, so such a model "
                "can't be exported"
            )

    def build(self, vocab_size: int, **special: int | None) -> ModelConfig:
        """The model's config; `special`: ids of its special tokens. Raises: ValueError."""
        shape = {NAMES.get(name, name): value for name, value in vars(self).items()}
        shape["init_std"] = self.init_std or self.hidden_size**-0.5
        return ModelConfig(vocab_size=vocab_size, **shape, **special)


@dataclass
class Config(TrainingConfig):
    init: str = opt("", "model folder to continue from (empty: from scratch)")
    tokenizer: str = opt("", "tokenizer folder (empty: that of `init`, or a new one trained on the sources)")
    vocab_size: int | None = opt(None, f"size of a new tokenizer {tokenizer_stage.DEFAULT}")
    replay: list[str] = opt([], "old text files to mix in; FILE@W is read W times as often as the others")
    replay_share: float = opt(0.1, "fraction of an epoch's tokens that come from `replay`", least=0, below=1)
    model: ShapeConfig = opt(ShapeConfig, "shape of a new model")
    data: DataConfig = opt(DataConfig, "text")
    optim: OptimConfig = opt(OptimConfig(lr=2e-3), "optimizer")
    anneal: list[str] = opt([], "text files to train on during the final decay (schedule.kind=wsd); FILE@W as in data")

    def __post_init__(self):
        if self.finetune.kind != "full" and not self.init:
            raise ConfigError(f"finetune.kind={self.finetune.kind} needs `init`: a model to continue from")
        if self.anneal and self.schedule.kind != "wsd":
            raise ConfigError(f"anneal needs a final decay: set schedule.kind=wsd, not {self.schedule.kind}")
        check_ranges(self)


def train(config: Config) -> Result:
    """Train on text; the result's metrics include `eval_loss` in nats per token."""
    mesh = start(config, "pretrain")
    for name in ("replay", "anneal"):
        if sources := getattr(config, name):
            parse_sources(sources, name)  # report a mistake before the tokenizer is trained
    tokenizer = open_tokenizer(config, mesh)
    model = open_model(config, tokenizer, mesh)
    skipped = Skipped(config.data.on_error)
    bins, evaluation, annealing = open_data(config, tokenizer, model.config.max_positions, mesh, skipped)
    total = config.run.steps or bins.steps_in(config.run.epochs, config.schedule)
    start_annealing = annealing_start(config, total) if annealing else total
    settings = {"name": "pretrain", "total_steps": total, "tokenizer": tokenizer, "skipped": skipped}
    trainer = Trainer({"policy": model}, CrossEntropy(), config, mesh, **settings, evaluation=evaluation)
    parameters = sum(math.prod(full_shape(p, mesh.tp)) for p in model.parameters())
    trainer.say(f"{parameters:,} parameters, {bins.tokens:,} tokens an epoch")
    for step in trainer.steps():
        batches = bins.step(step, trainer.ramp) if step < start_annealing else annealing.step(step - start_annealing)
        # ------------------------------------------------------------------------------------------------------
        trainer.step(batches)  # Σ cross-entropy over all tokens / their number in the global batch
        # ------------------------------------------------------------------------------------------------------
    return trainer.result()


def annealing_start(config: Config, total: int) -> int:
    """The step from which `anneal` is read. Raises: ConfigError if the run has no final decay."""
    if (start := decay_start(config.schedule, total)) < total:
        return start
    decay = f"schedule.decay={config.schedule.decay}"
    raise ConfigError(f"anneal: {decay} of {total} steps is no step at all: give it in steps, e.g. 10, or run longer")


def open_tokenizer(config: Config, mesh: Mesh) -> Tokenizer:
    """The tokenizer that the config names, or a new one in the run's folder (trained by rank 0, once).

    Raises: ConfigError if the run's folder already has one of another size.
    """
    if config.tokenizer or config.init:
        return load_tokenizer(config.tokenizer or config.init)
    folder = Path(config.run.out) / "tokenizer"
    if mesh.main and not (folder / "tokenizer.model").exists():
        settings = tokenizer_stage.Config(config.data.sources, config.vocab_size, out=str(folder))
        tokenizer_stage.train(settings)
    mesh.barrier()
    tokenizer = load_tokenizer(str(folder))
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"vocab_size={config.vocab_size}, but {folder} holds a tokenizer of {tokenizer.vocab_size} tokens: "
            "use another --run.out, or delete that folder"
        )
    return tokenizer


def open_model(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> Transformer:
    if config.init:
        model = load_model(config.init, config.run.dtype, mesh, finetune=config.finetune, seed=config.run.seed)
        load_tokenizer(config.tokenizer or config.init, model)
        return model
    try:
        built = config.model.build(tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        model = Transformer(built, mesh, parameter_dtype(config.run.dtype, mesh), streamed=mesh.zero == 3)
    except ValueError as error:
        options = {NAMES.get(name, name): f"model.{name}" for name in vars(config.model)}
        raise ConfigError(re.sub(r"\w+", lambda word: options.get(word[0], word[0]), str(error))) from None
    return model.initialize(config.run.seed)


def open_data(
    config: Config, tokenizer: Tokenizer, context: int, mesh: Mesh, skipped: Skipped
) -> tuple[Bins, list[PackedBatch], Bins | None]:
    """(training bins, held-out batches, bins of the final decay or None), the last from `anneal` (MiniCPM, arXiv
    2404.06395, section 5). Rank 0 tokenises first; the others read what it wrote."""
    cache, old, better = str(Path(config.run.out) / "tokens"), None, None
    for turn in (True, False):
        if mesh.main == turn:
            new = text_sources(config.data, tokenizer, context, cache, skipped)
            if config.replay:
                old = text_sources(replace(config.data, sources=config.replay), tokenizer, context, cache, skipped)
            if config.anneal:
                settings = replace(config.data, sources=config.anneal, holdout=0.0)
                better = text_sources(settings, tokenizer, context, cache, skipped)
        mesh.barrier()
    train, held_out, weights = new
    if old:
        weights = weights + replay_weights(train, weights, old[0], old[2], config.replay_share)
        train, held_out = train + old[0], held_out + old[1]
    annealing = Bins(better[0], better[2], config.data, mesh, config.run.seed) if better else None
    return *open_bins(train, held_out, weights, config, mesh), annealing


def replay_weights(
    new: list[Source], weights: list[float], old: list[Source], old_weights: list[float], share: float
) -> list[float]:
    """Passes through the old sources, in proportion to `old_weights`, that make them `share` of an epoch's tokens."""
    fresh, stale = (
        sum(w * source.lengths.sum() for w, source in zip(passes, sources, strict=True))
        for passes, sources in ((weights, new), (old_weights, old))
    )
    scale = share / (1 - share) * fresh / max(stale, 1)
    return [scale * w for w in old_weights]


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("pretrain"))
