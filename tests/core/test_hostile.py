"""Records, folders and tokenizers as people have them: each bad one is a sentence, and nothing passes by mistake."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tritium
from tritium.core import formats
from tritium.core.config import UserError
from tritium.core.files import DataError, Skipped, read_documents, read_records
from tritium.core.formats import RecordError
from tritium.core.tokenizer import Tokenizer
from tritium.model.config import ModelConfig
from tritium.model.hf import ModelFolderError
from tritium.model.transformer import Transformer

USER = {"role": "user", "content": "a"}


def answer(**turn) -> dict:
    return {"messages": [USER, {"role": "assistant", "content": "b"} | turn]}


@pytest.mark.parametrize("line", ['{"a":' + "[" * 100_000 + "]" * 100_000 + "}", '{"a": ' + "9" * 6000 + "}"])
def test_json_that_python_will_not_read_is_malformed(tmp_path, line):
    file = tmp_path / "x.jsonl"
    file.write_text(line + '\n{"a": 1}\n')
    skipped = Skipped()
    assert [row for _, row in read_records(str(file), skipped)] == [{"a": 1}]
    assert skipped.reasons["malformed JSON"] == 1
    (tmp_path / "x.json").write_text(f"[{line}]")
    with pytest.raises(DataError, match="x.json:1: malformed JSON"):
        list(read_records(str(tmp_path / "x.json"), skipped))


def test_marks_line_ends_and_cut_archives(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a":1,"a":2}\r\n{"a":3}\r\n')
    assert [row["a"] for _, row in read_records(str(tmp_path / "x.jsonl"), Skipped())] == [2, 3]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"a":1}\n' * 9999)[:-20])
    with pytest.raises(DataError, match="x.jsonl.gz can't be read: Compressed file ended"):
        list(read_records(str(tmp_path / "x.jsonl.gz"), Skipped()))
    (tmp_path / "code.jsonl").write_text('{"text": "a", "repo": null}\n{"text": "b", "repo": "r", "path": "f.py"}\n')
    assert list(read_documents(str(tmp_path / "code.jsonl"), Skipped(), True)) == ["a", "# f.py\nb"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [USER | {"role": ["user"]}]}, "an unknown role"),
        (answer(weight="x"), "a weight that is not a number: 'x'"),
        (answer(tool_calls=5), "tool_calls that are not a list"),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "content that is not text"),
        ({"messages": [USER | {"content": [{"type": "text", "text": 5}]}]}, "content that is not text"),
        ({"messages": [USER | {"content": [{"type": ["text"], "text": "a"}]}]}, "content that is not text"),
        ({"instruction": "a", "output": "b", "history": 5}, r"not a list of \[question, answer\]"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"not a list of \[question, answer\]"),
        ({"instruction": "a", "output": "b", "system": 5}, "whose system is not text"),
        ({"instruction": "a", "output": "b", "input": 5}, "an instruction or input that is not text"),
        ({"instruction": "a", "output": True}, "whose answer is not text"),
        ({"question": "a", "answer": float("nan")}, "whose answer is not text"),
        ({"Body": "x", "Question": None, "Answer": 1}, "an empty question"),
        ({"text": "x", "test_list": [1], "code": "c"}, '"test_list" that is not a list of texts'),
    ],
)
def test_a_record_that_is_not_what_it_seems(record, words):
    with pytest.raises(RecordError, match=words):
        formats.conversation(record)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "a", "answer": "so #### "}, "its answer is empty"),
        ({"question": "a", "tests": None}, '"tests" that is not a list of texts'),
        ({"question": "a", "cases": "x"}, '"cases" that are not a list'),
        ({"text": "a", "test_list": [5], "code": "def f(): pass"}, '"test_list" that is not a list of texts'),
    ],
)
def test_a_problem_that_nothing_can_be_judged_by(record, words):
    with pytest.raises(RecordError, match=words):
        formats.problem(record)


def test_a_pair_of_whole_conversations_has_its_prompt_in_them():
    pair = {key: [USER, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    assert formats.preference(pair | {"id": 7, "score": 0.5}) == ([USER], "chosen", "rejected")


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    Transformer(ModelConfig(48, 16, 24, 2, 4, 2, 8, max_positions=40)).initialize(0).save(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((16,), float("nan")), "model.norm.weight holds NaN or infinity"),
        (torch.tensor([float("inf")] + [1.0] * 15).half(), "model.norm.weight holds NaN or infinity"),
        (torch.ones(16, dtype=torch.int8), "model.norm.weight is torch.int8.*quantised"),
        (torch.ones(16).to(torch.float8_e4m3fn), "model.norm.weight is torch.float8_e4m3fn"),
    ],
)
def test_weights_that_mean_nothing_here(folder, tensor, words):
    save_file(load_file(folder / "model.safetensors") | {"model.norm.weight": tensor}, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match=words):
        tritium.load(str(folder), dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 16.0}, "hidden_size=16.0 must be at least 1, and whole"),
        ({"num_attention_heads": "4"}, "config.json"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "a window of 0 must be"),
        ({"model_type": "mistral", "sliding_window": "x"}, "a window of 'x' must be"),
        ({"eos_token_id": "</s>"}, "special token is '</s>'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\): take the model in bf16"),
        ({"quantization_config": "x"}, r"quantised \(x\)"),
    ],
)
def test_a_config_that_says_what_can_not_be(folder, changes, words):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ModelFolderError, match=words):
        tritium.load(str(folder))


def test_a_config_with_nothing_where_there_is_a_default(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"eos_token_id": [], "rms_norm_eps": None, "max_position_embeddings": None, "architectures": [5]}
    (folder / "config.json").write_text("\ufeff" + json.dumps(raw))
    config = tritium.load(str(folder)).config
    assert (config.eos_id, config.norm_eps, config.max_positions) == (None, 1e-6, 2048)


def test_a_shard_that_was_not_fetched_and_pickles_are_named(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelFolderError, match="model-00002-of-00002.safetensors of model.safetensors.index.json is m"):
        tritium.load(str(folder))
    (folder / "model-00001-of-00002.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="pickles"):
        tritium.load(str(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", b'{"<a>": "x"}'),
        ("added_tokens.json", b'{"": 5}'),
        ("added_tokens.json", b'{"<a>": -1}'),
        ("added_tokens.json", b'{"<a>": 1000000000}'),
        ("added_tokens.json", b"[1]"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": [5]}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_file_beside_the_vocabulary_that_makes_no_sense(tiny, tmp_path, name, content):
    tritium.Tokenizer.load(tiny.model).save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        Tokenizer.load(tmp_path)
