"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a dense or an NF4 base (QLoRA, arXiv 2305.14314).

    attach(model, LoraConfig(rank=16))     # model/adapters.py; a second one gets a name: attach(model, config, "poems")
    merge(model)                           # into the base

    y = x Wᵀ + scale · x aᵀ bᵀ     a [r, in], b [out, r], scale = alpha / r, or alpha / √r (rsLoRA, arXiv 2312.03732)

One of our matrices may be several of Hugging Face's (q, k, v), each with an adapter of its own, as in peft: then `a` is
theirs one below the other, and b block-diagonal. Under tensor parallelism b is cut where W is cut by rows, and a where
by columns; the other one is whole on all ranks, each of which has a part of its gradient.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritium.kernels import dequantize_nf4, lora_linear, quantize_nf4
from tritium.kernels.lora_linear import MAX_RANK
from tritium.kernels.nf4 import NF4Tensor
from tritium.kernels.wide import linear
from tritium.model.heads import ScalarModel
from tritium.model.hf import decoder_of, parts
from tritium.model.transformer import Block, Transformer, full_shape, parameter
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import Sharding, shard, unshard

PREFIX = "base_model.model."
Model = Transformer | ScalarModel


@dataclass
class LoraConfig:
    """An adapter's shape. `targets` are names of Hugging Face's matrices (q_proj, …); none: all of the layers'."""

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] = ()
    dropout: float = 0.0
    rslora: bool = False
    quantized: bool = False  # the base is in NF4
    base: str = ""  # folder of the base, for whoever loads the adapter

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_peft(self, targets: list[str]) -> dict:
        """What peft's adapter_config.json says of it."""
        raw = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        raw |= {"use_rslora": self.rslora, "target_modules": targets, "bias": "none", "fan_in_fan_out": False}
        return raw | ({"base_quantization": "nf4"} if self.quantized else {})

    @classmethod
    def from_peft(cls, raw: dict) -> "LoraConfig":
        """Raises: ValueError for an adapter of another kind, KeyError."""
        plain = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}
        plain |= {"layers_to_transform": None, "lora_bias": False, "peft_type": "LORA"}
        if odd := [f"{k}={raw.get(k)!r}" for k, v in plain.items() if raw.get(k, v) not in (v, None)]:
            raise ValueError(f"{', '.join(odd)} is not supported: plain LoRA is, and soft prompts are")
        targets = raw.get("target_modules") or ()
        if isinstance(targets, str):
            raise ValueError(f"target_modules={targets!r} is a pattern; a list of names is wanted")
        shape = (raw["r"], raw["lora_alpha"], tuple(target.rpartition(".")[2] for target in targets))
        more = raw.get("lora_dropout", 0.0), raw.get("use_rslora", False), raw.get("base_quantization") == "nf4"
        return cls(*shape, *more, base=raw.get("base_model_name_or_path") or "")


class Pair(nn.Module):
    """The adapter of one matrix W: of each of its `pieces` (name, rows of W on this rank) that is adapted, a and b."""

    def __init__(self, config: LoraConfig, pieces: list[tuple[str, int, bool]], sharding: Sharding, columns: int):
        super().__init__()
        self.config, self.pieces = config, pieces
        chosen = [i for i, (_, _, adapted) in enumerate(pieces) if adapted]
        a_cut, b_cut = (None, sharding) if sharding.dim == 0 else (sharding, None)
        if b_cut and len(pieces) > 1:
            common = b_cut.replicated or (False,) * len(pieces)
            b_cut = Sharding(0, tuple(b_cut.sections[i] for i in chosen), tuple(common[i] for i in chosen))
        self.a = parameter(len(chosen) * config.rank, columns, sharding=a_cut)
        self.b = parameter(sum(pieces[i][1] for i in chosen), config.rank, sharding=b_cut)

    @property
    def names(self) -> list[str]:
        return [name for name, _, adapted in self.pieces if adapted]

    @property
    def targets(self) -> list[str]:
        return [name.rpartition(".")[2] for name in self.names]

    def diagonal(self) -> Tensor:
        """b as it meets all of a: [rows of W, rows of a], zero where a row of W has another adapter or none."""
        if len(self.pieces) == 1:
            return self.b
        own = iter(self.b.split([rows for _, rows, adapted in self.pieces if adapted]))
        return torch.block_diag(*(next(own) if adapted else self.b.new_zeros(n, 0) for _, n, adapted in self.pieces))

    def whole(self, mesh: Mesh) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, a [r, in], b [out, r]) of each piece, whole on every rank. A collective."""
        a, b = unshard(self.a.detach(), self.a.sharding, mesh), unshard(self.b.detach(), self.b.sharding, mesh)
        cut = self.b.sharding
        rows = cut.sections if cut and cut.sections and len(self.names) > 1 else [len(b)]
        yield from zip(self.names, a.split(self.config.rank), b.split(list(rows)), strict=True)

    @torch.no_grad()
    def fill(self, a: Sequence[Tensor], b: Sequence[Tensor], mesh: Mesh) -> None:
        """The inverse of `whole`."""
        self.a.copy_(shard(torch.cat(list(a)), self.a.sharding, mesh))
        self.b.copy_(shard(torch.cat(list(b)), self.b.sharding, mesh))


class Adapted(nn.Module):
    """What a matrix has besides itself: adapters by name, which of them acts, and the NF4 codes that stand for it."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.pairs, self.active = nn.ModuleDict(), None
        self.shape, self.dtype, self.sharding = tuple(weight.shape), weight.dtype, weight.sharding
        self.quantized = False

    def quantize(self, weight: Tensor) -> None:
        """Keep `weight` as NF4; of its bf16 values, so that the codes don't depend on the dtype it was loaded in."""
        packed = quantize_nf4(weight.detach().bfloat16())
        for name, part in zip(("codes", "absmax", "absmax_scale", "absmax_mean"), packed.parts, strict=True):
            self.register_buffer(name, part, persistent=False)
        self.quantized = True

    @property
    def packed(self) -> NF4Tensor:
        parts = self.codes, self.absmax, self.absmax_scale, self.absmax_mean
        return NF4Tensor(*parts, self.shape, self.dtype)

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Callable) -> Tensor:
        """As `Block.linear`; dropout acts where gradients are recorded."""
        base = self.packed if self.quantized else rows(weight)
        if self.active is None:
            return linear(x, dequantize_nf4(base) if self.quantized else base, bias)
        pair: Pair = self.pairs[self.active]
        a, b, scale = pair.a, rows(pair.diagonal()), pair.config.scale
        dropout = pair.config.dropout if torch.is_grad_enabled() else 0.0
        y = lora_linear(x, base, a[:MAX_RANK], b[:, :MAX_RANK], scale, bias=bias, dropout=dropout)
        for i in range(MAX_RANK, len(a), MAX_RANK):  # what does not fit the kernel
            inner = F.linear(F.dropout(x, dropout), a[i : i + MAX_RANK])
            y = torch.add(y, F.linear(inner, b[:, i : i + MAX_RANK]), alpha=scale)
        return y

    @torch.no_grad()
    def merged(self, weight: Tensor | None) -> tuple[Tensor, float]:
        """(base + scale · b a in the model's dtype, its largest rounding error)."""
        exact = (dequantize_nf4(replace(self.packed, dtype=torch.float32)) if self.quantized else weight).float()
        if self.active is not None:
            pair = self.pairs[self.active]
            exact = exact.addmm(pair.diagonal().float(), pair.a.float(), alpha=pair.config.scale)
        stored = exact.to(self.dtype)
        return stored, float((stored - exact).abs().max()) if stored.numel() else 0.0


def matrices(model: Model) -> Iterator[tuple[Block, str, list[str]]]:
    """The layers' matrices: module, name in it, and Hugging Face's modules that it is made of."""
    for block, key, names in parts(model):
        if isinstance(block, Block) and all(name.endswith("_proj.weight") for name, _ in names):
            yield block, key, [name.removesuffix(".weight") for name, _ in names]


def attach_lora(model: Model, config: LoraConfig, key: str, seed: int) -> None:
    """Give the layers' matrices an adapter that does nothing yet; with `config.quantized` the matrices become NF4.

    a is drawn from U(-1/√in, 1/√in), b is 0 (peft's initialisation). Raises: ValueError for a target that is nowhere.
    """
    decoder = decoder_of(model)
    short = {module.rpartition(".")[2] for _, _, modules in matrices(model) for module in modules}
    if odd := set(config.targets) - short:
        raise ValueError(f"targets: {', '.join(sorted(odd))} not in this model, which has {', '.join(sorted(short))}")
    if config.quantized and decoder.mesh.tp > decoder.config.num_kv_heads:
        raise ValueError(f"mesh.tp={decoder.mesh.tp} ranks share key/value heads: their NF4 codes can't be cut")
    for block, name, modules in matrices(model):
        chosen = [not config.targets or module.rpartition(".")[2] in config.targets for module in modules]
        if any(chosen):
            attach_one(decoder, block, name, modules, chosen, config, key, seed)


def attach_one(decoder, block: Block, key: str, modules, chosen, config: LoraConfig, name: str, seed: int) -> None:
    mesh = decoder.mesh
    if key not in block.adapted:
        block.adapted[key] = Adapted(getattr(block, key))
    here = block.adapted[key]
    rows = [here.shape[0]]
    if len(modules) > 1:
        whole = here.sharding.whole_size(here.shape[0], mesh.tp)
        rows = [local for _, local in here.sharding.plan(whole, mesh.tp)]
    with torch.device(mesh.device):
        pair = Pair(config, list(zip(modules, rows, chosen, strict=True)), here.sharding, here.shape[1])
    pair.to(decoder.dtype)
    full = full_shape(pair.a, mesh.tp)
    draws = []
    for module in pair.names:
        digest = hashlib.sha256(f"{seed} {name} {module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        bound = full[1] ** -0.5
        draws.append(torch.empty(config.rank, full[1]).uniform_(-bound, bound, generator=generator))
    pair.fill(draws, [torch.zeros(full_shape(pair.b, mesh.tp))], mesh)
    here.pairs[name] = pair
    if config.quantized and not here.quantized:
        here.quantize(getattr(block, key))
        setattr(block, key, None)


def adapted(model: Model) -> Iterator[tuple[Block, str, Adapted]]:
    for block in model.modules():
        if isinstance(block, Block):
            for key, here in block.adapted.items():
                yield block, key, here


@torch.no_grad()
def merge(model: Model) -> float:
    """Add the active adapter to its base (where that is NF4, to what the codes stand for), and drop all adapters.

    In place; returns the largest rounding error of a weight in the model's dtype. Everything is trainable after it.
    Raises: ValueError for a soft prompt, which no weights can stand for.
    """
    decoder, worst = decoder_of(model), 0.0
    if decoder.soft_prompt is not None:
        raise ValueError(f"a soft prompt ({decoder.soft_prompt.config.kind}) can't be merged into its base's weights")
    for block, key, here in list(adapted(model)):
        stored, error = here.merged(getattr(block, key))
        worst = max(worst, error)
        p = parameter(0, sharding=here.sharding)
        p.data = stored
        setattr(block, key, p)
        del block.adapted[key]
    decoder.adapters.clear()
    decoder.prompts.clear()
    decoder.active = None
    model.requires_grad_(True)
    return worst
