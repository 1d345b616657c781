"""Filters and samplers: their definitions on small numbers, and the distribution that rejection sampling aims at."""

import numpy as np
import pytest
import torch

from tritium.core.batch import Document, pack
from tritium.core.objectives.likelihood import DynamicFineTuning, Unlikelihood
from tritium.core.select import (
    agreed_pairs,
    balanced,
    by_worth,
    distinct_paths,
    rejection_sample,
    spread_out,
)
from tritium.kernels.linear_logprob import LogProb


def test_answers_that_compute_the_same_are_one_path():
    texts = ["2+3=5, so 5", "First 2 + 3 = 5. The answer is 5", "3+2=5", "five", "five ", "it is 5"]
    assert distinct_paths(texts) == [0, 2, 3, 5]


def test_different_answers_stand_in_levels_of_equal_worth():
    answers = [("b", 1.0), ("a ", 2.0), (" ", 9.0), ("c", 1.0), ("a", 2.0)]
    assert by_worth(answers, lambda a: a[0], lambda a: a[1]) == [[("a", 2.0)], [("b", 1.0), ("c", 1.0)]]
    assert by_worth([], str, str) == []


def test_rejection_sampling_draws_from_the_optimal_policy():
    rewards, beta = [0.0, 0.5, 1.0], 0.5
    first = np.bincount([rejection_sample(rewards, beta, 3, (i,))[0] for i in range(3000)], minlength=3) / 3000
    accepted = np.exp((np.array(rewards) - 1.0) / beta)  # in the first sweep; the first of them in order comes first
    expected = accepted * np.append(1.0, np.cumprod(1 - accepted)[:-1])
    assert first == pytest.approx(expected, abs=0.03)
    included = np.zeros(3)
    for i in range(3000):
        once = rejection_sample(rewards, beta, 3, (7, i))
        assert sorted(once) == [0, 1, 2]  # drawn without replacement until enough are there
        included[rejection_sample(rewards, 1e-9, 1, (7, i))[0]] += 1
    assert included.tolist() == [0, 0, 3000]  # β → 0 takes the best


def test_pairs_that_reward_models_agree_on():
    margins = np.array([[2.0, 1.0, -0.1, 0.2], [1.0, -0.5, 3.0, 0.1], [3.0, 1.0, 1.0, 0.1]])
    assert agreed_pairs(margins, 0.0, 1.0).tolist() == [0, 3]
    assert agreed_pairs(margins, 0.4, 0.6).tolist() == [0, 1, 2]


def test_samples_are_spread_out_or_balanced():
    points = np.array([[0.0, 0], [0.1, 0], [10, 0], [0, 10], [10.1, 0]])
    chosen = spread_out(points, 3)
    assert {min(i, 1) if i < 2 else (2 if i in (2, 4) else 3) for i in chosen} >= {2, 3} and len(set(chosen)) == 3
    assert sorted(spread_out(points, 9)) == [0, 1, 2, 3, 4] and spread_out(points[:0], 3) == []
    assert balanced(["a1", "a2", "a3", "b1", "c1"], lambda r: r[0], 4) == [0, 3, 4, 1]


# ---------------------------------------------------------------------------------------------- losses of tokens


def outputs_and_batch() -> tuple[LogProb, object]:
    def document(n: int, good: float) -> Document:
        return Document(np.arange(n, dtype=np.int32), np.ones(n, np.float32), {"good": good})

    logp = torch.tensor([-0.5, -2.0, -0.1, -3.0, -0.7], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(5, dtype=torch.float64)
    return LogProb(logp, zero, zero, zero > 1), pack([[document(4, 1.0)], [document(3, 0.0)]], multiple_of=16)


def test_dft_has_the_gradient_of_cross_entropy_times_the_probability():
    outputs, batch = outputs_and_batch()
    loss = DynamicFineTuning().loss(outputs, batch)[0]["loss"].sum
    assert loss.item() == pytest.approx(-(outputs.logp.exp() * outputs.logp).sum().item())
    (gradient,) = torch.autograd.grad(loss, outputs.logp)
    torch.testing.assert_close(gradient, -outputs.logp.detach().exp())


def test_unlikelihood_lowers_bad_answers_only():
    outputs, batch = outputs_and_batch()
    p = outputs.logp.detach().exp()
    terms, _ = Unlikelihood().loss(outputs, batch)
    assert terms["loss"].sum.item() == pytest.approx((-p[:3].log().sum() - (1 - p[3:]).log().sum()).item())
    (gradient,) = torch.autograd.grad(terms["loss"].sum, outputs.logp)
    assert (gradient[:3] < 0).all() and (gradient[3:] > 0).all()


def test_unlikelihood_of_a_sure_token_is_finite():
    outputs, batch = outputs_and_batch()
    sure = outputs._replace(logp=torch.zeros(5, dtype=torch.float32, requires_grad=True))
    loss = Unlikelihood().loss(sure, batch)[0]["loss"].sum
    loss.backward()
    assert loss.isfinite() and sure.logp.grad.isfinite().all()
