"""The growth bench: slopes of what is measured beside those of the formula."""

import json
from dataclasses import replace

import pytest

from tritium.bench import growth
from tritium.bench.__main__ import main
from tritium.bench.rows import SCHEMA

TINY = {"layers": 1, "hidden_size": 32, "intermediate_size": 64, "heads": 2, "kv_heads": 1, "head_dim": 16}


def test_slopes_stand_beside_those_of_the_formula(tmp_path, monkeypatch, capsys):
    base = replace(growth.BASE, model=replace(growth.BASE.model, **TINY), vocab_size=128, context=32)
    monkeypatch.setattr(growth, "GROWTH", {"tokens T": ((64, 128, 256), lambda n: replace(base, bin_tokens=n))})
    file = tmp_path / "growth.jsonl"
    assert main(["growth", f"--out={tmp_path}", f"--jsonl={file}", "--steps=1", "--threads=1"]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["shape"]["size"] for row in rows] == [64, 128, 256] and all(row.keys() >= SCHEMA for row in rows)
    assert rows[0]["flops_slope"] == pytest.approx(1.0), "the work is as many times the tokens"
    assert 0 < rows[0]["mb_slope"] < 1.2 and 0 < rows[0]["held_slope"] < 1.2
    assert all(0.4 < row["mb"] / row["held"] < 2.5 for row in rows), "the planner's bytes are about those that are made"
    assert "tokens T" in capsys.readouterr().out and "of what is held" in file.with_suffix(".md").read_text()
    assert "what is held" in file.with_suffix(".svg").read_text()


def test_the_slope_of_a_power_is_its_exponent():
    assert growth.slope((1, 2, 4), [3.0, 12.0, 48.0]) == pytest.approx(2.0)
