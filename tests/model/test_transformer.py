"""The decoder against a plain transcription of its papers, and how it starts."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer, packed_positions
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import shard

pytestmark = pytest.mark.usefixtures("quick")
BASE = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "max_positions": 40}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "init_std": 0.3}
CONFIGS = {
    "Llama": ModelConfig(**BASE, **HEADS),
    "tied": ModelConfig(**BASE, **HEADS, tie_embeddings=True),
    "Qwen2": ModelConfig(**BASE, **HEADS, qkv_bias=True, rope_theta=500.0, norm_eps=1e-3),
    "Qwen3": ModelConfig(**BASE, **HEADS | {"head_dim": 16}, qk_norm=True),
}


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """In fp64, with norms and biases that are not their initial ones and zeros."""
    model = Transformer(config, dtype=torch.float64).initialize(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype)
    return model


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE on [T, D], dimension i paired with i + D/2, pair by pair."""
    T, D = x.shape
    out = torch.empty_like(x)
    for i in range(D // 2):
        angle = torch.arange(T, dtype=x.dtype) * theta ** (-2 * i / D)
        a, b = x[:, i], x[:, i + D // 2]
        out[:, i], out[:, i + D // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def reference(model: Transformer, ids: Tensor) -> Tensor:
    """Logits of one document, [T, V], head by head."""
    c, T = model.config, len(ids)
    H, G, D = c.num_heads, c.num_kv_heads, c.head_dim
    x = model.embedding[ids]
    for layer in model.layers:
        attn = layer.attention
        qkv = norm(x, layer.attention_norm, c.norm_eps) @ attn.qkv.t()
        qkv = qkv if attn.qkv_bias is None else qkv + attn.qkv_bias
        heads = list(qkv.split(D, -1))  # H of q, G of k, G of v, [T, D] each
        out = []
        for h in range(H):
            q, k, v = heads[h], heads[H + h // (H // G)], heads[H + G + h // (H // G)]
            if attn.q_norm is not None:
                q, k = norm(q, attn.q_norm, c.norm_eps), norm(k, attn.k_norm, c.norm_eps)
            scores = rotate(q, c.rope_theta) @ rotate(k, c.rope_theta).t() / math.sqrt(D)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ v)
        x = x + torch.cat(out, -1) @ attn.o.t()
        gate, up = (norm(x, layer.mlp_norm, c.norm_eps) @ layer.mlp.gate_up.t()).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer.mlp.down.t()
    return norm(x, model.norm, c.norm_eps) @ model.head_weight.t()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_the_papers(name):
    model = build(CONFIGS[name])
    ids = torch.randint(0, 48, (17,), generator=torch.Generator().manual_seed(1))
    ours, theirs = model.logits(ids), reference(model, ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # cos and sin are fp32
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((theirs * weight).sum(), parameters)
    for p, a, b in zip(parameters, torch.autograd.grad((ours * weight).sum(), parameters), expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm(), p.shape


@pytest.mark.parametrize("name", CONFIGS)
def test_logprob_is_the_log_softmax_of_the_logits(name):
    model = build(CONFIGS[name])
    ids, targets = torch.randint(0, 48, (2, 20), generator=torch.Generator().manual_seed(3))
    index = torch.tensor([19, 0, 7, 7])
    found = model.logprob(model.hidden(ids), targets, index, temperature=0.8)
    logp = (model.logits(ids) / 0.8).log_softmax(-1)[index]
    torch.testing.assert_close(found.logp, logp.gather(-1, targets[index, None])[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-10)
    assert torch.equal(found.hit, logp.argmax(-1) == targets[index])


def test_positions_restart_in_each_document():
    cu = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert packed_positions(7, cu, torch.device("cpu")).tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert packed_positions(3, None, torch.device("cpu")).tolist() == [0, 1, 2]


def test_a_document_longer_than_the_context_is_an_error():
    model = build(CONFIGS["Llama"])
    model.hidden(torch.zeros(80, dtype=torch.long), torch.tensor([0, 40, 80], dtype=torch.int32))
    with pytest.raises(ValueError, match="a document has 41 tokens"):
        model.hidden(torch.zeros(80, dtype=torch.long), torch.tensor([0, 39, 80], dtype=torch.int32))


# ---------------------------------------------------------------------------------------------- the first weights


def test_the_first_weights_have_the_spread_that_is_written_down():
    config = ModelConfig(512, 128, 256, 8, 4, 2, 32, qkv_bias=True, init_std=0.05)
    model = Transformer(config).initialize(0)
    for name, p in model.named_parameters():
        if name.endswith("norm"):
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            wanted = 0.05 / 4 if name.endswith((".o", ".down")) else 0.05  # √(2 · 8 layers) = 4
            assert p.std().item() == pytest.approx(wanted, rel=0.03) and abs(p.mean()) < 0.03 * wanted, name


def test_the_first_weights_come_from_the_seed_and_the_name():
    first, second, other = (Transformer(CONFIGS["Llama"]).initialize(seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding, other.embedding)
    matrices = [p.flatten()[:64] for p in first.parameters() if p.dim() == 2]
    assert all(not torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_weights_are_the_same_on_two_ranks(name):
    whole = Transformer(CONFIGS[name]).initialize(3)
    for rank in range(2):
        mesh = Mesh(rank=rank, world_size=2, tp=2, tp_rank=rank)  # no process group: none is needed to start
        part = Transformer(CONFIGS[name], mesh).initialize(3)
        for (key, p), full in zip(part.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, shard(full, p.sharding, mesh)), key


def test_a_mesh_that_does_not_divide_the_model_is_an_error():
    with pytest.raises(ValueError, match="mesh.tp=3 does not divide num_heads=4, num_kv_heads=2"):
        Transformer(CONFIGS["Llama"], Mesh(world_size=3, tp=3))


# ---------------------------------------------------------------------------------------------- the shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"head_dim": 12}, "head_dim=12"),
        ({"head_dim": 264}, "head_dim=264"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
    ],
)
def test_a_shape_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**BASE | HEADS | change)


def test_flops_are_those_of_the_matmuls():
    config = CONFIGS["Llama"]
    matrices = 16 * (4 + 2 + 2) * 8 + 4 * 8 * 16 + 3 * 16 * 24  # qkv, o, gate, up, down
    causal = 2 * 2 * 4 * 8 * 10 * 10 / 2  # q kᵀ and p v, the lower triangle
    assert config.layer_parameters == matrices
    assert config.flops([10], 3) == 2 * (2 * matrices * 10 + causal) + 2 * 48 * 16 * 3
    products = sum(2 * m * n * k for m, n, k in config.matmul_shapes(10))
    assert products == 2 * matrices * 10
    windowed = dataclasses.replace(config, windows=(4, None))
    hidden = 2 * 2 * 4 * 8 * 6 * 6 / 2  # of ten queries six see 1 to 6 keys less than they would: (10 - 4)² / 2
    assert config.flops([10, 3], 3) - windowed.flops([10, 3], 3) == hidden
