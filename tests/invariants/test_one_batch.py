"""How a batch is cut up does not show: packed = unpacked, 8 × 1 = 1 × 8, with fillers or without.

In fp64, where only the order of sums differs, so that 1e-9 is far above rounding and far below any mistake.
"""

import numpy as np
import pytest
import torch
from torch import nn

from tritium.core.batch import Document, pack
from tritium.core.objectives.base import supervised_logprob
from tritium.core.objectives.likelihood import CrossEntropy, Unlikelihood
from tritium.core.objectives.policy import PPO, PolicyGradient
from tritium.core.objectives.preference import KTO, PairOptions, Preference
from tritium.core.objectives.reward import Listwise, Pairwise, RewardObjective
from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh

pytestmark = pytest.mark.usefixtures("quick")
SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "max_positions": 30}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "init_std": 0.3}
MODELS = {
    "tied head, biases": ModelConfig(**SHAPE, **HEADS, tie_embeddings=True, qkv_bias=True),
    "own head, normed heads": ModelConfig(**SHAPE, **HEADS, qk_norm=True),
}
# Objective → (the documents of a group, the name of the groups' count).
OBJECTIVES = {
    "cross-entropy": (CrossEntropy(), 1, "groups"),
    "pairwise": (Pairwise(centering=0.1), 2, "pairs"),
    "listwise": (Listwise(), 3, "rankings"),
    "unlikelihood": (Unlikelihood(), 2, "groups"),
    "all pairs": (Listwise(pairs=True), 3, "rankings"),
    "kto": (KTO(0.5), 2, "groups"),
    "orpo": (Preference("orpo", PairOptions(beta=0.3)), 2, "pairs"),
    "dpo": (Preference(options=PairOptions(beta=0.3), sft=0.5), 2, "pairs"),
    "grpo by token": (PolicyGradient(beta=0.1, normalization="token"), 4, "groups"),
    "grpo by sequence": (PolicyGradient(beta=0.1), 4, "groups"),
    "gspo": (PolicyGradient(ratio="sequence"), 4, "groups"),
    "ppo": (PPO(beta=0.1), 4, "groups"),
}


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    return Transformer(config, dtype=torch.float64).initialize(seed)


def groups(size: int, count: int = 8, seed: int = 0) -> list[list[Document]]:
    """Documents of 2 to 30 tokens, with prompts at weight 0 and with all the fields that an objective may read."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        group = []
        for rank in range(size):
            n = int(rng.integers(2, 31))
            weights = (np.arange(n) >= rng.integers(1, n)).astype(np.float32)
            fields = {
                "rank": float(rank),
                "number": float(rank),
                "good": float(rank),
                "index": float(n + 100 * len(made)),
                "sampler_logp": np.zeros(n, np.float32),
            }
            fields["scored"] = (np.arange(n) == n - 1).astype(np.float32)
            fields["rewards"] = fields["scored"] * np.float32(rng.normal())
            group.append(Document(rng.integers(0, 40, n).astype(np.int32), weights, fields))
        made.append(group)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_of_packed_documents_are_those_of_each_alone(name):
    model, documents = build(MODELS[name]), [group[0] for group in groups(1, 9)]
    batch = pack([[d] for d in documents])
    packed = supervised_logprob(model, batch)
    alone = [supervised_logprob(model, pack([[d]])) for d in documents]
    for field in ("logp", "lse", "entropy"):
        expected = torch.cat([getattr(result, field) for result in alone])
        torch.testing.assert_close(getattr(packed, field), expected, rtol=0, atol=1e-9)
    parameters = list(model.parameters())
    together = torch.autograd.grad(packed.logp.sum(), parameters)
    apart = torch.autograd.grad(sum(result.logp.sum() for result in alone), parameters)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def gradients(objective, networks: nn.ModuleDict, batches, parameters) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a step, as the trainer defines them: sums over global counts."""
    if isinstance(objective, PolicyGradient):
        objective.estimate(networks, batches, Mesh.single())
    objective.prepare(networks, batches)
    counts = {key: sum(batch.counts[key] for batch in batches) for key in batches[0].counts}
    loss, total = 0.0, [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        terms, _ = objective.loss(objective.outputs(networks, batch), batch)
        part = sum(term.sum * term.coefficient / counts[term.denominator] for term in terms.values())
        for sum_, gradient in zip(total, torch.autograd.grad(part, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                sum_ += gradient
        loss += part.item()
    return loss, total


@pytest.mark.parametrize("name", OBJECTIVES)
def test_eight_bins_of_one_group_are_one_bin_of_eight(name):
    objective, size, counted = OBJECTIVES[name]
    model = build(MODELS["tied head, biases"])
    of_scores = isinstance(objective, RewardObjective)
    trained = ScalarModel(model).initialize(2) if of_scores else model
    reference = build(MODELS["tied head, biases"], seed=5).requires_grad_(False)
    critic = ScalarModel(build(MODELS["own head, normed heads"], seed=3)).initialize(4)
    networks = nn.ModuleDict({"policy": model, "reward": trained, "reference": reference, "critic": critic})
    parameters = [*trained.parameters(), *(critic.parameters() if name == "ppo" else ())]
    made = groups(size)
    cuts = {
        "1 × 8": [pack(made, {counted: 8.0})],
        "8 × 1": [pack([group], {counted: 1.0}) for group in made],
        "2 bins with fillers, and an empty one": [
            pack(made[:3], {counted: 3.0}, multiple_of=64),
            pack([], {counted: 0.0}),
            pack(made[3:], {counted: 5.0}, multiple_of=100),
        ],
    }
    loss, expected = gradients(objective, networks, cuts.pop("1 × 8"), parameters)
    assert all(g.abs().amax() > 1e-4 for g in expected)
    for cut, batches in cuts.items():
        batches = [batch for batch in batches if len(batch.tokens)]
        found, actual = gradients(objective, networks, batches, parameters)
        assert found == pytest.approx(loss, abs=1e-9), cut
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
