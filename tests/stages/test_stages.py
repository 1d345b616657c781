"""Every stage once, from Python, on a model of two layers: it learns what it should, and the next stage can read it."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tritium
from tritium.core.config import ConfigError
from tritium.core.data import DataConfig
from tritium.core.experience import Experience, ProblemsConfig
from tritium.core.optim import OptimConfig
from tritium.core.problems import Problem, problems_of
from tritium.core.rewards import Score
from tritium.core.rollout import Rollout, Sample
from tritium.core.run import LoopConfig, Result, RunConfig
from tritium.core.setup import read_model
from tritium.model.generate import Completion
from tritium.model.heads import ScalarModel
from tritium.parallel.mesh import Mesh
from tritium.stages import chat, dpo, evaluate, grpo, pretrain, reward, sample, sft, tokenizer
from tritium.stages.cli import run_stage

pytestmark = pytest.mark.usefixtures("quick")
LR = OptimConfig(lr=3e-3)


def run(out: Path, steps: int) -> RunConfig:
    return RunConfig(out=str(out), steps=steps, dtype="fp32")


def data(*sources: str) -> DataConfig:
    return DataConfig(list(sources), bin_tokens=512, holdout=0.2)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_finished(result: Result, out: Path, steps: int) -> None:
    """A folder with everything, for us and for transformers, and a line for each step."""
    folder = Path(result.checkpoint)
    assert folder == out / f"step-{steps:08d}"
    wanted = ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "manifest.json")
    assert all((folder / name).is_file() for name in wanted)
    assert [m["step"] for m in rows(out / "metrics.jsonl") if "time/step" in m] == list(range(1, steps + 1))
    assert (out / "config.toml").read_text() == json.loads((folder / "trainer" / "state.json").read_text())["config"]
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.fixture
def odd_is_right(monkeypatch):
    """A verifier under which an untrained model is sometimes right: an odd last token is."""
    judge = lambda ids, text, **_: Score(float(ids[-1] % 2))  # noqa: E731
    monkeypatch.setattr("tritium.stages.sample.make_reward", lambda spec, malformed=0.0: judge)
    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: judge)


# ---------------------------------------------------------------------------------------------- training


def test_pretrain_learns(tiny):
    assert tiny.metrics["eval_loss"] < tiny.metrics["before"] - 1.0
    assert tiny.metrics["before"] == pytest.approx(math.log(340), abs=0.1)
    model = tritium.load(tiny.model, dtype=torch.float32)
    assert model.config.vocab_size == tritium.Tokenizer.load(tiny.model).vocab_size == 340


def test_continued_pretraining_replays_old_text(tiny, tmp_path):
    (new := tmp_path / "new.txt").write_text("Once upon a time there was a small model. " * 60)
    config = pretrain.Config(init=tiny.model, replay=[tiny.data("text.jsonl")], replay_share=0.5, data=data(str(new)))
    config.run, config.optim = run(tmp_path / "out", 4), LR
    result = pretrain.train(config)
    assert_finished(result, tmp_path / "out", 4)
    assert result.metrics["eval_loss"] < result.before["eval_loss"]


def test_sft_learns(tiny, tmp_path):
    result = sft.train(
        sft.Config(data=data(tiny.data("chats.jsonl")), optim=LR, run=run(tmp_path, 8), model=tiny.model)
    )
    assert_finished(result, tmp_path, 8)
    assert result.metrics["eval_loss"] < result.before["eval_loss"] - 0.3


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_reward_learns_to_tell_answers_apart(tiny, tmp_path, loss):
    source = tiny.data("pairs.jsonl" if loss == "pairwise" else "rankings.jsonl")
    config = reward.Config(loss=loss, data=data(source), optim=LR, run=run(tmp_path, 12), model=tiny.model)
    result = reward.train(config)
    assert_finished(result, tmp_path, 12)
    assert result.metrics["eval_loss"] < result.before["eval_loss"] - 0.1
    model = read_model(result.checkpoint, "fp32", Mesh.single())
    assert isinstance(model, ScalarModel) and model.score.abs().sum() > 0


def test_dpo_moves_from_ln_2_towards_the_chosen_answers(tiny, tmp_path):
    config = dpo.Config(sft=0.1, data=data(tiny.data("pairs.jsonl")), optim=LR, run=run(tmp_path, 6), model=tiny.model)
    result = dpo.train(config)
    assert_finished(result, tmp_path, 6)
    first = rows(tmp_path / "metrics.jsonl")[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) == result.before["eval_loss"]
    assert result.metrics["eval_loss"] < math.log(2) - 0.02 and result.metrics["eval_margin"] > 0.05
    assert rows(tmp_path / "metrics.jsonl")[-2]["sft"] > 0


def grpo_config(tiny, out: Path, steps: int) -> grpo.Config:
    run = LoopConfig(out=str(out), steps=steps, dtype="fp32")
    return grpo.Config(model=tiny.model, data=ProblemsConfig([tiny.data("problems.jsonl")], 512), run=run)


def test_grpo_reinforces_what_the_verifier_likes(tiny, tmp_path, odd_is_right):
    config = grpo_config(tiny, tmp_path, 20)
    config.grpo, config.optim = grpo.GRPOConfig(prompts=6, group=8), OptimConfig(lr=3e-3, weight_decay=0.0)
    config.sampling.max_tokens = 4
    result = grpo.train(config)
    assert_finished(result, tmp_path, 20)
    rewards = [m["reward"] for m in rows(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1  # 0.17 to 0.3, by the number of threads
    first = rows(tmp_path / "metrics.jsonl")[0]
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5) and first["clip_fraction"] == 0.0


def test_grpo_goes_through_all_problems_before_it_repeats_one():
    problems = [Problem(i, [], [], "") for i in range(10)]
    passes = [[p.index for n in (5 * e, 5 * e + 1, 5 * e + 2, 5 * e + 3, 5 * e + 4) for p in chosen(n, problems)]
              for e in range(3)]  # fmt: skip
    assert all(sorted(found) == list(range(10)) for found in passes) and passes[0] != passes[1] != passes[2]
    across = problems_of(1, problems, 7, seed=0)  # the end of one pass, and the beginning of the next
    assert [p.index for p in across] == (passes[0] + passes[1])[7:14]
    assert problems_of(0, problems, 10, seed=1) != problems_of(0, problems, 10, seed=0)


def chosen(number: int, problems: list[Problem]) -> list[Problem]:
    return problems_of(number, problems, 2, seed=0)


def test_grpo_trains_on_groups_that_differ_and_on_answers_that_were_judged():
    def group(index: int, *rewards: float | None) -> list[Sample]:
        problem = Problem(index, [], [50 + index, 9], "")
        completion = Completion([index, 2], [0.0, 0.0], "stop")
        return [Sample(problem, completion, "", None if r is None else Score(float(r))) for r in rewards]

    rollout = Rollout(
        [group(0, 1, 1), group(1, 1, 0), group(2, None, 1), group(3, 0, None, 1, 1), group(4, None, None)]
    )
    config = grpo.Config(data=ProblemsConfig(bin_tokens=64), model="")
    trainer = SimpleNamespace(mesh=Mesh.single(), out=Path("none"))
    batches = Experience(trainer, None, [], None, config, 5).batches(rollout, updates=2, varied_only=True)
    assert [batch.sequences for batch in batches] == [2, 3]  # two updates get a batch each; groups are whole
    first, second = batches
    assert first.fields["rewards"][first.supervised].tolist() == [0, 1, 0, 0]
    assert second.fields["rewards"][second.supervised].tolist() == [0, 0, 0, 1, 0, 1]
    assert second.fields["number"].tolist() == [0, 1, 2]
    assert first.tokens[:8].tolist() == [51, 9, 1, 2] * 2  # token in, token out
    assert first.targets[first.supervised].tolist() == [1, 2] * 2


def test_a_step_that_ends_in_a_tools_words_is_scored_where_the_model_last_spoke():
    """Nothing is learned of a tool's words: a group whose every score lay there would have none, and a mean of NaN."""
    said = Completion([1, 2, 8, 9, 3], [0.0] * 5, "stop", weights=[1.0, 1.0, 0.0, 0.0, 1.0])
    samples = [Sample(Problem(0, [], [50], ""), said, "", Score(v, steps=(v,), ends=(3,))) for v in (0.0, 1.0)]
    trainer, config = SimpleNamespace(mesh=Mesh.single(), out=Path("none")), grpo.Config(model="")
    (batch,) = Experience(trainer, None, [], None, config, 1).batches(Rollout([samples]), updates=1, varied_only=True)
    assert batch.fields["rewards"][batch.supervised].tolist() == [0, 0, 0, 0, 1, 0]
    assert batch.fields["scored"][batch.supervised].tolist() == [0, 1, 0] * 2


def test_grpo_steps_on_nothing_where_no_group_teaches_and_says_so(tiny, tmp_path, capsys):
    config = grpo_config(tiny, tmp_path, 2)
    config.grpo, config.sampling.max_tokens = grpo.GRPOConfig(prompts=2, group=2), 2
    result = grpo.train(config)  # two tokens are never an answer: every sample gets the same reward
    assert result.metrics["varied_groups"] == 0.0 and result.metrics["reward"] <= 0.0
    before, after = (tritium.load(folder, dtype=torch.float32) for folder in (tiny.model, result.checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert "2 of 2 steps had nothing to learn from" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- sampling, measuring


def test_sample_writes_what_the_later_stages_read(tiny, tmp_path, odd_is_right):
    config = sample.Config(sources=[tiny.data("problems.jsonl")], k=6, out=str(tmp_path / "out"), model=tiny.model)
    config.sampling.max_tokens, config.dtype = 6, "fp32"
    metrics = sample.train(config).metrics
    assert 0 < metrics["right"] < metrics["solved"] <= 1 and metrics["verifier_failures"] == 0
    assert metrics["tokens_per_second"] > 0
    files = {name: rows(tmp_path / "out" / f"{name}.jsonl") for name in ("sft", "pairs", "rankings")}
    assert len(files["sft"]) == round(6 * metrics["solved"])
    right = {row["messages"][0]["content"]: row["messages"][-1]["content"] for row in files["sft"]}
    for row in files["pairs"]:
        assert row["chosen"] != row["rejected"] and row["prompt"][0]["content"] in right
    assert all(len(row["ranked"]) == 2 for row in files["rankings"])
    for stage, name in ((sft, "sft"), (dpo, "pairs")):
        again = stage.Config(data=data(f"{tmp_path}/out/{name}.jsonl"), run=run(tmp_path / name, 1), model=tiny.model)
        assert_finished(stage.train(again), tmp_path / name, 1)
    listwise = reward.Config(loss="listwise", data=data(f"{tmp_path}/out/rankings.jsonl"), model=tiny.model)
    listwise.run = run(tmp_path / "listwise", 1)
    assert_finished(reward.train(listwise), tmp_path / "listwise", 1)


def test_sample_that_finds_nothing_to_learn_says_so_and_one_that_does_says_how_much(tiny, tmp_path, capsys):
    common = [f"--model={tiny.model}", f"--sources={tiny.data('problems.jsonl')}", f"--out={tmp_path}/out", "--k=2"]
    common += ["--sampling.max_tokens=1"]
    assert run_stage("sample", [*common, "--reward=clip(exact, 0, 0)"]) == 2
    told = capsys.readouterr().err
    assert "of 6 problems have a right answer among 2: nothing to learn" in told and "Traceback" not in told
    assert run_stage("sample", [*common, "--reward=length(0, 9)", "--learn=reward"]) == 0
    assert "lines: sft.jsonl 1" in capsys.readouterr().err or (tmp_path / "out" / "sft.jsonl").stat().st_size
    assert run_stage("sample", [*common, "--reward=maths"]) == 2
    assert "did you mean math" in capsys.readouterr().err


def test_evaluate_prints_one_json_object_whatever_was_skipped(tiny, tmp_path, capsys):
    problems = Path(tiny.data("problems.jsonl")).read_text() + '{"question": "no answer"}\n'
    (tmp_path / "problems.jsonl").write_text(problems)
    config = evaluate.Config(data=f"{tmp_path}/problems.jsonl", json=True, save=f"{tmp_path}/a.jsonl", model=tiny.model)
    config.sampling.max_tokens = 8
    metrics = evaluate.train(config).metrics
    shown = capsys.readouterr()
    assert json.loads(shown.out) == metrics and "skipped 1" in shown.err
    answers = rows(tmp_path / "a.jsonl")
    assert metrics["n"] == len(answers) == 6
    assert metrics["exact_match"] == sum(a["score"]["value"] for a in answers) / 6
    assert metrics["low_95"] <= metrics["exact_match"] <= metrics["high_95"]


def test_bits_per_byte_count_every_token_but_the_first_once(tiny, tmp_path):
    text = "What is 12 + 34? Ünïcödé. " * 12  # several contexts long
    (tmp_path / "a.txt").write_text(text)
    model, ours = tritium.load(tiny.model, dtype=torch.float32), tritium.Tokenizer.load(tiny.model)
    ids, context = torch.tensor([ours.bos_id, *ours.encode(text)]), model.config.max_positions
    assert len(ids) > 3 * context
    nats, seen = 0.0, []
    for start in range(0, len(ids) - 1, context - 1):
        window = ids[start : start + context]
        logp = model.logits(window).log_softmax(-1)[:-1].gather(-1, window[1:, None])
        nats -= logp.sum().item()
        seen.append((-logp.sum().item(), len(window) - 1))
        predicted = start + len(window)
    assert predicted == len(ids)
    metrics = evaluate.train(evaluate.Config(text=str(tmp_path / "a.txt"), dtype="fp32", model=tiny.model)).metrics
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    off = [loss - nats / (len(ids) - 1) * count for loss, count in seen]
    error = math.sqrt(sum(x * x for x in off) * len(off) / (len(off) - 1)) / (len(ids) - 1)
    assert math.log(metrics["perplexity_high"] / metrics["perplexity"]) == pytest.approx(1.96 * error, rel=1e-3)
    ends = (metrics["bits_per_byte_low"], metrics["bits_per_byte_high"])
    assert sum(ends) / 2 == pytest.approx(metrics["bits_per_byte"]) and ends[0] < ends[1]


def test_text_that_is_skipped_is_told(tiny, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "What is 12 + 34?"}\n{"txt": "?"}\n')
    evaluate.train(evaluate.Config(text=str(tmp_path / "a.jsonl"), model=tiny.model, json=True))
    shown = capsys.readouterr()
    assert json.loads(shown.out)["perplexity"] > 1 and 'skipped 1 × a record without a "text"' in shown.err


@pytest.mark.parametrize("stage,option", [("evaluate", "data"), ("evaluate", "text"), ("sample", "sources")])
def test_a_missing_file_is_told_with_its_option(tiny, tmp_path, capsys, stage, option):
    out = [f"--out={tmp_path}/out"] if stage == "sample" else []
    assert run_stage(stage, [f"--model={tiny.model}", f"--{option}={tmp_path}/none.jsonl", *out]) == 2
    assert f"tritium {stage}: {option}: {tmp_path}/none.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage,option,more",
    [
        ("sample", "out", ["--model=none"]),  # told before the model is loaded
        ("evaluate", "save", ["--model=none", "--data={text}"]),
        ("corpus", "out", []),
        ("tokenizer", "out", ["--sources={text}"]),
        ("run", "out", []),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(tiny, tmp_path, capsys, stage, option, more):
    (tmp_path / "file").touch()
    arguments = [argument.format(text=tiny.data("text.jsonl")) for argument in more]
    assert run_stage(stage, [f"--{option}={tmp_path}/file/out", *arguments]) == 2
    shown = capsys.readouterr().err
    assert f"{option}={tmp_path}/file" in shown and "can't be written: " in shown and "Traceback" not in shown


def test_a_limit_leaves_something_and_a_seed_is_no_negative_number():
    for stage in (sample, evaluate):
        with pytest.raises(ConfigError, match="limit=0 must be at least 1"):
            stage.Config(limit=0, model="m")
        with pytest.raises(ConfigError, match="seed=-1 must be at least 0"):  # numpy's seeds have no sign
            stage.Config(seed=-1, model="m")


def test_evaluate_needs_something_to_measure(tiny):
    with pytest.raises(ConfigError, match="--data=problems.jsonl"):
        evaluate.train(evaluate.Config(model=tiny.model))


def test_chat_answers_each_line_until_the_end(tiny, tmp_path, monkeypatch, capsys):
    long = "and " * 100  # does not fit the context, and must not end the session
    lines = ["What is 1 + 2?", "", "And 2 + 3?", "/reset", long, "Hi", f"/save {tmp_path}/a.jsonl"]
    lines += [
        "/save",
        f"/save {tmp_path}/none/a.jsonl",
        f"/adapter {tmp_path}",
        "/rest",
        "/adapter none",
        "/quit",
        "never asked",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    config = chat.Config(model=tiny.model, seed=3)
    config.sampling.max_tokens = 8
    chat.train(config)
    shown = capsys.readouterr()
    assert shown.err.count("tokens, ") == 3 and "starting anew" in shown.out
    (saved,) = (json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert [m["role"] for m in saved] == ["user", "assistant"] and saved[0]["content"] == "Hi"
    assert "/save needs the name" in shown.out and "No such file" in shown.out and "adapter_config.json" in shown.out
    assert "adapters: none" in shown.out and "/rest is not a command: /reset, /save" in shown.out


def test_chat_runs_programs_and_keeps_their_turns(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tritium.core.tools.find_call", lambda text: "print(6 * 7)")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hi\n/save {tmp_path}/a.jsonl"))
    config = chat.Config(model=tiny.model, seed=1)
    config.sampling.max_tokens, config.sampling.tool, config.sampling.temperature = 40, "python", 2.0
    config.sampling.max_calls = 1
    for seed in range(30):  # until an answer ends by itself
        config.seed = seed
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hi\n/save {tmp_path}/a.jsonl"))
        chat.train(config)
        if "[python] 42" in capsys.readouterr().out:
            break
    saved = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])["messages"]
    assert [m["role"] for m in saved][:3] == ["user", "assistant", "tool"] and saved[2]["content"] == "42"


def test_a_tokenizer_is_trained_and_measured(tiny, tmp_path):
    result = tokenizer.train(tokenizer.Config([tiny.data("text.jsonl")], 320, out=str(tmp_path)))
    assert result.metrics["vocab_size"] == tritium.Tokenizer.load(tmp_path).vocab_size == 320
    assert result.metrics["bytes_per_token"] > 1.0
