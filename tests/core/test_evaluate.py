"""Evaluations: whose likelihood is whose, unbiased pass@k, intervals, the forms of multiple choice, wins."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tritium
from tritium.core.config import ConfigError
from tritium.core.evaluate import Choice, Likelihood, choice, interval, likelihoods, pass_at_k, read_choices
from tritium.core.files import DataError, Skipped
from tritium.core.formats import RecordError
from tritium.model.heads import ScalarModel
from tritium.stages import evaluate

pytestmark = pytest.mark.usefixtures("quick")
DATA = Path(__file__).parents[3] / "shared" / "data"


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, right, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 1, 7)]:
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_intervals_are_wilsons_and_no_points_where_nothing_or_all_is_solved():
    assert interval([0.0, 1.0] * 50) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval([0.0] * 10, 8) == (0.0, pytest.approx(0.2775, abs=1e-4)) and interval([1.0] * 10)[1] == 1.0
    assert all(interval([0.0] * n)[0] == 0.0 and interval([1.0] * n)[1] == 1.0 for n in range(1, 300))
    assert interval([0.5] * 10, 8)[0] < 0.5 < interval([0.5] * 10, 8)[1]


@pytest.mark.parametrize("difficulty", [(0.1, 2.0), (2.0, 2.0), (50.0, 50.0), (9.0, 0.5)])
def test_intervals_hold_the_mean_nineteen_times_in_twenty_whether_problems_are_alike_or_not(difficulty):
    rng, (a, b), held = np.random.default_rng(0), difficulty, []
    for _ in range(2000):
        shares = rng.binomial(8, rng.beta(a, b, 60)) / 8
        low, high = interval(shares, 8)
        held.append(low <= a / (a + b) <= high)
    assert 0.91 < np.mean(held) <= 0.99  # 0.95, but for the first: nearly all shares are 0


def test_forms_of_multiple_choice():
    arc = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    sciq = {"question": "Q?", "correct_answer": "y", "distractor1": "x", "distractor2": "z", "support": "S."}
    plain = {"question": "Q?", "choices": ["x", "y"], "answer": 1}
    prompts = "Question: Q?\nAnswer:", "S.\nQuestion: Q?\nAnswer:"
    assert (choice(arc).prompt, choice(sciq).prompt) == prompts
    assert choice(arc) == choice(plain) == choice(plain | {"answer": "y"}) and choice(arc).solved.endswith("Answer: y")
    assert choice(sciq).options == (" y", " x", " z") and choice(sciq).answer == 0
    assert choice({"context": "a b ", "continuation": "c"}).solved == "a b c"
    for bad in ({}, plain | {"answer": 2}, plain | {"answer": "w"}, plain | {"choices": []}, arc | {"answerKey": "C"}):
        with pytest.raises(RecordError):
            choice(bad)


def test_a_continuations_likelihood_is_that_of_its_own_tokens(tiny):
    model = tritium.load(tiny.model, dtype=torch.float64)
    tokenizer = tritium.Tokenizer.load(tiny.model)
    pairs = [("What is 3 + 4", " = 7"), ("What", " is it"), ("", "What"), ("12 " * 200, "= 24")]
    found = likelihoods(model, tokenizer, pairs)
    for (prompt, continuation), given in zip(pairs[:2], found, strict=False):
        before, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + continuation)
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        logp = model.logits(torch.tensor(start + ids)).log_softmax(-1).detach()
        count = len(ids) - len(before)
        own = [float(logp[len(start) + i - 1, ids[i]]) for i in range(len(before), len(ids))]
        assert given.tokens == count and given.logp == pytest.approx(math.fsum(own))
    assert all(math.isfinite(x.logp) for x in found) and found[3].tokens >= 1


def test_shots_are_solved_before_and_asked_no_more(tmp_path):
    rows = [{"question": f"Q{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"question": "no choices"}')
    skipped = Skipped()
    found = read_choices(str(tmp_path / "c.jsonl"), 2, skipped)
    assert all(c.prompt.endswith(f"\n\nQuestion: Q{i}?\nAnswer:") for i, c in zip((2, 3), found, strict=True))
    assert found[0].prompt.startswith("Question: Q0?\nAnswer: a\n\nQuestion: Q1?\nAnswer: b\n\n")
    assert skipped.reasons.total() == 1


@pytest.mark.parametrize("file", ["arc_easy_validation.jsonl", "sciq_validation.jsonl", "lambada_1000.jsonl"])
def test_the_real_files_are_read_whole(file):
    if not (DATA / "eval" / file).exists():
        pytest.skip(f"{DATA / 'eval' / file} is not there")
    skipped = Skipped()
    count = len((DATA / "eval" / file).read_text("utf-8").splitlines())
    assert len(read_choices(str(DATA / "eval" / file), 0, skipped)) == count and not skipped.reasons


def config(tiny, **options) -> evaluate.Config:
    made = evaluate.Config(model=tiny.model, dtype="fp32", **options)
    made.sampling.max_tokens = 4
    return made


@pytest.mark.parametrize("logps", [(-1.0, -1.0), (math.nan, math.nan)])
def test_a_model_that_tells_nothing_apart_has_nothing_right_where_the_answer_comes_first(logps):
    asked = Choice("Question: ?\nAnswer:", (" one", " two"), 0)
    assert evaluate.verdict(asked, [Likelihood(logp, 1, False) for logp in logps]) == (False, False)
    assert evaluate.verdict(asked, [Likelihood(logp, 1, False) for logp in (-1.0, -2.0)]) == (True, True)


def test_choices_are_measured_and_saved(tiny, tmp_path):
    rows = [{"question": "3 + 4?", "choices": ["7", "8"], "answer": i} for i in (0, 1)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.jsonl"
    metrics = evaluate.measure(config(tiny, choices=str(tmp_path / "c.jsonl"), save=str(out))).metrics
    assert metrics["accuracy"] == 0.5 and metrics["questions"] == 2 and metrics["accuracy_low"] > 0
    assert len(json.loads(out.read_text().splitlines()[0])["likelihoods"]) == 2


def test_samples_give_pass_at_k_and_an_answer_against_itself_wins_half(tiny, tmp_path):
    saved = str(tmp_path / "a.jsonl")
    first = evaluate.measure(config(tiny, data=tiny.data("problems.jsonl"), save=saved, reward="length(0, 9)")).metrics
    sampling = evaluate.SamplingConfig(temperature=1e-3)
    again = config(tiny, data=tiny.data("problems.jsonl"), against=saved, samples=2, sampling=sampling)
    metrics = evaluate.measure(again).metrics
    assert metrics["win_rate"] == 0.5 and metrics["compared"] == first["n"] == 6
    assert 0 <= metrics["pass@1"] <= metrics["pass@2"] <= 1


def test_a_reward_model_says_who_wins(tiny, tmp_path):
    scorer = ScalarModel(tritium.load(tiny.model, dtype=torch.float32)).initialize(0)
    scorer.save(str(tmp_path / "scorer"))
    tritium.Tokenizer.load(tiny.model).save(str(tmp_path / "scorer"))
    saved = tmp_path / "a.jsonl"
    evaluate.measure(config(tiny, data=tiny.data("problems.jsonl"), save=str(saved)))
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    shuffled = [
        row | {"answer": text} for row, text in zip(rows, ["7", "Hello", "x y", "12", "= 3", "no"], strict=True)
    ]
    saved.write_text("".join(json.dumps(row) + "\n" for row in shuffled))
    options = {"data": tiny.data("problems.jsonl"), "against": str(saved), "reward_model": str(tmp_path / "scorer")}
    metrics = evaluate.measure(config(tiny, **options)).metrics
    assert metrics["compared"] == 6 and metrics["win_rate_low"] <= metrics["win_rate"] <= metrics["win_rate_high"]
    assert (metrics["win_rate"] * 6) % 1 == pytest.approx(0)  # scores of different answers differ


def test_shots_come_as_turns_and_what_no_longer_fits_is_told(tiny, tmp_path, capsys):
    saved = tmp_path / "a.jsonl"
    evaluate.measure(config(tiny, data=tiny.data("problems.jsonl"), shots=1, save=str(saved)))
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert (
        len(rows) == 4 and "skipped 1 × a question longer than the context, with its shots" in capsys.readouterr().err
    )
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant", "user"]


def test_another_that_lacks_problems_is_told_before_the_work_and_answers_are_kept_where_its_judge_fails(
    tiny, tmp_path, monkeypatch
):
    (tmp_path / "o.jsonl").write_text('{"messages": [], "answer": "x"}\n')
    given = {"data": tiny.data("problems.jsonl"), "save": str(tmp_path / "a.jsonl")}
    with monkeypatch.context() as patch, pytest.raises(DataError, match="lacks 6 of 6"):
        patch.setattr(evaluate, "roll_out", None)
        evaluate.measure(config(tiny, **given, against=str(tmp_path / "o.jsonl")))
    evaluate.measure(config(tiny, **given))
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    monkeypatch.setattr(evaluate, "wins_by_score", lambda *_: [])
    with pytest.raises(DataError, match="the judge failed on every pair"):
        evaluate.measure(config(tiny, **given, against=str(tmp_path / "b.jsonl")))
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_what_can_not_be_evaluated_is_explained(tiny, tmp_path):
    problems = tiny.data("problems.jsonl")
    with pytest.raises(ConfigError, match="use fewer shots"):
        evaluate.measure(config(tiny, data=problems, shots=5))
    (tmp_path / "code.jsonl").write_text('{"question": "Write f.", "tests": ["assert f(1)"]}\n' * 3)
    with pytest.raises(ConfigError, match="problems with tests have no reference answer to show"):
        evaluate.measure(config(tiny, data=str(tmp_path / "code.jsonl"), shots=1, reward="code"))
    with pytest.raises(ConfigError, match="needs a temperature above 0"):
        config(tiny, data=problems, samples=2)
    with pytest.raises(ConfigError, match="did you mean math"):
        config(tiny, data=problems, reward="maths")
