"""Soft prompts: virtual tokens before every document. They alone are trained.

    prompt      n embeddings                       prompt tuning (Lester et al. 2021, arXiv 2104.08691)
    p_tuning    n embeddings that an MLP makes     P-tuning (Liu et al. 2021, arXiv 2103.10385); the MLP is not kept
    prefix      n keys and values in each layer    prefix tuning (Li & Liang 2021, arXiv 2101.00190); not rotated

A virtual token is an id beyond the vocabulary, V … V + n - 1, at the positions 0 … n - 1. `Transformer.hidden` puts
them before each document of a packed stream and drops what becomes of them; generation puts them before the prompt, so
that they lie in the cache like any other token. The context is n tokens shorter.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer, parameter

PEFT_TYPES = {"prompt": "PROMPT_TUNING", "p_tuning": "P_TUNING", "prefix": "PREFIX_TUNING"}  # ours → peft's


@dataclass
class PromptConfig:
    """`tokens` virtual ones of a `kind`; `base` is the base's folder, for whoever loads the prompt."""

    kind: str
    tokens: int = 20
    base: str = ""
    made: bool = False  # P-tuning's MLP has done its work, and is gone

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")

    def to_peft(self, model: ModelConfig) -> dict:
        """What peft's adapter_config.json says of it."""
        heads = model.num_kv_heads if self.kind == "prefix" else model.num_heads
        width = heads * model.head_dim if self.kind == "prefix" else model.hidden_size
        raw = {"peft_type": PEFT_TYPES[self.kind], "num_virtual_tokens": self.tokens, "num_transformer_submodules": 1}
        return raw | {"token_dim": width, "num_attention_heads": heads, "num_layers": model.num_layers}


@dataclass
class Virtual:
    """What stands in a stream where its virtual tokens are."""

    mask: Tensor  # [T] bool: the virtual ones
    slots: Tensor  # [T]: which of the n
    values: Tensor  # [n, E], or of a prefix [n, L, 2, G, D]

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings [T, E] with the prompt's in place."""
        return x if self.values.dim() > 2 else torch.where(self.mask[:, None], self.values[self.slots], x)

    def attend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [T, G, D] with the prefix's in place."""
        if self.values.dim() == 2:
            return k, v
        mask, (key, value) = self.mask[:, None, None], self.values[:, layer].unbind(1)  # [n, G, D]
        return torch.where(mask, key[self.slots], k), torch.where(mask, value[self.slots], v)


class SoftPrompt(nn.Module):
    """One prompt's parameters; of one that P-tuning trains, also those of its MLP."""

    def __init__(self, config: PromptConfig, model: ModelConfig):
        super().__init__()
        self.config, self.first_id, width = config, model.vocab_size, model.hidden_size
        self.shape = (config.tokens, width)
        if config.kind == "prefix":
            self.shape = (config.tokens, model.num_layers, 2, model.num_kv_heads, model.head_dim)
        self.table = parameter(config.tokens, math.prod(self.shape[1:]))
        shapes = [(width, width), (width,)] * 3 if config.kind == "p_tuning" and not config.made else []
        self.encoder = nn.ParameterList([parameter(*shape) for shape in shapes])

    def flat(self) -> Tensor:
        """What acts, as peft keeps it: [n, E], of a prefix [n, L · 2 · G · D]."""
        x = self.table
        for i in range(0, len(self.encoder), 2):
            x = F.linear(x.relu() if i else x, self.encoder[i], self.encoder[i + 1])
        return x

    @property
    def ids(self) -> list[int]:
        return list(range(self.first_id, self.first_id + self.shape[0]))

    def within(self, tokens: Tensor) -> Virtual:
        """What to put in place of a stream's virtual tokens, [T]."""
        slots = tokens - self.first_id
        return Virtual(slots >= 0, slots.clamp_min(0), self.flat().view(self.shape))

    def before(self, tokens: Tensor, cu: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A stream with the virtual tokens before each document: (tokens [T'], cu_seqlens [S+1], positions [T'], where
        the stream's own tokens are [T]). No host sync."""
        n, device = self.shape[0], tokens.device
        cu = torch.tensor([0, len(tokens)], dtype=torch.int32, device=device) if cu is None else cu
        count = len(cu) - 1
        place = n * torch.arange(count + 1, device=device)  # virtual tokens before document s begins
        ahead = torch.repeat_interleave(place[1:], cu.diff().long(), output_size=len(tokens))
        own = torch.arange(len(tokens), device=device) + ahead  # [T]
        new = ((cu[:-1].long() + place[:-1])[:, None] + torch.arange(n, device=device)).flatten()  # [S · n]
        made = []
        for given, virtual in ((tokens, self.first_id), (positions + n, 0)):
            x = given.new_empty(len(tokens) + n * count)
            x[own], x[new] = given, (virtual + torch.arange(n, device=device)).repeat(count)
            made.append(x)
        return made[0], (cu + place).int(), made[1], own

    @torch.no_grad()
    def initialize(self, model: Transformer, seed: int) -> None:
        """Embeddings of tokens drawn from the vocabulary (Lester et al., section 3.2); a prefix's from N(0, 0.02²); the
        MLP's matrices from U(±1/√E), biases 0."""
        generator = torch.Generator().manual_seed(seed)
        self.table.copy_(torch.empty(self.table.shape).normal_(0.0, 0.02, generator=generator))
        if len(self.shape) == 2:
            rows = torch.randint(self.first_id, self.shape[:1], generator=generator)
            self.table.copy_(model.embedding[rows.to(model.embedding.device)])
        for p in self.encoder:
            bound = p.shape[-1] ** -0.5 if p.dim() == 2 else 0.0
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))


def attach_prompt(model: Transformer, config: PromptConfig, key: str, seed: int) -> None:
    """Give the model a soft prompt. Raises: ValueError where the model, or its mesh, can't have it."""
    if not isinstance(model, Transformer):
        raise ValueError(f"kind={config.kind} is for a language model, not for a reward model")
    if model.mesh.tp > 1 or model.mesh.cp > 1:
        raise ValueError(f"kind={config.kind} goes with data parallelism only: set mesh.tp=1 and mesh.cp=1")
    if config.tokens >= model.positions - 1:
        raise ValueError(f"tokens={config.tokens} leave nothing of the context of {model.positions}")
    with torch.device(model.mesh.device):
        soft = SoftPrompt(config, model.config).to(model.dtype)
    soft.initialize(model, seed)
    model.prompts[key] = soft
