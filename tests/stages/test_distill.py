"""Distillation from the command line, in its three modes; a teacher with another vocabulary is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import tritium
from tritium.core.config import ConfigError
from tritium.core.rewards import Score
from tritium.core.rewards.exact import ExactMatch
from tritium.core.setup import load_model
from tritium.stages import cli, distill, tokenizer

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory) -> str:
    """The tiny model with its weights moved, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("teacher")
    shutil.copytree(tiny.model, folder, dirs_exist_ok=True)
    model = tritium.load(tiny.model, dtype=torch.float32)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    model.save(str(folder))
    return str(folder)


def run(tiny, out, teacher: str, *settings: str) -> list[dict]:
    fixed = [f"--model={tiny.model}", f"--teacher={teacher}", f"--run.out={out}", "--run.dtype=fp32"]
    fixed += ["--data.bin_tokens=512", "--optim.lr=3e-3", "--run.eval_bins=1", "--draw.sampling.max_tokens=6"]
    assert cli.main(["distill", *fixed, *settings]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("setting", ["--kind=forward", "--kind=reverse", "--top_k=8"])
def test_the_student_comes_closer_to_the_teacher_on_given_answers(tiny, tmp_path, teacher, setting):
    rows = run(tiny, tmp_path, teacher, setting, f"--data.sources={tiny.data('chats.jsonl')}", "--run.epochs=3")
    before, *_, after = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert 0 < after < before


def test_what_a_teacher_said_at_another_temperature_is_not_taken_for_this_ones(tiny, tmp_path, teacher):
    """A folder whose checkpoints are gone still has the cache."""
    settings = ["--top_k=8", f"--data.sources={tiny.data('chats.jsonl')}", "--run.steps=1"]
    fresh = run(tiny, tmp_path / "fresh", teacher, *settings, "--temperature=2", "--top_k=4")
    run(tiny, tmp_path / "used", teacher, *settings)
    shutil.rmtree(tmp_path / "used" / "step-00000001")
    again = run(tiny, tmp_path / "used", teacher, *settings, "--temperature=2", "--top_k=4")
    assert [row["loss"] for row in again if "loss" in row] == [row["loss"] for row in fresh if "loss" in row]


def test_the_student_comes_closer_to_the_teacher_on_its_own_answers(tiny, tmp_path, teacher):
    source = f"--data.sources={tiny.data('problems.jsonl')}"
    rows = run(tiny, tmp_path, teacher, source, "--mode=on_policy", "--draw.prompts=6", "--run.steps=8")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-2:]) < sum(losses[:2])


def test_the_student_learns_what_the_teacher_answers(tiny, tmp_path, teacher):
    source = f"--data.sources={tiny.data('problems.jsonl')}"
    rows = run(tiny, tmp_path, teacher, source, "--mode=sequence", "--draw.prompts=6", "--draw.k=8", "--run.steps=10")
    losses = [row["loss"] for row in rows if "loss" in row]  # its answers' cross-entropy
    assert sum(losses[-3:]) < sum(losses[:3]) and all(0 <= row["right"] <= 1 for row in rows if "right" in row)


def test_an_adapter_of_the_student_learns_from_the_teacher(tiny, tmp_path, teacher):
    lora = ("--finetune.kind=lora", "--finetune.rank=4", "--optim.lr=1e-2")
    rows = run(tiny, tmp_path / "a", teacher, *lora, f"--data.sources={tiny.data('chats.jsonl')}", "--run.epochs=3")
    before, *_, after = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert 0 < after < before and list((tmp_path / "a").glob("*/adapter_config.json"))
    dual = ("--mode=dual", "--draw.reward=length(0, 3)", "--draw.prompts=6", "--run.steps=1")
    (row,) = run(tiny, tmp_path / "b", teacher, *lora, f"--data.sources={tiny.data('problems.jsonl')}", *dual)
    assert row["pairs_kept"] > 0 and row["margin"] == pytest.approx(0.0, abs=1e-5)  # the base is the reference


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"mode": "sequence", "temperature": 0.5}, "temperature=0.5: mode=sequence has none"),
        ({"mode": "dual", "temperature": 2.0}, "temperature=2.0: mode=dual has none"),
        ({"mode": "on_policy", "sft": 1.0}, "sft=1.0: mode=on_policy has none; these do: logit"),
        ({"positive_from": "teacher"}, "positive_from=teacher: mode=logit has none; these do: dual"),
        ({"weights": [1.0, 0.0, 0.0]}, "weights=1.0,0.0,0.0: mode=logit has none"),
    ],
)
def test_what_a_mode_would_ignore_is_refused(setting, words):
    with pytest.raises(ConfigError, match=words):
        distill.Config(model="", teacher="", **setting)


def test_logits_that_are_cut_are_refused_by_a_divergence(tiny, tmp_path, monkeypatch, capsys):
    def capped(*given, **options):
        model = load_model(*given, **options)
        model.config = replace(model.config, head_softcap=30.0)
        return model

    monkeypatch.setattr(distill, "load_model", capped)
    arguments = [f"--model={tiny.model}", f"--teacher={tiny.model}", f"--data.sources={tiny.data('chats.jsonl')}"]
    assert cli.main(["distill", *arguments, f"--run.out={tmp_path / 'run'}"]) == 2
    assert "does not support models that soft-cap their logits" in capsys.readouterr().err


def test_pairs_and_both_kls_together(tiny, tmp_path, teacher, monkeypatch):
    def odd(self, ids, text, *, prompt="", reference="") -> Score:
        return Score(float(ids[0] % 2))

    monkeypatch.setattr(ExactMatch, "__call__", odd)
    source = f"--data.sources={tiny.data('problems.jsonl')}"
    rows = run(tiny, tmp_path, teacher, source, "--mode=dual", "--draw.prompts=6", "--run.steps=4", "--draw.refresh=2")
    steps = [row for row in rows if "kl_positive" in row]
    assert len(steps) == 4 and all(row["pairs_kept"] > 0 and row["kl_negative"] > 0 for row in steps)
    assert (
        abs(steps[0]["margin"]) < 1e-5 and steps[1]["margin"] != 0.0
    )  # the reference is the student of the round's start
    assert steps[2]["margin"] == pytest.approx(0.0, abs=1e-5)


def test_a_teacher_with_another_vocabulary_is_refused(tiny, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny.model, other)
    tokenizer.train(tokenizer.Config(sources=[tiny.data("text.jsonl")], vocab_size=330, out=str(tmp_path / "t")))
    for file in (tmp_path / "t").iterdir():
        shutil.copy(file, other)
    arguments = [f"--model={tiny.model}", f"--teacher={other}", f"--data.sources={tiny.data('chats.jsonl')}"]
    assert cli.main(["distill", *arguments, f"--run.out={tmp_path / 'run'}"]) == 2
    assert f"teacher={other} has another vocabulary" in capsys.readouterr().err
