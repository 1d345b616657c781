"""The training bench: everyone does the same work, and who does not gets no ratio."""

import json
from dataclasses import replace

import pytest
import torch

from tritium.bench import contenders, train
from tritium.bench.rows import SCHEMA
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh

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
    assert all(row.keys() >= SCHEMA and row["pass"] == "pretrain" and row["ms"] > 0 for row in (ours, theirs))
    said = capsys.readouterr().out
    assert "MFLOP a token × tokens/s" in said and "Our step: " in said
    assert all(f"{row['contender']}: {row['setting'].split()[0]}" in said for row in (ours, theirs))


def test_on_real_text_ours_and_transformers_learn_alike(tmp_path):
    """The same losses, step by step; both fall. A wrong rate shows here, and in no time of a step."""
    _, rows = rows_of(tmp_path, "--against=hf_fp32", "--text", "--lr=3e-3", "--vocab_size=256", "--steps=8")
    ours, theirs = (row["losses"] for row in rows)
    assert len(theirs) == train.WARM + 16 and len(ours) == len(theirs) - 1  # the last is told with the next step
    assert ours == pytest.approx(theirs[:-1], rel=0.01) and ours[-1] < ours[0] - 0.5


def test_pairs_train_too(tmp_path):
    code, rows = rows_of(tmp_path, "--stages=dpo,reward")
    assert code == 0 and [row["stage"] for row in rows] == ["reward", "dpo"]
    assert rows[1]["loss"] == pytest.approx(0.6931, abs=1e-3), "the reference is the policy: ln 2"


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_step_of_every_stage(tmp_path, stage):
    """Trained tokens, and where the time went; where answers are sampled, that is a part of its own."""
    shape = train.ShapeConfig(layers=1, hidden_size=32, intermediate_size=64, heads=2, kv_heads=1, head_dim=16)
    config = train.Config(model=shape, vocab_size=128, bin_tokens=128, context=64)
    work = train.make_work(config, stage, tmp_path)
    tokens, _, parts = next(contenders.tritium(work))
    assert tokens > 0 and parts["forward"] > 0 and parts["backward"] > 0
    assert ("sample" in parts) == (stage in contenders.SAMPLED)
    assert train.flops_per_token(work) > 0


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_micro_batches_do_the_same_work(tmp_path, stage):
    """The same tokens and mean loss of a step, in shorter streams."""
    shape = train.ShapeConfig(layers=1, hidden_size=32, intermediate_size=64, heads=2, kv_heads=1, head_dim=16)
    config = train.Config(model=shape, vocab_size=128, bin_tokens=512, context=64)
    work = train.make_work(config, stage, tmp_path)
    (tokens, loss, _), (again, same, _) = (next(contenders.tritium(replace(work, micro_tokens=n))) for n in (512, 128))
    assert again == tokens and same == pytest.approx(loss, rel=1e-3)


def test_rows_of_other_work_stay_and_those_of_the_same_are_replaced(tmp_path):
    """In JSONL, Markdown and SVG."""
    file = tmp_path / "rows.jsonl"
    _, (ours,) = rows_of(tmp_path)
    for stage, speed in (("sft", 11.0), ("sft", 22.0)):
        train.write_report(file, [ours | {"stage": stage, "tokens_per_second": speed}])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["stage"], row["tokens_per_second"]) for row in rows[1:]] == [("sft", 22.0)]
    text = file.with_suffix(".md").read_text()
    assert text.count("## ") == 2 and "22" in text and "forward" in text
    assert "22 tokens/s" in file.with_suffix(".svg").read_text()


def test_other_work_gets_no_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAME", -1.0)  # nothing is close enough
    code, (_, theirs) = rows_of(tmp_path, "--against=hf")
    assert code == 1 and theirs["status"] == "other work" and theirs["ours_over_it"] is None


@pytest.mark.parametrize("size", train.SIZES)
def test_sizes_have_the_parameters_that_they_are_named_after(size):
    wanted = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    config = train.Config(**train.SIZES[size])
    found = sum(p.numel() for p in Transformer(train._shape(config), Mesh.single(torch.device("meta"))).parameters())
    assert found == pytest.approx(wanted, rel=0.25), f"{found:,}"


def test_sizes_are_trained_one_after_another(tmp_path, monkeypatch):
    config = train.load(train.Config, TINY, "", "")
    tiny = {str(v): {"model": config.model, "vocab_size": v} for v in (128, 64)}
    monkeypatch.setattr(train, "SIZES", tiny)
    rows = []
    monkeypatch.setattr(train, "measure", lambda c, stage: rows.append((c.vocab_size, stage)) or [])
    monkeypatch.setattr(train, "write_report", lambda *_: None)
    monkeypatch.setattr(train, "_table", lambda found: [])
    monkeypatch.setattr(train, "_settings", lambda found: [])
    monkeypatch.setattr(train, "load", lambda *_: train.replace(config, sizes=["128", "64"], out=str(tmp_path)))
    assert train.main([]) == 0 and rows == [(128, "pretrain"), (64, "pretrain")]
