"""The decoder: embedding → L × (attention, SwiGLU) → RMSNorm, and the language-model head.

    hidden = model.hidden(tokens, cu_seqlens)               # [T, E], a packed stream of documents
    result = model.logprob(hidden, targets, index=…)        # LogProb(logp, lse, entropy, hit), each [N] fp32

Pre-norm residual blocks as in Llama (arXiv 2302.13971): RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864, half-split
layout), grouped-query attention (arXiv 2305.13245), SwiGLU (arXiv 2002.05202). The residual addition is fused into the
norm that follows it. q, k and v are one matrix, and so are gate and up, which saves matmuls.

Tensor parallel: qkv, gate_up and the vocabulary are sharded by rows, o and down by columns; between blocks each rank
has its own tokens (parallel/tensor.py). Context parallel: each rank has its own chunks of the stream, and `hidden`
returns these (parallel/context.py); `logprob` returns results for the whole batch. With a KV cache all ranks see all
tokens.

Initialisation: every matrix N(0, init_std²); o and down divided by √(2L), so that the residual stream's variance
does not grow with depth (GPT-2, section 2.3); norms 1, biases 0. With a `width_base`, as in MiniCPM (muP, arXiv
2404.06395, appendix A.1), all of the layers' matrices are divided by √(E / width_base) instead. Each parameter has its
own generator, seeded with (seed, name), so that a model starts the same on any mesh.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tritium.kernels import geglu, linear_logprob, rms_norm, rope, swiglu, wide
from tritium.kernels.linear_logprob import LogProb
from tritium.model.config import ModelConfig
from tritium.model.rope import dynamic_rope, rope_table
from tritium.parallel.context import ContextAttention, Split, gather_results
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import Sharding, all_reduce, embedding_part, gather_tokens, scatter_tokens, shard, unshard

HEAD_ROWS = 256  # the head's input rows are padded to a multiple of this
IGNORE = -100  # the target of a token without a prediction: linear_logprob ignores it


@dataclass
class Stream:
    """What all layers need besides the hidden states, for the T tokens of the stream or this rank's part of them."""

    cos: Tensor  # [T, D/2] (of what is rotated), as sin
    sin: Tensor
    query_scale: Tensor | None  # [T, 1, 1]: LogN
    attend: Callable[..., Tensor]  # layer, q [T, H, D], k and v [T, G, D], window, softcap, scale → [T, H, D]
    tp_group: ProcessGroup | None
    cached: bool  # generation with a KV cache: all ranks see all tokens, and there are no gradients
    linear: Callable[..., Tensor]  # x [T, in], weight [out, in], bias → [T, out]
    virtual: Any = None  # prompts.Virtual: embeddings, or keys and values, of a soft prompt's tokens

    def enter(self, x: Tensor) -> Tensor:
        """On the way into a block: gather the tensor-parallel ranks' tokens, [T / tp, E] → [T, E]."""
        return x if self.cached else gather_tokens(x, self.tp_group)

    def leave(self, x: Tensor) -> Tensor:
        """On the way out of a block: sum the ranks' partial results, [T, E] → [T / tp, E]."""
        return all_reduce(x, self.tp_group) if self.cached else scatter_tokens(x, self.tp_group)


class Block(nn.Module):
    """A module that multiplies with its matrices by name, so that model/lora.py can attach an adapter to each."""

    def __init__(self):
        super().__init__()
        self.adapted = nn.ModuleDict()  # name of a matrix → lora.Adapted

    def linear(
        self, x: Tensor, name: str, multiply: Callable, bias: Tensor | None = None, rows: Callable = lambda w: w
    ) -> Tensor:
        """x Wᵀ + bias, [T, in] → [T, out], with the matrix `name`; `rows` selects the rows of it that are used."""
        weight = getattr(self, name)
        if name in self.adapted:
            return self.adapted[name](x, weight, bias, rows)
        return multiply(x, rows(weight), bias)


class Attention(Block):
    """Causal grouped-query self-attention over a packed stream."""

    def __init__(self, config: ModelConfig, mesh: Mesh, index: int):
        super().__init__()
        self.index, self.eps, self.head_dim = index, config.norm_eps, config.head_dim
        self.rotary_dim = config.rotary_dim or config.head_dim
        self.options = {
            "window": config.windows[index] if config.windows else None,
            "softcap": config.attention_softcap,
            "scale": None if config.query_scalar is None else config.query_scalar**-0.5,
        }
        self.heads = config.num_heads // mesh.tp
        sizes = tuple(n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads))
        shared = config.num_kv_heads < mesh.tp  # then every rank holds all K and V rows, and uses one head's
        self.kv_heads = 1 if shared else config.num_kv_heads // mesh.tp
        self.kv_head = mesh.tp_rank * config.num_kv_heads // mesh.tp if shared else None
        cut = Sharding(0, sizes, (False, shared, shared))
        rows = sum(local for _, local in cut.plan(sum(sizes), mesh.tp))
        self.qkv = parameter(rows, config.hidden_size, sharding=cut)
        self.qkv_bias = parameter(rows, sharding=cut) if config.qkv_bias else None
        self.o = parameter(config.hidden_size, self.heads * self.head_dim, sharding=Sharding(1))
        self.q_norm = parameter(self.head_dim) if config.qk_norm else None
        self.k_norm = parameter(self.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        qkv = self.linear(stream.enter(x), "qkv", stream.linear, self.used(self.qkv_bias), self.used)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)  # [T, ·, D]
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        q, k = self.rotate(q, k, stream)
        if stream.query_scale is not None:
            q = q * stream.query_scale.to(q.dtype)
        if stream.virtual is not None:
            k, v = stream.virtual.attend(self.index, k, v)
        out = stream.attend(self.index, q, k, v, **self.options)  # [T, H, D]
        return stream.leave(self.linear(out.flatten(1), "o", stream.linear))

    def rotate(self, q: Tensor, k: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        if self.rotary_dim == self.head_dim:
            return rope(q, k, stream.cos, stream.sin)
        (q, q_rest), (k, k_rest) = (x.tensor_split([self.rotary_dim], -1) for x in (q, k))
        q, k = rope(q, k, stream.cos, stream.sin)
        return torch.cat([q, q_rest], -1), torch.cat([k, k_rest], -1)

    def used(self, rows: Tensor | None) -> Tensor | None:
        """The rows of this rank's heads, if ranks share K and V heads and hold all of their rows."""
        if rows is None or self.kv_head is None:
            return rows
        q, kv = rows.tensor_split([self.heads * self.head_dim])
        k, v = kv.unflatten(0, (2, -1, self.head_dim))[:, self.kv_head]  # [D, E] each
        return torch.cat([q, k, v])


class MLP(Block):
    """down(silu(gate(x)) * up(x)), or with gelu in place of silu (Gemma)."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        width, self.gated = config.intermediate_size, geglu if config.gemma else swiglu
        self.gate_up = parameter(2 * width // mesh.tp, config.hidden_size, sharding=Sharding(0, (width, width)))
        self.down = parameter(config.hidden_size, width // mesh.tp, sharding=Sharding(1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        hidden = self.gated(self.linear(stream.enter(x), "gate_up", stream.linear))  # [T, F]
        return stream.leave(self.linear(hidden, "down", stream.linear))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, mesh: Mesh, index: int):
        super().__init__()
        self.scale = config.residual_scale
        self.normalize = partial(rms_norm, eps=config.norm_eps, offset=float(config.gemma))
        self.attention_norm = parameter(config.hidden_size)
        self.attention = Attention(config, mesh, index)
        self.mlp_norm = parameter(config.hidden_size)
        self.mlp = MLP(config, mesh)
        self.after_attention_norm = parameter(config.hidden_size) if config.gemma else None
        self.after_mlp_norm = parameter(config.hidden_size) if config.gemma else None
        self.recompute, self.dropout = "none", 0.0

    def forward(self, x: Tensor, residual: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor]:
        """`x` is the previous block's output, which the first norm adds to the residual stream; both [T / tp, E]."""
        if residual is None:
            residual, x = x, self.normalize(x, self.attention_norm)
        else:
            x, residual = self.normalize(x, self.attention_norm, residual=residual)
        x = self.leaving(self.attention(x, stream), self.after_attention_norm)
        x, residual = self.normalize(x, self.mlp_norm, residual=residual)
        mlp = recomputed(self.mlp) if self.recompute == "selective" else self.mlp
        return self.leaving(mlp(x, stream), self.after_mlp_norm), residual

    def leaving(self, x: Tensor, norm: Tensor | None) -> Tensor:
        x = x if norm is None else self.normalize(x, norm)
        if self.dropout and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        return x if self.scale == 1 else x * self.scale


def recomputed(module: nn.Module) -> Callable:
    """The module with activation checkpointing: its activations are recomputed in the backward (arXiv 1604.06174)."""
    return partial(checkpoint, module, use_reentrant=False) if torch.is_grad_enabled() else module


class Transformer(nn.Module):
    """The language model. Built on `mesh`, it holds this rank's shards, on `mesh.device`.

    A `streamed` model has no memory yet: `initialize` or model/hf.py only note where each parameter comes from, and
    ZeRO-3's `FlatModule` loads them unit by unit (parallel/zero.py). Until then it can't be used.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32, streamed: bool = False
    ):
        super().__init__()
        mesh = mesh or Mesh.single()
        check_divides(config, mesh.tp)
        self.config, self.mesh = config, mesh
        self.neftune = 0.0
        self.adapters: dict[str, Any] = {}  # name → lora.LoraConfig or prompts.PromptConfig; see model/adapters.py
        self.active: str | None = None  # name of the active adapter
        self.prompts = nn.ModuleDict()  # name → prompts.SoftPrompt
        rows = config.vocab_size // mesh.tp
        self.rotary_dim = config.rotary_dim or config.head_dim
        with torch.device("meta" if streamed else mesh.device), default_dtype(dtype):
            self.embedding = parameter(rows, config.hidden_size, sharding=Sharding(0))
            self.layers = nn.ModuleList(Layer(config, mesh, i) for i in range(config.num_layers))
            self.norm = parameter(config.hidden_size)
            self.head = None if config.tie_embeddings else parameter(rows, config.hidden_size, sharding=Sharding(0))
        for module in self.modules() if streamed else ():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, hollow(p, mesh.device))
        with torch.device(mesh.device):
            table = rope_table(config.rope_theta, self.rotary_dim, config.max_positions, config.rope_scaling)
            self.register_buffer("cos_sin", table, persistent=False)  # [2, positions, D/2] fp32
        # Rounded to the parameters' dtype, as in the original models: Gemma's √E in bf16 is not quite √E.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def positions(self) -> int:
        """The context length; `config.max_positions` is what the active soft prompt leaves of it."""
        return self.cos_sin.shape[1]

    @property
    def soft_prompt(self) -> Any:
        """The active prompts.SoftPrompt, if any."""
        return dict(self.prompts.items()).get(self.active)

    @property
    def virtual_ids(self) -> list[int]:
        """The ids of its virtual tokens, which precede every prompt in generation."""
        return [] if self.soft_prompt is None else self.soft_prompt.ids

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix, [V / tp, E]; the embedding itself when they are tied."""
        return self.embedding if self.head is None else self.head

    def hidden(
        self, tokens: Tensor, cu_seqlens: Tensor | None = None, *, positions: Tensor | None = None, cache=None
    ) -> Tensor:
        """Final hidden states [T, E] of a packed stream; without a cache, of this rank's T'/cp tokens (see `Split`).

        `tokens` [T] holds whole documents with bounds `cu_seqlens` [S+1] int32 (None: one document). `positions` [T]
        defaults to restarting in each document. `cache` is a view of the KV cache (model/cache.py).
        Raises: ValueError for a document that is longer than the model's context (checked on a CPU only).
        """
        if positions is None:
            positions = packed_positions(len(tokens), cu_seqlens, tokens.device)
        own, soft = None, self.soft_prompt
        if soft is not None and cache is None:
            tokens, cu_seqlens, positions, own = soft.before(tokens, cu_seqlens, positions)
        if tokens.device.type == "cpu" and len(tokens) and int(positions.max()) >= self.positions:
            raise ValueError(f"a document has {int(positions.max()) + 1} tokens, this model {self.positions} positions")
        dynamic = self.config.rope_scaling is not None and self.config.rope_scaling.rope_type == "dynamic"
        noisy = bool(self.neftune) and torch.is_grad_enabled()
        lengths = document_lengths(positions, cu_seqlens, cache is None) if dynamic or noisy else None
        if cache is None:
            split = Split.of(len(tokens), self.mesh)
            tokens, positions = split.take(tokens), split.take(positions)
            lengths = lengths if lengths is None else split.take(lengths)
            attend, linear = ContextAttention(split, split.fill(cu_seqlens, tokens.device)), wide.linear
        else:
            attend, linear = partial(cache.attend, cu_seqlens=cu_seqlens), cache.linear
        cos, sin = self.dynamic_rope(positions, lengths) if dynamic else self.cos_sin[:, positions]  # [T, D/2]
        virtual, scale = None if soft is None else soft.within(tokens), self.query_scale(positions)
        stream = Stream(cos, sin, scale, attend, self.mesh.tp_group, cache is not None, linear, virtual)
        tokens = tokens if virtual is None else tokens.masked_fill(virtual.mask, 0)
        x, residual = stream.leave(embedding_part(tokens, self.embedding, self.mesh.tp_group)), None
        x = x if virtual is None else virtual.embed(x)
        x = x if self.embedding_scale == 1 else x * self.embedding_scale
        x = x + self.noise(x, lengths) if noisy else x
        for layer in self.layers:
            x, residual = (recomputed(layer) if layer.recompute == "full" else layer)(x, residual, stream)
        x = self.layers[-1].normalize(x, self.norm, residual=residual)[0]
        x = x if own is None else x[own]
        return stream.enter(x if self.config.head_scale == 1 else x * self.config.head_scale)

    def dynamic_rope(self, positions: Tensor, lengths: Tensor) -> Tensor:
        config = self.config
        return dynamic_rope(config.rope_theta, self.rotary_dim, positions, lengths, config.rope_scaling)

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """LogN scaling: max(1, log_n(position + 1)), [T, 1, 1] fp32 (Su 2021, and Qwen, arXiv 2309.16609)."""
        if self.config.logn_length is None:
            return None
        return ((positions + 1).float().log() / math.log(self.config.logn_length)).clamp_min(1.0)[:, None, None]

    def embed(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Each document's embedding, [S, E] with unit norm: the hidden state of its last token (Qwen3-Embedding, arXiv
        2506.05176). Documents must not be empty."""
        hidden = gather_results(self.hidden(tokens, cu_seqlens), Split.of(len(tokens), self.mesh))
        return F.normalize(hidden[cu_seqlens[1:].long() - 1].float(), dim=-1)

    def noise(self, x: Tensor, lengths: Tensor) -> Tensor:
        """NEFTune's noise (arXiv 2310.05914): U(-1, 1) · α / √(document length · E), [T / tp, E]."""
        own = len(x) * self.mesh.tp_rank if len(x) < len(lengths) else 0
        scale = self.neftune * (lengths[own : own + len(x), None].clamp_min(1) * x.shape[1]) ** -0.5
        return (torch.rand_like(x, dtype=torch.float32) * 2 - 1).mul_(scale).to(x.dtype)

    def set_noise(self, dropout: float = 0.0, neftune: float = 0.0) -> None:
        """Set the dropout of the blocks' outputs and NEFTune's α; both act only while gradients are recorded."""
        self.neftune = neftune
        for layer in self.layers:
            layer.dropout = dropout

    def set_recompute(self, kind: str) -> None:
        """Activation checkpointing: recompute "none", "selective" (the MLP, two thirds of a layer's activations) or
        "full" (all but a layer's input)."""
        for layer in self.layers:
            layer.recompute = kind

    def logprob(
        self, hidden: Tensor, targets: Tensor, index: Tensor | None = None, *, temperature: float = 1.0
    ) -> LogProb:
        """log p(target | prefix), log-sum-exp, entropy and hit of each token, [N] fp32; the only way to use the head.

        `hidden`: the result of `hidden`; `targets` [T]; `index` [N]: the tokens to compute (None: all). Under context
        parallelism each rank computes its own tokens (their number is one host sync), and all get all results.
        """
        split = Split.of(len(targets), self.mesh)
        if split.group is None:
            return self.local_logprob(hidden[: split.tokens], targets, index, temperature)
        index = torch.arange(len(targets), device=targets.device) if index is None else index
        place = split.place(index)
        own = place[place >= 0]
        results = torch.stack(self.local_logprob(hidden, split.take(targets), own, temperature), 1)  # [·, 4]
        results = results.new_zeros(split.local, 4).index_copy(0, own, results)
        logp, lse, entropy, hit = gather_results(results, split).index_select(0, index).unbind(1)  # [N] each
        return LogProb(logp, lse, entropy, hit != 0)

    def local_logprob(self, hidden: Tensor, targets: Tensor, index: Tensor | None, temperature: float) -> LogProb:
        """`logprob` without context parallelism, of hidden states [T, E]."""
        count = len(targets) if index is None else len(index)
        if index is not None:
            # Padded with ignored tokens: oneDNN builds a kernel for every new shape.
            index = F.pad(index, (0, -count % HEAD_ROWS))
            hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
            targets[count:] = IGNORE
        options = {"temperature": temperature, "softcap": self.config.head_softcap, "group": self.mesh.tp_group}
        result = linear_logprob(hidden, self.head_weight, targets, **options)
        return LogProb(*(values[:count] for values in result))

    def logits(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[T, V] in the model's dtype: for small uses; training goes through `logprob`."""
        return gather_results(self.project(self.hidden(tokens, cu_seqlens)), Split.of(len(tokens), self.mesh))

    def project(self, hidden: Tensor, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        """Logits of hidden states, [N, E] → [N, V], whole on every rank; under tensor parallelism without gradients.

        `linear` multiplies with the head's weight: see model/packed.py."""
        logits, cap = linear(hidden, self.head_weight), self.config.head_softcap  # [N, V / tp]
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return unshard(logits.detach(), Sharding(1), self.mesh) if self.mesh.tp > 1 else logits

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder (config.json, model.safetensors); see model/hf.py."""
        from tritium.model.hf import save

        save(self, folder)

    @torch.no_grad()
    def initialize(self, seed: int) -> "Transformer":
        """Initialise the weights in place, as the module's docstring says; returns self."""
        for name, p in self.named_parameters():
            come_from(p, partial(self.drawn, name, p, seed))
        return self

    def drawn(self, name: str, p: nn.Parameter, seed: int) -> Tensor:
        """A parameter's initial weights, of this rank's shape."""
        config = self.config
        if name.endswith(("norm", "bias")):
            return torch.full(p.shape, float(name.endswith("norm") and not config.gemma))
        out_std = config.init_std / math.sqrt(2 * config.num_layers)
        std = out_std if name.endswith((".o", ".down")) else config.init_std
        if config.width_base is not None:  # muP
            std = config.init_std * (math.sqrt(config.head_scale) if "layers." in name else 1.0)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        full = torch.empty(full_shape(p, self.mesh.tp)).normal_(0.0, std, generator=generator)
        return shard(full, p.sharding, self.mesh)


def parameter(*shape: int, sharding: Sharding | None = None) -> nn.Parameter:
    """An uninitialised parameter with its sharding; if not sharded, a rank's gradient is only a part of the sum."""
    p = nn.Parameter(torch.empty(*shape))
    p.sharding, p.partial = sharding, sharding is None
    return p


def hollow(p: nn.Parameter, device: torch.device) -> nn.Parameter:
    """A parameter like p with the memory of one element: see `come_from`."""
    made = nn.Parameter(torch.zeros(1, dtype=p.dtype, device=device).expand(p.shape))
    made.sharding, made.partial, made.source = p.sharding, p.partial, None
    return made


def come_from(p: nn.Parameter, source: Callable[[], Tensor]) -> None:
    """Fill p with this rank's values from `source`: now, or, if p is hollow, when `FlatModule` needs them."""
    if hasattr(p, "source"):
        p.source = source
    else:
        p.copy_(source())


def full_shape(p: nn.Parameter, tp: int) -> tuple[int, ...]:
    """The shape of the whole parameter of which `p` is one of `tp` shards."""
    cut = p.sharding
    return tuple(cut.whole_size(n, tp) if cut and i == cut.dim else n for i, n in enumerate(p.shape))


def packed_positions(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """0, 1, 2, … restarting at each document: [T] int64, without a host sync."""
    positions = torch.arange(length, device=device)
    if cu_seqlens is None:
        return positions
    return positions - torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=length)


def document_lengths(positions: Tensor, cu_seqlens: Tensor | None, whole: bool) -> Tensor:
    """The length of each token's document, [T]; during decoding (not `whole`), the length so far."""
    if cu_seqlens is None:
        return torch.full_like(positions, len(positions)) if whole else positions + 1
    whole = positions[(cu_seqlens[1:].long() - 1).clamp_min(0)] + 1  # [S]; of a prompt's rest, with what is cached
    return torch.repeat_interleave(whole, cu_seqlens.diff().long(), output_size=len(positions))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within, new tensors have this dtype, so that none has to be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_divides(config: ModelConfig, tp: int) -> None:
    """Raises: ValueError naming every size that tp does not divide."""
    sizes = {n: getattr(config, n) for n in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")}
    if tp % config.num_kv_heads == 0:
        del sizes["num_kv_heads"]  # several ranks share a head
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % tp]
    if wrong:
        raise ValueError(f"mesh.tp={tp} does not divide {', '.join(wrong)}")
