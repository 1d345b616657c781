"""The steps that ask models: teachers that answer, time out or talk nonsense; embeddings, classifiers, mixtures."""

import contextlib
import importlib.util
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tritium.core.config import ConfigError, UserError
from tritium.core.curate import distil, reject, semantic
from tritium.core.curate.mixture import best_mixture, best_ratio, fit_mixture, fit_replay, simplex
from tritium.core.curate.select import clusters, mixed
from tritium.core.curate.semantic import Embedder, most_similar
from tritium.stages import curate

CONFUSED = "mumble"


@pytest.fixture
def teacher():
    """A server that says `say(question, seed)`; None: HTTP 503; "": no reply before the time-out; "…": cut off."""
    over = threading.Event()
    state = {"asked": [], "say": lambda question, seed: f"It is so. {seed % 97}"}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"]
            state["asked"].append(question)
            said = state["say"](question, body.get("seed", 0))
            if said == "":
                over.wait()  # longer than the client does
            self.send_response(503 if said is None else 200)
            self.end_headers()
            if said is not None:
                choice = {"message": {"content": said}, "finish_reason": "length" if said[-1] == "…" else "stop"}
                self.wfile.write(json.dumps({"choices": [choice]}).encode())

        def log_message(self, *arguments):
            pass

        def handle(self):
            with contextlib.suppress(OSError):  # the client has left
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state["url"] = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def run(tmp_path, rows, steps, out="out", **settings):
    """The documents that a pipeline leaves, and its last step's summary."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {"collect": {"sources": [str(source)]}} | steps
    curate.train(curate.Config(steps=tables, out=str(tmp_path / out), workers=1, **({"shard_mb": 0.001} | settings)))
    summary = json.loads((tmp_path / out / "curate.json").read_text())["steps"][-1]
    (last,) = sorted((tmp_path / out / "steps").iterdir())[-1:]
    return [json.loads(line) for f in sorted(last.glob("*.jsonl")) for line in f.open()], summary


def prompts(count):
    return [{"instruction": f"Explain thing number {i} in few words", "output": f"gold {i}"} for i in range(count)]


FAST = {"tries": 2, "wait": 0.01, "seconds": 20.0}


def test_a_teachers_answers_are_added_and_cached(tmp_path, teacher):
    step = FAST | {"do": "distil", "teacher": teacher["url"], "n": 2}
    documents, summary = run(tmp_path, prompts(5) + [{"question": "1+1?", "answer": "2"}], {"ask": step})
    assert [[a["by"] for a in d["answers"]] for d in documents] == [["gold", *["teacher/answer"] * 2]] * 5 + [["gold"]]
    assert len(teacher["asked"]) == 10 and summary["rows"] == 6  # what has a reference needs no teacher
    texts = [a["text"] for d in documents for a in d["answers"][1:]]
    assert len(set(texts)) > 5  # a seed of its own for each
    (tmp_path / "out/steps/01-ask").rename(tmp_path / "gone")
    again, _ = run(tmp_path, prompts(5) + [{"question": "1+1?", "answer": "2"}], {"ask": step})
    assert again == documents and len(teacher["asked"]) == 10


def test_a_reply_that_was_kept_with_its_end_cut_off_is_asked_for_again(tmp_path, teacher, monkeypatch):
    step = FAST | {"do": "distil", "teacher": teacher["url"]}
    teacher["say"] = lambda question, seed: "It is…"
    with monkeypatch.context() as patch:
        patch.setattr(distil.Distil, "drawn", {"temperature": 0.7, "max_tokens": 512, "whole": False})
        documents, _ = run(tmp_path, prompts(2), {"ask": step})
    assert [d["answers"][-1]["text"] for d in documents] == ["It is…"] * 2
    shutil.rmtree(tmp_path / "out/steps")
    teacher["say"] = lambda question, seed: "It is so."
    documents, _ = run(tmp_path, prompts(2), {"ask": step})
    assert [d["answers"][-1]["text"] for d in documents] == ["It is so."] * 2


def test_a_run_that_ends_in_the_middle_asks_nothing_twice_and_gives_the_same(tmp_path, teacher):
    step = FAST | {"do": "distil", "teacher": teacher["url"], "batch": 2}
    whole, _ = run(tmp_path, prompts(12), {"ask": step}, out="whole")
    said, teacher["asked"][:] = list(teacher["asked"]), []
    real = distil.Distil.ask

    def fails_after(count):
        calls = iter(range(count))

        def ask(self, *arguments):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(self, *arguments)

        return ask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil.Distil, "ask", fails_after(4))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, prompts(12), {"ask": step}, out="cut")
    documents, _ = run(tmp_path, prompts(12), {"ask": step}, out="cut")
    assert documents == whole and sorted(teacher["asked"]) == sorted(said)


def test_a_judge_is_asked_nothing_twice_where_a_run_ends_among_its_answers(tmp_path, teacher, monkeypatch):
    """The judge says something else each time: only what was kept can make the files equal."""
    given = iter(range(100))
    teacher["say"] = lambda question, seed: f"Score: {1 + next(given) % 10}"
    monkeypatch.setattr(reject.Reject, "BATCH", 2)
    steps = {"reject": {"score": f"judge('{teacher['url']}', tries=1)", "accept": {"length(5, 9)": 0.5}}}
    rows = [row | {"m": {"solution": "it is 0", "is_correct": False}} for row in [{"question": f"{i} + 1?",
            "answer": str(i + 1)} for i in range(9)]]  # fmt: skip
    real, calls = reject.Reject.verdict, iter(range(5))

    def verdict(self, document):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(self, document)

    with monkeypatch.context() as patch:
        patch.setattr(reject.Reject, "verdict", verdict)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, rows, steps, shard_mb=1)
    asked = len(teacher["asked"])
    documents, _ = run(tmp_path, rows, steps, shard_mb=1)
    assert asked == 2 * 6 and len(teacher["asked"]) == 2 * 9
    scores = [round(9 * a["score"]) for d in documents for a in d["answers"]]
    assert sorted(scores) == sorted(i % 10 for i in range(18))  # each reply counted once
    shutil.rmtree(tmp_path / "out/steps/01-reject")
    assert run(tmp_path, rows, steps, shard_mb=1)[0] == documents and len(teacher["asked"]) == 18


def test_a_teacher_that_fails_costs_its_own_documents_only(tmp_path, teacher):
    seen: dict[str, int] = {}

    def say(question, seed):
        seen[question] = seen.get(question, 0) + 1
        if "number 1 " in question:
            return None  # busy for ever
        if "number 2 " in question:
            return ""  # too slow
        if "number 4 " in question:
            return "It is because of …"
        return None if "number 3 " in question and seen[question] == 1 else "fine"  # busy once

    teacher["say"] = say
    rows = [{"instruction": row["instruction"], "output": "x"} for row in prompts(6)]
    step = FAST | {"do": "distil", "teacher": teacher["url"], "seconds": 0.5}
    documents, summary = run(tmp_path, rows, {"ask": step})
    answered = [len(d["answers"]) == 2 for d in documents]
    assert answered == [True, False, False, True, False, True] and seen["Explain thing number 3 in few words"] == 2
    assert seen["Explain thing number 4 in few words"] == 1
    assert any("cut off" in row["detail"] for row in summary["samples"]["the teacher did not answer"])
    assert summary["notes"] == {"the teacher did not answer": 3} and summary["rows"] == 6 and not summary["dropped"]
    assert "503" in (page := (tmp_path / "out/curate.html").read_text()) and "the teacher did not answer" in page
    teacher["say"] = lambda question, seed: None
    with pytest.raises(UserError, match=r"none of 9 replies .*503.*start it"):
        run(tmp_path, prompts(9), {"ask": step}, out="dead", shard_mb=1)


REPLIES = {  # task → what the teacher says, and what the last document then is: its question, its last answer
    "chain": ("one, two", "Explain thing number 1 in few words", "<think>\none, two\n</think>\n\ngold 1"),
    "revise": ("better now", "Explain thing number 1 in few words", "better now"),
    "evolve": ("harder task", "harder task", "harder task"),
    "self-instruct": ("a new task", "a new task", "a new task"),
    "counterfactual": (
        "<question>new?</question> <chain>because</chain> <conclusion>no</conclusion>",
        "new?",
        "<think>\nbecause\n</think>\n\nno",
    ),
}


@pytest.mark.parametrize("task", REPLIES)
def test_each_task_puts_its_calls_together(tmp_path, teacher, task):
    reply, question, answer = REPLIES[task]
    teacher["say"] = lambda question, seed: reply
    step = FAST | {"do": "distil", "teacher": teacher["url"], "task": task, "which": "all"}
    documents, _ = run(tmp_path, prompts(2), {"ask": step})
    last = documents[-1]
    assert last["messages"][-1]["content"] == question and last["answers"][-1]["text"] == answer
    assert last["answers"][-1]["by"] == f"teacher/{task}" and documents[0]["answers"][0]["text"] == "gold 0"
    assert len(documents) == (2 if task in ("chain", "revise") else 4)
    assert all(d["provenance"][1]["teacher"] == "v1" for d in documents)
    assert len({d["id"] for d in documents}) == len(documents)


def test_two_steps_of_distillation_give_documents_of_their_own(tmp_path, teacher):
    step = FAST | {"do": "distil", "teacher": teacher["url"], "task": "evolve", "which": "all"}
    documents, _ = run(tmp_path, prompts(2), {"once": step, "twice": step})
    assert len(documents) == 8 and len({d["id"] for d in documents}) == 8
    assert documents[-1]["id"].startswith("in:") and "/once" in documents[-1]["id"] and "/twice" in documents[-1]["id"]


def test_a_text_becomes_questions_and_facts_several_each(tmp_path, teacher):
    def say(question, seed):
        if "List the facts" in question:
            return "1. Water is wet.\n- Fire is hot."
        if question.startswith("Fact:"):
            subject = question.split()[1]
            return f"<question>What of {subject}? {seed}</question><conclusion>{question.split()[3]}</conclusion>"
        return "Question: What?\nChain: thus\nConclusion: that" if "Make of this" in question else CONFUSED

    teacher["say"] = say
    texts = [{"text": "Water is wet and fire is hot."}]
    ask = FAST | {"do": "distil", "teacher": teacher["url"]}
    documents, _ = run(tmp_path, texts, {"ask": ask | {"task": "facts", "n": 3}})
    assert len(documents) == 1 + 2 * 3 and documents[0]["kind"] == "text"
    assert sum("Water" in d["messages"][0]["content"] for d in documents[1:]) == 3
    assert len({d["id"] for d in documents}) == 7
    documents, _ = run(tmp_path, texts, {"ask": ask | {"task": "text"}}, out="b")
    assert documents[1]["answers"][0]["text"] == "<think>\nthus\n</think>\n\nthat"
    teacher["say"] = lambda question, seed: CONFUSED
    documents, summary = run(tmp_path, texts, {"ask": ask | {"task": "text", "temperature": 0.1}}, out="c")
    assert len(documents) == 1 and summary["notes"] == {"the teacher's reply is not what was asked for": 1}
    assert CONFUSED in (tmp_path / "c/curate.html").read_text()


def test_a_local_model_teaches_and_its_right_answers_are_learned(tmp_path, tiny, quick):
    ask = {"do": "distil", "teacher": tiny.model, "which": "all", "n": 4, "max_tokens": 48, "temperature": 1.0}
    rows = [json.loads(line) for line in Path(tiny.data("problems.jsonl")).read_text().splitlines()]
    documents, summary = run(tmp_path, rows, {"ask": ask, "reject": {"score": "length(1, 50)"}})
    failed = sum(json.loads((tmp_path / "out/curate.json").read_text())["steps"][1]["notes"].values())
    assert sum(len(d["answers"]) for d in documents) == 6 * 5 - failed and failed < 20  # empty, and cut off
    assert all(0 <= d["scores"]["pass_rate"] <= 1 for d in documents if len(d["answers"]) > 1)
    assert all({"right", "score"} <= a.keys() for d in documents for a in d["answers"])
    assert summary["values"]["pass_rate"] and (tmp_path / "out/pairs.jsonl").read_text()
    again, _ = run(tmp_path, rows, {"ask": ask, "reject": {"score": "length(1, 50)"}}, out="again")
    assert again == documents


def test_perplexity_and_ifd_come_from_the_model(tmp_path, tiny, quick):
    text = Path(tiny.data("text.jsonl")).read_text().splitlines()[0]
    rows = [json.loads(text), {"text": "zqx jvk wpf zzq " * 4}, {"question": "1+1?", "answer": "It is 2"}]
    documents, summary = run(tmp_path, rows, {"perplexity": {"model": tiny.model}})
    known, strange, _ = (d["scores"]["perplexity"] for d in documents)
    assert known < strange and len(summary["values"]["perplexity"]) == 3
    documents, summary = run(
        tmp_path, rows, {"perplexity": {"model": tiny.model, "high": (known + strange) / 2}}, out="b"
    )
    assert summary["dropped"] == {"perplexity out of bounds": 1}
    documents, _ = run(tmp_path, rows, {"ifd": {"do": "perplexity", "ifd": True, "model": tiny.model}}, out="c")
    assert ["ifd" in d["scores"] for d in documents] == [False, False, True] and documents[2]["scores"]["ifd"] > 0


def test_a_classifier_learns_from_examples_what_is_good(tmp_path):
    good = [f"the proof of lemma {i} follows by induction on n" for i in range(40)]
    bad = [f"click here to win {i} prizes now!!!" for i in range(40)]
    for name, texts in (("good", good[:30]), ("bad", bad[:30])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    step = {"good": [str(tmp_path / "good.jsonl")], "bad": [str(tmp_path / "bad.jsonl")], "low": 0.5}
    rows = [{"text": text} for text in good[30:] + bad[30:]]
    documents, summary = run(tmp_path, rows, {"classify": step})
    assert [d["text"] for d in documents] == good[30:] and summary["dropped"] == {"quality out of bounds": 10}
    with pytest.raises(ConfigError, match="good and bad"):
        run(tmp_path, rows, {"classify": {}}, out="b")


def test_an_encoder_of_berts_family_embeds_by_its_mean_hidden_state(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).eval()
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "bert")
    rows = Embedder(str(tmp_path / "bert"))(["a b c", "d", "a b c"])
    hidden = model(**tokenizer("a b c", return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(rows[0], (hidden / hidden.norm()).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-6)
    assert abs(rows[0] @ rows[1]) < 0.999


NO_FAISS = pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="faiss is not installed")
ENGINES = ["torch", pytest.param("faiss", marks=NO_FAISS)]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_most_similar_rows_are_those_of_all_products(engine, monkeypatch):
    monkeypatch.setattr("tritium.core.curate.semantic.ROWS", 11)
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(150, 8)).astype(np.float32), rng.normal(size=(23, 8)).astype(np.float32)
    values, places = most_similar(queries, rows, 5, engine)
    products = queries @ rows.T
    assert (places == np.argsort(-products, axis=1)[:, :5]).all()
    np.testing.assert_allclose(values, -np.sort(-products, axis=1)[:, :5], rtol=1e-5)
    assert most_similar(queries, rows[:3], 5)[0].shape == (23, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_texts_of_one_meaning_keep_the_first(tmp_path, tiny, quick, engine):
    rows = [{"text": text} for text in ("12 plus 30 is 42", "Who are you?", "12 plus 30 is  42", "print(x)", "")]
    step = {"model": tiny.model, "threshold": 0.9999, "engine": engine}
    documents, summary = run(tmp_path, rows, {"semantic": step | {"threshold": 0.999}})
    assert documents[0]["text"] == rows[0]["text"] and summary["dropped"]["means what another does"] >= 1
    assert "resembles in:0" in (tmp_path / "out/curate.html").read_text()


def test_a_text_is_as_similar_as_1_to_itself(tmp_path, tiny, quick):
    rows = [{"text": text} for text in ["the same again"] * 5 + ["something else"]]
    documents, _ = run(tmp_path, rows, {"semantic": {"model": tiny.model, "threshold": 1.0}}, shard_mb=1)
    assert [d["text"] for d in documents] == [rows[0]["text"], rows[-1]["text"]]


@pytest.mark.parametrize("memory", [1e-6, 1.0])
def test_what_is_similar_is_found_however_little_is_in_memory(tmp_path, memory, monkeypatch):
    """Each with the one before it that is most similar, over many blocks, which the memory alone decides on."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(70, 8))
    for copy, of in ((20, 3), (41, 40), (69, 20), (60, 59)):
        vectors[copy] = vectors[of] + 0.01 * rng.normal(size=8)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    monkeypatch.setattr("tritium.core.curate.semantic.ROWS", 7)
    monkeypatch.setattr(semantic.Embedder, "__call__", lambda self, texts: vectors[[int(t) for t in texts]])
    rows = [{"text": str(i)} for i in range(70)]
    step = {"model": str(tmp_path), "threshold": 0.99}
    documents, summary = run(tmp_path, rows, {"semantic": step}, memory_mb=memory, shard_mb=3e-4)
    assert sorted({*range(70)} - {int(d["text"]) for d in documents}) == [20, 41, 60, 69]
    assert {row["twin"].split(":")[1] for row in summary["samples"]["means what another does"]} <= {
        d["id"].split(":")[1] for d in documents
    }  # the one that stays, not the nearest copy


def test_evaluation_items_are_found_by_words_and_by_meaning(tmp_path, tiny, quick):
    words = [f"w{i}" for i in range(40)]
    item, short = " ".join(words[:20]), "What is 12 plus 30?"
    items = (json.dumps({"question": text}) + "\n" for text in (item, short))
    (tmp_path / "eval.jsonl").write_text("".join(items))
    rows = [
        {"text": "before " + " ".join(words[3:17]) + " after"},
        {"text": " ".join(words[3:15])},
        {"question": "what is 12 plus 30", "answer": "42"},
        {"question": "What is 12 plus 31?", "answer": "43"},
    ]
    step = {"against": [str(tmp_path / "eval.jsonl")]}
    documents, summary = run(tmp_path, rows, {"decontaminate": step})
    assert documents[0]["text"] == rows[1]["text"] and documents[1]["reference"] == "43" and len(documents) == 2
    assert summary["dropped"] == {"shares a passage with an evaluation set": 2}
    _, summary = run(tmp_path, rows[3:], {"decontaminate": step | {"model": tiny.model, "threshold": 0.8}}, out="b")
    assert summary["dropped"] == {"means what an item of an evaluation set does": 1}


@pytest.mark.parametrize("by", ["cluster", "diverse"])
def test_samples_by_embedding_have_what_they_are_asked_for(tmp_path, tiny, quick, by, monkeypatch):
    monkeypatch.setattr("tritium.core.curate.select.BATCH", 5)
    monkeypatch.setattr("tritium.core.curate.select.ROWS", 4)
    rows = [{"text": f"{i} plus 3 is {i + 3}"} for i in range(20)] + [{"text": "Hello, who are you?"}]
    documents, _ = run(tmp_path, rows, {"select": {"count": 4, "by": by, "model": tiny.model, "clusters": 3}})
    assert len(documents) == 4 and rows[-1]["text"] in [d["text"] for d in documents]  # the one of another kind


def test_rules_on_languages_sources_categories_and_scores_choose(tmp_path):
    rows = [{"text": f"text {i}", "lang": lang, "type": kind} for i, (lang, kind) in
            enumerate([("en", "algebra"), ("en", "geometry"), ("fr", "algebra"), ("en", "algebra")])]  # fmt: skip
    for settings, kept, reason in (
        ({"languages": ["en"]}, [0, 1, 3], "language 'fr'"),
        ({"categories": ["algebra"]}, [0, 2, 3], "category 'geometry'"),
        ({"sources": ["out"]}, [], "source 'in'"),
        ({"high": {"words": 1}}, [], "words > 1"),
    ):
        documents, summary = run(tmp_path, rows, {"filter": {"rules": []}, "select": settings}, out=reason)
        assert [int(d["text"][5:]) for d in documents] == kept
        assert summary["dropped"] == {reason: 4 - len(kept)}


def test_the_best_answers_are_learned_and_those_of_people_only_where_wanted(tmp_path):
    solutions = {"a": ("1 + 1 = 2 so 2", True), "b": ("2 * 1 = 2, it is 2", True), "c": ("it is 3", False)}
    gold = "one more than one\n#### 2"
    row = {"question": "1+1?", "answer": gold}
    row |= {name: {"solution": text, "is_correct": right} for name, (text, right) in solutions.items()}
    for settings, learned in (
        ({}, [gold]),
        ({"keep": 9}, [gold, solutions["a"][0], solutions["b"][0]]),
        ({"keep": 9, "gold": False}, [solutions["a"][0], solutions["b"][0]]),
        ({"score": "-length(1, 9)", "keep": 1}, [solutions["b"][0]]),
        ({"score": "-length(1, 9)", "keep": 9, "least": -0.3}, [solutions["b"][0], solutions["a"][0]]),
    ):
        documents, _ = run(tmp_path, [row], {"reject": settings}, out=str(len(str(settings))))
        lines = (tmp_path / str(len(str(settings))) / "sft.jsonl").read_text().splitlines()
        assert [json.loads(line)["messages"][-1]["content"] for line in lines] == learned
        assert documents[0]["scores"]["pass_rate"] == pytest.approx(2 / 3)


def test_a_sample_of_one_kind_lets_the_others_pass(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(9)] + prompts(5)
    documents, summary = run(tmp_path, rows, {"select": {"kinds": ["text"], "count": 3, "low": {"words": -1e9}}})
    assert [d["kind"] for d in documents] == ["chat"] * 5 and summary["dropped"] == {"words < -1e+09": 9}
    documents, _ = run(tmp_path, rows, {"select": {"kinds": ["text"], "count": 3}}, out="b")
    assert sorted(d["kind"] for d in documents) == ["chat"] * 5 + ["text"] * 3


def test_clusters_are_those_that_are_there():
    rng = np.random.default_rng(0)
    centres = np.eye(4)[[0, 1, 2]]
    vectors = np.repeat(centres, 10, 0) + 0.1 * rng.normal(size=(30, 4))
    found = clusters(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 3)
    assert all(len(set(found[i : i + 10])) == 1 for i in (0, 10, 20)) and len(set(found)) == 3


def test_a_mixture_takes_small_sources_again_and_large_ones_in_part():
    sources, sizes = ["a"] * 80 + ["b"] * 10 + ["c"] * 10, np.full(100, 7)
    times = mixed({"a": 1.0, "b": 1.0}, sources, sizes)
    taken = {s: sum(t for t, name in zip(times, sources, strict=True) if name == s) for s in "abc"}
    assert taken == {"a": 45, "b": 45, "c": 0} and set(times[80:90]) == {4, 5}


def test_the_mixture_that_small_runs_point_to_is_found(tmp_path):
    rng, truth = np.random.default_rng(0), np.array([0.9, -0.6, 0.2])
    mixtures = rng.dirichlet((1.0, 1.0, 1.0), 24)
    losses = 1.5 + np.exp(mixtures @ truth)
    runs = [(dict(zip("abc", m, strict=True)), float(loss)) for m, loss in zip(mixtures, losses, strict=True)]
    fit = fit_mixture(runs)
    np.testing.assert_allclose(fit.loss(simplex(3, 10)), 1.5 + np.exp(simplex(3, 10) @ truth), rtol=0.01)
    best = best_mixture(runs)
    assert best["b"] > 0.75 and sum(best.values()) == pytest.approx(1)
    assert len(simplex(3, 4)) == 15 and (simplex(3, 4).sum(1) == 1).all()
    rows = [{"text": f"text {i}"} for i in range(4)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps({"mixture": m, "loss": x}) + "\n" for m, x in runs))
    select = {"do": "select", "mixture_from": str(tmp_path / "runs.jsonl")}
    read = {name: {"do": "collect", "sources": [str(tmp_path / "in.jsonl")], "source": name} for name in "ab"}
    documents, _ = run(tmp_path, rows, read | {"mix": select})
    assert {d["source"] for d in documents} == {"b"} and len(documents) == 8
    with pytest.raises(ConfigError, match="no document is of c; the sources are a, b"):
        run(tmp_path, rows, read | {"mix": {"do": "select", "mixture": {"a": 0.5, "c": 0.5}}}, out="unknown")
    assert mixed({"a": 0.0}, ["a"], np.array([3])).tolist() == [0]
    with pytest.raises(ConfigError, match="can't fit "):
        fit_mixture(runs[:3])


def test_the_replay_law_is_recovered_from_its_own_losses():
    tokens, ratios = np.meshgrid([1e3, 3e3, 1e4, 3e4], [0.05, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.95])
    tokens, ratios = tokens.ravel(), ratios.ravel()
    law = lambda d, r: 1.7 + 8.0 * r**0.6 / d**0.3 + 0.4 / (r + 0.05) ** 0.5  # noqa: E731
    seen = tokens < 2e4
    fit = fit_replay(tokens[seen], ratios[seen], law(tokens, ratios)[seen])
    np.testing.assert_allclose(fit.loss(tokens, ratios), law(tokens, ratios), rtol=0.02)  # also where it was not fitted
    assert 0.3 < best_ratio(fit, fit, 1e4) < 0.7  # of equals, half
    assert best_ratio(fit, fit, 1e4, weight=5.0) < best_ratio(fit, fit, 1e4)
    with pytest.raises(ConfigError, match="six"):
        fit_replay([1, 2], [0.5, 0.5], [1, 1])


def test_small_runs_tell_how_much_replay_a_mixture_gets(tmp_path):
    """L(D, r) of both corpora, the general one harder to keep: half of the tokens is too little for it."""
    law = lambda c, d, r: 1.7 + 8.0 * r**0.6 / d**0.3 + c / (r + 0.05) ** 0.5  # noqa: E731
    runs = [{"mixture": {"law": 10 * r, "web": 10 * (1 - r)}, "tokens": d,
             "loss": {"law": law(0.3, d, r), "web": law(0.6, d, 1 - r)}}
            for d in (1e3, 1e4, 1e5) for r in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)]  # fmt: skip
    shares = np.linspace(0.01, 0.99, 99)
    rows = [{"text": f"text {i:03d}"} for i in range(100)]
    (file := tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    read = {name: {"do": "collect", "sources": [str(tmp_path / "in.jsonl")], "source": name} for name in ("law", "web")}
    for out, settings in (("a", {}), ("b", {"tokens": 1e6}), ("c", {"weight": 3.0})):
        tokens, weight = settings.get("tokens", 1e5), settings.get("weight", 1.0)
        best = shares[(law(0.3, tokens, shares) + weight * law(0.6, tokens, 1 - shares)).argmin()]
        step = {"do": "select", "mixture_from": str(file)} | settings
        documents, summary = run(tmp_path, rows, read | {"mix": step}, out=out)
        assert summary["facts"]["share of law, by the small runs"] == pytest.approx(best, abs=0.04)
        assert sum(d["source"] == "law" for d in documents) / len(documents) == pytest.approx(best, abs=0.05)
    assert best < 0.4
    file.write_text(json.dumps({"mixture": {"law": 1}, "tokens": 3, "loss": {"law": 2}}))
    with pytest.raises(ConfigError, match='"tokens" and two sources'):
        run(tmp_path, rows, read | {"mix": step}, out="wrong")
