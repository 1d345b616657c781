"""Records in the forms that people keep them, and what bad ones get."""

import gzip
import json

import pytest

from tritium.core.files import DataError, Skipped, read_documents, read_records, read_text
from tritium.core.formats import RecordError, conversation, preference, problem, ranking, scored

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"messages": [USER, ANSWER | {"loss_weight": 0}]}, [USER, ANSWER | {"weight": 0.0}]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]}, [USER, ANSWER]),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            [SYSTEM, USER, ANSWER],
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, [USER, ANSWER]),
        ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\nI"}, ANSWER]),
        ({"instruction": "Q", "output": "A", "history": [["Q", "A"]]}, [USER, ANSWER, USER, ANSWER]),
        ({"question": "Q", "answer": "A"}, [USER, ANSWER]),
    ],
)
def test_conversations(record, messages):
    assert conversation(record) == messages


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "Q"}, "without an answer"),
        ({"question": "Q", "answer": " "}, "without an answer"),
        ({"messages": [USER]}, "without an answer"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": ["Q"]}, "not an object"),
        ({"messages": [{"role": "robot", "content": "Q"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "not text"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "empty turn"),
        ({"title": "T"}, "unknown form (keys: title)"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(record, words):
    with pytest.raises(RecordError) as caught:
        conversation(record)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"instruction": "Q", "chosen": "A", "rejected": "B", "output": "ignored"},
        {"messages": [USER, ANSWER], "chosen": ANSWER, "rejected": {"role": "assistant", "content": "B"}},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "B"}]},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"}, "rejected": "B"},
    ],
)
def test_preferences(record):
    assert preference(record) == ([USER], "A", "B")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "Q", "chosen": "A"}, '"rejected"'),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "equal"),
        ({"messages": [ANSWER], "chosen": "A", "rejected": "B"}, "without a prompt"),
    ],
)
def test_a_preference_that_cannot_be_used_says_why(record, words):
    with pytest.raises(RecordError) as caught:
        preference(record)
    assert words in str(caught.value)


def test_rankings():
    assert ranking({"question": "Q", "ranked": ["B", ANSWER, "C"]}) == ([USER], [["B"], ["A"], ["C"]])
    assert ranking({"question": "Q", "ranked": [["B", "D"], "A"]}) == ([USER], [["B", "D"], ["A"]])
    with pytest.raises(RecordError, match="twice"):
        ranking({"question": "Q", "ranked": ["B", ["A", "B"]]})
    with pytest.raises(RecordError, match="two answers"):
        ranking({"question": "Q", "ranked": ["A"]})


@pytest.mark.parametrize(("answer", "reference"), [("2 + 2 = 4\n#### 4", "4"), ("4", "4"), (4, "4"), (0.5, "0.5")])
def test_problems(answer, reference):
    assert problem({"question": "Q", "answer": answer}) == ([USER], reference)


def test_a_problem_without_an_answer():
    with pytest.raises(RecordError, match="without an answer"):
        problem({"question": "Q"})


# ---------------------------------------------------------------------------------------------- files


def records(path, skipped=None) -> list[dict]:
    return [record for _, record in read_records(str(path), skipped or Skipped())]


def test_malformed_lines_are_skipped_and_counted_with_the_first_place(tmp_path):
    (file := tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n\n[2]\n{"a": 3}\nno\n')
    skipped = Skipped()
    assert records(file, skipped) == [{"a": 1}, {"a": 3}]
    assert skipped.reasons == {"malformed JSON": 2, "a record that is not a JSON object": 1}
    assert f"skipped 2 × malformed JSON (first: {file}:2)" in skipped.summary()


def test_on_error_raise_stops_at_the_line(tmp_path):
    (file := tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match="a.jsonl:2: malformed JSON"):
        records(file, Skipped("raise"))


def test_one_json_list_is_read_and_its_mistake_has_a_line(tmp_path):
    (file := tmp_path / "a.json").write_text('[{"a": 1},\n {"a": 2}]')
    assert records(file) == [{"a": 1}, {"a": 2}]
    file.write_text('[{"a": 1},\n {"a": }]')
    with pytest.raises(DataError, match="a.json:2: malformed JSON"):
        records(file)
    file.write_text('{\n  "a": [\n    1\n  ]\n}\n{"a": 2}')
    assert records(file) == [{"a": [1]}, {"a": 2}], "objects in a row, as people read them"
    file.write_text('{"version": 1, "data": [{"a": 1}, {"a": 2}]}')
    assert records(file) == [{"a": 1}, {"a": 2}]
    file.write_text('{\n  "a": [\n    1')
    with pytest.raises(DataError, match="a.json:3: malformed JSON"):
        records(file)
    file.write_text('"a"')
    with pytest.raises(DataError, match="a .json list of them"):
        records(file)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_json_list_is_read_in_chunks_wherever_they_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("tritium.core.files.CHUNK", chunk)
    rows = [{"a": 'ü\u2028"]', "b": [1.5e-7, True, None]}, {}, {"c": "x" * 200}]
    (file := tmp_path / "a.json").write_text(json.dumps(rows) + "\n")
    assert records(file) == rows
    file.write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    assert records(file) == rows
    for text, words in (
        ('[{"a": 1},\n{"b" 2}]', r":2: malformed JSON: Expecting ':'"),
        ('[{"a": 1},\n\n {"b": "never ends}]', ":3: malformed JSON: Unterminated"),
        ('[{"a": 1},', "the list does not end"),
        ('[{"a": 1}]\n[{"a": 2}]', ":2: malformed JSON: more than one list"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            records(file)


def test_gzip_is_read_and_a_truncated_one_is_a_sentence(tmp_path):
    packed = gzip.compress(b'{"a": 1}\n' * 50)
    (file := tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert len(records(file)) == 50
    for damaged in (packed[:-12], packed[:20] + b"\xff" * 9 + packed[29:], b"plain text"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="a.jsonl.gz can't be read"):
            records(file)


def test_the_byte_order_mark_of_windows_does_not_cost_the_first_record(tmp_path):
    (file := tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert records(file) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b" \n", "is empty"), (b"ab\xffc", "byte 2 is 0xff")]
)
def test_a_file_without_text(tmp_path, content, words):
    (file := tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_text(str(file))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_text(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        read_text(str(tmp_path))


def test_documents(tmp_path):
    (plain := tmp_path / "a.txt").write_text("one\ntwo")
    assert list(read_documents(str(plain), Skipped())) == ["one\ntwo"]
    rows = [{"text": "one"}, {"title": "two"}, {"text": ""}, {"text": "half of 🙂: \ud83d"}, {"text": "three"}]
    (lines := tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skipped = Skipped()
    assert list(read_documents(str(lines), skipped)) == ["one", "three"]
    assert skipped.reasons == {'a record without a "text"': 2, "a text that is not valid Unicode": 1}


def test_a_json_list_that_is_called_jsonl_is_read_as_what_it_is(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}], indent=1))
    assert [record["question"] for _, record in read_records(str(path), Skipped())] == ["a", "c"]


def test_a_file_of_malformed_lines_says_why_it_holds_no_record(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"a": \n[1]\n')
    with pytest.raises(DataError, match=r"(?s)holds no record.*skipped 1 × .*:1"):
        list(read_records(str(file), Skipped()))


def test_a_missing_score_is_named():
    with pytest.raises(RecordError, match="a record without verbosity"):
        scored({"prompt": "p", "completion": "c", "helpfulness": 1}, ("helpfulness", "verbosity"), 4)
