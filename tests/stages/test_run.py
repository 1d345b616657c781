"""The ladder at smoke size, and what recipes may say."""

import json

import pytest

from tritium.core.config import ConfigError
from tritium.stages import run

NAMES = ["corpus", "tokenizer", "pretrain", "cold", "sft", "sample", "reward", "dpo", "grpo"]
KEYS = {"name", "metric", "before", "after", "higher_is_better", "seconds", "tokens_per_second", "checkpoint"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished run of the smoke recipe."""
    out = tmp_path_factory.mktemp("smoke")
    run.train(run.Config(recipe="smoke", out=str(out)))
    return out


def rows(out) -> list[dict]:
    return json.loads((out / "results.json").read_text())["stages"]


def test_every_stage_is_run_and_described(smoke):
    assert [row["name"] for row in rows(smoke)] == NAMES
    assert all(row.keys() >= KEYS for row in rows(smoke))
    pretrain = rows(smoke)[2]
    assert not pretrain["higher_is_better"]
    assert pretrain["after"] < pretrain["before"] - 1.0  # it learned something
    report = (smoke / "report.html").read_text()
    assert all(f">{name}<" in report for name in NAMES)
    assert "<svg" in report


def test_a_rerun_finds_everything_done(smoke, capsys):
    before = rows(smoke)
    run.train(run.Config(recipe="smoke", out=str(smoke)))
    assert rows(smoke) == before
    shown = capsys.readouterr()
    assert shown.err.count("already done") == len(NAMES)
    assert "chat --model=" in shown.out


def test_an_interrupted_stage_is_resumed_and_a_changed_one_run_anew(smoke, tmp_path, monkeypatch):
    recipe = tmp_path / "mine.toml"
    text = '[stages.corpus]\nmetric="megabytes"\n[stages.tokenizer]\nmetric="bytes_per_token"\n[stages.tokenizer.config]\n'
    recipe.write_text(f'extends = "smoke"\n{text}vocab_size = 700\n')
    monkeypatch.setattr(run, "read_recipe", only(run.read_recipe, "corpus", "tokenizer"))
    run.train(run.Config(recipe=str(recipe), out=str(tmp_path / "out")))
    kept = (tmp_path / "out" / "corpus" / "test.jsonl").stat().st_mtime_ns
    recipe.write_text(f'extends = "smoke"\n{text}vocab_size = 720\n')
    run.train(run.Config(recipe=str(recipe), out=str(tmp_path / "out")))
    assert (tmp_path / "out" / "corpus" / "test.jsonl").stat().st_mtime_ns == kept  # not changed: not run again
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    del state["tokenizer"]["row"]  # as if it had been interrupted
    marker = tmp_path / "out" / "tokenizer" / "of-the-interrupted-run"
    marker.touch()
    (tmp_path / "out" / "state.json").write_text(json.dumps(state))
    run.train(run.Config(recipe=str(recipe), out=str(tmp_path / "out")))
    assert marker.exists()  # its folder was kept, so that a training stage can resume from it


def only(read, *names):
    """`read_recipe`, with the stages of these names alone."""

    def shortened(name):
        recipe = read(name)
        return recipe | {"stages": {k: v for k, v in recipe["stages"].items() if k in names}}

    return shortened


@pytest.mark.parametrize(
    "text,word",
    [
        ("title = 1\n", "at least one"),
        ("[stages.sft]\nconfg = {}\n", "confg"),
        ("[stages.nosuchstage]\n", "nosuchstage"),
        ('[stages.sft]\nconfig.model = "{pretrain}"\n', "pretrain"),
        ("[stages.sft\n", "mine.toml"),
        ('extends = "nothing"\n', "nothing"),
    ],
)
def test_a_recipe_with_a_mistake_says_what_is_wrong(tmp_path, text, word):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=word):
        run.train(run.Config(recipe=str(recipe), out=str(tmp_path / "out")))
