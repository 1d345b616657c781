"""Judges by their text: mathematics that is equal, forms, and the sums that are made of them."""

import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tritium.core.config import ConfigError
from tritium.core.rewards import Answer, Score, judge
from tritium.core.rewards.make import Abstain, Gate, WeightedSum, make_reward
from tritium.core.rewards.maths import MathMatch, equivalent
from tritium.core.rewards.worker import WorkerError


def value(spec, text: str, reference: str = "", tokens: int = 0) -> float:
    return make_reward(spec)([0] * tokens, text, reference=reference).value


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("Half of them, so the answer is 50%.", r"\frac12"),
        (r"so $x = \frac{\sqrt{12}}{2}$", r"\sqrt3"),
        (r"\boxed{\dfrac{2\sqrt3}{3}}", r"2/\sqrt{3}"),
        (r"\boxed{\frac{1}{1+\sqrt2}}", r"\sqrt{2} - 1"),
        ("50", r"50\%"),
        ("50%", "50"),
        ("(x+1)^2", "x^2 + 2x + 1"),
        ("2\\pi r", "2 r π"),
        ("x^{-1}", "1/x"),
        (r"\{1, 2\}", "{2, 1}"),
        ("x = 1 or x = 2", "2, 1"),
        (r"1 \pm \sqrt{2}", r"1-\sqrt2, 1+\sqrt2"),
        (r"(-\infty, 3] \cup [5, 7)", "[5,7) ∪ (-∞, 3]"),
        (r"x \in [1, 2)", "[1,2)"),
        (r"\left(\frac12, 3\right)", "(0.5, 3)"),
        ("1.5 m", "150 cm"),
        ("1 hour", "60 minutes"),
        (r"5\text{ cm}", "5"),
        (r"90^\circ", "90"),
        ("1 1/2", "1.5"),
        (r"-1\frac{1}{2}", "-1.5"),
        ("$1,234.50", "1234.5"),
        ("1{,}234", "1234"),
        (r"3\times10^2", "300"),
        ("2^{1000}", "4^{500}"),
        (r"\text{Paris}", "paris"),
        ("(C)", "C"),
        ("first 7, then\n<think>no, 8</think>The total is 9 apples.", "9"),
    ],
)
def test_the_same_mathematics_is_right(answer, reference):
    assert MathMatch()([], answer, reference=reference).value == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("0.333", "1/3"),
        ("0.5%", "0.5"),
        ("50", "0.5"),
        (r"\boxed{4} or \boxed{5}", "4"),
        ("[1,2]", "[1,2)"),
        ("(1,2)", "(2,1)"),
        ("{1,2}", "{1,2,3}"),
        ("12", "1,2"),
        ("5 cm", "5 m"),
        ("5 km", "5 kg"),
        ("x^2", "2x"),
        ("x+1", "x-1"),
        (r"\sqrt2", "1.41421356"),
        ("1/0", "0"),
        ("__import__('os').getpid()", "0"),
        ("9^9^9^9", "1"),
        ("9" * 290 + "^9999", "1"),
        ("1e999999999", "1"),
        ("(a+b+c+d+f)^5000", "1"),
        ("(" * 2000 + "1" + ")" * 2000, "2"),
        ("\\frac{" * 300, "1"),
        ("<think>the answer is 4</think>5", "4"),
    ],
)
def test_other_mathematics_is_wrong_and_ends_at_once(answer, reference):
    assert MathMatch()([], answer, reference=reference).value == 0.0


@pytest.mark.parametrize(
    ("reference", "part"),
    [("5_8", "8"), ("7 \\pmod{12}", "12"), ("$7 \\pmod{12}$", "12"), ("\\lfloor 3.7 \\rfloor", "3.7")],
)
def test_a_part_of_a_reference_that_is_not_understood_is_no_right_answer(reference, part):
    assert MathMatch()([], f"\\boxed{{{part}}}", reference=reference).value == 0.0
    assert MathMatch()([], f"\\boxed{{{reference}}}", reference=reference).value == 1.0


@pytest.mark.parametrize("verdict", ["same", "other", "sympy"])
def test_hundreds_of_pairs_that_fool_or_confuse_judges(verdict):
    """The file's lines: verdict, answer, reference, between tabs; "sympy" for the same where sympy is installed."""
    if verdict == "sympy":
        pytest.importorskip("sympy")
    lines = Path(__file__).with_name("maths_pairs.tsv").read_text("utf-8").splitlines()
    pairs = [line.split("\t")[1:] for line in lines if line.startswith(verdict)]
    assert len(pairs) > 5 and [pair for pair in pairs if equivalent(*pair) != (verdict != "other")] == []


@pytest.mark.parametrize(
    "answer",
    ["1 a" + "  b" * 300 + "!", "answer is " * 20_000, "\\boxed{" * 20_000, "1," * 400, "sin1," * 100,
     "\\pm" * 300 + "1", "(x+1)^{9999}", "(x+y+z+a+b)^{40}/(x+y)^{40}",
     "\\sqrt{" + "9" * 290 + "}", "1000!!!!", "e^{e^{e^{e^{9}}}}"],
)  # fmt: skip
def test_answers_made_to_hang_the_judge_do_not_and_are_wrong(answer):
    judged = judge(MathMatch(), [Answer([], answer, reference="1, 2")], seconds=20)
    assert judged.scores[0].value == 0.0 and not judged.failures


def test_what_needs_sympy_too_often_is_the_judges_failure_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr("tritium.core.rewards.maths.call", lambda *_: time.sleep(0.05))
    many = ", ".join(f"\\ln {i}" for i in range(2, 40))
    if find_spec("sympy"):
        judged = judge(MathMatch(seconds=0.1), [Answer([], many, reference=many.replace("ln 2,", "ln 41,"))])
        assert "too many comparisons" in str(judged.failures)


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        (r"first \boxed{4}, then \boxed{5", "5", False),  # cut off
        (r"\boxed{4} or rather \boxed{\boxed{5}}", "5", True),
        (r"\boxed{\{1, 2\}}", "{2, 1}", True),
        ("so $x = 5$", "5", True),
        ("No, 5", "5", True),
        ("so a + b = 7", "7", True),
        ("2x + 3y = 6", "6y = 12 - 4x", True),
        ("2x + 3y = 6", "3x + 2y = 6", False),
        ("It is 1/2", "2", False),
        ("The answer is 2", "The answer is 2", True),
        ("The answer is:\n\\[\n42\n\\]", "42", True),
        ("So the answer is `42`.", "42", True),
        ("Tea is $4 / 2 = $2.0 and she has $50 - $35 = $15.\nA: 15", "15", True),  # dollars are no formulas
        ("It is $36 - $11 = $<<36-11=25>>25 and $25 - $4 = $<<25-4=21>>21.\nA: 21", "21", True),
        ("The solutions are $x=1$ and $x=2$.", "1, 2", True),
        ("The solutions are $x=1$ and $x=3$.", "1, 2", False),
        ("For $n=5$ the solutions are $1, 2$.", "1, 2", True),
        ("It is on $\\text{Tuesday}$", "Tuesday", True),
        (r"\boxed{18}", "She has 9 + 9 of them.\nThe total is 18 apples.", True),
        ("#### 1/2", "So the answer is: $0.5$.", True),
        ("The answer is 3", "The answer is 2", False),
        ("x = 2", "so $x = 2$", True),
        ("no solution", "No solution", True),
        ("Evelyn", "the answer is Evelyn.", True),
    ],
)
def test_what_counts_as_the_answer(text, reference, right):
    assert MathMatch()([], text, reference=reference).value == float(right)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        (r"\sqrt[3]{8}", "2", True),
        (r"\sin^2(x)+\cos^2(x)", "1", True),
        ("e^{2x}", "(e^x)^2", True),
        (r"\frac{\ln 8}{\ln 2}", "3", True),
        (r"\ln 8", "2", False),
        (r"\sqrt[3]{9}", "2", False),
    ],
)
def test_what_is_not_rational_goes_to_sympy(answer, reference, same):
    pytest.importorskip("sympy")
    assert equivalent(answer, reference) is same


def test_a_reference_that_is_missing_is_the_judges_failure():
    assert judge(MathMatch(), [Answer([], "4")]).failures


def test_a_catastrophic_pattern_is_killed_counted_and_the_next_answer_is_judged():
    pattern = make_reward("regex('^(a+)+$', seconds=0.5)")
    judged = judge(pattern, [Answer([], "a" * 40 + "b"), Answer([], "aaa"), Answer([], "b")])
    assert [score and score.value for score in judged.scores] == [None, 1.0, 0.0]
    assert [name.partition(":")[0] for name in judged.failures] == [WorkerError.__name__]


@pytest.mark.parametrize(
    ("spec", "text", "expected"),
    [
        ("tags('think', 'answer')", "<think>a</think>\n<answer>b</answer>", 1.0),
        ("tags('think', 'answer')", "a</think><answer>b</answer>", 1.0),  # opened in the prompt
        ("tags('think', 'answer')", "<answer>b</answer><think>a</think>", 0.0),
        ("tags('think', 'answer')", "<think>a<answer>b</answer></think>", 0.5),
        ("tags", "<think>a</think><think>b</think>c", 0.0),
        ("tags", "no tags", 0.0),
        ("json", '```json\n{"a": 1}\n```', 1.0),
        ("json('a', 'b')", '{"a": 1}', 0.5),
        ("json", "{'a': 1}", 0.0),
        ("json", "[" * 100_000, 0.0),
        ("repetition(2)", "a b a b a b", 0.6),
        ("repetition(2)", "a b c d", 0.0),
        ("repetition", "", 0.0),
        ("repetition(2)", "哈哈哈哈", 2 / 3),
        ("language('ru')", "Привет, мир! 123", 1.0),
        ("language('en')", "Hello мир", 5 / 8),
        ("language('ja')", "日本語です", 1.0),
        ("language('ja')", "中文", 0.0),
        ("language('zh')", "中文", 1.0),
        ("language('en')", "12345", 0.0),
    ],
)
def test_forms(spec, text, expected):
    assert value(spec, text) == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "expected"), [(0, 1), (100, 1), (150, 0.5), (200, 0), (1000, 0)])
def test_length_falls_between_two_numbers(tokens, expected):
    assert value("length(100, 200)", "", tokens=tokens) == expected


@pytest.mark.parametrize("text", ["a bad  word", "BAD\u200b WORD!", "b\u0301ad word", "ｂａｄ ｗｏｒｄ"])
def test_words_are_found_in_disguise(tmp_path, text):
    (tmp_path / "words.txt").write_text("# what may not be said\nbad word\nc++\n")
    spec = f"words({str(tmp_path / 'words.txt')!r})"
    assert value(spec, text) == 0.0 and value(spec, "a badword, not bad words") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", 1),
        ("5", -4),
        ("I don't know.", 0),
        ("<think>4?</think>I don’t know", 0),
        ("I don't know, 5", -4),
        ("5 I don't know", -4),
    ],
)
def test_abstention_costs_nothing_and_a_hedged_guess_is_a_guess(text, expected):
    assert value("abstain(exact)", text, "4") == expected


def test_a_weighted_sum_shows_its_components_and_who_is_right():
    score = make_reward("math + 0.5*tags - length(1, 2)")([0], "<think>a</think>7", reference="8")
    assert score.value == -0.5 and score.parts == {"math": 0, "tags": 1, "length(1, 2)": 1} and not score.solved
    right = make_reward("0.1*math - repetition")([], "8", reference="8")
    assert right.value == pytest.approx(0.1) and right.solved


def test_a_component_that_fails_fails_the_sum_and_no_other_answer():
    judged = judge(make_reward("exact + tags"), [Answer([], "4", reference="4"), Answer([], "4")])
    assert judged.scores[0].value == 1.0 and judged.scores[1] is None
    assert list(judged.failures) == ["ValueError: exact: there is no reference answer to compare with"]


def test_a_gate_asks_the_judge_only_where_it_is_open():
    asked = []

    def record(ids, text, **_):
        asked.append(text)
        return Score(0.7)

    judged = judge(Gate(make_reward("json"), record, closed=-1), [Answer([], "{}"), Answer([], "no")])
    assert [s.value for s in judged.scores] == [0.7, -1] and asked == ["{}"] and not judged.scores[1].solved


def test_clipping_bounds_the_value_and_keeps_who_is_right():
    score = make_reward("clip(math - 5*tags, -1, 1)")([], "<think>a</think>8", reference="8")
    assert score.value == -1 and score.solved


def test_malformed_answers_take_the_value_that_the_stage_gives_unless_the_text_does():
    for spec, expected in (("exact", -0.5), ("exact(malformed=-2)", -2), ("tags + math", -0.5)):
        assert make_reward(spec, malformed=-0.5)([], "", reference="4").value == expected


def test_a_sum_with_one_term_of_weight_one_is_that_judge():
    assert isinstance(make_reward("math"), MathMatch) and isinstance(make_reward("2*math"), WeightedSum)
    assert isinstance(make_reward("abstain(math, wrong=-1)"), Abstain)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("maths", "did you mean math"),
        ("math +", "can't be read"),
        ("", "can't be read"),
        ("math.real", "is no judge"),
        ("0.5", "is no judge"),
        ("length(200, 100)", "below the second"),
        ("length", "missing 2 required"),
        ("math(colour=1)", "unexpected keyword"),
        ("regex('(')", "unterminated"),
        ("language('tlh')", "one of en"),
        ("words('/no/such')", "no such file"),
        ("__import__('os').system('true')", "is no judge"),
        ("gate(tags, 3)", "3 is no judge"),
        ("clip('math')", "'math' is no judge"),
        ("clip(math, 1, -1)", "the first must not be above the second"),
    ],
)
def test_a_mistake_in_a_rewards_text_is_explained(spec, words):
    with pytest.raises(ConfigError, match=words):
        make_reward(spec)
