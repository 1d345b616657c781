"""The training bench: everyone does the same work, and who does not gets no ratio."""

import json

import pytest

from tritium.bench import train

TINY = ["--model.layers=1", "--model.hidden_size=32", "--model.intermediate_size=64", "--model.heads=2"]
TINY += ["--model.kv_heads=1", "--model.head_dim=16", "--vocab_size=128", "--bin_tokens=128", "--context=32"]
TINY += ["--rounds=2", "--steps=1", "--threads=1"]


def rows_of(tmp_path, *options):
    file = tmp_path / "rows.jsonl"
    code = train.main([*TINY, f"--out={tmp_path}", f"--jsonl={file}", *options])
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def test_ours_and_transformers_do_the_same_work(tmp_path, capsys):
    code, (ours, theirs) = rows_of(tmp_path, "--against=hf")
    assert code == 0 and (ours["contender"], theirs["contender"]) == ("tritium", "hf")
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=train.SAME)
    assert ours["ours_over_it"] == 1.0 and theirs["ours_over_it"] > 0
    assert "hf" in capsys.readouterr().out


def test_pairs_train_too(tmp_path):
    code, rows = rows_of(tmp_path, "--stages=dpo,reward")
    assert code == 0 and [row["stage"] for row in rows] == ["dpo", "reward"]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the reference is the policy: ln 2"


def test_other_work_gets_no_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAME", -1.0)  # nothing is close enough
    code, (_, theirs) = rows_of(tmp_path, "--against=hf")
    assert code == 1 and theirs["status"] == "other work" and theirs["ours_over_it"] is None
