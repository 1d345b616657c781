"""Distillation: every divergence from full logits in fp64, cached teachers, the two levels, and any cut of a batch."""

import numpy as np
import pytest
import torch

from tritium.core.batch import Document, pack
from tritium.core.objectives.distill import Distill, DualLevel
from tritium.core.objectives.preference import PairOptions, Preference
from tritium.core.online import pair_of
from tritium.core.problems import Problem
from tritium.core.rewards import Score
from tritium.core.rollout import Sample
from tritium.model.config import ModelConfig
from tritium.model.generate import Completion
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import init_mesh

SHAPE = ModelConfig(40, 16, 24, 2, 2, 2, 8, max_positions=32, init_std=0.3)
WIDE = ModelConfig(40, 24, 32, 1, 2, 2, 8, max_positions=32, init_std=0.3)
pytestmark = pytest.mark.usefixtures("quick")


def networks_on(mesh=None) -> dict[str, Transformer]:
    made = {"policy": (SHAPE, 0), "reference": (SHAPE, 9), "teacher": (WIDE, 5)}
    return {k: Transformer(c, mesh, dtype=torch.float64).initialize(s) for k, (c, s) in made.items()}


def pairs_of() -> list[list[Document]]:
    rng = np.random.default_rng(4)

    def document(n: int) -> Document:
        weights = np.concatenate([np.zeros(4), np.ones(n)]).astype(np.float32)
        return Document(rng.integers(0, 40, 4 + n).astype(np.int32), weights)

    return [[document(n), document(m)] for n, m in ((2, 6), (1, 3), (5, 5), (7, 1))]


def packed(pairs, multiple_of: int = 1):
    tokens = [float(sum((pair[i].weights > 0).sum() for pair in pairs)) for i in (0, 1)]
    counts = {"pairs": float(len(pairs)), "positive_tokens": tokens[0], "negative_tokens": tokens[1]}
    return pack(pairs, counts, multiple_of)


def divergences(student: Transformer, teacher: Transformer, doc: Document, kind: str, temperature: float = 1.0):
    """Of each supervised token of a document, by the definition."""
    ids, on = torch.from_numpy(doc.ids).long(), torch.from_numpy(doc.weights[1:] > 0)
    q, p = ((m.logits(ids)[:-1][on] / temperature).softmax(-1) for m in (student, teacher))
    p, kl = p.detach(), lambda a, b: (a * torch.log(a / b)).sum(-1)
    if kind == "jsd":
        return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2
    return kl(p, q) if kind == "forward" else kl(q, p)


def total(objective, networks: dict, *batches) -> torch.Tensor:
    networks = torch.nn.ModuleDict(networks)
    objective.prepare(networks, batches)
    counts = {key: sum(b.counts[key] for b in batches) for key in batches[0].counts}
    loss = 0.0
    for batch in batches:
        terms, _ = objective.loss(objective.outputs(networks, batch), batch)
        loss = loss + sum(t.sum * t.coefficient / counts[t.denominator] for t in terms.values())
    return loss


def assert_same(network, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=tolerance)
    parameters = list(network.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_divergence_by_its_definition(kind):
    networks, documents = networks_on(), [d for pair in pairs_of() for d in pair]
    student, teacher = networks["policy"], networks["teacher"]
    kl = torch.cat([divergences(student, teacher, d, kind, 1.5) for d in documents])
    assert_same(student, total(Distill(kind, 1.5), networks, pack([[d] for d in documents])), kl.mean())


def test_the_answers_cross_entropy_is_added():
    networks, documents, nll = networks_on(), [d for pair in pairs_of() for d in pair], []
    student, batch = networks["policy"], pack([[d] for d in documents])
    for d in documents:
        ids, on = torch.from_numpy(d.ids).long(), torch.from_numpy(d.weights[1:] > 0)
        nll.append(-student.logits(ids)[:-1][on].softmax(-1).gather(-1, ids[1:][on, None]).log()[:, 0])
    expected = total(Distill(), networks, batch) + 0.5 * torch.cat(nll).mean()
    assert_same(student, total(Distill(sft=0.5), networks, batch), expected)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0), ("reverse", 1), ("jsd", 0.5)])
def test_the_divergence_is_that_of_trls_gkd(kind, beta):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    networks, documents = networks_on(), [d for pair in pairs_of() for d in pair]
    student, logits = networks["policy"], {"policy": [], "teacher": []}
    for d in documents:
        ids, on = torch.from_numpy(d.ids).long(), torch.from_numpy(d.weights[1:] > 0)
        for name, found in logits.items():
            found.append(networks[name].logits(ids)[:-1][on])
    given = [torch.cat(logits[name])[None] for name in ("policy", "teacher")]
    labels = torch.zeros(given[0].shape[:2], dtype=torch.long)
    theirs = GKDTrainer.generalized_jsd_loss(given[0], given[1].detach(), labels, beta=beta, temperature=1.5)
    assert_same(student, total(Distill(kind, 1.5), networks, pack([[d] for d in documents])), theirs)


def test_a_kept_teacher_is_asked_once_and_its_rest_is_one_bucket():
    networks, documents = networks_on(), [d for pair in pairs_of() for d in pair]
    student, teacher = networks["policy"], networks["teacher"]
    objective, expected = Distill(top_k=3), 0.0
    for d in documents:
        ids, on = torch.from_numpy(d.ids).long(), torch.from_numpy(d.weights[1:] > 0)
        q, p = (m.logits(ids)[:-1][on].softmax(-1) for m in (student, teacher))
        best = p.topk(3)
        p = torch.cat([best.values, 1 - best.values.sum(-1, True)], -1).detach()
        q = q.gather(-1, best.indices)
        q = torch.cat([q, 1 - q.sum(-1, True)], -1)
        expected = expected + (p * torch.log(p / q)).sum()
    first = pack([[d] for d in documents])
    expected = expected / first.counts["tokens"]
    assert_same(student, total(objective, networks, first), expected, 1e-6)  # it is kept in fp32
    teacher.initialize(77)
    again = [pack([[d] for d in documents[5:]], multiple_of=16), pack([[d] for d in documents[:5]])]
    assert total(objective, networks, *again).item() == pytest.approx(expected.item(), abs=1e-6)


def dual(networks: dict, pairs) -> torch.Tensor:
    """The issue's joint loss: each level by its definition, each with its own denominator."""
    pairs_loss = total(Preference(options=PairOptions(0.3)), networks, packed(pairs))
    student, teacher = networks["policy"], networks["teacher"]
    positive, negative = (torch.cat([divergences(student, teacher, p[i], "forward") for p in pairs]) for i in (0, 1))
    return 0.5 * pairs_loss + 2.0 * positive.mean() + 0.25 * negative.mean()


def test_two_levels_each_with_its_own_denominator_however_the_batch_is_cut():
    networks, pairs = networks_on(), pairs_of()
    student, weights = networks["policy"], (0.5, 2.0, 0.25)
    objective = lambda: DualLevel(options=PairOptions(0.3), weights=weights)  # noqa: E731
    assert_same(student, total(objective(), networks, packed(pairs)), dual(networks, pairs))
    cut = [packed([pair]) for pair in pairs]
    assert_same(student, total(objective(), networks, *cut), dual(networks, pairs))
    filled = [packed(pairs[:3], 64), packed(pairs[3:], 50)]
    assert_same(student, total(objective(), networks, *filled), dual(networks, pairs))


def on_ranks(tp: int, cp: int) -> list[float]:
    networks = networks_on(init_mesh(tp=tp, cp=cp, device="cpu"))
    batch = packed(pairs_of(), 16)
    return [total(o, networks, batch).item() for o in (Distill("jsd"), DualLevel(options=PairOptions(0.3)))]


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2)])
def test_ranks_that_share_a_model_or_its_tokens_agree_with_one(pool2, tp, cp):
    networks, batch = networks_on(), packed(pairs_of(), 16)
    alone = [total(o, networks, batch).item() for o in (Distill("jsd"), DualLevel(options=PairOptions(0.3)))]
    for found in pool2.run(on_ranks, tp, cp):
        assert found == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize(
    ("positive_from", "margin", "expected"),
    [("student", 0, (2, 1)), ("teacher", 0, (3, 1)), ("best", 0, (2, 1)), ("best", 1.5, None), ("teacher", 0.5, None)],
)
def test_pairs_are_filtered_by_who_is_better_and_by_how_much(positive_from, margin, expected):
    values = [0.5, 0.0, 1.0, 0.5, None]
    samples = [
        Sample(Problem(0, [], [1], ""), Completion([i], [0.0], "stop"), "", None if v is None else Score(v))
        for i, v in enumerate(values)
    ]
    pair = pair_of(samples[:3], samples[3:], positive_from, margin)
    assert (pair and tuple(s.completion.tokens[0] for s in pair)) == expected
    assert pair_of(samples[4:], samples[:2], "best", 0) is None  # no judge judged the student's
