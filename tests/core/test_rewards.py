"""Judges: the verifier of short answers, and what happens when a judge fails."""

import pytest

from tritium.core.rewards import Answer, Score, judge
from tritium.core.rewards.exact import ExactMatch


def verdict(text: str, reference: str) -> float:
    return ExactMatch(malformed=-0.5)([], text, reference=reference).value


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("1232", "1232"),
        ("The total is 1,232.", "1232"),
        ("1232", "1,232"),
        ("5 - 10 is -5", "-5"),
        ("0.50", "0.5"),
        ("0.5", "0.50"),
        ("7.0", "7"),
        ("007", "7"),
        ("It is 0.", "0"),
        ("0.0", "0"),
        ("100", "100"),
        ("first 3, then 4", "4"),
        ("<think>2+2=4</think>4", "4"),
        ("<think>\nno 5\n</think>\n\n**4**", "4"),
        ("2+2=4</think> 4", "4"),
        ("Paris", "  paris "),
        ("New   York", "new york"),
    ],
)
def test_right(text, reference):
    assert verdict(text, reference) == 1.0


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("1,233", "1232"),
        ("5", "-5"),
        ("-5", "5"),
        ("0.05", "0.5"),
        ("10", "100"),
        ("4 or 5", "4"),
        ("no number at all", "4"),
        ("<think>4</think>5", "4"),
        ("Paris, France", "Paris"),
    ],
)
def test_wrong(text, reference):
    assert verdict(text, reference) == 0.0


@pytest.mark.parametrize("text", ["", "  ", "<think>2+2=4", "<think>2+2=4, so 4</think>", "<think>4</think>  \n"])
def test_reasoning_without_an_answer_is_malformed_not_wrong(text):
    assert verdict(text, "4") == -0.5


def test_a_missing_reference_is_the_judges_failure():
    with pytest.raises(ValueError, match="no reference"):
        ExactMatch()([], "4")


def test_a_judge_that_raises_is_counted_and_excluded_never_zero():
    def moody(ids, text, *, prompt="", reference=""):
        if text == "boom":
            raise RuntimeError("no such file")
        return Score(float(text))

    judged = judge(moody, [Answer([], text) for text in ("1", "boom", "0", "boom", "nan", "inf")])
    assert [score and score.value for score in judged.scores] == [1.0, None, 0.0, None, None, None]
    assert judged.failures["RuntimeError: no such file"] == 2 and judged.failures.total() == 4


def test_a_verdict_may_be_a_bool_or_an_int():
    judged = judge(lambda ids, text, **_: Score(text == "yes"), [Answer([], "yes"), Answer([], "no")])
    assert [(type(s.value), s.value) for s in judged.scores] == [(float, 1.0), (float, 0.0)]


def test_a_judge_sees_tokens_text_prompt_and_reference():
    seen = []

    def record(ids, text, *, prompt="", reference=""):
        seen.append((ids, text, prompt, reference))
        return Score(0.0)

    judge(record, [Answer([1, 2], "text", "prompt", "reference")])
    assert seen == [([1, 2], "text", "prompt", "reference")]


@pytest.mark.parametrize("failing", [KeyboardInterrupt, SystemExit])
def test_stopping_is_not_a_judges_failure(failing):
    def stop(ids, text, **_):
        raise failing

    with pytest.raises(failing):
        judge(stop, [Answer([], "x")])
