"""Judges: the verifier of short answers, and what happens when a judge fails."""

import re
import signal
import time

import pytest

from tritium.core.rewards import Answer, Score, judge
from tritium.core.rewards.exact import ExactMatch, NumberMatch


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


def test_the_wrong_count_of_scores_and_steps_that_are_no_numbers_are_failures():
    class Short:
        def batch(self, answers):
            return [Score(1.0)] * (len(answers) - 1)

    judged = judge(Short(), [Answer([1], ""), Answer([2], "")])
    assert judged.scores == [None, None] and "1 scores for 2 answers" in str(judged.failures)
    for odd, words in (
        (Score(1.0, steps=(0.5, float("nan")), ends=(0, 1)), "the score is nan"),
        (Score(1.0, steps=(0.5,), ends=(0, 1)), "1 scores of steps that end at 2 places"),
        (0.5, "no attribute 'value'"),
    ):
        judged = judge(lambda ids, text, odd=odd, **_: odd, [Answer([1, 2], "")])
        assert judged.scores == [None] and words in str(judged.failures)


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


def pattern(ids, text, **_):
    return Score(float(bool(re.fullmatch("(a+)+", text))))


def sleeper(ids, text, **_):
    while text != "a":
        try:
            time.sleep(60)
        except Exception:  # a judge that catches all there is
            text = "b" if text == "aab" else "a"
    return Score(1.0)


@pytest.mark.parametrize(("hangs", "failures"), [(pattern, 1), (sleeper, 0)])
def test_a_reward_that_hangs_is_cut_off_counted_and_the_others_are_judged(hangs, failures):
    answers = [Answer([], "a"), Answer([], "a" * 60 + "b"), Answer([], "a")]
    start, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    judged = judge(hangs, answers, seconds=0.2)
    assert [judged.scores[0].value, judged.scores[2].value] == [1.0, 1.0] and time.monotonic() - start < 30
    assert judged.failures == ({"TimeoutError: no score within 0.2 s": 1} if failures else {})
    assert (judged.scores[1] is None) == bool(failures)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_batch_that_hangs_fails_for_all_its_answers():
    class Slow:
        def batch(self, answers):
            time.sleep(60)

    judged = judge(Slow(), [Answer([], "a"), Answer([], "b")], seconds=0.1)
    assert judged.scores == [None, None] and judged.failures.total() == 2


def test_a_judge_within_a_judge_leaves_the_outer_limit_running():
    class Outer:
        def batch(self, answers):
            judge(lambda *_, **__: Score(1.0), answers)
            time.sleep(60)

    assert judge(Outer(), [Answer([], "a")], seconds=0.3).failures.total() == 1


@pytest.mark.parametrize(
    ("text", "reference"),
    [("1,2,3", "123"), ("4,5", "45"), (".5", "5"), ("1/2", "2"), ("1,00", "100"), ("9" * 5000, "5"), ("3/0", "3.5")],
)
def test_parts_of_numbers_are_no_numbers(text, reference):
    for found in (ExactMatch(), NumberMatch()):
        judged = judge(found, [Answer([], text, reference=reference)])
        assert judged.scores[0].value == 0.0 and not judged.failures


@pytest.mark.parametrize(
    ("text", "reference"),
    [("-.5", "-0.50"), ("pages 3-4", "4"), ("-0", "0"), ("5, and", "5"), ("1,234, as said", "1234"), ("-$5", "-5")],
)
def test_numbers_are_read_as_people_write_them(text, reference):
    assert ExactMatch()([], text, reference=reference).value == NumberMatch()([], text, reference=reference).value == 1
