"""The ladder at smoke size, and what recipes may say."""

import json
import re
from html import escape

import pytest

from tritium.core.config import ConfigError
from tritium.stages import evaluate, run

STAGES = "corpus tokenizer pretrain cold sft sample reward dpo teach distill imitate grpo ppo"
NAMES = STAGES.split()
ROW = ("name", "metric", "before", "after", "seconds", "tokens_per_second", "checkpoint")
KEYS = {*ROW, "higher_is_better"}


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
    assert rows(smoke)[NAMES.index("sample")]["tokens_per_second"] > 0
    report = (smoke / "report.html").read_text()
    assert all(f">{name}<" in report for name in NAMES)
    assert "<svg" in report
    settings = (smoke / "pretrain" / "config.toml").read_text()
    assert "eval_bins = 8" in settings and escape(settings) in report  # defaults too: what really ran


def test_a_rerun_finds_everything_done(smoke, capsys):
    before = rows(smoke)
    run.train(run.Config(recipe="smoke", out=str(smoke)))
    assert rows(smoke) == before
    shown = capsys.readouterr()
    assert shown.err.count("already done") == len(NAMES)
    assert f"({len(NAMES)} of {len(NAMES)}): already done" in shown.err
    assert "chat --model=" in shown.out


def test_an_interrupted_stage_is_resumed_and_a_changed_one_run_anew(tiny, tmp_path):
    recipe, out = tmp_path / "mine.toml", tmp_path / "out"

    def climb(size: int) -> None:
        text = ""
        for name, vocab_size in (("first", 320), ("second", size)):
            text += f'[stages.{name}]\nkind = "tokenizer"\nmetric = "vocab_size"\n'
            text += f'config = {{ sources = ["{tiny.data("text.jsonl")}"], vocab_size = {vocab_size} }}\n'
        recipe.write_text(text)
        run.train(run.Config(recipe=str(recipe), out=str(out)))

    climb(325)
    kept = (out / "first" / "tokenizer.model").stat().st_mtime_ns
    marker = out / "second" / "of-this-run"
    marker.touch()
    climb(330)
    assert (out / "first" / "tokenizer.model").stat().st_mtime_ns == kept  # not changed: not run again
    assert rows(out)[1]["after"] == 330 and not marker.exists()
    state = json.loads((out / "state.json").read_text())
    del state["stages"]["second"]["result"]  # as if it had been interrupted
    (out / "state.json").write_text(json.dumps(state))
    marker.touch()
    climb(330)
    assert marker.exists()  # its folder was kept, so that a training stage can resume from it


@pytest.mark.parametrize(
    "text,word",
    [
        ("title = 't'\n", "at least one"),
        ("[stages.sft]\nconfg = {}\n", "confg"),
        ("[stages.nosuchstage]\n", "nosuchstage"),
        ('[stages.sft]\nconfig.model = "{pretrain}"\n', "no stage 'pretrain' comes before"),
        ('[stages.sft]\nconfig.model = "m"\nconfig.optim.lrr = 1\n', "did you mean optim.lr"),
        ('[stages.mine]\nkind = "stf"\n', "did you mean sft"),
        ("[stages.evaluate]\n", "makes no folder"),
        ("[stages.cli]\n", "no stage 'cli'"),
        ('[stages."../x"]\nkind = "corpus"\n', "a word"),
        ('[stages.sft]\nconfig.model = "m"\nmetric = "exact_match"\n', "needs test ="),
        (
            'test = "none.jsonl"\n[stages.sft]\nconfig.model = "m"\nmetric = "exact_match"\n',
            "none.jsonl does not exist",
        ),
        ('test = "none.jsonl"\n[stages.corpus]\nmetric = "exact_match"\n', "measures a model"),
        ("[stages.corpus]\nmetric = 3\n", "metric = 3 must be a string"),
        ("stages = 3\n", "must be a table"),
        ('tests = "a.jsonl"\n[stages.corpus]\n', "tests"),
        ("[stages.sft\n", "mine.toml"),
        ('extends = "no/such.toml"\n', "'no/such.toml' is neither a file nor built in; there are "),
        ('extends = "nothing"\n', "nothing"),
    ],
)
def test_a_recipe_with_a_mistake_says_what_is_wrong(tmp_path, text, word):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(word)):
        run.train(run.Config(recipe=str(recipe), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()  # nothing was run


def test_a_mistake_in_the_last_stage_is_found_before_the_first_runs(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[stages.corpus]\nmetric = "megabytes"\n[stages.sft]\nconfig.model = "{pretrain}"\n')
    with pytest.raises(ConfigError, match="these do: corpus"):
        run.train(run.Config(recipe=str(recipe), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_only_names_in_braces_are_references():
    folders = {"sft": "out/sft/step-3", "my-data": "out/my-data"}
    assert run.fill(["{sft}/a", {"k": "{my-data}{sft}"}, 3], folders, "") == [
        "out/sft/step-3/a",
        {"k": "out/my-dataout/sft/step-3"},
        3,
    ]
    text = 'Answer as {} or {"a": 1}; \\d{3}'
    assert run.fill(text, folders, "") == text


def test_a_folder_that_no_recipe_made_is_left_alone(tmp_path):
    recipe, out = tmp_path / "mine.toml", tmp_path / "out"
    recipe.write_text('[stages.corpus]\nmetric = "megabytes"\n')
    (precious := out / "corpus" / "precious.txt").parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(ConfigError, match=re.escape(f"{out / 'corpus'} is there")):
        run.train(run.Config(recipe=str(recipe), out=str(out)))
    assert precious.exists()


def test_a_metric_that_the_stage_does_not_have(tiny, tmp_path, capsys):
    recipe, config = tmp_path / "mine.toml", run.Config(recipe=str(tmp_path / "mine.toml"), out=str(tmp_path / "out"))
    settings = f'config = {{ sources = ["{tiny.data("text.jsonl")}"], vocab_size = 320 }}\n'
    recipe.write_text(f'[stages.tokenizer]\nmetric = "bytes"\n{settings}')
    with pytest.raises(ConfigError, match="'bytes' is not one of its own: bytes_per_token, vocab_size"):
        run.train(config)
    recipe.write_text(f'[stages.tokenizer]\nmetric = "bytes_per_token"\n{settings}')
    assert run.train(config).metrics["bytes_per_token"] > 1
    assert "already done" in capsys.readouterr().err  # what is shown of a stage is no reason to run it again


def test_the_tables_columns_are_as_wide_as_what_is_in_them(tmp_path):
    ladder = run.Ladder({"stages": {}}, tmp_path)
    ladder.rows = [
        dict(zip(ROW, ("sft", "eval_loss", 2.5, 1.25, 9.4, 12345.6, "runs/sft"), strict=True)),
        dict(zip(ROW, ("reinforcement", "calibration_error_of_all", None, -1469.0, 1e6, None, "runs/r"), strict=True)),
    ]
    assert ladder.table().splitlines() == [
        "stage          metric                    before      after  seconds  tokens/s  checkpoint",
        "sft            eval_loss                  2.500      1.250        9     12346  runs/sft",
        "reinforcement  calibration_error_of_all       –  -1469.000  1000000         –  runs/r",
    ]


def test_a_model_is_measured_once_and_anew_where_it_or_the_test_changed(tiny, tmp_path, monkeypatch, capsys, quick):
    measured, measure = [], evaluate.measure

    def counted(settings):
        measured.append(settings.model)
        settings.sampling.max_tokens = 4
        return measure(settings)

    def climb(steps: int) -> list[dict]:
        measured.clear()
        recipe.write_text(RECIPE.format(test=test, model=tiny.model, text=tiny.data("text.jsonl"), steps=steps))
        run.train(run.Config(recipe=str(recipe), out=str(out)))
        return rows(out)

    monkeypatch.setattr(evaluate, "measure", counted)
    out, recipe, test = tmp_path / "out", tmp_path / "mine.toml", tmp_path / "test.jsonl"
    test.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    scratch, continued = climb(steps=1)
    assert scratch["before"] is None and scratch["after"] is not None  # there was no model before it
    assert continued["before"] == scratch["after"]
    assert len(measured) == 2 and climb(steps=1) == [scratch, continued] and not measured

    test.write_text(test.read_text() * 2)
    climb(steps=1)
    assert len(measured) == 2 and len((out / "answers" / "continued.jsonl").read_text().splitlines()) == 2
    (out / "answers" / "continued.jsonl").write_text("of the run before\n")
    climb(steps=2)  # of `continued` only, which is trained and measured anew
    assert len(measured) == 1 and "of the run before" not in (out / "answers" / "continued.jsonl").read_text()

    capsys.readouterr()
    recipe.write_text(recipe.read_text().replace('"exact_match"', '"eval_loss"'))
    run.train(run.Config(recipe=str(recipe), out=str(out)))
    assert capsys.readouterr().err.count("already done") == 2
    assert all(row["after"] < row["before"] and not row["higher_is_better"] for row in rows(out))


PHASE = """
[stages.{name}]
kind = "{kind}"
metric = "{metric}"
config.model = "{model}"
config.data.sources = ["{problems}"]
config.{kind} = {{ prompts = 2, group = 2, {options} }}
config.sampling.max_tokens = 4
config.run = {{ steps = 1, dtype = "fp32" }}
{more}
"""


def test_phases_of_reinforcement_learning_each_have_prompts_rewards_and_a_kl(tiny, tmp_path, quick):
    (other := tmp_path / "other.jsonl").write_text('{"question": "Say a word.", "answer": "word"}\n' * 2)
    algorithm, problems = 'algorithm = "reinforce++", beta = ', tiny.data("problems.jsonl")
    style = f'config.reward = "exact - 0.5*repetition"\nconfig.reference.model = "{tiny.model}"'
    phases = [
        ("stem", "grpo", "right", tiny.model, problems, f"{algorithm} 0.02", ""),
        ("style", "grpo", "reward", "{stem}", other, f"{algorithm} 0.05", style),
        ("preference", "ppo", "right", "{style}", problems, "epochs = 1, beta = 0.1", 'config.reward = "exact"'),
    ]
    keys = ("name", "kind", "metric", "model", "problems", "options", "more")
    (recipe := tmp_path / "phases.toml").write_text(
        "".join(PHASE.format(**dict(zip(keys, phase, strict=True))) for phase in phases)
    )
    run.train(run.Config(recipe=str(recipe), out=str(tmp_path / "out")))
    assert [row["name"] for row in rows(tmp_path / "out")] == ["stem", "style", "preference"]
    numbers = {}
    for name in ("stem", "style", "preference"):
        (line,) = (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()
        numbers[name] = json.loads(line)
        assert numbers[name]["kl_k3"] >= 0
    assert "reward/repetition" in numbers["style"] and "reward/repetition" not in numbers["preference"]


RECIPE = """
test = "{test}"
[stages.scratch]
kind = "pretrain"
metric = "exact_match"
[stages.scratch.config]
tokenizer = "{model}"
model = {{ layers = 1, hidden_size = 16, intermediate_size = 16, heads = 1, kv_heads = 1, head_dim = 16, context = 64 }}
data = {{ sources = ["{text}"], bin_tokens = 256 }}
run = {{ steps = 1, dtype = "fp32" }}
[stages.continued]
kind = "pretrain"
metric = "exact_match"
[stages.continued.config]
init = "{{scratch}}"
data = {{ sources = ["{text}"], bin_tokens = 256 }}
run = {{ steps = {steps}, dtype = "fp32" }}
"""
