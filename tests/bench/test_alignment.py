"""The comparison of alignment methods, at the smallest size: each runs, and the table says what was measured."""

import json

import pytest

from tritium.bench import __main__ as bench
from tritium.bench.rows import SCHEMA
from tritium.core.rewards import Score

pytestmark = pytest.mark.usefixtures("quick")


def test_a_table_of_two_methods(tiny, tmp_path, monkeypatch, capsys):
    odd = lambda ids, text, **_: Score(float(ids[-1] % 2))  # noqa: E731
    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: odd)
    monkeypatch.setattr("tritium.stages.sample.make_reward", lambda spec, malformed=0.0: odd)
    monkeypatch.setattr("tritium.bench.alignment.PROBE", 1)
    problems, out = tiny.data("problems.jsonl"), tmp_path / "a.md"
    arguments = [f"--model={tiny.model}", f"--problems={problems}", f"--test={problems}", f"--out={out}"]
    arguments += ["--seeds=1", "--max_steps=2", "--max_tokens=6", "--methods=rft,rloo"]
    assert bench.main(["alignment", *arguments]) == 1  # two steps teach nothing, and that is said
    lines = out.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| rft", "| rloo"] and "1 seed(s)" in out.read_text()
    assert bench.main(["alignment", *arguments, f"--teacher={tiny.model}", "--methods=distill"]) == 1
    measured = out.with_suffix(".jsonl").read_text()
    assert all(json.loads(line).keys() >= SCHEMA for line in measured.splitlines())
    assert "rloo" in (chart := out.with_suffix(".svg").read_text()) and "SFT" in chart
    assert bench.main(["alignment", *arguments]) == 1  # what was measured is not measured again, and stays in the table
    assert out.with_suffix(".jsonl").read_text() == measured and measured.count("\n") == 3
    assert [line.split(" | ")[0] for line in out.read_text().splitlines()[-3:]] == ["| rft", "| rloo", "| distill"]
    assert bench.main(["alignment", *arguments, f"--out={tmp_path}/b.md", "--methods=distill"]) == 2
    assert bench.main(["alignment", *arguments[:1], "--problems=none", "--test=none"]) == 2
    assert "--problems=none does not exist" in capsys.readouterr().err
