"""A baseline in the manner of nanoGPT and nanochat: the same Llama in plain torch, compiled, and nothing else."""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tritium.model.config import ModelConfig


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        e, d = c.hidden_size, c.head_dim
        self.c, self.norm1, self.norm2 = c, nn.RMSNorm(e, c.norm_eps), nn.RMSNorm(e, c.norm_eps)
        self.q, self.o = nn.Linear(e, c.num_heads * d, bias=False), nn.Linear(c.num_heads * d, e, bias=False)
        self.k, self.v = (nn.Linear(e, c.num_kv_heads * d, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(e, c.intermediate_size, bias=False) for _ in range(2))
        self.down = nn.Linear(c.intermediate_size, e, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, T, E]; cos, sin [T, D]
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2)  # [B, H, T, D]

        def rotate(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat([-b, a], -1) * sin

        y = self.norm1(x)
        q, k, v = rotate(heads(self.q(y))), rotate(heads(self.k(y))), heads(self.v(y))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GPT(nn.Module):
    """`forward(tokens [B, T])` is the mean cross-entropy of predicting each token but the first."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c, self.embed, self.norm = c, nn.Embedding(c.vocab_size, c.hidden_size), nn.RMSNorm(c.hidden_size)
        self.norm.eps = c.norm_eps
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        d = self.c.head_dim
        inverse = self.c.rope_theta ** (-torch.arange(0, d, 2, device=tokens.device) / d)
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), inverse).repeat(1, 2)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        logits = self.head(self.norm(x))[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def load(self, file: str) -> "GPT":
        """The weights of a Hugging Face Llama, tied head or not."""
        names = {"self_attn.": "", "mlp.": "", "_proj": "", "input_layernorm": "norm1"}
        names |= {"post_attention_layernorm": "norm2", "model.": "", "embed_tokens": "embed", "lm_head": "head"}
        renamed = {}
        for name, tensor in load_file(file).items():
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name] = tensor
        self.load_state_dict({"head.weight": renamed["embed.weight"], **renamed})
        return self
