"""Generation is the training forward: the same log-probs, whatever the prompts, the order and the size of the batch."""

import numpy as np
import pytest
import torch

from tritium.core.batch import Document, pack
from tritium.core.objectives.base import supervised_logprob
from tritium.core.objectives.policy import PolicyGradient
from tritium.model.config import ModelConfig
from tritium.model.generate import generate
from tritium.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick")
SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "max_positions": 128}
MODELS = {
    "grouped heads": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.2),
    "biases": ModelConfig(**SHAPE, num_heads=2, num_kv_heads=2, head_dim=16, init_std=0.2, qkv_bias=True),
    "normed, one kv head": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=1, head_dim=8, init_std=0.2, qk_norm=True),
}


def drawn(model: Transformer, max_batch: int):
    """Nine prompts of 1 to 40 tokens, some of whose answers end early, so that waiting ones join late."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 60, n).tolist() for n in (1, 40, 3, 17, 8, 1, 25, 2, 30)]
    return prompts, generate(model, prompts, max_tokens=20, stop_ids=range(8), max_batch=max_batch, seed=2)


def training_logps(model: Transformer, prompts, completions) -> list[torch.Tensor]:
    """The log-probs of the same tokens by the packed forward, one tensor per sequence."""
    documents = []
    for prompt, c in zip(prompts, completions, strict=True):
        weights = np.append(np.zeros(len(prompt)), np.ones(len(c.tokens))).astype(np.float32)
        documents.append(Document(np.array(prompt + c.tokens, np.int32), weights))
    logp = supervised_logprob(model, pack([[d] for d in documents])).logp
    return list(logp.split([len(c.tokens) for c in completions]))


@pytest.mark.parametrize("max_batch", [2, 9])
@pytest.mark.parametrize("name", MODELS)
def test_the_samplers_logps_are_the_training_forwards(name, max_batch):
    model = Transformer(MODELS[name]).initialize(0)
    prompts, completions = drawn(model, max_batch)
    lengths = [len(c.tokens) for c in completions]
    assert max(lengths) - min(lengths) >= 5
    for c, expected in zip(completions, training_logps(model, prompts, completions), strict=True):
        np.testing.assert_allclose(c.logps, expected.tolist(), rtol=0, atol=1e-5)


def test_in_bf16_they_agree_to_its_rounding():
    model = Transformer(MODELS["grouped heads"], dtype=torch.bfloat16).initialize(0)
    prompts, completions = drawn(model, 4)
    sampled = torch.tensor([logp for c in completions for logp in c.logps])
    trained = torch.cat(training_logps(model, prompts, completions)).float()
    assert (sampled - trained).abs().mean() < 0.02


def test_generating_leaves_the_model_and_its_gradients_alone():
    model = Transformer(MODELS["grouped heads"]).initialize(0)
    before = [p.clone() for p in model.parameters()]
    _, completions = drawn(model, 4)
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.grad is None and p.requires_grad
    batch = pack([[Document(np.array([1, 2, 3], np.int32), np.ones(3, np.float32))]])
    networks = torch.nn.ModuleDict({"policy": model})
    assert PolicyGradient().outputs(networks, batch).logp.requires_grad
