"""What a data factory must not do to good data: signs of calculation, code, tools, and what no judge could judge."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from tritium.core.curate.clean import Clean, anonymised
from tritium.core.curate.distil import extracted
from tritium.core.curate.layouts import html_text, parse
from tritium.core.curate.minhash import word_hashes
from tritium.core.curate.reject import verifier
from tritium.core.formats import RecordError
from tritium.core.rewards import Score
from tritium.core.select import distinct_paths
from tritium.stages import curate


def run(tmp_path, rows, steps, out="out"):
    """The documents that a pipeline leaves, its last step's summary, and the rows of a file that it wrote."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tables = {"collect": {"sources": [str(source)]}} | steps
    curate.train(curate.Config(steps=tables, out=str(tmp_path / out), workers=1, shard_mb=0.001))
    (last,) = sorted((tmp_path / out / "steps").iterdir())[-1:]
    documents = [json.loads(line) for f in sorted(last.glob("*.jsonl")) for line in f.open(encoding="utf-8")]
    return documents, json.loads((tmp_path / out / "curate.json").read_text())["steps"][-1]


def written(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def judges(monkeypatch):
    """`fussy`, which fails on what says "odd", and gives the length of the rest."""

    def fussy(ids, text, *, prompt="", reference=""):
        if "odd" in text:
            raise ValueError("no idea")
        return Score(float(len(text)), right=True)

    monkeypatch.setattr("tritium.core.rewards.make.make_reward", lambda spec: fussy)


@pytest.mark.parametrize("role", [{"verify": "fussy"}, {"accept": {"fussy": 1.0}}, {"score": "fussy"}])
def test_of_answers_that_a_judge_failed_on_nothing_is_learned(tmp_path, judges, role):
    def row(i, gold, *others):
        tried = {f"m{k}": {"solution": text, "is_correct": True} for k, text in enumerate(others)}
        return {"question": f"{i}?", "answer": f"{gold}\n#### 1"} | tried

    rows = [row(1, "plain answer", "an odd one"), row(2, "odd", "also odd")]
    documents, summary = run(tmp_path, rows, {"reject": {"verify": "none"} | role | {"keep": 9, "pairs": 9}})
    assert [m["messages"][-1]["content"] for m in written(tmp_path, "sft")] == ["plain answer\n#### 1"]
    assert written(tmp_path, "pairs") == written(tmp_path, "rankings") == []  # it is no worse answer either
    assert len(documents) == 1 and summary["dropped"] == {"no answer that could be judged": 1}
    assert sum(n for note, n in summary["notes"].items() if "no idea" in note) == 3


def test_a_set_is_compared_as_maths_and_tests_are_run():
    assert verifier({"reference": "{1, 2}"}) == "math"
    assert verifier(parse({"text": "Double it.", "code": "f", "test_list": ["assert f(2) == 4"]})) == "code"


def test_what_is_selected_after_rejection_is_what_is_learned(tmp_path):
    def row(question, *right):
        return {"question": question, "answer": "1"} | {
            f"m{k}": {"solution": f"it is {1 if r else 0}", "is_correct": r} for k, r in enumerate(right)
        }

    rows = [row("easy?", True, True), row("good?", True, False), row("hard?", False, False)]
    steps = {"reject": {"keep": 9}, "select": {"low": {"pass_rate": 0.2}, "high": {"pass_rate": 0.9}}}
    documents, summary = run(tmp_path, rows, steps)
    assert [d["messages"][0]["content"] for d in documents] == ["good?"]
    assert {r["messages"][0]["content"] for r in written(tmp_path, "sft")} == {"good?"}
    assert [r["prompt"][0]["content"] for r in written(tmp_path, "pairs")] == ["good?"]
    assert summary["facts"]["pairs.jsonl"] == 1


def test_signs_of_calculation_are_words_and_marks_of_prose_are_not():
    def words(text):
        hashes, _, starts, ends = word_hashes([text.encode()])
        return [text.encode()[a:b].decode() for a, b in zip(starts, ends, strict=True)], hashes.tolist()

    assert words("x^2-3x + 2 = -1 ")[0] == ["x", "^", "2", "-", "3x", "+", "2", "=", "-", "1"]
    assert words("state-of-the-art -- *so* a/b\n- item")[0] == ["state", "of", "the", "art", "so", "a", "b", "item"]
    assert words("“Don’t” «go»…")[1] == words('"Don\'t" go')[1]
    assert words("三，四。五")[0] == ["三", "，", "四", "五"]


def test_problems_that_differ_by_a_sign_are_two(tmp_path):
    rows = [{"text": f"Find all real x for which x^2 {a} 3x {b} 2 = 0 and check"} for a in "+-" for b in "+-"]
    documents, _ = run(tmp_path, rows, {"near": {"threshold": 0.9}})
    assert len(documents) == 4


def test_evaluation_items_are_met_in_other_typography_and_templates_and_not_with_other_signs(tmp_path):
    svamp = {"Body": "He has 3 pens", "Question": "How many has he?", "Answer": 3.0}
    items = [{"question": "What is 12 + 30?"}, {"question": "Didn't Tom's dog eat all of Ann's bones today?"}, svamp]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in [*items, {"id": 3}]))
    rows = [
        {"question": "What is 12 - 30?", "answer": "-18"},
        {"messages": [{"role": "user", "content": "what is 12+30"}, {"role": "assistant", "content": "42"},
                      {"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Gladly."}]},
        {"question": "Answer briefly: “Didn’t Tom’s dog eat all of Ann’s bones today?”", "answer": "no"},
        svamp,
    ]  # fmt: skip
    documents, summary = run(tmp_path, rows, {"decontaminate": {"against": [str(tmp_path / "eval.jsonl")]}})
    assert [d["messages"][0]["content"] for d in documents] == ["What is 12 - 30?"]
    assert summary["facts"] == {"items of evaluation sets": 3, "records that ask nothing": 1}


def test_matrix_products_are_no_mail_addresses_and_addresses_may_be_short():
    found = Counter()
    code = "y = q@k.transpose(-2, -1) + X@W.mean(0)[1]; std::vector a::b fe80::1"
    assert anonymised(code, found) == code
    assert anonymised("ask 2606:4700:4700::1111, not 8.8.4.4", found) == "ask <IP>, not <IP>" and found == {"ip": 2}


def cleaned(document, **options):
    return Clean(**options).one({"id": "1", "language": "", "provenance": [{"step": "clean"}], "scores": {}} | document)


def test_what_tools_are_called_with_is_cleaned_and_tells_conversations_apart(tmp_path):
    def row(to):
        call = {"name": "send", "arguments": {"to": [to], "text": "Hi"}}
        turns = [("human", "Write."), ("function_call", json.dumps(call)), ("observation", "ok"), ("gpt", "Done.")]
        return {"conversations": [{"from": f, "value": v} for f, v in turns], "tools": '[{"name": "send"}]'}

    documents, _ = run(tmp_path, [row("jo@mail.example.org"), row("Ann"), row("Ann")], {"exact": {}, "clean": {}})
    calls = [d["messages"][1]["tool_calls"][0]["arguments"]["to"] for d in documents]
    assert calls == [["<EMAIL>"], ["Ann"]] and documents[0]["messages"][0]["tools"] == [{"name": "send"}]


def test_records_that_break_later_steps_are_told_apart_at_once(tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": "Who?"}) + "\n")
    rows = [
        {"system_prompt": ["be", "kind"], "question": "q", "response": "r"},
        {"messages": [{"role": "assistant", "content": "nobody asked"}]},
        {"\ud800": 1},
        {"question": "How many?", "answer": 10**400},
    ]
    documents, _ = run(tmp_path, rows, {"decontaminate": {"against": [str(tmp_path / "eval.jsonl")]}, "reject": {}})
    assert [d["answers"][0]["text"] for d in documents] == [str(10**400)]
    (first, *_) = json.loads((tmp_path / "out/curate.json").read_text(encoding="utf-8"))["steps"]
    assert first["dropped"].pop("a record of unknown form (keys: \ud800)") == 1
    assert sorted(first["dropped"]) == ["a conversation without a question", "a record whose system is not text"]


def test_text_that_utf8_can_not_hold_is_no_reply_of_a_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr("tritium.core.rewards.llm.Endpoint.ask", lambda *_: "half \ud800")
    step = {"do": "distil", "teacher": "http://127.0.0.1:9/v1"}
    documents, summary = run(tmp_path, [{"instruction": "Say", "output": "gold"}], {"ask": step})
    assert [a["by"] for a in documents[0]["answers"]] == ["gold"] and list(summary["notes"].values()) == [1]


def test_marks_of_right_and_wrong_that_are_neither_say_nothing():
    marked = parse({"problem": "p", "generations": ["a", "b", "c"], "correctness_math_verify": ["yes", True, None]})
    assert [a.get("right") for a in marked["answers"]] == [None, True, None]


def test_endless_runs_of_one_sign_do_not_hold_a_pipeline_up():
    """Each took minutes: a pattern began anew at every sign, and looked at all that follow."""
    tokens, digits = "eyJ-" * 100_000, "1" * 200_000
    assert anonymised(tokens, Counter()) == tokens and distinct_paths([digits, digits]) == [0]
    assert extracted("\n" * 100_000 + "**Question:** q\n\n---\n**Answer:** a", ["question", "answer"]) == {
        "question": "q", "answer": "a"
    }  # fmt: skip


def test_letters_that_an_invisible_sign_parts_from_their_accent_are_normalised():
    assert Clean().changed("e\u200b\u0301", Counter()) == "é"


def test_a_turn_that_is_not_to_be_learned_is_no_answer():
    said = [("user", "a", 1), ("assistant", "b", 1), ("user", "c", 1), ("assistant", "d", 0)]
    turns = [{"role": role, "content": text, "weight": weight} for role, text, weight in said]
    assert [a["text"] for a in parse({"messages": turns})["answers"]] == ["b"]
    with pytest.raises(RecordError, match="nothing is to be learned"):
        parse({"messages": turns[2:]})


def test_nothing_but_invisible_signs_is_no_text():
    assert cleaned({"kind": "text", "text": "\u200b\ufeff \x07"}).reason == "no text"
    fence = "```python\nfor i in a: del il[e], un, la, le, los\n```"
    assert cleaned({"kind": "text", "text": f"Write a loop that is short.\n{fence}"})["language"] == "en"


def test_pages_keep_their_tables_apart_their_code_indented_and_what_a_form_wraps():
    assert html_text("<form><p>All of\n the page</p></form><button>OK</button>") == "All of the page"
    assert html_text("<table><tr><td>a</td><td>b</td></tr></table><dl><dt>k<dd>v</dl>") == "a b\n\nk\nv"
    assert html_text("<pre>def f():\n    return  1\n</pre>") == "def f():\n    return  1"


def test_every_failure_of_a_teacher_is_counted(tmp_path, monkeypatch):
    said = {"answers": lambda question: RuntimeError("down"), "facts": lambda question: "- "}
    problem = {"problem": "Why?", "solution": "", "answer": "2"}
    for task, row in (("answers", problem), ("facts", {"text": "Water is wet."})):
        model = SimpleNamespace(replies=lambda asked, seeds, say=said[task]: [say(q) for q in asked])
        monkeypatch.setattr("tritium.core.curate.distil.Distil.source", model)
        ask = {"do": "distil", "teacher": "http://nowhere/v1", "n": 3, "which": "unanswered"}
        _, summary = run(tmp_path, [row], {"ask": ask | ({"task": "facts"} if task == "facts" else {})}, out=task)
        lost = sum(summary["dropped"].values()) + sum(summary["notes"].values())
        assert lost == (3 if task == "answers" else 1), summary


def test_sources_that_are_gone_leave_no_tokens_and_steps_do_not_overwrite_each_other(tmp_path):
    from tritium.core.config import ConfigError
    from tritium.core.tokenizer import train_tokenizer

    train_tokenizer(["some other words here"] * 9, 265, tmp_path / "t")
    pack = {"pack": {"tokenizer": str(tmp_path / "t")}}
    for source in ("old", "new"):
        (tmp_path / "in.jsonl").write_text('{"text": "some words"}\n')
        collect = {"sources": [str(tmp_path / "in.jsonl")], "source": source}
        curate.train(curate.Config(steps={"collect": collect} | pack, out=str(tmp_path / "out"), workers=1))
    assert {f.name.partition(".")[0] for f in (tmp_path / "out/pack").iterdir()} == {"new"}
    twice = {"a": {"do": "reject", "kinds": ["chat"]}, "b": {"do": "reject", "kinds": ["problem"]}}
    with pytest.raises(ConfigError, match="overwrite"):
        curate.Config(steps={"collect": collect} | twice)


def test_rules_for_prose_take_no_maths_and_no_code(tmp_path):
    rows = [{"question": "1+1?", "answer": "#### 2"}, {"text": "too short"},
            {"text": "Double it.", "code": "def f(x): return 2 * x", "test_list": ["assert f(2) == 4"]}]  # fmt: skip
    documents, summary = run(tmp_path, rows, {"filter": {"rules": ["gopher", "c4", "yi"]}})
    assert [d["kind"] for d in documents] == ["problem", "problem"] and summary["dropped"] == {"min_words": 1}
    assert run(tmp_path, rows, {"filter": {"rules": ["gopher"], "kinds": []}}, out="all")[0] == []


@pytest.mark.parametrize(
    "text", ["2023:08:14 12:30:00", "x = rows[2000::2]", "3000:10:20", "y = x@W.weight.t()", "X@W.mean(0)"]
)
def test_dates_slices_and_products_are_no_addresses(text):
    assert anonymised(text, Counter()) == text


@pytest.mark.parametrize("address", ["2a00:1450::1", "2606:4700:4700::1111", "2a00:1450:4001:0081:0000:0000:0000:200e"])
def test_what_is_an_address_of_version_6_is_replaced(address):
    assert anonymised(f"ping {address}, then", Counter()) == "ping <IP>, then"


def test_a_line_of_code_hides_no_language_of_the_lines_after_it(tmp_path):
    german = (
        "Der Mann ging mit dem Hund in den Wald und die Frau war nicht da, weil sie auf das Kind gewartet hat. " * 5
    )
    documents, _ = run(tmp_path, [{"text": "from x import y\n" + german}], {"clean": {}})
    assert documents[0]["language"] == "de"


def test_a_pre_that_is_closed_and_was_not_open_spoils_no_other():
    assert html_text("a</pre><pre>if x:\n    y</pre>").endswith("if x:\n    y")
