"""Answers drawn and judged: whose randomness is whose, what may be asked, and what a problem's file may say."""

import json

import pytest
import torch

from tritium.core.config import ConfigError
from tritium.core.files import Skipped
from tritium.core.problems import Problem, load_problems, share
from tritium.core.rewards import Score
from tritium.core.rewards.make import make_reward
from tritium.core.rollout import Sample, SamplingConfig, roll_out, sample_document
from tritium.core.tokenizer import Tokenizer
from tritium.model.generate import Completion
from tritium.model.hf import load
from tritium.parallel.mesh import Mesh

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.load(tiny.model)


def drawn(tiny, tokenizer, problems: list[Problem], mesh: Mesh) -> list[list[list[int]]]:
    """The tokens of two answers to each of this rank's problems."""
    model = load(tiny.model, torch.float32, mesh=mesh)
    judge = lambda ids, text, **_: Score(1.0)  # noqa: E731
    rollout = roll_out(model, tokenizer, share(problems, mesh), judge, SamplingConfig(max_tokens=8), n=2, seed=(3,))
    return [[s.completion.tokens for s in group] for group in rollout.groups]


def test_a_problem_that_comes_twice_is_answered_anew_and_the_same_on_any_number_of_ranks(tiny, tokenizer):
    problems = load_problems([tiny.data("problems.jsonl")], tokenizer, 96, Skipped())[:2] * 2
    alone = drawn(tiny, tokenizer, problems, Mesh.single())
    assert alone[0] != alone[2] and alone[1] != alone[3]
    for rank in range(2):
        mesh = Mesh(rank=rank, world_size=2, dp=2, dp_rank=rank)
        assert drawn(tiny, tokenizer, problems, mesh) == alone[rank::2]


def test_a_stop_string_is_no_part_of_the_answer_that_is_judged_and_learned(tiny, tokenizer):
    (problem,) = load_problems([tiny.data("problems.jsonl")], tokenizer, 96, Skipped())[:1]
    model, exact = load(tiny.model, torch.float32), make_reward("exact")
    (free,) = roll_out(model, tokenizer, [problem], exact, SamplingConfig(max_tokens=20, temperature=0)).samples
    problem.reference, stop = free.text[:4], free.text[4:7]
    sampling = SamplingConfig(max_tokens=20, temperature=0, stop=["~", stop])
    (sample,) = roll_out(model, tokenizer, [problem], exact, sampling).samples
    assert sample.text == free.text[: free.text.index(stop)] and sample.completion.finish_reason == "stop"
    assert sample.right == (free.text.index(stop) == 4)
    assert sample.completion.tokens == free.completion.tokens[: len(sample.completion.tokens)]


def test_where_the_verifier_fails_what_is_rewarded_does_not_say_what_is_right(tiny, tokenizer):
    problems = load_problems([tiny.data("problems.jsonl")], tokenizer, 96, Skipped())[:1]
    judge, broken = (lambda ids, text, value=v, **_: Score(1 / value) for v in (1, 0))
    given = (load(tiny.model, torch.float32), tokenizer, problems, judge, SamplingConfig(max_tokens=2))
    (sample,) = roll_out(*given).samples
    assert sample.score.value == 1.0 and sample.right
    rollout = roll_out(*given, verifier=broken)
    assert rollout.samples[0].score.value == 1.0 and not rollout.samples[0].right and rollout.failures.total() == 1


def test_problems_have_no_weights(tmp_path, tokenizer):
    (file := tmp_path / "a.jsonl").write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n")
    assert len(load_problems([str(file)], tokenizer, 96, Skipped())) == 1
    with pytest.raises(ConfigError, match=r"sources: .*a.jsonl@2: problems have no weights; leave out the @2"):
        load_problems([f"{file}@2"], tokenizer, 96, Skipped(), "sources")
    with pytest.raises(ConfigError, match="^data is empty"):
        load_problems([], tokenizer, 96, Skipped(), "data")


@pytest.mark.parametrize(("value", "right"), [(1.0, True), (1.5, True), (0.5, False), (None, False)])
def test_an_answer_is_right_where_the_judge_says_so(value, right):
    score = None if value is None else Score(value)
    assert Sample(Problem(0, [], [], ""), Completion(), "", score).right == right


def test_the_samplers_log_probs_go_with_the_answers_tokens():
    sample = Sample(Problem(0, [], [7, 8], ""), Completion([1, 2, 3], [-0.5, -1.5, -2.5], "stop"), "")
    document = sample_document(sample, {"advantages": 0.5})
    assert document.ids.tolist() == [7, 8, 1, 2, 3] and document.weights.tolist() == [0, 0, 1, 1, 1]
    assert document.fields["sampler_logp"].tolist() == [0, 0, -0.5, -1.5, -2.5]
    assert document.fields["advantages"] == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": -1}, "sampling.top_k=-1 must be from 0"),
        ({"temperature": -0.5}, "sampling.temperature=-0.5 must be at least 0"),
        ({"top_p": 0.0}, "sampling.top_p=0.0 must be from 1e-30 to 1"),
        ({"max_tokens": 0}, "sampling.max_tokens=0 must be at least 1"),
    ],
)
def test_sampling_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        SamplingConfig(**options)
