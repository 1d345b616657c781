"""What a run of GRPO says about its rollouts, whatever the ranks, and what it does at the end of the context."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tritium.core.config import ConfigError, from_dict
from tritium.core.experience import Experience, ShapingConfig, summary
from tritium.core.problems import Problem, problems_of
from tritium.core.rewards import Score
from tritium.core.rollout import Rollout, Sample, SamplingConfig
from tritium.core.tokenizer import Tokenizer
from tritium.model.generate import Completion
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.stages import grpo

pytestmark = pytest.mark.usefixtures("quick")


def group(*rewards: float | None, length: int = 2) -> list[Sample]:
    completion = Completion([1] * length, [0.0] * length, "stop" if length < 4 else "length")
    return [Sample(Problem(0, [], [5], ""), completion, "", None if r is None else Score(float(r))) for r in rewards]


def summary_of(groups_per_rank: list[list[list[Sample]]]) -> dict[str, float]:
    mesh = init_mesh()
    rollout = Rollout(groups_per_rank[mesh.rank])
    rollout.failures["broken"] = sum(s.score is None for s in rollout.samples)
    return summary(rollout, ShapingConfig(), 8, mesh)


def test_a_rollouts_numbers_are_those_of_all_ranks(pool2):
    first, second = [group(1, 0), group(1, 1)], [group(None, -0.5, length=8)]
    expected = {"reward": 2.5 / 5, "right": 3 / 5, "length": 24 / 6, "ended": 4 / 6, "varied_groups": 1 / 3}
    expected |= {"shaped_reward": 2.5 / 5, "samples": 6.0}
    assert pool2.run(summary_of, [first, second]) == [pytest.approx(expected | {"verifier_failures": 1.0})] * 2
    alone = summary(Rollout(first), ShapingConfig(), 8, Mesh.single())
    assert pool2.run(summary_of, [first, []]) == [alone] * 2  # a rank may have no problem at all
    assert set(summary(Rollout([]), ShapingConfig(), 8, Mesh.single()).values()) == {0.0}


def test_answers_that_score_the_same_still_teach_where_their_rewards_differ(tmp_path):
    """Too long an answer costs: all wrong, but one of them worse."""
    rollout = Rollout([[*group(0, 0), *group(0, length=8)], group(0, 0)])
    config = grpo.Config(model="", shaping=ShapingConfig(overlong=4))
    config.sampling.max_tokens = 8
    trainer = SimpleNamespace(mesh=Mesh.single(), out=tmp_path)
    (batch,) = Experience(trainer, None, [], None, config, 2).batches(rollout, updates=1, varied_only=True)
    assert batch.fields["rewards"][batch.supervised].tolist() == [0.0] * 11 + [-1.0]
    assert summary(rollout, config.shaping, 8, Mesh.single())["varied_groups"] == 0.5


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch):
    """Train under a verifier that likes odd token sums; the metrics of each step."""
    judge = lambda ids, text, **_: Score(sum(ids) % 2)  # noqa: E731
    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: judge)

    def run(source: str, **sections) -> list[dict]:
        fixed = {"model": tiny.model, "grpo": {"prompts": 4, "group": 4}, "data": {"sources": [source]}}
        config = from_dict(grpo.Config, fixed | sections)
        config.run.out, config.run.steps, config.run.dtype = str(tmp_path / "out"), 2, "fp32"
        grpo.train(config)
        return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]

    return run


def test_the_sampler_and_the_trainer_agree_on_the_log_probs(tiny, trained):
    for step in trained(tiny.data("problems.jsonl"), sampling={"max_tokens": 24, "top_k": 50}):
        assert step["varied_groups"] > 0 and 0 < step["sampler_gap"] < 1e-5


def test_a_gap_is_measured_at_temperature_1_only(tiny, trained):
    steps = trained(tiny.data("problems.jsonl"), sampling={"max_tokens": 8, "temperature": 0.7})
    assert all(step["varied_groups"] > 0 and "sampler_gap" not in step for step in steps)


def test_answers_that_reach_the_end_of_the_context_are_trained_on(tiny, tmp_path, trained):
    tokenizer, question = Tokenizer.load(tiny.model), "What is 1 + 2?"
    while len(tokenizer.encode(question)) < 70:  # of 96 positions
        question = "1 + " + question
    (file := Path(tmp_path / "long.jsonl")).write_text(json.dumps({"question": question, "answer": "3"}) + "\n")
    steps = trained(str(file), sampling={"max_tokens": 200})
    assert all(step["varied_groups"] > 0 and step["length"] < 26 for step in steps)


@pytest.mark.parametrize(
    "options", [{"algorithm": "rloo", "scale": "group"}, {"constant": 9.0}, {"algorithm": "dr_grpo", "constant": -1.0}]
)
def test_an_option_that_the_algorithm_would_ignore_is_refused(options):
    with pytest.raises(ConfigError, match="grpo.(scale|constant)="):
        grpo.GRPOConfig(**options)


def test_a_problem_outside_the_band_stays_away_as_long_with_several_rounds():
    settings = SimpleNamespace(data=SimpleNamespace(band=[0.1, 0.9]))
    trainer = SimpleNamespace(mesh=Mesh.single(), out=Path("none"), notes={})
    experience = Experience(trainer, None, [], None, settings, 1, rounds=8)
    experience.remember(Rollout([group(1, 1)]), 10)
    problems = [Problem(i, [], [], "") for i in range(3)]
    rates = trainer.notes["pass_rates"]
    assert all(p.index for n in range(88, 96) for p in problems_of(n, problems, 2, 0, rates, [0.1, 0.9]))


def test_a_failure_of_the_judge_is_no_problem_that_is_never_solved():
    settings = SimpleNamespace(data=SimpleNamespace(band=[0.1, 0.9]))
    trainer = SimpleNamespace(mesh=Mesh.single(), out=Path("none"), notes={})
    experience = Experience(trainer, None, [], None, settings, 1)
    experience.remember(Rollout([group(None, None)]), 0)
    assert trainer.notes["pass_rates"] == {}
    experience.remember(Rollout([group(1, None, 0)]), 1)
    assert trainer.notes["pass_rates"] == {"0": [0.5, 1]}


def test_failures_on_the_likeliest_answers_are_counted(monkeypatch):
    settings = SimpleNamespace(shaping=ShapingConfig(), sampling=SamplingConfig())
    experience = Experience(SimpleNamespace(out=Path("none")), None, [], None, settings, 1, greedy=True)
    likeliest = Rollout([group(None), group(0.5)], Counter(broken=1))
    monkeypatch.setattr(Experience, "answers", lambda *_: likeliest)
    rollout = Rollout([group(1, 0), group(1, 1)])
    assert experience.greedy_scores(rollout, 0) == [0.0, 0.5] and rollout.failures.total() == 1


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"entropy": 0.1}, {}])
def test_what_holds_for_every_answer_acts_also_where_none_is_better(tiny, trained, monkeypatch, options):
    """A KL to the reference pulls the policy back when all problems are solved."""
    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: lambda ids, text, **_: Score(1.0))
    steps = trained(tiny.data("problems.jsonl"), grpo={"prompts": 2, "group": 3} | options)
    assert all((step["tokens"] > 0) == bool(options) and step["varied_groups"] == 0 for step in steps)
    assert all(("kl_k3" in step) == ("beta" in options) for step in steps)


def scored_document(score: Score, weights: list[float], shaping: dict) -> dict[str, list[float]]:
    """Where a rollout's document has its rewards, of an answer of four tokens that did not end by itself."""
    settings = SimpleNamespace(shaping=ShapingConfig(**shaping), sampling=SimpleNamespace(max_tokens=8))
    experience = Experience(SimpleNamespace(out=Path("none")), None, [], None, settings, 1)
    completion = Completion([1] * 4, [0.0] * 4, "length", weights=weights)
    document = experience.document(Sample(Problem(0, [], [5], ""), completion, "", score), {"number": 0.0})
    return {name: document.fields[name][1:].tolist() for name in ("rewards", "scored")}


def test_step_scores_are_shaped_and_the_last_bears_what_the_end_costs():
    steps = Score(0.5, steps=(3.0, 0.5), ends=(1, 3))
    found = scored_document(steps, [], {"scale": 2.0, "clip": 4.0, "missing_eos": 1.5})
    assert found == {"rewards": [0.0, 4.0, 0.0, -0.5], "scored": [0.0, 1.0, 0.0, 1.0]}


@pytest.mark.parametrize("score", [Score(1.0), Score(1.0, steps=(1.0,), ends=(3,))])
def test_a_score_where_a_tool_speaks_last_belongs_to_the_last_token_that_was_drawn(score):
    """At a token without a weight it would be lost, and a group of such answers would have no score at all: NaN."""
    assert scored_document(score, [1.0, 1.0, 0.0, 0.0], {})["rewards"] == [0.0, 1.0, 0.0, 0.0]
