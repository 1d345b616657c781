"""Trained models as judges: of steps, of several qualities, in ensembles."""

import json

import pytest
import torch

from tritium.core.chat import render
from tritium.core.config import ConfigError
from tritium.core.rewards import Answer, Score, judge
from tritium.core.rewards.make import WeightedSum, make_reward
from tritium.core.setup import read_model
from tritium.core.tokenizer import Tokenizer
from tritium.parallel.mesh import Mesh
from tritium.stages import cli

pytestmark = pytest.mark.usefixtures("quick")
QUICK = ("--data.bin_tokens=512", "--run.dtype=fp32", "--optim.lr=1e-2", "--data.holdout=0")


def train(tiny, folder, rows: list[dict], *options: str) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--model={tiny.model}", f"--data.sources={folder}/rows.jsonl", f"--run.out={folder}/run", *QUICK]
    assert cli.main(["reward", *arguments, *options]) == 0
    return f"{folder}/run"


@pytest.fixture(scope="module")
def steps_judge(tiny, tmp_path_factory) -> str:
    steps = [("  yes", True), ("no\n no", False)]
    orders = [zip(*steps[:: 1 - 2 * (i % 2)], strict=True) for i in range(32)]
    rows = [{"prompt": f"{i} + 1 = ?", "completions": c, "labels": x} for i, (c, x) in enumerate(orders)]
    return train(tiny, tmp_path_factory.mktemp("steps"), rows, "--loss=process", "--run.steps=24")


def test_a_process_judge_reads_each_step_where_training_did(tiny, steps_judge):
    prompt, text = "3 + 1 = ?", "\n  yes \nno no\n\n   \nyes"
    score = make_reward(f"process({steps_judge!r})")([], text, prompt=prompt)
    tokenizer, network = Tokenizer.load(tiny.model), read_model(steps_judge, "auto", Mesh.single())
    ids, expected = list(render(tokenizer, [{"role": "user", "content": prompt}], generation_prompt=True).ids), []
    for step in ("yes", "no no", "yes"):
        ids += tokenizer.encode(step) + tokenizer.encode("\n")
        expected.append(network.values(torch.tensor(ids))[-1].sigmoid().item())
    assert score.steps == pytest.approx(expected, abs=2e-3) and score.ends == ()
    assert min(score.steps[0], score.steps[2]) > 0.6 > 0.4 > score.steps[1] == score.value  # it learned which is right
    product = make_reward(f"process({steps_judge!r}, over='product')")([], text, prompt=prompt)
    assert product.value == pytest.approx(score.steps[0] * score.steps[1] * score.steps[2])
    assert make_reward(f"process({steps_judge!r})")([], " \n ").value == 0.0


def test_step_scores_stand_at_the_tokens_that_end_the_steps(tiny, steps_judge):
    tokenizer, reward = Tokenizer.load(tiny.model), make_reward(f"process({steps_judge!r})")
    ids = [*tokenizer.encode("é yes\n\n no no \nyes"), tokenizer.eos_id]
    answers = [Answer(ids, tokenizer.decode(ids), "Q", decoder=tokenizer.incremental), Answer([1], "")]
    score, empty = judge(reward, answers).scores
    assert len(score.ends) == len(score.steps) == 3 and empty.ends == ()
    for end, upto in zip(score.ends, ("é yes", "é yes\n\n no no", "é yes\n\n no no \nyes"), strict=True):
        assert tokenizer.decode(ids[: end + 1]).startswith(upto) and not tokenizer.decode(ids[:end]).startswith(upto)
    assert "longer than" in str(judge(reward, [Answer([1], "yes\n" * 90)]).failures)


def test_a_sum_adds_steps_by_weight_and_whole_answers_at_the_last_token():
    steps = lambda ids, text, **_: Score(0.5, steps=(0.5, 1.0), ends=(1, 4))  # noqa: E731
    whole = lambda ids, text, **_: Score(1.0)  # noqa: E731
    score = WeightedSum({"a": whole, "b": steps}, {"a": 3.0, "b": 2.0})(range(6), "")
    assert (score.value, score.ends, score.steps) == (4.0, (1, 4, 5), (1.0, 2.0, 3.0)) and score.solved


def test_grpo_learns_from_steps(tiny, steps_judge, tmp_path):
    arguments = [f"--model={tiny.model}", f"--data.sources={tiny.data('problems.jsonl')}", f"--run.out={tmp_path}"]
    arguments += ["--run.steps=1", "--run.dtype=fp32", "--grpo.prompts=2", "--grpo.group=3", "--sampling.max_tokens=8"]
    assert cli.main(["grpo", *arguments, f"--reward=process({steps_judge!r}) + exact"]) == 0
    (row,) = [r for r in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "reward" in r]
    assert 0 < row[f"reward/process({steps_judge!r})"] < 1 and row["verifier_failures"] == 0


def test_a_folder_that_is_none_or_holds_no_judge_is_explained(tiny):
    with pytest.raises(ConfigError, match="no folder '/no/such'"):
        make_reward("process('/no/such')")
    with pytest.raises(ConfigError, match="min or product"):
        make_reward(f"process({tiny.model!r}, over='mean')")
    failed = judge(make_reward(f"model({tiny.model!r})"), [Answer([1], "x")])
    assert "train one with `tritium reward`" in str(failed.failures)
