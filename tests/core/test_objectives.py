"""Every objective against its paper's formula, in fp64, on a small model: values, and gradients of every parameter."""

import itertools
import math

import numpy as np
import pytest
import torch

from tritium.core.batch import Document, PackedBatch, pack
from tritium.core.objectives.base import Objective
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.objectives.preference import PairOptions, Preference
from tritium.core.objectives.reward import Listwise, Pairwise, plackett_luce
from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.transformer import Transformer

SHAPE = ModelConfig(40, 16, 24, 2, 2, 1, 8, max_positions=32, init_std=0.3)
pytestmark = pytest.mark.usefixtures("quick")


def model(seed: int = 0) -> Transformer:
    return Transformer(SHAPE, dtype=torch.float64).initialize(seed)


def document(rng, prompt: int, answer: int, **fields) -> Document:
    weights = np.concatenate([np.zeros(prompt), np.ones(answer)]).astype(np.float32)
    return Document(rng.integers(0, 40, prompt + answer).astype(np.int32), weights, fields)


def total(objective: Objective, networks: dict, batch: PackedBatch) -> torch.Tensor:
    """The loss that the trainer would minimise on this batch alone."""
    networks = torch.nn.ModuleDict(networks)
    objective.prepare(networks, [batch])
    terms, _ = objective.loss(objective.outputs(networks, batch), batch)
    return sum(term.sum * term.coefficient / batch.counts[term.denominator] for term in terms.values())


def metrics(objective: Objective, networks: dict, batch: PackedBatch) -> dict[str, float]:
    networks = torch.nn.ModuleDict(networks)
    objective.prepare(networks, [batch])
    _, values = objective.loss(objective.outputs(networks, batch), batch)
    return {k: v.sum.item() / batch.counts[v.denominator] for k, v in values.items()}


def assert_same(network: torch.nn.Module, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def answer_logps(network: Transformer, doc: Document, temperature: float = 1.0) -> torch.Tensor:
    """log π(y_t | x, y_<t) of the answer's tokens, by the full logits of the document alone."""
    ids = torch.from_numpy(doc.ids).long()
    logp = (network.logits(ids) / temperature).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return logp[torch.from_numpy(doc.weights[1:] > 0)]


def test_cross_entropy():
    rng = np.random.default_rng(0)
    documents = [document(rng, 3, 5), document(rng, 1, 1), document(rng, 2, 7)]
    documents[2].weights[4:6] = (0.25, 2.0)
    network, batch = model(), pack([[d] for d in documents])
    loss = total(CrossEntropy(), {"policy": network}, batch)
    weights = [torch.from_numpy(d.weights[d.weights > 0]).double() for d in documents]
    summed = sum((w * -answer_logps(network, d)).sum() for d, w in zip(documents, weights, strict=True))
    assert_same(network, loss, summed / (5 + 1 + 5 + 0.25 + 2.0))


# ---------------------------------------------------------------------------------------------- reward models


def scorer() -> ScalarModel:
    return ScalarModel(model()).initialize(1)


def score(network: ScalarModel, doc: Document) -> torch.Tensor:
    return network.values(torch.from_numpy(doc.ids).long())[-1]


def test_pairwise():
    rng = np.random.default_rng(1)
    pairs = [[document(rng, 3, n), document(rng, 3, m)] for n, m in ((2, 4), (1, 1), (5, 2))]
    network, batch = scorer(), pack(pairs, {"pairs": 3.0})
    expected = 0.0
    for chosen, rejected in pairs:
        a, b = score(network, chosen), score(network, rejected)
        expected = expected - torch.log(1 / (1 + torch.exp(b - a))) / 3 + 0.1 * (a + b) ** 2 / 3
    assert_same(network, total(Pairwise(centering=0.1), {"reward": network}, batch), expected)
    right = [score(network, chosen) > score(network, rejected) for chosen, rejected in pairs]
    assert metrics(Pairwise(), {"reward": network}, batch)["accuracy"] == pytest.approx(sum(right).item() / 3)


def test_listwise_is_plackett_luce_over_rankings_of_any_length():
    rng = np.random.default_rng(2)
    rankings = [[document(rng, 2, 3, rank=float(i)) for i in range(n)] for n in (2, 4, 3)]
    network, batch = scorer(), pack(rankings, {"rankings": 3.0})
    expected = 0.0
    for ranking in rankings:
        strengths = [score(network, d).exp() for d in ranking]
        for k in range(len(strengths)):
            expected = expected - torch.log(strengths[k] / sum(strengths[k:])) / 3
    assert_same(network, total(Listwise(), {"reward": network}, batch), expected)
    best = [score(network, r[0]) == max(score(network, d) for d in r) for r in rankings]
    assert metrics(Listwise(), {"reward": network}, batch)["accuracy"] == pytest.approx(sum(best).item() / 3)


def test_the_probabilities_of_all_orders_add_up_to_one():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.3], dtype=torch.float64)
    orders = [plackett_luce(scores[list(order)]) for order in itertools.permutations(range(4))]
    assert torch.stack(orders).neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_a_ranking_of_two_is_a_pair():
    rng = np.random.default_rng(3)
    pair = [document(rng, 3, 2, rank=0.0), document(rng, 3, 4, rank=1.0)]
    network, batch = scorer(), pack([pair], {"pairs": 1.0, "rankings": 1.0})
    listwise, pairwise = (total(o, {"reward": network}, batch) for o in (Listwise(), Pairwise()))
    assert_same(network, listwise, pairwise)


def test_scores_far_apart_stay_finite():
    assert plackett_luce(torch.tensor([-500.0, 500.0])).item() == pytest.approx(1000.0)


# ---------------------------------------------------------------------------------------------- preferences


def preference_pairs() -> list[list[Document]]:
    rng = np.random.default_rng(4)
    return [[document(rng, 4, n), document(rng, 4, m)] for n, m in ((2, 6), (1, 3), (5, 5))]


@pytest.mark.parametrize("sft", [0.0, 0.3])
def test_dpo(sft):
    pairs = preference_pairs()
    policy, reference = model(0), model(9).requires_grad_(False)
    batch = pack(pairs, {"pairs": 3.0})
    expected = 0.0
    for chosen, rejected in pairs:
        ratio = lambda d: (answer_logps(policy, d) - answer_logps(reference, d)).sum()  # noqa: E731
        expected = expected - torch.log(torch.sigmoid(0.2 * ratio(chosen) - 0.2 * ratio(rejected))) / 3
        expected = expected - sft * answer_logps(policy, chosen).mean() / 3
    networks = {"policy": policy, "reference": reference}
    assert_same(policy, total(Preference(options=PairOptions(beta=0.2), sft=sft), networks, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dpo_starts_at_ln_2(dtype):
    policy, reference = (Transformer(SHAPE, dtype=dtype).initialize(0) for _ in range(2))
    batch = pack(preference_pairs(), {"pairs": 3.0})
    networks = {"policy": policy, "reference": reference.requires_grad_(False)}
    assert total(Preference(), networks, batch).item() == pytest.approx(math.log(2), abs=1e-7)
    values = metrics(Preference(), networks, batch)
    assert values["margin"] == values["chosen_reward"] == values["accuracy"] == 0.0
