"""The shape of a decoder, and what a pass through it costs."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tritium.model.rope import RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama kind. H query heads share G key/value heads of D dims; see the README for the letters."""

    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # D
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over each head of q and k before the rotation
    init_std: float = 0.02
    bos_id: int | None = None
    eos_id: int | None = None
    more_eos_ids: tuple[int, ...] = ()  # what else ends an answer, where there are several
    family: str = ""  # Hugging Face's model_type (empty: the one of llama, qwen2, qwen3 and minicpm that has all of it)
    windows: tuple[int | None, ...] = ()  # of each layer: how many keys a query sees at most (empty: all)
    rotary_dim: int | None = None  # how many of a head's dimensions are rotated (None: all)
    rope_scaling: RopeScaling | None = None
    logn_length: int | None = None  # queries after so many tokens are scaled by log_n(position + 1) (Qwen)
    query_scalar: float | None = None  # scores are divided by its root (None: by that of D)
    attention_softcap: float | None = None  # scores are softcap · tanh(scores / softcap) (Gemma 2)
    head_softcap: float | None = None  # logits likewise
    embedding_scale: float = 1.0  # Gemma, MiniCPM
    residual_depth: float | None = None  # MiniCPM: blocks' outputs are multiplied by this / √L
    width_base: int | None = None  # MiniCPM, muP: the head's input is multiplied by this / E

    def __post_init__(self):
        if not self.family:
            scaled = self.embedding_scale != 1 or (self.residual_depth, self.width_base) != (None, None)
            kinds = {"qwen2": self.qkv_bias, "qwen3": self.qk_norm, "minicpm": scaled, "llama": True}
            object.__setattr__(self, "family", next(family for family, has in kinds.items() if has))
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_positions"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1, and whole")
        if odd := [w for w in self.windows if w is not None and not (isinstance(w, int) and w >= 1)]:
            raise ValueError(f"a window of {odd[0]!r} must be at least 1, and whole")
        for i in (self.bos_id, *self.stop_ids):
            if i is not None and not (isinstance(i, int) and 0 <= i < self.vocab_size):
                raise ValueError(f"the id of a special token is {i!r}, no number of one of {self.vocab_size} tokens")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value} must be above 0, and finite")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 8 or not 8 <= self.head_dim <= 256:
            raise ValueError(f"head_dim={self.head_dim} must be a multiple of 8 from 8 to 256")

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return [i for i in (self.eos_id, *self.more_eos_ids) if i is not None]

    @property
    def gemma(self) -> bool:
        """GeGLU instead of SwiGLU, norms weighted by 1 + w, and a norm after each block as well (arXiv 2408.00118)."""
        return self.family == "gemma2"

    @property
    def residual_scale(self) -> float:
        return 1.0 if self.residual_depth is None else self.residual_depth / math.sqrt(self.num_layers)

    @property
    def head_scale(self) -> float:
        return 1.0 if self.width_base is None else self.width_base / self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Matrix parameters of one layer (what a token is multiplied with)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    def pairs(self, length: int) -> float:
        """(query, key) pairs of a causal document, over all layers: n²/2 each, or what a window leaves of it."""
        widths = Counter(self.windows or (None,) * self.num_layers)
        reach = [(count, min(length, width or length)) for width, count in widths.items()]
        return sum(count * width * (length - width / 2) for count, width in reach)

    def flops(self, lengths: Sequence[int], head_tokens: int) -> float:
        """FLOPs of one forward pass over documents of these lengths: 2 per matrix parameter and token, the head on
        `head_tokens` only, and attention's 2 matmuls x 2 FLOPs x H D for each pair. Training costs three times that;
        what is computed again in the backward does not count (PaLM, arXiv 2204.02311, appendix B).
        """
        attention = 4 * self.num_heads * self.head_dim * sum(map(self.pairs, lengths))
        layers = self.num_layers * 2 * self.layer_parameters * sum(lengths)
        return layers + attention + 2 * self.vocab_size * self.hidden_size * head_tokens

    def matmul_shapes(self, tokens: int) -> list[tuple[int, int, int]]:
        """(M, N, K) of the forward's matrix products, to measure what this machine can do with them."""
        e, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        qkv = (self.num_heads + 2 * self.num_kv_heads) * d
        return [(tokens, qkv, e), (tokens, e, self.num_heads * d), (tokens, 2 * f, e), (tokens, e, f)]
