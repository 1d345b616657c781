"""Policy gradients against their papers' formulas, in fp64, and against TRL's own loss on the same model and batch."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from tritium.core.batch import Document, PackedBatch, pack
from tritium.core.objectives.policy import ALGORITHMS, PPO, PolicyGradient, adapted, algorithm, kl_estimate
from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh

SHAPE = ModelConfig(40, 16, 24, 2, 2, 1, 8, max_positions=32, init_std=0.3)
ANSWERS = (((2, 1.0), (7, -0.5), (4, 0.0)), ((1, 0.25), (6, 1.5), (3, 1.0)))  # groups of (length, score)
pytestmark = pytest.mark.usefixtures("quick")


def model(seed: int = 0, away: float = 0.0) -> Transformer:
    """With `away`, a little off: so that some ratios are clipped."""
    made = Transformer(SHAPE, dtype=torch.float64).initialize(seed)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p += away * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
    return made


def document(rng, answer: int, score: float, number: int, prompt: int = 3, poison: float = 0.0, **fields) -> Document:
    """An answer with its score at the last token. `poison` is in every slot that belongs to no answer's token."""
    weights = np.append(np.zeros(prompt), np.ones(answer)).astype(np.float32)
    arrays = {"rewards": np.zeros(answer), "scored": np.zeros(answer), "sampler_logp": rng.normal(-3, 0.3, answer)}
    arrays["rewards"][-1], arrays["scored"][-1] = score, 1.0
    spread = {k: np.append(np.full(prompt, poison), v).astype(np.float32) for k, v in arrays.items()}
    ids = rng.integers(0, 40, prompt + answer).astype(np.int32)
    return Document(ids, weights, {"number": float(number), "greedy": 0.5, **spread, **fields})


def rollout(poison: float = 0.0) -> tuple[list[list[Document]], PackedBatch]:
    rng = np.random.default_rng(5)
    groups = [[document(rng, n, r, i, poison=poison) for i, (n, r) in enumerate(answers)] for answers in ANSWERS]
    return groups, pack(groups)


def answer_logps(network: Transformer, doc: Document, temperature: float = 1.0) -> torch.Tensor:
    """log π(y_t | x, y_<t) of the answer's tokens, by the full logits of the document alone."""
    ids = torch.from_numpy(doc.ids).long()
    logp = (network.logits(ids) / temperature).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return logp[torch.from_numpy(doc.weights[1:] > 0)]


def networks(policy, reference=None, critic=None) -> torch.nn.ModuleDict:
    found = {"policy": policy, "reference": reference, "critic": critic}
    return torch.nn.ModuleDict({k: v for k, v in found.items() if v is not None})


def total(objective: PolicyGradient, nets, batch: PackedBatch) -> torch.Tensor:
    """The loss that the trainer would minimise on this batch alone."""
    terms, _ = objective.loss(objective.outputs(nets, batch), batch)
    return sum(term.sum * term.coefficient / batch.counts[term.denominator] for term in terms.values())


def assert_same(network: torch.nn.Module, ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-10) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=atol)
    parameters = list(network.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------- the papers' formulas


class Old:
    """What a formula knows of an answer: its score and the log-probs of π_old and π_ref."""

    def __init__(self, doc: Document, old: Transformer, reference: Transformer, temperature: float):
        self.doc, self.score = doc, float(np.nansum(doc.fields["rewards"]))
        with torch.no_grad():
            self.old, self.ref = (answer_logps(m, doc, temperature) for m in (old, reference))


def clipped(rho, a, low, high):
    return torch.min(rho * a, torch.clamp(rho, 1 - low, 1 + high) * a)


def formula(name: str, groups: list[list[Old]], pi, beta: float) -> torch.Tensor:
    """The loss of each paper, answer by answer and token by token; `pi(answer)` are its log-probs under the policy."""
    answers = [a for group in groups for a in group]
    tokens, loss = sum(len(a.old) for a in answers), 0.0
    sequence_kl = lambda a: (a.old - a.ref).sum()  # noqa: E731
    if name == "reinforce++":  # every token's own return, whitened over all tokens
        gains = [[(a.score - beta * (a.old - a.ref)[t:].sum()).item() for t in range(len(a.old))] for a in answers]
        flat = np.concatenate(gains)
    for group in groups:
        scores = torch.tensor([a.score for a in group], dtype=torch.float64)
        if name in ("rloo", "remax"):
            scores = scores - beta * torch.stack([sequence_kl(a) for a in group])
        for i, a in enumerate(group):
            rho, others = (pi(a) - a.old).exp(), torch.cat([scores[:i], scores[i + 1 :]])
            k3 = (a.ref - pi(a)).exp() - (a.ref - pi(a)) - 1
            gain = (scores[i] - scores.mean()) / (scores.std() + 1e-4)
            if name == "grpo":
                value = (clipped(rho, gain, 0.2, 0.2) - beta * k3).mean() / len(answers)
            elif name == "dr_grpo":
                value = (clipped(rho, scores[i] - scores.mean(), 0.2, 0.2) - beta * k3).sum() / (20 * len(answers))
            elif name == "dapo":
                value = (clipped(rho, gain, 0.2, 0.28) - beta * k3).sum() / tokens
            elif name == "gspo":
                s = (pi(a) - a.old).mean().exp()
                value = (clipped(s, gain, 3e-4, 4e-4) - beta * k3.mean()) / len(answers)
            elif name == "rloo":
                value = clipped(rho, scores[i] - others.mean(), 0.2, 0.2).sum() / len(answers)
            elif name == "remax":
                value = clipped(rho, scores[i] - 0.5, 0.2, 0.2).sum() / len(answers)
            elif name == "reinforce++":
                mine = torch.tensor(gains[answers.index(a)], dtype=torch.float64)
                value = clipped(rho, (mine - flat.mean()) / math.sqrt(flat.var() + 1e-8), 0.2, 0.2).sum() / tokens
            loss = loss - value
    return loss


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.05, 0.7)])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_its_papers(name, beta, temperature):
    groups, batch = rollout(poison=math.nan)
    old, policy, reference = model(), model(away=0.05), model(9)
    constant = 20.0 if name == "dr_grpo" else None
    objective = algorithm(name, beta=beta, temperature=temperature, constant=constant)
    objective.estimate(networks(old, reference), [batch], Mesh.single())
    known = [[Old(d, old, reference, temperature) for d in group] for group in groups]
    expected = formula(name, known, lambda a: answer_logps(policy, a.doc, temperature), beta)
    nets = networks(policy, reference)
    assert_same(policy, total(objective, nets, batch), expected, 1e-7)  # scores are kept in fp32
    _, metrics = objective.loss(objective.outputs(nets, batch), batch)
    assert 0 < metrics["clip_fraction"].sum / batch.counts["tokens"] < 1


@pytest.mark.parametrize("far", [100.0, -100.0])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_token_that_was_all_but_impossible_does_not_cost_the_step(name, far):
    """e^100 is infinite in fp32, and 0 · ∞ a NaN in every gradient."""
    policy, (_, batch) = Transformer(SHAPE).initialize(0), rollout()
    objective, nets = algorithm(name, beta=0.1, kl_in="loss"), networks(policy, model(9).float())
    objective.estimate(nets, [batch], Mesh.single())
    for field in ("old_logp", "reference_logp"):
        batch.fields[field][5] += far
    loss = total(objective, nets, batch)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, list(policy.parameters())))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nothing_is_clipped_before_the_first_update(name, dtype):
    policy, (_, batch) = Transformer(SHAPE, dtype=dtype).initialize(0), rollout()
    objective, nets = ALGORITHMS[name], networks(policy)
    objective.estimate(nets, [batch], Mesh.single())
    _, metrics = objective.loss(objective.outputs(nets, batch), batch)
    assert metrics["clip_fraction"].sum == 0 and metrics["old_kl"].sum.item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(batch.fields["old_logp"], objective.outputs(nets, batch).logp, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_update_on_a_rollout_needs_no_pass_before_it(name):
    """The same loss, gradient and gap to the sampler as with log-probs that were asked for first."""
    (_, batch), (_, again), first, second = rollout(), rollout(), model(), model()
    asked = algorithm(name, importance=1.1)
    numbers = asked.estimate(networks(first), [batch], Mesh.single())
    objective = algorithm(name, importance=1.1, on_policy=True)
    assert objective.estimate({}, [again], Mesh.single()) == {}, "no network is asked"
    loss, same = total(asked, networks(first), batch), total(objective, networks(second), again)
    loss.backward(), same.backward()
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-7)  # scores are kept in fp32
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7)
    _, metrics = objective.loss(objective.outputs(networks(second), again), again)
    gap = metrics["sampler_gap"]
    assert gap.sum.item() / again.counts[gap.denominator] == pytest.approx(numbers["sampler_gap"], rel=1e-6)


def test_rlo_and_the_group_mean_differ_by_n_over_n_minus_1():
    (_, batch), nets = rollout(), networks(model())
    found = {}
    for name in ("rloo", "dr_grpo"):
        ALGORITHMS[name].estimate(nets, [batch], Mesh.single())
        found[name] = batch.fields["advantages"]
    torch.testing.assert_close(found["rloo"], found["dr_grpo"] * 3 / 2)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce++"])
def test_scores_that_are_equal_teach_nothing_however_large_they_are(name):
    rng = np.random.default_rng(3)
    score = 1000.1 if name != "reinforce++" else 100.1
    for count in (1, 3, 7):
        batch = pack([[document(rng, 2, score, i) for i in range(count)]])
        ALGORITHMS[name].estimate(networks(model().float()), [batch], Mesh.single())
        assert batch.fields["advantages"].dtype == torch.float32
        assert batch.fields["advantages"].abs().max() < 1e-9
    batch = pack([[document(rng, 2, 1e20 * i, i) for i in range(4)]])  # its square is no float32
    ALGORITHMS[name].estimate(networks(model().float()), [batch], Mesh.single())
    assert batch.fields["advantages"].isfinite().all()


def test_step_scores_reach_the_tokens_up_to_their_step():
    """Process supervision: scores normalised over all steps of a group; a token gets those that are still to come."""
    rng = np.random.default_rng(0)
    docs = [document(rng, 4, 0.0, 0), document(rng, 2, 0.0, 1)]
    steps = [{1: 1.0, 3: 0.0}, {1: 0.5}]
    for doc, scores in zip(docs, steps, strict=True):
        doc.fields["scored"][:] = 0.0
        for at, value in scores.items():
            doc.fields["rewards"][3 + at], doc.fields["scored"][3 + at] = value, 1.0
    batch = pack([docs])
    PolicyGradient().estimate(networks(model()), [batch], Mesh.single())
    scores = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    a, b, c = ((scores - scores.mean()) / (scores.std() + 1e-4)).tolist()
    assert batch.fields["advantages"].tolist() == pytest.approx([a + b, a + b, b, b, c, c], abs=1e-6)


@pytest.mark.parametrize("name", ["rloo", "remax"])
def test_a_kl_in_the_reward_counts_too_where_the_last_step_ends_before_the_answer(name):
    groups, _ = rollout()
    for doc in groups[0] + groups[1]:  # the end token after the last step has no score
        doc.fields["rewards"], doc.fields["scored"] = (np.roll(doc.fields[k], -1) for k in ("rewards", "scored"))
    groups = [[d for d in group if len(d) > 4] for group in groups]  # with an answer of two tokens or more
    objective, found = algorithm(name, beta=0.5), []
    for seed in (1, 2):
        batch = pack(
            [[Document(d.ids, d.weights, d.fields | {"number": float(i)}) for i, d in enumerate(g)] for g in groups]
        )
        objective.estimate(networks(model(), model(seed)), [batch], Mesh.single())
        found.append(batch.fields["advantages"])
    assert not torch.allclose(*found)


def test_importance_weights_are_what_the_sampler_did_otherwise_and_are_cut():
    (groups, batch), policy = rollout(), model()
    nets = networks(policy)
    objective = algorithm("dapo", importance=1.1)
    objective.estimate(nets, [batch], Mesh.single())
    gaps = [
        answer_logps(policy, d).detach() - torch.from_numpy(d.fields["sampler_logp"][3:]) for g in groups for d in g
    ]
    weights = torch.cat(gaps).exp()
    assert 0 < (weights > 1.1).sum() < len(weights)
    expected = -(weights.clamp_max(1.1) * batch.fields["advantages"]).sum() / batch.counts["tokens"]
    assert total(objective, nets, batch).item() == pytest.approx(expected.item(), abs=1e-9)
    numbers = objective.rollout_numbers([batch], Mesh.single())
    assert numbers["sampler_gap"] == pytest.approx(torch.cat(gaps).abs().mean().item(), abs=1e-6)


def test_kl_estimates_over_all_tokens_are_the_kl_and_k2s_gradient_is_its_gradient():
    """Expectations by enumeration: k1 and k3 are unbiased; as losses, k1 has no gradient and k2 has the KL's."""
    logits = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    policy = logits.log_softmax(-1)
    p = policy.exp().detach()
    kl = (policy.exp() * (policy - reference)).sum()
    mean = {kind: (p * kl_estimate(policy, reference, kind)).sum() for kind in ("k1", "k2", "k3")}
    assert mean["k1"].item() == pytest.approx(kl.item()) == mean["k3"].item()
    gradient = {kind: torch.autograd.grad(value, logits, retain_graph=True)[0] for kind, value in mean.items()}
    assert gradient["k1"].abs().max() < 1e-12
    torch.testing.assert_close(gradient["k2"], torch.autograd.grad(kl, logits, retain_graph=True)[0])
    torch.testing.assert_close(gradient["k3"], policy.exp().detach() - reference.exp())  # of KL(ref ‖ π)


# ---------------------------------------------------------------------------------------------- PPO


def critic(seed: int = 3, away: float = 0.0) -> ScalarModel:
    return ScalarModel(model(seed, away)).initialize(4)


def test_ppo_is_its_formula_token_by_token_whatever_lies_in_slots_of_no_token():
    groups, batch = rollout(poison=math.nan)
    policy, old, reference = model(away=0.05), model(), model(9)
    values, old_values, options = critic(away=0.05), critic(), {"gamma": 0.98, "lam": 0.9, "beta": 0.1}
    objective = PPO(**options, value_clip=0.05, value_coefficient=0.7)
    numbers = objective.estimate(networks(old, reference, old_values), [batch], Mesh.single())
    parts, all_advantages = [], []
    for d in (d for group in groups for d in group):
        a, n = Old(d, old, reference, 1.0), int(d.weights.sum())
        v = old_values.values(torch.from_numpy(d.ids).long()).detach()[2 : 2 + n]
        r = -0.1 * (a.old - a.ref)
        r[-1] += a.score
        advantages, running, following = torch.zeros(n, dtype=torch.float64), 0.0, 0.0
        for t in reversed(range(n)):
            running = r[t] + 0.98 * following - v[t] + 0.98 * 0.9 * running
            advantages[t], following = running, v[t]
        parts.append((d, a, v, advantages))
        all_advantages.append(advantages)
    flat, policy_loss, value_loss = torch.cat(all_advantages), 0.0, 0.0
    for d, a, v, advantages in parts:
        rho = (answer_logps(policy, d) - a.old).exp()
        white = (advantages - flat.mean()) / (flat.var(unbiased=False) + 1e-8).sqrt()
        policy_loss = policy_loss - clipped(rho, white, 0.2, 0.2).sum() / len(flat)
        new = values.values(torch.from_numpy(d.ids).long())[2 : 2 + len(v)]
        target, near = advantages + v, torch.max(torch.min(new, v + 0.05), v - 0.05)
        value_loss = value_loss + 0.5 * torch.max((new - target) ** 2, (near - target) ** 2).sum() / len(flat)
    ours = total(objective, networks(policy, reference, values), batch)
    both = torch.nn.ModuleList([policy, values])
    assert_same(both, ours, policy_loss + 0.7 * value_loss, 1e-7)
    returns, v = torch.cat([a + v for _, _, v, a in parts]), torch.cat([v for _, _, v, _ in parts])
    explained = 1 - (returns - v).var(unbiased=False) / returns.var(unbiased=False)
    assert numbers["explained_variance"] == pytest.approx(explained.item(), abs=1e-6)


def test_without_whitening_and_value_clipping():
    (_, batch), value, old = rollout(), critic(away=0.05), critic()
    objective, nets = PPO(scale="none", value_clip=0.0), networks(model(), critic=value)
    objective.estimate(networks(model(), critic=old), [batch], Mesh.single())
    fields = batch.fields
    torch.testing.assert_close(fields["advantages"], fields["returns"] - fields["old_values"], rtol=0, atol=1e-12)
    terms, metrics = objective.loss(objective.outputs(nets, batch), batch)
    error = value.values(batch.tokens, batch.cu_seqlens, batch.positions)[batch.supervised] - fields["returns"]
    assert terms["value_loss"].sum.item() == pytest.approx((error**2).sum().item() / 2)
    assert "value_clip_fraction" not in metrics


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_kl_of_any_kind_and_an_entropy_bonus_in_the_loss(kind):
    (groups, batch), policy, reference, added = rollout(), model(away=0.05), model(9), 0.0
    objective = algorithm("dapo", beta=0.3, kl=kind, kl_in="loss", entropy=0.2)
    objective.estimate(networks(model(), reference), [batch], Mesh.single())
    for d in (d for group in groups for d in group):
        logp = policy.logits(torch.from_numpy(d.ids).long()).log_softmax(-1)[2:-1]  # of a prompt of three tokens
        ratio = answer_logps(policy, d) - answer_logps(reference, d).detach()
        kl = {"k1": ratio, "k2": ratio**2 / 2, "k3": torch.exp(-ratio) - 1 + ratio}[kind]
        added = added + (0.3 * kl + 0.2 * (logp.exp() * logp).sum(-1)).sum() / batch.counts["tokens"]
    nets = networks(policy, reference)
    assert_same(policy, total(objective, nets, batch), total(algorithm("dapo"), nets, batch) + added, 1e-7)


def test_whitening_is_over_all_batches_and_ranks(pool2):
    expected = white([0, 1], Mesh.single())
    assert expected.mean().item() == pytest.approx(0, abs=1e-6) and expected.var(unbiased=False).item() > 0.99
    for rank, found in enumerate(pool2.run(white_of_rank)):
        torch.testing.assert_close(found, expected[:13] if rank == 0 else expected[13:], rtol=0, atol=1e-9)


def white(chosen: list[int], mesh: Mesh) -> torch.Tensor:
    groups, _ = rollout()
    batches = [pack([groups[i]]) for i in chosen]
    ALGORITHMS["reinforce++"].estimate(networks(model()), batches, mesh)
    return torch.cat([batch.fields["advantages"] for batch in batches])


def white_of_rank() -> torch.Tensor:
    from tritium.parallel.mesh import init_mesh

    mesh = init_mesh()
    return white([mesh.rank], mesh)


def test_ptx_has_a_denominator_of_its_own():
    groups, batch = rollout()
    rng, policy = np.random.default_rng(1), model()
    text = pack([[Document(rng.integers(0, 40, n).astype(np.int32), np.ones(n, np.float32))] for n in (5, 9)])
    text.counts = {"ptx": text.counts["tokens"], "stream": text.counts["stream"]}
    objective, nets = algorithm("dapo", ptx=2.0), networks(policy)
    alone = total(objective, nets, text)
    logps = [answer_logps(policy, Document(text.tokens[a:b].int().numpy(), np.ones(b - a, np.float32)))
             for a, b in ((0, 5), (5, 14))]  # fmt: skip
    assert alone.item() == pytest.approx(-2.0 * torch.cat(logps).mean().item(), abs=1e-9)
    objective.estimate(nets, [batch], Mesh.single())
    assert "tokens" not in text.counts and total(objective, nets, batch).item() != 0


def test_the_adaptive_coefficient_moves_by_at_most_2_percent_and_towards_the_target():
    assert adapted(0.1, 6.0, 6.0) == 0.1
    assert adapted(0.1, 60.0, 6.0) == pytest.approx(0.1 * 1.02) and adapted(0.1, 0.0, 6.0) == pytest.approx(0.098)
    assert adapted(0.1, 6.6, 6.0) == pytest.approx(0.1 * 1.01)


# ---------------------------------------------------------------------------------------------- TRL


def trl_loss(policy: Transformer, groups, advantages: torch.Tensor, old, reference, **options) -> torch.Tensor:
    """`GRPOTrainer._compute_loss` of the same answers, padded as TRL wants them, in a trainer without the rest."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    docs = [d for group in groups for d in group]
    longest = max(int(d.weights.sum()) for d in docs)
    row = lambda v, n: pad(v, (0, n - len(v)))  # noqa: E731
    ids = torch.stack([row(torch.from_numpy(d.ids).long(), 3 + longest) for d in docs])
    lengths = torch.tensor([int(d.weights.sum()) for d in docs])
    mask = (torch.arange(longest) < lengths[:, None]).long()

    class Harness(trl.GRPOTrainer):
        def __init__(self):
            pass

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **_):
            logits = torch.stack([model.logits(r) for r in input_ids])[:, -logits_to_keep - 1 : -1]
            logp = logits.log_softmax(-1)
            entropies = -(logp.exp() * logp).sum(-1)
            return logp.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0], entropies, None

    self = Harness()
    one = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x)
    self.__dict__ |= {"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
    self.__dict__ |= {"importance_sampling_level": "token", "beta": 0.0, "use_vllm": False, "epsilon_low": 0.2}
    self.__dict__ |= {"epsilon_high": 0.2, "_entropy_bonus_enabled": False, "accelerator": one, "model": policy}
    self.__dict__ |= {"max_completion_length": 20, "current_gradient_accumulation_steps": 1}
    self.__dict__ |= {"_metrics": defaultdict(lambda: defaultdict(list)), "num_generations": len(groups[0])}
    self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    self.__dict__ |= options
    inputs = {"prompt_ids": ids[:, :3], "completion_ids": ids[:, 3:], "completion_mask": mask, "advantages": advantages}
    inputs |= {"prompt_mask": torch.ones_like(ids[:, :3]), "num_items_in_batch": lengths.sum()}
    with torch.no_grad():
        for key, m in (("old_per_token_logps", old), ("ref_per_token_logps", reference)):
            inputs[key] = torch.stack([row(answer_logps(m, d), longest) for d in docs])
    return self._compute_loss(policy, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {"loss_type": "grpo"}),
        ("dr_grpo", {"loss_type": "dr_grpo"}),
        ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}
         | {"epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_trls(name, options, beta):
    groups, batch = rollout()
    old, policy, reference = model(), model(away=0.05), model(9)
    objective = algorithm(name, beta=beta, constant=20.0 if name == "dr_grpo" else None)
    objective.estimate(networks(old, reference), [batch], Mesh.single())
    scores = torch.tensor([[r for _, r in answers] for answers in ANSWERS], dtype=torch.float64)
    advantages = scores - scores.mean(-1, keepdim=True)
    if name != "dr_grpo":
        advantages = advantages / (scores.std(-1, keepdim=True) + 1e-4)
    theirs = trl_loss(policy, groups, advantages.flatten(), old, reference, beta=beta, **options)
    assert_same(policy, total(objective, networks(policy, reference), batch), theirs, 1e-5)
