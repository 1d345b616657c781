"""Preference losses: the formula of each paper in fp64, TRL's own code on the same model and batch, and KTO's z₀."""

import math
import resource
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tritium.core.batch import Document, pack
from tritium.core.config import UserError
from tritium.core.kept import Kept
from tritium.core.objectives.preference import KTO, LOSSES, REFERENCE_FREE, PairOptions, Pairs, Preference, mismatched
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.data import all_reduce_counts
from tritium.parallel.mesh import init_mesh

SHAPE = ModelConfig(40, 16, 24, 2, 2, 2, 8, max_positions=32, init_std=0.3)
OPTIONS = PairOptions(beta=0.3, label_smoothing=0.1, margin=0.7, penalty=2.0)
pytestmark = pytest.mark.usefixtures("quick")


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean_logp: float) -> float:
    return math.exp(mean_logp) / (1 - math.exp(mean_logp))


# name → the paper's loss of one pair, written with probabilities as there: π, ref (log-probs) and lengths of c and r.
B, E, M, L = OPTIONS.beta, OPTIONS.label_smoothing, OPTIONS.margin, OPTIONS.penalty
FORMULAS = {
    "dpo": lambda c, r, fc, fr, n, m: (
        -(1 - E) * math.log(sigma(B * (c - fc) - B * (r - fr))) - E * math.log(sigma(B * (r - fr) - B * (c - fc)))
    ),
    "dpo_norm": lambda c, r, fc, fr, n, m: (
        -(1 - E) * math.log(sigma(B / n * (c - fc) - B / m * (r - fr)))
        - E * math.log(sigma(B / m * (r - fr) - B / n * (c - fc)))
    ),
    "robust": lambda c, r, fc, fr, n, m: (
        (
            (1 - E) * -math.log(sigma(B * (c - fc - r + fr)))  # L(x, y_w, y_l)
            - E * -math.log(sigma(B * (r - fr - c + fc)))  # L(x, y_l, y_w)
        )
        / (1 - 2 * E)
    ),
    "ipo": lambda c, r, fc, fr, n, m: (
        (math.log(math.exp(c) * math.exp(fr) / math.exp(r) / math.exp(fc)) - 0.5 / B) ** 2
    ),
    "ipo_mean": lambda c, r, fc, fr, n, m: ((c - fc) / n - (r - fr) / m - 0.5 / B) ** 2,
    "dpop": lambda c, r, fc, fr, n, m: (
        -math.log(sigma(B * ((c - fc) - (r - fr) - L * max(0, math.log(math.exp(fc) / math.exp(c))))))
    ),
    "hinge": lambda c, r, fc, fr, n, m: max(0, 1 - B * (c - fc) + B * (r - fr)),
    "apo_zero": lambda c, r, fc, fr, n, m: -sigma(B * (c - fc)) + sigma(B * (r - fr)) + 1,
    "apo_down": lambda c, r, fc, fr, n, m: sigma(B * (c - fc)) - sigma(B * ((c - fc) - (r - fr))) + 1,
    "orpo": lambda c, r, fc, fr, n, m: -B * math.log(sigma(math.log(odds(c / n) / odds(r / m)))),
    "simpo": lambda c, r, fc, fr, n, m: (
        -(1 - E) * math.log(sigma(B / n * c - B / m * r - M)) - E * math.log(sigma(-B / n * c + B / m * r + M))
    ),
    "cpo": lambda c, r, fc, fr, n, m: -(1 - E) * math.log(sigma(B * c - B * r)) - E * math.log(sigma(B * r - B * c)),
    "slic": lambda c, r, fc, fr, n, m: max(0, M - c + r),
    "rrhf": lambda c, r, fc, fr, n, m: max(0, r / m - c / n),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_pairs_is_its_papers_formula(name):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (20, 2)).astype(float)
    policy, reference = (-rng.random((20, 2)) * 2 * lengths - 0.01 for _ in range(2))
    expected = [
        FORMULAS[name](*p, *q, *n)
        for p, q, n in zip(policy.tolist(), reference.tolist(), lengths.tolist(), strict=True)
    ]
    found = LOSSES[name](Pairs(*(torch.from_numpy(x) for x in (policy, reference, lengths))), OPTIONS)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert set(FORMULAS) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_of_pairs_overflows(name):
    policy = torch.tensor([[-1e4, -1e-9], [-1e-9, -1e4], [-3e3, -3e3]], dtype=torch.float32, requires_grad=True)
    pairs = Pairs(policy, torch.full((3, 2), -50.0), torch.full((3, 2), 10.0))
    loss = LOSSES[name](pairs, OPTIONS).sum()
    loss.backward()
    assert math.isfinite(loss.item()) and policy.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- on a model, with TRL


def model(seed: int) -> Transformer:
    return Transformer(SHAPE, dtype=torch.float64).initialize(seed)


def document(rng, prompt: int, answer: int, **fields) -> Document:
    weights = np.concatenate([np.zeros(prompt), np.ones(answer)]).astype(np.float32)
    return Document(rng.integers(0, 40, prompt + answer).astype(np.int32), weights, fields)


def pairs_of(seed: int = 4) -> list[list[Document]]:
    rng = np.random.default_rng(seed)
    return [[document(rng, 4, n), document(rng, 4, m)] for n, m in ((2, 6), (1, 3), (5, 5))]


def padded(documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, completion mask) [n, L], padded on the right, as TRL's collators make them."""
    size = max(map(len, documents))
    ids, mask = (torch.zeros(len(documents), size, dtype=torch.long) for _ in range(2))
    for i, d in enumerate(documents):
        ids[i, : len(d)], mask[i, : len(d)] = torch.from_numpy(d.ids), torch.from_numpy(d.weights > 0)
    return ids, mask


class Padded:
    """Our model under the interface that TRL's fused head gives its own."""

    training = True

    def __init__(self, network: Transformer):
        self.network = network

    def __call__(self, input_ids, labels, **_):
        logits = torch.stack([self.network.logits(row) for row in input_ids])  # causal: what is padded shows nowhere
        targets = labels[:, 1:]
        logp = logits.log_softmax(-1)[:, :-1].gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        logp, zero = logp.masked_fill(targets == -100, 0.0), torch.zeros(targets.shape, dtype=torch.float64)
        return SimpleNamespace(log_probs=logp, entropy=zero, mean_logits=zero, is_top1=zero > 0)


def same(x):
    return x


def trainer(**settings) -> SimpleNamespace:
    """What TRL's loss code reads of its trainer."""
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same)
    common = {"aux_loss_enabled": False, "precompute_ref_logps": False, "_total_train_tokens": 0, "_tp_size": 1}
    common |= {"accelerator": accelerator, "_metrics": defaultdict(lambda: defaultdict(list))}
    args = SimpleNamespace(gradient_checkpointing_kwargs=None, center_rewards_coefficient=None)
    unused = {"args": args, "model": torch.nn.Module()}
    return SimpleNamespace(**common | unused | settings)


def trl_dpo(policy, reference, pairs, loss_type: str) -> torch.Tensor:
    from trl import DPOTrainer

    ids, mask = padded([p[0] for p in pairs] + [p[1] for p in pairs])
    state = trainer(ref_model=Padded(reference), loss_types=[loss_type], loss_weights=[1.0], beta=OPTIONS.beta)
    vars(state).update(label_smoothing=E, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    return DPOTrainer._compute_loss(state, Padded(policy), inputs, False)


def assert_same(network, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=tolerance)
    parameters = list(network.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def total(objective, networks: dict, *batches) -> torch.Tensor:
    """The loss that the trainer would minimise on these micro-batches."""
    networks = torch.nn.ModuleDict(networks)
    objective.prepare(networks, batches)
    counts = {key: sum(b.counts[key] for b in batches) for key in batches[0].counts}
    loss = 0.0
    for batch in batches:
        terms, _ = objective.loss(objective.outputs(networks, batch), batch)
        loss = loss + sum(t.sum * t.coefficient / counts[t.denominator] for t in terms.values())
    return loss


TRL = {
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "robust": "robust",
    "ipo_mean": "ipo",
    "hinge": "hinge",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}


@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradients_are_trls(name, monkeypatch):
    # TRL's dpo has no smoothing: that of its "sigmoid" is 0
    options = PairOptions(OPTIONS.beta, E if name == "robust" else 0.0)
    policy, reference = model(0), model(9).requires_grad_(False)
    ours = total(
        Preference(name, options), {"policy": policy, "reference": reference}, pack(pairs_of(), {"pairs": 3.0})
    )
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.disable_gradient_checkpointing", lambda *a: torch.autograd.set_grad_enabled(False)
    )
    monkeypatch.setattr("trl.trainer.dpo_trainer.is_peft_model", lambda m: False)
    assert_same(policy, ours, trl_dpo(policy, reference, pairs_of(), TRL[name]))


def trl_logps(policy: Transformer, pairs, mean: bool) -> list[torch.Tensor]:
    """[pairs] of the chosen and of the rejected answers, by TRL's own `get_batch_logps`."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    found = []
    for i in (0, 1):
        ids, mask = padded([p[i] for p in pairs])
        logits = torch.stack([policy.logits(row) for row in ids])
        found.append(CPOTrainer.get_batch_logps(logits, ids.masked_fill(mask == 0, -100), average_log_prob=mean))
    return found


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_reference_free_losses_and_their_gradients_are_trls(name):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy, pairs = model(0), pairs_of()
    chosen, rejected = trl_logps(policy, pairs, mean=name != "cpo")
    state = trainer(beta=B, label_smoothing=E, alpha=0.0, simpo_gamma=M)
    state.loss_type = "simpo" if name == "simpo" else "sigmoid"
    if name == "orpo":
        losses, *_ = ORPOTrainer.odds_ratio_loss(state, chosen, rejected)
        theirs = -(losses + chosen).mean().double()  # policy_nll_loss − losses, where the answers alone are labels
    else:
        theirs = CPOTrainer.cpo_loss(state, chosen, rejected)[0].mean()
    ours = total(
        Preference(name, OPTIONS, sft=None if name == "orpo" else 0.0), {"policy": policy}, pack(pairs, {"pairs": 3.0})
    )
    assert_same(policy, ours, theirs, 1e-5)


@pytest.mark.parametrize(("name", "summed"), [("orpo", False), ("cpo", True), ("rrhf", True)])
def test_the_likelihood_of_the_chosen_answer_is_added_as_its_paper_does(name, summed):
    policy, batch = model(0), pack(pairs_of(), {"pairs": 3.0})
    without = total(Preference(name, OPTIONS, sft=0.0), {"policy": policy}, batch)
    logps = []
    for chosen, _ in pairs_of():
        ids = torch.from_numpy(chosen.ids).long()
        logp = (
            policy.logits(ids)
            .log_softmax(-1)[:-1]
            .gather(-1, ids[1:, None])[:, 0][torch.from_numpy(chosen.weights[1:] > 0)]
        )
        logps.append(logp.sum() if summed else logp.mean())
    expected = without - sum(logps) / 3
    assert name in REFERENCE_FREE  # no reference network, and none is asked for
    assert_same(policy, total(Preference(name, OPTIONS), {"policy": policy}, batch), expected)


def test_the_reference_is_asked_once_for_an_answer_however_it_is_packed(tmp_path):
    policy, reference = model(0), model(9).requires_grad_(False)
    networks, pairs, file = {"policy": policy, "reference": reference}, pairs_of(), str(tmp_path / "kept.sqlite")
    objective = Preference(kept=Kept(file))
    first = total(objective, networks, pack(pairs, {"pairs": 3.0})).item()
    reference.initialize(5)  # it would show if it were asked again
    again = [pack(pairs[::-1][:1], {"pairs": 1.0}), pack(pairs[:2], {"pairs": 2.0}, multiple_of=32)]
    assert total(objective, networks, *again).item() == pytest.approx(first, abs=1e-12)
    resumed = Preference(kept=Kept(file))  # another process: what was asked is on the disk
    assert total(resumed, networks, pack(pairs, {"pairs": 3.0})).item() == pytest.approx(first, abs=1e-12)
    assert total(Preference(), networks, pack(pairs, {"pairs": 3.0})).item() != pytest.approx(first, abs=1e-6)
    for place, torn in ((4096, b"?" * 4096), (0, b"not a database at all")):  # a page; the file's head
        with open(file, "r+b") as damaged:
            damaged.seek(place)
            damaged.write(torn)
        assert total(Preference(kept=Kept(file)), networks, pack(pairs, {"pairs": 3.0})).item() != first


def test_what_a_model_said_and_the_disk_has_no_room_for_is_a_sentence(tmp_path):
    kept, before = Kept(str(tmp_path / "kept.sqlite")), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert kept.get([b"a"], np.float64) == [None]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        with pytest.raises(UserError, match="kept.sqlite can't be written: .*; free some space"):
            kept.put([b"a"], [np.zeros(1 << 15)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept.put([b"a"], [np.ones(1)])
    assert kept.get([b"a"], np.float64) == [1.0]


def test_an_answer_that_is_certain_has_a_gradient():
    policy = torch.tensor([[0.0, -2.0], [-1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    pairs = Pairs(policy, torch.zeros(3, 2), torch.full((3, 2), 4.0))
    LOSSES["orpo"](pairs, OPTIONS).sum().backward()
    assert policy.grad.isfinite().all() and (policy.grad[:2].diff() > 0).all()  # towards the chosen one


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_are_shown_in_the_unit_of_the_loss(name):
    """A loss of means per token shows means: its accuracy is then of what it compares."""
    policy, reference = model(0), model(9).requires_grad_(False)
    batch, networks = pack(pairs_of(), {"pairs": 3.0}), torch.nn.ModuleDict({"policy": policy, "reference": reference})
    objective = Preference(name, OPTIONS)
    objective.prepare(networks, [batch])
    outputs = objective.outputs(networks, batch)
    shown = objective.loss(outputs, batch)[1]["margin"].sum.item()
    against = torch.zeros(6, dtype=torch.float64) if name in REFERENCE_FREE else batch.fields["reference"]
    lengths = torch.tensor([2, 6, 1, 3, 5, 5], dtype=torch.float64)
    answers = [part.sum() for part in outputs.logp.split(lengths.long().tolist())]
    rewards = B * (torch.stack(answers) - against)
    rewards = rewards / lengths if name in ("dpo_norm", "ipo_mean", "orpo", "simpo", "rrhf") else rewards
    assert shown == pytest.approx((rewards[::2] - rewards[1::2]).sum().item(), abs=1e-9)


# ---------------------------------------------------------------------------------------------- KTO


def feedback() -> list[Document]:
    rng = np.random.default_rng(5)
    shapes = ((4, 2, 1), (3, 6, 0), (2, 3, 1), (5, 1, 0), (3, 4, 0))
    return [document(rng, p, n, good=float(g), index=float(i)) for i, (p, n, g) in enumerate(shapes)]


def closer(network: Transformer, other: Transformer, share: float) -> Transformer:
    """The network, moved a share of the way from the other: near it, as a policy is near its reference."""
    with torch.no_grad():
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            p.copy_(q + share * (p - q))
    return network


def test_kto_is_trls():
    from trl import KTOTrainer

    reference, documents, used = model(9).requires_grad_(False), feedback(), []
    for seed in (0, 3):
        policy = closer(model(seed), reference, 0.5)
        objective = KTO(0.3, desirable=1.5, undesirable=0.5)
        batch = pack([[d] for d in documents])
        ours = total(objective, {"policy": policy, "reference": reference}, batch)
        ids, mask = padded(documents)
        shuffled = []
        for d, other in zip(documents, [documents[-1], *documents[:-1]], strict=True):
            prompt, answer = d.ids[d.weights == 0], other.ids[other.weights > 0]
            on = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer))])
            shuffled.append(Document(np.concatenate([prompt, answer]), on.astype(np.float32)))
        kl_ids, kl_mask = padded(shuffled)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        inputs |= {"KL_input_ids": kl_ids, "KL_attention_mask": torch.ones_like(kl_ids), "KL_completion_mask": kl_mask}
        inputs["label"] = torch.tensor([d.fields["good"] > 0 for d in documents])
        state = trainer(ref_model=None, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
        vars(state).update(loss_type="kto", calculate_KL=True, precompute_ref_logps=True)
        state._compute_kl_logps = lambda m, b, s=state: KTOTrainer._compute_kl_logps(s, m, b)
        state.accelerator.autocast = torch.no_grad
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trl.trainer.kto_trainer.disable_gradient_checkpointing", lambda *a: torch.no_grad())
            patch.setattr("trl.trainer.kto_trainer.is_peft_model", lambda m: False)
            inputs["ref_logps"], inputs["ref_KL_logps"] = KTOTrainer.compute_ref_log_probs(
                state, Padded(reference), inputs
            )
        theirs = KTOTrainer._compute_loss(state, Padded(policy), inputs, False)
        assert_same(policy, ours, theirs)
        used.append(batch.fields["z0"].item())
    assert max(used) > 0  # else the clamp was all that was tested


def test_z0_does_not_depend_on_the_bins():
    reference = model(9).requires_grad_(False)
    policy, documents = closer(model(3), reference, 0.5), feedback()
    networks = {"policy": policy, "reference": reference}
    whole = total(KTO(0.3), networks, pack([[d] for d in documents]))
    cut = [pack([[documents[i]] for i in part], multiple_of=32) for part in ((3,), (0, 4), (2, 1))]
    assert_same(policy, total(KTO(0.3), networks, *cut), whole)


def kto_on_ranks(tp: int) -> float:
    """The step's KTO loss on this rank's share of the documents, as the trainer adds it up over dp."""
    mesh = init_mesh(tp=tp, device="cpu")
    reference, policy = (Transformer(SHAPE, mesh, torch.float64).initialize(seed) for seed in (9, 3))
    networks = torch.nn.ModuleDict({"policy": closer(policy, reference, 0.5), "reference": reference})
    batch, objective = pack([[d] for d in feedback()[mesh.dp_rank :: mesh.dp]]), KTO(0.3)
    objective.prepare(networks, [batch])
    terms, _ = objective.loss(objective.outputs(networks, batch), batch)
    return all_reduce_counts({"loss": terms["loss"].sum.item()}, mesh)["loss"] / len(feedback())


@pytest.mark.parametrize("tp", [1, 2])
def test_kto_does_not_depend_on_the_ranks(pool2, tp):
    reference = model(9).requires_grad_(False)
    networks = {"policy": closer(model(3), reference, 0.5), "reference": reference}
    alone = total(KTO(0.3), networks, pack([[d] for d in feedback()])).item()
    assert pool2.run(kto_on_ranks, tp) == pytest.approx([alone, alone], abs=1e-9)


def test_z0_of_pairs_is_of_answers_to_other_prompts():
    rng, documents = np.random.default_rng(6), []
    for i, (prompt, *answers) in enumerate(((4, 2, 3), (3, 6, 1))):  # both answers of a pair have the same prompt
        ids = rng.integers(0, 40, prompt).astype(np.int32)
        for j, n in enumerate(answers):
            made = document(rng, prompt, n, good=1.0 - j, index=2.0 * i + j)
            made.ids[:prompt] = ids
            documents.append(made)
    batch = pack([documents[:2], documents[2:]])
    (made,) = mismatched([batch], model(0))
    answers = [d.ids[d.weights > 0].tolist() for d in documents]
    found = [made.targets[made.supervised].tolist()[a:b] for a, b in ((0, 1), (1, 2), (2, 5), (5, 8))]
    assert found == [answers[3], answers[3], answers[1], answers[1]]
