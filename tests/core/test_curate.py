"""The steps of the data factory that look at one document: layouts, cleaning, filters."""

import importlib.util
import json
from collections import Counter

import pytest

from tritium.core.curate.clean import Clean, anonymised, identified
from tritium.core.curate.filters import RULES, Filter, Measures
from tritium.core.curate.layouts import html_text, parse
from tritium.core.curate.reject import math_verify
from tritium.core.curate.step import Drop
from tritium.core.formats import RecordError
from tritium.core.rewards.make import make_reward

RECORDS = {
    "gsm8k": {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
    "numina": {"problem": "1+1?", "solution": "So \\boxed{2}.", "source": "amc", "messages": []},
    "math": {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": "It is \\boxed{2}."},
    "openr1": {"problem": "1+1?", "solution": "\\boxed{2}", "answer": "2", "generations": ["<think>a</think>2", "3"],
               "correctness_math_verify": [True, False], "uuid": "u"},
    "natural": {"question": "1+1?", "reference_answer": "2", "responses": [{"response_model": "m", "response": "2."}]},
    "svamp": {"Body": "He has 1", "Question": "And 1 more?", "Answer": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_maths_layouts_give_a_reference_that_their_answers_meet(name):
    document = parse(RECORDS[name])
    assert document["kind"] == "problem" and document["reference"] == "2"
    judge = make_reward("math")
    right = [judge((), a["text"], reference=document["reference"]).solved for a in document["answers"]]
    assert right == [a.get("right", True) for a in document["answers"]]
    assert not any("<<" in a["text"] for a in document["answers"])


def test_code_layouts_give_tests_that_their_solutions_pass():
    echo = "print(int(input()) * 2)"
    double = "def double(x):\n    return 2 * x"
    call = json.dumps({"inputs": [[2]], "outputs": [[4]], "fn_name": "double"})
    fenced = f"```python\n{echo}\n```"
    made = [
        parse({"question": "Double it.", "input_output": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]}),
               "solutions": json.dumps([echo]), "starter_code": ""}),
        parse({"question": "Double it.", "input_output": call,
               "solutions": json.dumps([double])}),
        parse({"name": "p", "description": "Double it.", "public_tests": {"input": ["2\n"], "output": ["4\n"]},
               "private_tests": {"input": ["3"], "output": ["6"]}, "generated_tests": {"input": [], "output": []},
               "solutions": {"language": [2, 3], "solution": ["int main(){}", echo]}}),
        parse({"id": "1/A", "description": "Double it.", "input_format": "x", "output_format": "2x", "note": None,
               "examples": [{"input": "2", "output": "4"}], "official_tests": [], "editorial": fenced}),
        parse({"task_id": 1, "text": "Double it.", "code": double, "test_list": ["assert double(2) == 4"]}),
        parse({"task_id": "H/1", "prompt": "def double(x):\n", "canonical_solution": "    return 2 * x\n",
               "test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "double"}),
    ]  # fmt: skip
    any_sum = "import sys\nn, right, said = [list(map(int, open(name).read().split())) for name in sys.argv[1:]]\n"
    any_sum += "print(int(len(said) == 2 and sum(said) == n[0]))"
    pair = {
        "description": "Two numbers of this sum.",
        "input_format": "n",
        "generated_checker": any_sum,
        "examples": [{"input": "5", "output": "2 3"}],
        "editorial": "```python\nprint(int(input()), 0)\n```",
    }
    made.append(parse(pair))
    judge = make_reward("code")
    assert judge((), "print(2, 4)", reference=made[-1]["reference"]).value == 0.0
    for unfit in ({"interaction_format": "ask"}, {"input_mode": "file"}):
        with pytest.raises(RecordError, match="standard input alone"):
            parse(pair | unfit)
    for document in made:
        assert document["kind"] == "problem" and len(document["answers"]) == 1
        assert judge((), document["answers"][0]["text"], reference=document["reference"]).solved, document


def test_chats_end_with_the_users_turn_and_their_last_answer_is_an_answer():
    made = [
        parse({"system_prompt": "Be kind.", "question": "Hi", "response": "Hello"}),
        parse({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        parse({"instruction": "Hi", "input": "", "output": "Hello"}),
        parse({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}),
    ]
    for document in made:
        assert document["kind"] == "chat" and document["messages"][-1]["content"] == "Hi"
        assert [a["text"] for a in document["answers"]] == ["Hello"]
    assert parse({"problem": "Prove it.", "solution": "Trivial."})["kind"] == "chat"  # nothing to verify by
    assert parse({"problem": "Prove it.", "solution": "Trivial.", "answer": "proof"})["kind"] == "chat"
    assert parse({"question": "Why?", "answer": "Because " + "of this " * 30})["kind"] == "chat"
    with pytest.raises(RecordError):
        parse({"unknown": 1})


def test_html_becomes_the_text_that_a_reader_sees():
    page = "<html><head><title>T</title></head><body><nav>menu</nav><h1>A &amp; B</h1>"
    page += "<p>one <b>two</b></p><script>x()</script><p>three"
    assert html_text(page) == "A & B\n\none two\n\nthree"
    assert parse({"html": page})["text"].startswith("A & B")
    assert html_text("<head><title>T</title><meta x><body><p>one") == "one"  # closing tags may be left out


def test_tags_that_never_end_take_no_time_and_other_signs_stay():
    assert len(html_text("<a " * 100_000)) > 200_000
    page = "<p>1<2, <b title='x<y'>bold</b> <!-- <i>gone</i> --> <script>if (a<b) {}</script>a <c and <i>d</i></p>"
    assert html_text(page) == "1<2, bold a <c and d"


def test_personal_data_is_replaced_and_sums_are_not():
    secret = "AKIA" + "A" * 16
    text = f"Mail jo.doe+x@mail.example.org, call +49 30 1234 5678 or (212) 555-0188, from 8.8.8.8; key {secret}."
    found = Counter()
    said = anonymised(text, found)
    assert said == "Mail <EMAIL>, call <PHONE> or <PHONE>, from <IP>; key <KEY>." and found.total() == 5
    for innocent in ("1234 - 5678 = -4444", "version 1.2.3", "127.0.0.1:8000", "12:30:45", "3.14159 26535", "x@y",
                     "2024-01-15", "1,000,000 + 2,000", "a+123456789"):  # fmt: skip
        assert anonymised(innocent, Counter()) == innocent


@pytest.mark.parametrize("pii", [True, False])
def test_texts_are_made_uniform_and_other_languages_left_out(pii):
    def cleaned(text):
        document = {"id": "1", "kind": "text", "text": text, "language": "", "provenance": [{"step": "clean"}]}
        return Clean(pii=pii, languages=["fr"]).one(document)

    document = cleaned("Le cafe\u0301 est a\u0300 la table\r\net il\u200b ne veut pas\x07 manger: a@b.org\ufeff")
    address = "<EMAIL>" if pii else "a@b.org"
    assert document["text"] == f"Le café est à la table\net il ne veut pas manger: {address}"
    assert document["language"] == "fr" and document["provenance"] == [
        {"step": "clean"} | ({"email": 1} if pii else {})
    ]
    assert cleaned(SENTENCES["de"]) == Drop("language de")


def test_the_most_frequent_of_equals_is_the_texts_first_in_every_process():
    text = "aa bb xxxxxxxx yyyyyyyyyy aa bb xxxxxxxx yyyyyyyyyy"  # 'aa bb', 'bb x…', 'x… y…': twice each
    assert Measures(text).top(2) == pytest.approx(2 * 4 / 44)
    symbols = RULES["max_symbol_words"].value(Measures("# a b c d e f g h i " * 2 + "... " * 2))
    assert symbols == pytest.approx(2 / 22)  # either, not both


SENTENCES = {
    "en": "The cat sat on the mat and it was happy with this.",
    "de": "Die Katze saß auf der Matte und sie war nicht zufrieden mit dem Essen.",
    "fr": "Le chat est sur la table et il ne veut pas manger avec les autres.",
    "es": "El gato está en la mesa y no quiere comer con los otros.",
    "ru": "Он не был в городе, но она сказала, что это было только для него.",
    "uk": "Він не був у місті, але вона сказала, що це було для нього.",
    "zh": "这是一个关于数学的问题，我们需要计算它的结果。",
    "ja": "これは数学の問題です。計算してください。",
    "ko": "이것은 수학 문제입니다.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_are_told_apart(language):
    assert identified(SENTENCES[language]) == language


@pytest.mark.skipif(not importlib.util.find_spec("py3langid"), reason="py3langid is not installed")
@pytest.mark.parametrize("language", SENTENCES)
def test_languages_are_those_of_the_library(language):
    assert identified(SENTENCES[language], "py3langid") == identified(SENTENCES[language])


def naive_repeated(words, n):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts, covered = Counter(grams), set()
    for i, gram in enumerate(grams):
        if counts[gram] > 1:
            covered.update(range(i, i + n))
    return sum(len(words[i]) for i in covered) / sum(map(len, words))


@pytest.mark.parametrize(
    "text", ["a b c d e f a b c d e f g", "one two " * 20, "x", "", "aa bb cc dd ee ff gg hh " * 2 + "end"]
)
def test_repeated_ngrams_are_what_the_paper_counts(text):
    words, measured = text.split(), Measures(text)
    for n in (5, 6, 10):
        assert measured.repeated(n) == pytest.approx(naive_repeated(words, n) if words else 0)
    if words:
        counts = Counter(zip(words, words[1:], strict=False))
        top, times = counts.most_common(1)[0] if counts else ((), 1)
        assert measured.top(2) == pytest.approx(times * len("".join(top)) / len("".join(words)) if times > 1 else 0)


PROSE = ("The committee met on Tuesday to review the plans that had been drawn up. Several members have asked for more "
         "detail about costs. It was agreed to return with a revised estimate, and to publish the minutes online. The "
         "chair thanked everyone and closed the session before noon, as had been announced beforehand.")  # fmt: skip
BREAKERS = {
    "min_words": "Too short to be of any use to the reader.",
    "max_repeated_lines": PROSE + ("\nBuy the best now and be happy" * 4),
    "max_repeated_5grams": PROSE + " to be read over again by all of you" * 4,
    "min_stop_words": " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60)),
    "min_alphabetic_words": PROSE + " 12 34 56 78 90" * 8,
    "max_bullet_lines": "\n".join(f"- item {chr(97 + i)} of the list that we have to be with" for i in range(9)),
    "max_symbol_words": PROSE + " #tag" * 8,
    "max_top_2gram": "the and of to have " * 3 + "bigword bigword2 " * 30,
    "max_mean_word": " ".join(["the", "and"] + ["incomprehensibilities" + chr(97 + i % 26) * 3 for i in range(60)]),
    "max_words": "word " * 100_001,
    "min_mean_word": "a of to be " * 20,
    "max_ellipsis_lines": "\n".join(f"read more about {name} and what comes of it …" for name in "abc"),
    "max_repeated_line_characters": PROSE + ("\nBuy the best now and be happy, as all of your friends are" * 3),
    "max_repeated_paragraphs": PROSE + "\n\nBuy now" * 3,
    "max_repeated_paragraph_characters": "\n\n".join([PROSE] * 2),
    "max_top_3gram": PROSE + " all of you" * 9,
    "max_top_4gram": PROSE + " all of you said" * 9,
    **{f"max_repeated_{n}grams": PROSE + " to be read over again by all of you and me" * 4 for n in range(5, 11)},
    "min_sentences": "One. Two.",
    "max_braces": PROSE + " {",
    "max_placeholders": PROSE + " Lorem ipsum.",
    "max_special_characters": PROSE + " §±∆|" * 60,
    "max_incomplete_lines": "\n".join(f"line number {i} that does not end in any way" for i in range(9)),
    "max_short_lines": "Too short.\n" * 9,
    "min_characters": "Too short.",
    "max_characters": "x" * 1_000_001,
}


def applied(text, **settings):
    document = {"id": "1", "kind": "text", "text": text, "scores": {}, "provenance": [{"step": "filter"}]}
    return Filter(**settings).one(document)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_finds_what_breaks_it(rule):
    outcome = applied(BREAKERS[rule], rules=[], limits={rule: RULES[rule].limit})
    assert isinstance(outcome, Drop) and outcome.reason == rule
    if RULES[rule].set != "none":
        assert isinstance(applied(BREAKERS[rule], rules=[RULES[rule].set]), Drop)
    assert applied(PROSE, rules=[], limits={rule: RULES[rule].limit})["text"] == PROSE


def test_prose_passes_all_rules_and_what_a_list_of_words_has_does_not(tmp_path):
    assert applied(PROSE, rules=["gopher", "c4", "yi"])["provenance"] == [{"step": "filter", "words": 53}]
    (tmp_path / "bad.txt").write_text("revised estimate\n")
    assert applied(PROSE, words=[str(tmp_path / "bad.txt")]).reason == "a word of bad.txt"


def test_rules_on_words_know_scripts_without_spaces():
    text = "".join(SENTENCES["zh"] + chr(0x4E00 + 37 * i) for i in range(4))
    assert applied(text, rules=[], limits={"min_words": 50, "min_mean_word": 3, "min_stop_words": 2})["id"] == "1"


@pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="math-verify is not installed")
def test_answers_are_judged_as_the_library_does():
    cases = [("0.5", "so \\boxed{\\frac{1}{2}}", True), ("12", "the answer is $12$", True), ("3", "\\boxed{4}", False),
             ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}", True), ("(1, 2)", "\\boxed{(2, 1)}", False)]  # fmt: skip
    for reference, text, right in cases:
        assert math_verify((), text, reference=reference).solved == right, text
        assert make_reward("math")((), text, reference=reference).solved == right, text
