"""What people's files become: every record of real ones, tools, variables, turns, normalisation, code."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tritium
from tritium.core.batch import Document, pack
from tritium.core.code import fill_in_the_middle, hole_markers, repository
from tritium.core.config import ConfigError, UserError
from tritium.core.curate.runner import run_steps
from tritium.core.curate.sources import Collect
from tritium.core.curate.step import Context, read_shard
from tritium.core.data import DataConfig, encode_documents, record_sources
from tritium.core.files import DataError, Skipped, read_documents, read_records
from tritium.core.formats import RecordError, conversation, feedback, fill, preference, problem
from tritium.core.groups import conversation_group, normalized, preference_group
from tritium.core.tokenizer import Tokenizer, train_tokenizer

DATA = Path(tritium.__file__).parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the shared data beside the checkout")
HOLES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    text = "user assistant system one two first second answer def f(x): return x\n" * 3
    special = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", *HOLES)
    return train_tokenizer([text], 320, tmp_path_factory.mktemp("forms"), special=special)


USABLE = {
    "sft/alpaca_en_demo.json": 999,
    "sft/alpaca_zh_demo.json": 1000,
    "sft/glaive_toolcall_en_demo.json": 300,
    "sft/identity.json": 91,
    "sft/instruction_1100.json": 1100,
    "sft/reason_tool_use_demo_50.jsonl": 50,
    "sft/sharegpt_zh_150.jsonl": 150,
    "sft/v1_sft_demo.jsonl": 500,
    "preference/kto_en_demo.json": 300,
    "preference/dpo_en_demo.json": 300,
    "preference/instruction_preference_1100.json": 1094,  # six pairs of equal answers
    "reasoning/HumanEval.jsonl": 164,
    "reasoning/gsm8k_model_solutions_400.jsonl": 400,
    "reasoning/gsm8k_train.jsonl": 7473,
    "reasoning/mbpp.jsonl": 974,
    "reasoning/svamp.jsonl": 1000,
}


@needs_data
@pytest.mark.parametrize("file", USABLE)
def test_every_usable_record_of_real_files_is_used(tokenizer, file):
    convert = {"sft": conversation_group(tokenizer), "preference": preference_group(tokenizer), "reasoning": problem}
    convert = feedback if "kto" in file else convert[file.partition("/")[0]]
    used = 0
    for _, record in read_records(str(DATA / file), Skipped("raise")):
        try:
            convert(record)
            used += 1
        except RecordError as error:
            assert "answers are equal" in str(error)
    assert used == USABLE[file]


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


ASKED = [said("user", "Q")]
CALL = {"name": "f", "arguments": {"a": "it's"}}
DOWNLOADED = {  # records as the datasets have them, without what nobody reads
    "OpenOrca": ({"system_prompt": "S", "question": "Q", "response": "A"}, [said("system", "S"), *ASKED]),
    "dolly": ({"instruction": "Q", "context": "of this", "response": "A"}, [said("user", "Q\nof this")]),
    "MetaMathQA": ({"type": "GSM", "query": "Q", "original_question": "O", "response": "A"}, ASKED),
    "MATH": ({"problem": "Q", "level": "Level 5", "type": "Algebra", "solution": "A"}, ASKED),
    "NuminaMath-1.5": ({"problem": "Q", "solution": "A", "answer": "3", "problem_is_valid": "Yes"}, ASKED),
    "OpenMathInstruct-2": ({"problem": "Q", "generated_solution": "A", "expected_answer": "3"}, ASKED),
    "TRL": ({"prompt": ASKED, "completion": [said("assistant", "A")]}, ASKED),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "chatgpt", "value": "A"}]}, ASKED),
    "LMSYS-Chat": ({"conversation": [said("user", "Q"), said("assistant", "A")]}, ASKED),
    "MBPP, sanitized": (
        {"prompt": "Q", "code": "A", "test_imports": ["import math"], "test_list": ["assert f()"]},
        [said("user", "Q\nassert f()")],
    ),
}


@pytest.mark.parametrize("name", DOWNLOADED)
def test_datasets_are_read_as_they_were_downloaded(name):
    record, question = DOWNLOADED[name]
    assert conversation(record) == [*question, said("assistant", "A")]


def test_references_of_downloaded_problems():
    assert problem({"problem": "Q", "solution": "so $\\boxed{3}$."}) == (ASKED, "3")
    assert problem({"prompt": ASKED, "reward_model": {"ground_truth": "3", "style": "rule"}}) == (ASKED, "3")
    assert problem({"problem": "Q", "expected_answer": "3", "generated_solution": "it is 4"}) == (ASKED, "3")
    assert json.loads(problem(DOWNLOADED["MBPP, sanitized"][0])[1])["setup"] == "import math"


def test_function_calls_of_xlam_and_glaive():
    tools = [{"name": "f", "description": "d", "parameters": {}}]
    asked, called = conversation({"query": "Q", "answers": json.dumps([CALL]), "tools": json.dumps(tools)})
    assert asked == said("user", "Q") | {"tools": tools} and called["tool_calls"] == [CALL]
    chat = 'USER: Q\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{"a": "it\'s"}\'} <|endoftext|>'
    chat += '\n\n\nFUNCTION RESPONSE: {"b": 1}\n\n\nASSISTANT: First.\n\nThen. <|endoftext|>\n\n\n'
    messages = conversation({"system": "SYSTEM: S", "chat": chat})
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[0]["content"] == "S" and messages[2]["tool_calls"] == [CALL]
    assert messages[4]["content"] == "First.\n\nThen."
    old = {"messages": [*ASKED, {"role": "assistant", "content": None, "function_call": CALL}]}
    assert conversation(old)[1]["tool_calls"] == [CALL]


def test_pairs_that_share_their_prompt():
    start = "\n\nHuman: one\n\nAssistant: two\n\nthree\n\nHuman: Q\n\nAssistant:"
    pair = {"chosen": f"{start} A", "rejected": f"{start} B"}  # HH-RLHF
    before = [said("user", "one"), said("assistant", "two\n\nthree")]
    assert preference(pair) == ([*before, *ASKED], "A", "B")
    assert preference({"system": "S", "question": "Q", "chosen": "A", "rejected": "B"})[0] == [
        said("system", "S"),
        *ASKED,
    ]
    assert problem({"prompt": start, "answer": "A"})[0] == [*before, *ASKED]
    for rejected, words in (
        (start, "does not end with an answer"),
        (start.replace("two", "2") + " B", "differ before their last turns"),
    ):
        with pytest.raises(RecordError, match=words):
            preference(pair | {"rejected": rejected})
    with pytest.raises(RecordError, match="for reward and dpo"):
        conversation(pair)
    with pytest.raises(RecordError, match="labelled as bad"):
        conversation({"prompt": "Q", "completion": "A", "label": False})


def test_tables_are_read_and_what_is_packed_says_how_to_unpack_it(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"Q{i}", "answer": str(i), "messages": None} for i in range(600)]
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), file := tmp_path / "a.parquet")
    assert [conversation(r)[1]["content"] for _, r in read_records(str(file), Skipped("raise"))] == list(
        map(str, range(600))
    )
    document, *_ = read_shard(collected(tmp_path / "out", file))
    assert document["messages"] == [said("user", "Q0")] and document["reference"] == "0"
    file.write_bytes(file.read_bytes()[:99])
    (zst := tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd\x00\x99\xff")
    for damaged, words in ((file, "can't be read"), (zst, "zstd -d")):
        with pytest.raises(DataError, match=words):
            list(read_records(str(damaged), Skipped()))
    with pytest.raises(DataError, match="a.jsonl.zst is not text: leave it out, or unpack it"):
        Collect(sources=[str(zst)]).check()
    (image := tmp_path / "a.png").write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(DataError, match="a.png is not text: leave it out"):
        Collect(sources=[str(image)]).check()


def collected(out: Path, file: Path) -> str:
    context = Context(out, out / "scratch", 0, 1 << 20, 1 << 20, map=None, cache=out / "said.sqlite")
    *_, _ = run_steps({"collect": Collect(sources=[str(file)])}, context, 1)
    return str(next((out / "steps" / "00-collect").glob("*.jsonl")))


@needs_data
def test_references_are_answers_and_test_programs():
    files = ("gsm8k_train", "gsm8k_model_solutions_400", "svamp", "mbpp", "HumanEval")
    first = {f: problem(next(read_records(f"{DATA}/reasoning/{f}.jsonl", Skipped()))[1]) for f in files}
    assert [first[f][1] for f in list(first)[:3]] == ["72", "18", "145"]
    assert first["svamp"][0][0]["content"].endswith("into 93 groups. How big is each group of bananas?")
    assert json.loads(first["HumanEval"][1])["entry_point"] == "has_close_elements"
    assert len(json.loads(first["mbpp"][1])["tests"]) == 3


def test_sharegpts_tools_and_openais_are_the_same():
    call, tools = {"name": "add", "arguments": {"a": 1}}, [{"name": "add"}]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "Let me see."},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "A"},
        ],
        "tools": json.dumps(tools),
    }
    wrapped = {"type": "function", "function": call}
    openai = {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [wrapped]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "A"},
        ],
        "tools": tools,
    }
    typed = json.loads(json.dumps(openai))
    parts = [{"type": "text", "value": "Let me see."}, {"type": "tool_call", "value": json.dumps(call)}]
    typed["messages"][1] = {"role": "assistant", "content": parts}
    assert conversation(sharegpt) == conversation(openai) == conversation(typed)
    assert conversation(openai)[0]["tools"] == tools and conversation(openai)[1]["tool_calls"] == [call]
    with pytest.raises(RecordError, match="function call that is not JSON"):
        conversation({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "add("}]})


def test_the_unified_form():
    record = {"conversation": [{"system": "S", "input": "one", "output": "a"}, {"input": "two", "output": "b"}]}
    assert [(m["role"], m["content"]) for m in conversation(record)] == [
        ("system", "S"), ("user", "one"), ("assistant", "a"), ("user", "two"), ("assistant", "b"),
    ]  # fmt: skip


def test_a_form_is_found_or_named(tokenizer, tmp_path):
    record = {"question": "q", "answer": "a", "messages": TALK[:2]}
    assert conversation(DataConfig().told(record)) == TALK[:2]
    assert conversation(DataConfig(form="question").told(record))[0]["content"] == "q"
    (path := tmp_path / "a.jsonl").write_text(
        json.dumps(record) + "\n" + json.dumps({"instruction": "i", "output": "o"})
    )
    config, skipped = DataConfig([str(path)], form="alpaca"), Skipped()
    train, _, _ = record_sources(config, conversation_group(tokenizer), 64, 0, skipped)
    assert len(train[0].groups) == 1 and "not of the form alpaca: it has no instruction" in skipped.summary()


def test_variables_are_filled_in_and_others_left():
    record = {"output": "I am {{name}} by {{ author }}, {{x}}.", "n": [1, "{{name}}"]}
    assert fill(record, {"name": "Tritium", "author": "us"}) == {
        "output": "I am Tritium by us, {{x}}.",
        "n": [1, "Tritium"],
    }
    assert DataConfig(variables=["name=A=B"]).told({"a": "{{name}}"}) == {"a": "A=B"}
    with pytest.raises(ConfigError, match="data.variables: 'name' is not NAME=VALUE"):
        DataConfig(variables=["name"])


def documents(tokenizer, **options) -> list[Document]:
    return conversation_group(tokenizer, DataConfig(**options))({"messages": TALK})


def losses(document: Document) -> tuple[float, float]:
    """(Σ weight · loss, Σ weight) for a made-up loss of each token that depends on what stands before it."""
    prefix = np.cumsum(document.ids.astype(np.float64)) % 97
    return float(document.weights @ prefix), float(document.weights.sum())


def test_unrolled_turns_sum_to_all_in_one_pass_and_last_is_the_last(tokenizer):
    whole, last, unrolled = (documents(tokenizer, turns=t) for t in ("all", "last", "unrolled"))
    assert [len(d) for d in (whole, last, unrolled)] == [1, 1, 2]
    total = np.sum([losses(d) for d in unrolled], axis=0)
    np.testing.assert_allclose(total, losses(whole[0]), rtol=1e-12)
    np.testing.assert_allclose(losses(last[0]), losses(unrolled[1]), rtol=1e-12)
    assert losses(last[0])[1] < losses(whole[0])[1] and len(last[0]) == len(whole[0])


@pytest.mark.parametrize(("by", "worth"), [("turn", [1, 1]), ("sequence", None)])
def test_a_turn_or_a_sequence_counts_the_same_whatever_its_length(tokenizer, by, worth):
    (document,) = documents(tokenizer, normalize=by)
    runs = np.split(document.weights, np.flatnonzero(np.diff(document.weights > 0)) + 1)
    sums = [run.sum() for run in runs if run.any()]
    np.testing.assert_allclose(sums, worth or sums, rtol=1e-6)
    np.testing.assert_allclose(document.weights.sum(), 2 if by == "turn" else 1, rtol=1e-6)


@pytest.mark.parametrize("by", ["token", "turn", "sequence"])
def test_packed_and_accumulated_is_the_unpacked_sum(by):
    rng = np.random.default_rng(0)
    made = []
    for length in (5, 17, 9, 30, 3):
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[[0, 1]] = 0, 1
        made.append(normalized(Document(rng.integers(0, 50, length).astype(np.int32), weights), by))
    table = torch.from_numpy(rng.standard_normal((50, 50)))

    def total(bins: list[list[Document]]) -> tuple[float, float]:
        loss = count = 0.0
        for batch in (pack([[d] for d in members]) for members in bins):
            logp = torch.log_softmax(table[batch.tokens], -1)
            picked = logp.gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
            loss, count = loss - float((batch.weights.double() * picked).sum()), count + batch.counts["tokens"]
        return loss, count

    np.testing.assert_allclose(total([made]), total([[d] for d in made]), rtol=1e-12)
    np.testing.assert_allclose(total([made[:2], made[2:]]), total([made]), rtol=1e-12)


def test_a_conversation_without_an_answer_to_learn_is_counted(tokenizer, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    path, skipped = tmp_path / "x.jsonl", Skipped()
    learned = [turns[0], {"role": "assistant", "content": "b"}]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, learned)))
    config = DataConfig(sources=[str(path)], turns="unrolled", holdout=0.0)
    record_sources(config, conversation_group(tokenizer, config), 64, 0, skipped, atomic=False)
    assert skipped.reasons == {"a record without a supervised token within the context": 1}


def test_unrolled_answers_of_a_long_conversation_need_not_share_a_batch(tokenizer, tmp_path):
    (path := tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    config = DataConfig(sources=[str(path)], turns="unrolled", holdout=0.0)
    train, _, _ = record_sources(config, conversation_group(tokenizer, config), 99, 0, Skipped("raise"), atomic=False)
    assert [len(group) for group in train[0].groups] == [1, 1]


@pytest.mark.parametrize("spm", [False, True])
def test_a_hole_loses_nothing_and_its_parts_can_be_put_back(tokenizer, spm):
    text, rng = "def f(x):\n    return 猫 * 2\n", np.random.default_rng(1)
    pre, suf, mid = markers = hole_markers(tokenizer)
    for _ in range(20):
        ids = fill_in_the_middle(tokenizer, text, markers, rng, spm)
        assert ids[0] == pre and ids.count(suf) == ids.count(mid) == 1
        a, b = ids.index(suf), ids.index(mid)
        prefix, suffix, middle = (tokenizer.decode(part) for part in (ids[1:a], ids[a + 1 : b], ids[b + 1 :]))
        assert (prefix == "" or not spm) and prefix + middle + suffix == text


def test_a_share_of_documents_gets_holes_the_same_each_time(tokenizer):
    texts = [f"first {i} answer" for i in range(200)]
    config = DataConfig(fim=0.5)
    once, again = (encode_documents(texts, tokenizer, config) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    holed = [hole_markers(tokenizer)[2] in ids for ids in once]
    assert 70 < sum(holed) < 130
    plain = encode_documents(texts, tokenizer, DataConfig())
    assert all(h or np.array_equal(a, b) for h, a, b in zip(holed, once, plain, strict=True))


def test_a_tokenizer_without_markers_is_told(tmp_path):
    with pytest.raises(UserError, match="data.fim: this tokenizer has no tokens for it; train one with"):
        hole_markers(
            train_tokenizer(["user assistant system one two first second answer return x\n" * 3], 300, tmp_path)
        )


def test_a_repository_is_one_document_and_imports_come_first(tmp_path):
    files = {
        "app/main.py": "from app.core import run\nimport app.util\n",
        "app/core.py": "from app import util\nfrom app.util import x\n",
        "app/util.py": "import os\nx = 1\n",
    }
    text = repository(files)
    assert [text.index(f"# {path}") for path in ("app/util.py", "app/core.py", "app/main.py")] == sorted(
        text.index(f"# {path}") for path in files
    )
    rows = [{"repo": "r", "path": path, "text": content} for path, content in files.items()]
    rows.insert(1, {"repo": "other", "path": "a.c", "text": '#include "b.h"\n'})
    (path := tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_documents(str(path), Skipped(), True)) == [text, '// a.c\n#include "b.h"\n']
    assert len(list(read_documents(str(path), Skipped()))) == 4
    circle = repository({"a.py": "import b\n", "b.py": "import a\n"})
    assert circle.startswith("# a.py") and "# b.py" in circle
