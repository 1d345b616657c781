"""The stages that learn from preferences: their objectives train from the command line, and bad input is refused."""

import json
import math
import shutil
import weakref

import pytest

import tritium
from tritium.core.rewards import Score
from tritium.core.rewards.scorer import ModelReward
from tritium.core.trainer import Trainer
from tritium.model.surgery import with_wider_mlps
from tritium.stages import cli, tokenizer

pytestmark = pytest.mark.usefixtures("quick")
QUICK = ("--data.bin_tokens=512", "--run.dtype=fp32", "--run.eval_bins=1", "--optim.lr=3e-3")


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("loss", ["kto", "orpo", "ipo"])
def test_an_objective_by_name_moves_towards_the_chosen_answers(tiny, tmp_path, loss):
    source = f"--data.sources={tiny.data('pairs.jsonl')}"
    code = cli.main(["dpo", f"--model={tiny.model}", source, f"--loss={loss}", "--beta=0.1", *QUICK, "--run.steps=6",
                     f"--run.out={tmp_path}"])  # fmt: skip
    assert code == 0
    before, *_, after = [row for row in metrics(tmp_path) if "eval_loss" in row]
    assert sum(after[k] - before[k] for k in ("eval_loss", "eval_sft") if k in after) < 0
    assert loss == "orpo" or after["eval_accuracy"] >= 0.5  # orpo's is absolute: which answer is likelier per token


def test_online_pairs_are_drawn_and_judged_round_by_round(tiny, tmp_path, monkeypatch):
    """Two steps on what is drawn, then the policy is the reference: the next round begins at a margin of 0."""
    odd = lambda self, ids, text, **_: Score(float(ids[0] % 2))  # noqa: E731
    monkeypatch.setattr("tritium.core.rewards.exact.ExactMatch.__call__", odd)
    draw = ["--draw.prompts=12", "--draw.k=4", "--draw.updates=2", "--draw.refresh=1", "--draw.sampling.max_tokens=6"]
    arguments = [
        f"--model={tiny.model}",
        f"--data.sources={tiny.data('problems.jsonl')}",
        "--online",
        *draw,
        *QUICK,
        "--optim.lr=2e-2",
    ]
    assert cli.main(["dpo", *arguments, "--run.steps=11", f"--run.out={tmp_path}"]) == 0
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert len(rows) == 11 and ["right" in row for row in rows] == [True, False] * 5 + [True]
    assert all(row["margin"] == pytest.approx(0.0, abs=1e-5) for row in rows[::2])
    assert all(row["margin"] != 0.0 for row in rows[1::2])


def test_a_run_that_keeps_no_pair_says_that_it_learned_nothing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tritium.core.rewards.exact.ExactMatch.__call__", lambda self, ids, text, **_: Score(1.0))
    arguments = [f"--model={tiny.model}", f"--data.sources={tiny.data('problems.jsonl')}", "--online", *QUICK]
    arguments += ["--draw.prompts=2", "--draw.k=2", "--draw.sampling.max_tokens=2", "--run.steps=3"]
    assert cli.main(["dpo", *arguments, f"--run.out={tmp_path}"]) == 0
    assert "3 of 3 steps had nothing to learn from" in capsys.readouterr().err
    assert all(row["pairs_kept"] == 0 for row in metrics(tmp_path) if "pairs_kept" in row)


def test_kto_learns_from_answers_without_a_pair(tiny, tmp_path, capsys):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + (i % 2)), "label": bool(i % 2)} for i in range(12)]
    rows.append({"prompt": "Q", "completion": "A", "label": "good"})
    source = f"--data.sources={write(tmp_path / 'feedback.jsonl', *rows)}"
    arguments = ["dpo", f"--model={tiny.model}", source, "--loss=kto", *QUICK, "--run.steps=2"]
    assert cli.main([*arguments, f"--run.out={tmp_path / 'run'}"]) == 0
    assert "skipped 1 × a label that is neither true nor false: 'good'" in capsys.readouterr().err
    assert all(row["kl"] >= 0 for row in metrics(tmp_path / "run") if "kl" in row)


def test_a_reference_with_another_vocabulary_is_refused(tiny, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny.model, other)
    made = tokenizer.train(tokenizer.Config(sources=[tiny.data("text.jsonl")], vocab_size=330, out=str(tmp_path / "t")))
    for file in other.glob("tokenizer*"):
        file.unlink()
    for file in (tmp_path / "t").iterdir():
        shutil.copy(file, other)
    assert made.checkpoint
    arguments = [f"--model={tiny.model}", f"--reference={other}", f"--data.sources={tiny.data('pairs.jsonl')}"]
    assert cli.main(["dpo", *arguments, *QUICK, f"--run.out={tmp_path / 'run'}"]) == 2
    assert f"reference={other} has another vocabulary (330 tokens)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (["--loss=ipo", "--label_smoothing=0.1"], "ipo has none"),
        (["--label_smoothing=0.5"], "label_smoothing=0.5 must be below 0.5"),
        (["--loss=simpo", "--reference=x"], "reference=x: loss=simpo has none"),
        (["--margin=2"], "margin=2.0: loss=dpo has none; these do: simpo, slic"),
        (["--sft=1", "--loss=kto"], "sft=1.0: loss=kto has none"),
        (["--desirable=2"], "desirable=2.0: loss=dpo has none"),
        (["--beta=0"], "beta=0.0 must be above 0"),
        (["--online", "--loss=kto"], "which loss=kto does not take"),
        (["--online", "--draw.prompts=0"], "draw.prompts=0 must be at least 1"),
        (["--loss=dpos"], "dpo"),
    ],
)
def test_settings_without_a_meaning_are_refused(capsys, setting, words):
    assert cli.main(["dpo", "--model=m", "--data.sources=p", *setting]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (["--finetune.kind=prefix", "--draw.refresh=1"], "can't be updated from a policy that is an adapter"),
        (["--finetune.kind=lora", "--draw.refresh=1"], "can't be updated from a policy that is an adapter"),
        (["--reference={wider}", "--draw.refresh=1"], "reference and policy have different shapes"),
        (["--loss=simpo", "--draw.refresh=1"], "draw.refresh=1: this loss has no reference"),
        (["--draw.k=1"], "draw.k=1: a pair needs two answers"),
        (
            ["--schedule.batch_start=0.5", "--schedule.batch_ramp=2"],
            "the batch is set by draw.prompts and draw.updates",
        ),
    ],
)
def test_what_rounds_have_no_use_for_is_refused(tiny, tmp_path, capsys, setting, words):
    wider = tmp_path / "wider"
    shutil.copytree(tiny.model, wider)
    with_wider_mlps(tritium.load(tiny.model), 2).save(str(wider))
    fixed = [f"--model={tiny.model}", f"--data.sources={tiny.data('problems.jsonl')}", f"--run.out={tmp_path / 'run'}"]
    assert cli.main(["dpo", "--online", *fixed, *(text.format(wider=wider) for text in setting)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_noise_is_left_out_and_counted(tiny, tmp_path, capsys, monkeypatch, stage):
    """Two reward models that know the longer answer to be better, and one that was taught the contrary. They have left
    memory when training begins."""
    rows = [{"prompt": f"{i}?", "chosen": "1" * 8, "rejected": "1"} for i in range(40)]
    models = []
    for seed, teaches in enumerate((rows, rows, [r | {"chosen": "1", "rejected": "1" * 8} for r in rows])):
        source = f"--data.sources={write(tmp_path / f'{seed}.jsonl', *teaches)}"
        arguments = [f"--model={tiny.model}", source, *QUICK, "--optim.lr=1e-2", "--run.steps=6", f"--run.seed={seed}"]
        assert cli.main(["reward", *arguments, f"--run.out={tmp_path / str(seed)}"]) == 0
        models.append(str(tmp_path / str(seed)))
    mixed = rows[:9] + [r | {"chosen": "1", "rejected": "1" * 8} for r in rows[:3]]
    arguments = [stage, f"--model={tiny.model}", f"--data.sources={write(tmp_path / 'mixed.jsonl', *mixed)}", *QUICK]
    arguments += ["--run.steps=1", "--data.holdout=0"]
    capsys.readouterr()
    asked_ones, held, step = [], [], Trainer.step

    class Watched(ModelReward):
        def __post_init__(self):
            super().__post_init__()
            asked_ones.append(weakref.ref(self))

    def watched(*given):
        held.append(sum(judge() is not None for judge in asked_ones))
        step(*given)

    monkeypatch.setattr("tritium.core.rewards.scorer.ModelReward", Watched)
    monkeypatch.setattr(Trainer, "step", watched)
    for i, (asked, more, left_out) in enumerate(
        ((models[:2], [], 3), (models, ["--filter.margin=-100"], 3), (models, ["--filter.agreement=1"], 12))
    ):
        code = cli.main([*arguments, f"--filter.models={','.join(asked)}", *more, f"--run.out={tmp_path / f'run{i}'}"])
        assert code == (2 if left_out == 12 else 0)  # nothing is left
        assert f"{left_out} × a pair that the reward models of filter.models find" in capsys.readouterr().err
    assert held == [0, 0] and len(asked_ones) == 2 + 3 + 3
    assert cli.main([*arguments, f"--filter.models={tiny.model}", f"--run.out={tmp_path / 'no'}"]) == 2
    assert "is a language model" in capsys.readouterr().err
    assert cli.main([*arguments, "--filter.margin=1", f"--run.out={tmp_path / 'no'}"]) == 2
    assert "filter.models: name some" in capsys.readouterr().err


def test_pairs_of_equal_answers_are_counted(tiny, tmp_path, capsys):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "A"}, *({"prompt": "Q", "chosen": "A", "rejected": "B"},) * 3]
    source = f"--data.sources={write(tmp_path / 'pairs.jsonl', *rows)}"
    assert cli.main(["dpo", f"--model={tiny.model}", source, *QUICK, f"--run.out={tmp_path / 'run'}"]) == 0
    assert "skipped 1 × a pair whose answers are equal" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["dft", "unlikelihood"])
def test_sft_by_another_loss(tiny, tmp_path, loss):
    data = tiny.data("chats.jsonl" if loss == "dft" else "pairs.jsonl")
    arguments = [f"--model={tiny.model}", f"--loss={loss}", f"--data.sources={data}", f"--run.out={tmp_path}"]
    assert cli.main(["sft", *arguments, *QUICK, "--run.steps=6"]) == 0
    before, *_, after = [row["eval_loss"] for row in metrics(tmp_path) if "eval_loss" in row]
    assert after != before and all(row["skipped"] == 0 for row in metrics(tmp_path) if "skipped" in row)


class Odd:
    """Judges by the first token: 1 where it is odd."""

    def __init__(self, malformed: float = 0.0):
        pass

    def __call__(self, ids, text, *, prompt="", reference=""):
        return Score(float(ids[0] % 2))


def test_the_best_and_the_worst_of_many_make_a_pair(tiny, tmp_path, monkeypatch):
    """As a reward model's refresh between phases wants them: it gives every answer another score."""
    longest = lambda ids, text, **_: Score(float(sum(map(ord, text))))  # noqa: E731
    monkeypatch.setattr("tritium.stages.sample.make_reward", lambda spec, malformed=0.0: longest)
    arguments = [f"--model={tiny.model}", f"--sources={tiny.data('problems.jsonl')}", f"--out={tmp_path}", "--k=6"]
    arguments += ["--chosen=best", "--pairs=1", "--sampling.max_tokens=4", "--dtype=fp32"]
    assert cli.main(["sample", *arguments]) == 0
    pairs, rankings = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "rankings")
    )
    ends = [(row["ranked"][0], row["ranked"][-1]) for row in rankings]
    assert len(pairs) > 3 and [(pair["chosen"], pair["rejected"]) for pair in pairs] == ends


def test_right_answers_are_learned_and_preferred_whatever_else_their_scores_are_made_of(tiny, tmp_path, monkeypatch):
    """A score of several parts is another for each answer: the best one is not the only right one, and a right one that
    scores lower is not rejected."""
    right = lambda text: sum(map(ord, text)) % 2 == 1  # noqa: E731
    judge = lambda ids, text, **_: Score(sum(map(ord, text)) / 1e4, right=right(text))  # noqa: E731
    monkeypatch.setattr("tritium.stages.sample.make_reward", lambda spec, malformed=0.0: judge)
    arguments = [f"--model={tiny.model}", f"--sources={tiny.data('problems.jsonl')}", f"--out={tmp_path}", "--k=8"]
    assert cli.main(["sample", *arguments, "--paths=4", "--sampling.max_tokens=4", "--dtype=fp32"]) == 0
    learned, pairs = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "pairs")
    )
    asked = [row["messages"][0]["content"] for row in learned]
    assert max(map(asked.count, asked)) > 1 and all(right(row["messages"][-1]["content"]) for row in learned)
    assert len(pairs) > 3 and all(right(p["chosen"]) and not right(p["rejected"]) for p in pairs)


@pytest.mark.parametrize("learn", ["right", "reward", "advantage", "condition"])
def test_what_is_learned_from_scored_answers(tiny, tmp_path, monkeypatch, learn):
    monkeypatch.setattr("tritium.stages.sample.make_reward", lambda spec, malformed=0.0: Odd())
    arguments = [f"--model={tiny.model}", f"--others={tiny.model}", f"--sources={tiny.data('problems.jsonl')}"]
    arguments += [f"--learn={learn}", "--paths=3", "--beta=0.5", "--rso=4", "--k=4", f"--out={tmp_path / 'out'}"]
    assert cli.main(["sample", *arguments, "--sampling.max_tokens=4", "--dtype=fp32"]) == 0
    file = tmp_path / "out" / "sft.jsonl"
    turns = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    asked = [next(m["content"] for m in t if m["role"] == "user") for t in turns]
    assert max(map(asked.count, asked)) > 1  # more answers than one to a problem; of two models, up to eight
    if learn == "right":
        assert max(map(asked.count, asked)) <= 3
    if learn == "condition":
        assert {t[0]["content"] for t in turns} == {"Quality: right", "Quality: wrong"}
    if learn == "reward":
        assert {round(t[-1]["weight"], 3) for t in turns} == {1.0, round(math.exp(2), 3)}
    if learn == "advantage":
        assert min(t[-1]["weight"] for t in turns) < 1 < max(t[-1]["weight"] for t in turns)
    code = ["sft", f"--model={tiny.model}", f"--data.sources={file}", *QUICK, "--run.steps=1"]
    assert cli.main([*code, f"--run.out={tmp_path / 'run'}"]) == 0
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
