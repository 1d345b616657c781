"""tritium sweep: trials in processes of their own, stopped early where hopeless, resumed, shown."""

import json

import pytest

from tritium.core.config import ConfigError, UserError
from tritium.stages import sweep

pytestmark = pytest.mark.usefixtures("quick")


def options(tiny, out, *more: str) -> list[str]:
    run = ["--run.steps=6", "--run.eval_every=2", "--run.eval_bins=1", "--run.dtype=fp32", "--schedule.kind=constant"]
    data = [f"--model={tiny.model}", f"--data.sources={tiny.data('chats.jsonl')}", "--data.holdout=0.2"]
    return ["sft", f"--out={out}", "--vary=optim.lr=1e-9:3e-2:log", *data, *run, *more]


def test_trials_run_are_shown_and_resumed(tiny, tmp_path, capsys):
    assert sweep.main(options(tiny, tmp_path, "--trials=2")) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "sweep.md").read_text() and shown.count("| done |") == 2
    rows = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["value"])
    assert best["value"] == min(y for x, y in best["curve"] if x) and shown.splitlines()[2].startswith(
        f"| {rows.index(best)} | {best['settings']['optim.lr']} |"
    )
    assert (tmp_path / "sweep.svg").read_text().startswith("<svg")
    assert sweep.main(options(tiny, tmp_path, "--trials=3", "--jobs=2")) == 0  # of the same seed: as if never stopped
    again = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert again[:2] == rows and len(again) == 3
    (tmp_path / "trials.jsonl").write_text(json.dumps(again[1]) + "\n")  # killed when the second of two had ended
    stale = [{"step": step, "eval_loss": -9.0} for step in (2, 4)]
    (tmp_path / "trial-000/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stale))
    assert sweep.main(options(tiny, tmp_path, "--trials=2")) == 0
    redone = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [(row["number"], row["value"]) for row in redone] == [(i, again[i]["value"]) for i in (1, 0)]
    with (tmp_path / "trials.jsonl").open("a") as lines:
        lines.write('{"settings": {"opt')  # killed while it wrote
    assert sweep.main(options(tiny, tmp_path, "--trials=2")) == 0
    with pytest.raises(UserError, match="holds trials of optim.lr: use another --out"):
        sweep.main([*options(tiny, tmp_path, "--trials=3"), "--vary=optim.beta1=0.8:0.9"])


def test_a_trial_below_the_median_is_stopped():
    class Quiet(sweep.Sweep):
        def __init__(self, curves, sign):
            self.trials, self.sign = [sweep.Trial({}, curve=c) for c in curves], sign

    good = [[(0, 5.0), (10, 3.0)], [(0, 5.0), (10, 3.2), (20, 1.0)], [(0, 5.0), (10, 3.4)]]
    for curve, hopeless in (
        ([(0, 9.0)], False),  # nothing is trained yet
        ([(0, 5.0), (10, 3.3)], True),
        ([(0, 5.0), (10, 3.1)], False),
        ([(0, 1.0), (10, float("nan"))], True),  # what it was before training does not count
        ([(0, 5.0), (20, 4.0)], False),  # too few have come so far
        ([], False),
    ):
        for sign in (1.0, -1.0):
            trials = Quiet([[(x, sign * y) for x, y in c] for c in [*good, curve]], sign)
            assert trials.hopeless(trials.trials[3]) == hopeless, curve


def test_mistakes_are_told_before_a_trial_runs(tiny, tmp_path, capsys):
    for more, words in (
        ("--vary=optim.lrr=1:2", "optim.lrr.*did you mean --optim.lr"),
        ("--vary=run.steps=1:2:log:x", "may be :log"),
        ("--vary=optim.kind=adamw,sgd", "expected one of adamw, muon"),
        ("--data.sourcs=x", "did you mean --data.sources"),
        ("--trials=0", "must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            sweep.main(options(tiny, tmp_path, more))
    with pytest.raises(ConfigError, match="no stage 'stf' to vary; did you mean sft"):
        sweep.main(["stf", "--vary=a=1:2"])
    with pytest.raises(UserError, match="no trial gave eval_loss: look at .*log.txt"):
        sweep.main(options(tiny, tmp_path / "bad", "--trials=1", f"--model={tmp_path}/none"))
    assert "does not exist" in (tmp_path / "bad" / "trial-000" / "log.txt").read_text()
