"""What every stage does before its first step: the mesh, the folder, the model, the tokenizer."""

import fnmatch
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tritium
from tritium.core.chat import find_template
from tritium.core.checkpoint import model_folder
from tritium.core.config import ConfigError, UserError, opt, to_toml
from tritium.core.data import parse_sources
from tritium.core.output import make_folder
from tritium.core.tokenizer import Tokenizer
from tritium.kernels.backend import fp32_is_faster
from tritium.model.adapters import Base, attach, base_folder
from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.hf import ADAPTER_CONFIG, ModelFolderError, from_hf_config, load, read_json
from tritium.model.lora import LoraConfig, Model, merge
from tritium.model.prompts import PEFT_TYPES, PromptConfig
from tritium.model.transformer import Transformer
from tritium.parallel.data import check_same
from tritium.parallel.mesh import Mesh, init_mesh

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass
class MeshConfig:
    """How the processes of `torchrun` share the work; the ranks that tp and cp leave over are data parallel."""

    tp: int = opt(1, "tensor-parallel size")
    cp: int = opt(1, "context-parallel size: ranks that share the tokens of one sequence")
    zero: int = opt(0, "ZeRO stage: 1 shards the optimizer state, 2 also gradients, 3 also parameters")
    ring: bool = opt(False, "context parallelism by ring attention (layers with a window all-gather keys and values)")
    shard: int = opt(0, "hybrid ZeRO: shard over groups of this many ranks, e.g. those of one host (0: over all)")
    timeout: float = opt(600.0, "seconds that a collective waits for a rank before the run is stopped")


@dataclass
class FinetuneConfig:
    """Which parameters are trained: all, those with certain names, a LoRA adapter (model/lora.py), or virtual tokens
    (model/prompts.py)."""

    kind: str = opt(
        "full",
        "what is trained; qlora: LoRA on an NF4 base; prompt, p_tuning, prefix: virtual tokens before each document",
        choices=("full", "freeze", "lora", "qlora", *PEFT_TYPES),
    )
    train: list[str] = opt([], "freeze: name patterns of the parameters to train, e.g. layers.3.*")
    rank: int = opt(16, "lora: rank of the adapter")
    alpha: float = opt(32.0, "lora: the adapter's output is scaled by alpha / rank")
    rslora: bool = opt(False, "lora: scale by alpha / √rank instead")
    targets: list[str] = opt([], "lora: matrices to adapt, e.g. q_proj,v_proj (default: all matrices of the layers)")
    dropout: float = opt(0.0, "lora: dropout on the adapter's input")
    tokens: int = opt(20, "prompt, p_tuning, prefix: number of virtual tokens")
    block_dropout: float = opt(0.0, "dropout on the outputs of the attention and MLP blocks")
    neftune: float = opt(0.0, "NEFTune: noise scale α on the embeddings during training (5 is usual; 0: off)")

    def __post_init__(self):
        if not 0 <= self.block_dropout < 1 or self.neftune < 0:
            raise ConfigError("finetune.block_dropout must be in [0, 1), and finetune.neftune must not be negative")
        if (self.kind == "freeze") != bool(self.train):
            raise ConfigError("finetune.kind=freeze and finetune.train (patterns of what to train) need each other")
        try:
            self.adapter("")
        except ValueError as error:
            raise ConfigError(f"finetune.{error}") from None

    def adapter(self, base: str) -> LoraConfig | PromptConfig | None:
        """What is attached to the model in the folder `base`. Raises: ValueError."""
        if self.kind in PEFT_TYPES:
            return PromptConfig(self.kind, self.tokens, base)
        shape = (self.rank, self.alpha, tuple(self.targets), self.dropout, self.rslora)
        return LoraConfig(*shape, quantized=self.kind == "qlora", base=base) if "lora" in self.kind else None


def join(mesh: MeshConfig, device: str, settings: str) -> Mesh:
    """Join the mesh of the processes that run the same `settings`.

    Raises: ConfigError for a mesh that can't be, and for ranks that were started with different settings or code.
    """
    try:
        joined = init_mesh(mesh.tp, mesh.cp, mesh.zero, device, mesh.timeout, mesh.shard, mesh.ring)
        check_same(joined, settings, "configuration")
        check_same(joined, code_version(), "code")
    except ValueError as error:
        raise ConfigError(f"mesh: {error}") from None
    return joined


def code_version() -> str:
    """The package's version and a hash of its sources."""
    root, digest = Path(tritium.__file__).parent, hashlib.sha256()
    for file in sorted(file for package in tritium.PACKAGES for file in (root / package).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return f"{tritium.__version__} ({digest.hexdigest()[:16]})"


def start(config: Any, stage: str) -> Mesh:
    """Join the mesh and try the run's folder. `config` has `data`, `run` and `mesh`; an empty `run.out` is filled in.

    Raises: ConfigError, as `join`; UserError where a source is missing, or the folder can't be written.
    """
    parse_sources(config.data.sources)
    config.run.out = config.run.out or f"runs/{stage}"
    mesh = join(config.mesh, config.run.device, to_toml(config))
    if mesh.main:
        make_folder(config.run.out, "run.out", now=False)
    return mesh


def parameter_dtype(name: str, mesh: Mesh) -> torch.dtype:
    """The dtype that `name` means; "auto" is bf16 where its matmuls are faster than fp32's, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if mesh.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    able = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if able and not fp32_is_faster(torch.bfloat16) else torch.float32


def load_model(
    folder: str, dtype: str, mesh: Mesh, *, frozen: bool = False, finetune: FinetuneConfig | None = None, seed: int = 0
) -> Transformer:
    """A language model from a folder, in a dtype named as in RunConfig; with `finetune`, to be trained as that says.
    Raises: UserError saying what is wrong.
    """
    model = read_model(folder, dtype, mesh, streamed=finetune is not None and finetune.kind != "qlora")
    if not isinstance(model, Transformer):
        raise UserError(f"{folder} is a reward model; this needs a language model")
    if finetune is None:
        return model.requires_grad_(not frozen)
    prepare_training(model, finetune, folder, seed)
    return model


def prepare_training(model: Transformer, finetune: FinetuneConfig, folder: str, seed: int) -> None:
    """Freeze what is not trained, or attach an adapter; that of the model's `folder`, if there is one, is first merged.
    Raises: UserError where it can't be; ConfigError for names that the model does not have."""
    if model.adapters:
        try:
            merge(model)
        except ValueError as error:
            raise UserError(f"{folder}: {error}; train a new one on that base") from None
    model.set_noise(finetune.block_dropout, finetune.neftune)
    try:
        if (adapter := finetune.adapter(str(Path(model_folder(folder)).resolve()))) is not None:
            attach(model, adapter, seed=seed)
    except ValueError as error:
        raise ConfigError(f"finetune.{error}") from None
    if finetune.kind == "freeze":
        check_patterns("finetune.train", finetune.train, [name for name, _ in model.named_parameters()])
        for name, p in model.named_parameters():
            p.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in finetune.train))


def trained_share(network: nn.Module) -> float:
    """The share of a network's parameters that are trained."""
    sizes = {kind: sum(p.numel() for p in network.parameters() if p.requires_grad == kind) for kind in (True, False)}
    return sizes[True] / max(1, sum(sizes.values()))


def check_patterns(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises: ConfigError where one of the patterns is no parameter's name."""
    if odd := [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]:
        raise ConfigError(f"{option}={odd[0]} is no parameter's name; they are like {', '.join(names[:4])}")


def load_reference(folder: str, dtype: str, mesh: Mesh, policy: Transformer) -> nn.Module:
    """The model that `policy` started from, frozen; where only an adapter is trained, its base: no second copy."""
    return Base(policy) if policy.adapters else read_model(folder, dtype, mesh, streamed=True).requires_grad_(False)


def read_model(folder: str, dtype: str, mesh: Mesh, streamed: bool = False) -> Transformer | ScalarModel:
    """A model from a folder; with `streamed`, at ZeRO-3 read when a trainer cuts it. Raises: UserError, ConfigError."""
    folder = model_folder(folder)
    if not Path(folder).is_dir():
        wrong = "is a file: name its folder" if Path(folder).exists() else "does not exist (nothing is downloaded)"
        raise UserError(f"model: the folder {folder!r} {wrong}")
    try:
        streamed &= mesh.zero == 3
        return load(folder, parameter_dtype(dtype, mesh), mesh=mesh, streamed=streamed)
    except ModelFolderError as error:
        raise UserError(str(error)) from None
    except ValueError as error:  # a mesh that does not divide the model
        raise ConfigError(str(error)) from None


def read_shape(folder: str) -> ModelConfig:
    """The shape of a folder's model, or of its adapter's base. Raises: UserError."""
    path = Path(model_folder(folder))
    try:
        while (path / ADAPTER_CONFIG).exists():
            path = base_folder(path, read_json(path / ADAPTER_CONFIG))
        return from_hf_config(read_json(path / "config.json"), path / "config.json")
    except ModelFolderError as error:
        raise UserError(str(error)) from None


def load_tokenizer(folder: str, model: Model | None = None, template: str | None = None) -> Tokenizer:
    """The tokenizer in a model's folder, with the chat `template` that is named for it ("": its own, or ChatML).

    Raises: UserError, also for an unknown template, and where the vocabulary is larger than the model's.
    """
    tokenizer = Tokenizer.load(model_folder(folder))
    if model is not None and tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}"
        raise UserError(f"{folder}: the tokenizer has {sizes}")
    if template == "" and not tokenizer.chat_template and find_template(tokenizer) == "chatml":
        template = "chatml"
    if template:
        tokenizer = tokenizer.with_template(template)
        find_template(tokenizer)
    tokenizer.rows = model.config.vocab_size if model is not None else 0
    return tokenizer


def check_same_vocabulary(model: str, other: str, option: str) -> None:
    """Raises: UserError where the folders' tokenizers differ: token for token, the models must mean the same."""
    ours, theirs = load_tokenizer(model), load_tokenizer(other)
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"{option}={other} has another vocabulary ({theirs.vocab_size} tokens) than {model} ({ours.vocab_size}): "
            "what they say of a token can't be compared; take one with the same tokenizer"
        )
