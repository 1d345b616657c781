"""`tritium inspect`: what a stage would learn, without its model and without reading whole files."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tritium.core.tokenizer import Tokenizer, train_tokenizer
from tritium.stages.cli import main

RECORD = {"messages": [{"role": "user", "content": "ask\x1b[2J"}, {"role": "assistant", "content": "tell\nit"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["ask tell it user assistant\n" * 3], 290, folder)
    sizes = {"vocab_size": 290, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    raw = sizes | {"model_type": "llama", "num_attention_heads": 2, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


def shown(capsys, *argv: str, code: int = 0) -> str:
    assert main(["inspect", *argv]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def test_conversations_show_what_is_learned_and_the_denominators(model, tmp_path, capsys, monkeypatch):
    (path := tmp_path / "a.jsonl").write_text(json.dumps(RECORD) + "\n{bad\n" + json.dumps(RECORD) + "\n")
    out = shown(capsys, "sft", f"--model={model}", f"--data.sources={path}")
    assert "<|im_start|>assistant\n⟦tell⏎\nit<|im_end|>⟧" in out and "── document 1: stream " in out
    assert "sequences 2" in out and "chat template: chatml" in out and "skipped 1 × malformed JSON" in out
    assert "\x1b" not in out and "ask\\x1b[2J" in out  # a record can't write to the terminal
    out = shown(capsys, "sft", f"--model={model}", f"--data.sources={path}", "--data.normalize=sequence")
    assert "tokens 2," in out and "Σ weight 1" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = shown(capsys, "sft", f"--model={model}", f"--data.sources={path}", "--data.template=plain")
    assert "\x1b[32mtell⏎\nit" in out and "\x1b[90m" in out and "chat template: plain" in out


def test_pairs_and_prompts_and_text(model, tmp_path, capsys):
    (pairs := tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "ask", "chosen": "tell", "rejected": "it"}))
    out = shown(capsys, "dpo", f"--model={model}", f"--data.sources={pairs}")
    assert "⟦tell<|im_end|>⟧" in out and "⟦it<|im_end|>⟧" in out and "sequences 2, groups 1" in out
    out = shown(capsys, "dpo", f"--model={model}", f"--data.sources={pairs}", "--loss=kto")
    assert "good 1" in out and "good 0" in out
    (ranks := tmp_path / "ranks.jsonl").write_text(json.dumps({"prompt": "ask", "ranked": ["tell", ["it", "ask"]]}))
    out = shown(capsys, "reward", f"--model={model}", f"--data.sources={ranks}", "--loss=listwise")
    assert out.count("rank 1") == 2 and out.count("rank 0") == 1
    (scores := tmp_path / "scores.jsonl").write_text(json.dumps({"prompt": "ask", "completion": "it", "a": 3, "b": 0}))
    heads = ["--loss=score", "--heads=a,b", "--highest=4"]
    out = shown(capsys, "reward", f"--model={model}", f"--data.sources={scores}", *heads)
    assert "a 0.75" in out and "b 0" in out
    (problems := tmp_path / "problems.jsonl").write_text(json.dumps({"question": "ask", "answer": "it"}))
    out = shown(capsys, "grpo", f"--model={model}", f"--data.sources={problems}")
    assert "⟦" not in out and out.split("assistant\n")[0].endswith("<|im_start|>")
    (text := tmp_path / "a.txt").write_text("ask tell " * 100)
    other = shutil.copytree(model, tmp_path / "other", ignore=shutil.ignore_patterns("config.json"))
    given = [f"--init={model}", f"--tokenizer={other}", f"--data.sources={text}", "--data.bin_tokens=100"]
    out = shown(capsys, "pretrain", *given)
    assert "── document 0: stream 0–63, 64 tokens, 63 learned" in out


def test_what_curate_packed(model, tmp_path, capsys):
    tokenizer = Tokenizer.load(model)
    ids, path = tokenizer.encode("tell it"), tmp_path / "a.tokens.npy"
    np.save(path, np.array([*ids, *ids, *ids[:1]], np.uint16))
    np.save(tmp_path / "a.starts.npy", np.array([0, len(ids), 2 * len(ids)]))
    (facts := tmp_path / "a.json").write_text(json.dumps({"tokenizer": tokenizer.fingerprint}))
    out = shown(capsys, "pretrain", f"--tokenizer={model}", f"--data.sources={path}")
    assert "stream 7, sequences 3" in out and out.count("t⟦ell it⟧") == 2
    facts.write_text(json.dumps({"tokenizer": "another"}))
    assert "another tokenizer" in shown(capsys, "pretrain", f"--tokenizer={model}", f"--data.sources={path}", code=2)


def test_what_each_loss_takes_and_an_adapters_folder(model, tmp_path, capsys):
    (pairs := tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "ask", "chosen": "tell", "rejected": "it"}))
    out = shown(capsys, "sft", f"--model={model}", f"--data.sources={pairs}", "--loss=unlikelihood")
    assert "good 1" in out and "good 0" in out
    (problems := tmp_path / "problems.jsonl").write_text(json.dumps({"question": "ask", "answer": "it"}))
    out = shown(capsys, "dpo", f"--model={model}", f"--data.sources={problems}", "--online")
    assert "⟦" not in out and "ask" in out
    (adapter := tmp_path / "adapter").mkdir()
    for file in Path(model).glob("token*"):
        (adapter / file.name).write_bytes(file.read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model}))
    assert "good 1" in shown(capsys, "dpo", f"--model={adapter}", f"--data.sources={pairs}", "--loss=kto")


def test_only_the_beginning_of_a_file_is_read(model, tmp_path, capsys):
    packed = gzip.compress(b"".join(json.dumps(RECORD).encode() + b"\n" for _ in range(200_000)))
    (path := tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])  # an error lies where it is cut off
    assert "sequences" in shown(capsys, "sft", f"--model={model}", f"--data.sources={path}")
    out = shown(capsys, "pretrain", f"--tokenizer={model}", f"--data.sources={path}", code=2)
    assert "no usable record at the beginning\nskipped 1000 × a record without a" in out
    packed = gzip.compress(json.dumps([RECORD] * 200_000).encode())  # one list, on one line
    (path := tmp_path / "a.json.gz").write_bytes(packed[: len(packed) // 2])
    assert "sequences" in shown(capsys, "sft", f"--model={model}", f"--data.sources={path}")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "usage: tritium inspect pretrain|sft"),
        (["sfd"], "no data to inspect of a stage 'sfd'; did you mean sft?"),
        (["pretrain", "--data.sources={a}"], "name one with --tokenizer"),
        (["sft", "--model={m}", "--data.sources={a}", "--data.template=lama3"], "did you mean llama3"),
        (["sft", "--model={m}", "--data.sources={a}"], "no usable record"),
    ],
)
def test_mistakes_are_sentences(model, tmp_path, capsys, argv, words):
    (path := tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    assert words in shown(capsys, *(a.format(a=path, m=model) for a in argv), code=2)
