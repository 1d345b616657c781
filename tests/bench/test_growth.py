"""The growth bench: slopes of what is measured beside those of the formula."""

import json
from dataclasses import replace

import pytest

from tritium.bench import growth
from tritium.bench.__main__ import main

TINY = {"layers": 1, "hidden_size": 32, "intermediate_size": 64, "heads": 2, "kv_heads": 1, "head_dim": 16}


def test_slopes_stand_beside_those_of_the_formula(tmp_path, monkeypatch, capsys):
    base = replace(growth.BASE, model=replace(growth.BASE.model, **TINY), vocab_size=128, context=32)
    monkeypatch.setattr(growth, "GROWTH", {"tokens T": ((64, 128, 256), lambda n: replace(base, bin_tokens=n))})
    file = tmp_path / "growth.jsonl"
    assert main(["growth", f"--out={tmp_path}", f"--jsonl={file}", "--steps=1", "--threads=1"]) == 0
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert row["flops_slope"] == pytest.approx(1.0), "the work is as many times the tokens"
    assert 0 < row["mb_slope"] < 1.2 and len(row["ms"]) == 3
    assert "tokens T" in capsys.readouterr().out and "tokens T" in file.with_suffix(".md").read_text()


def test_the_slope_of_a_power_is_its_exponent():
    assert growth.slope((1, 2, 4), [3.0, 12.0, 48.0]) == pytest.approx(2.0)
