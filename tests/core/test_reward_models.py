"""Trained models as judges: of steps, of several qualities, in ensembles."""

import json

import pytest
import torch

from tritium.core.chat import render
from tritium.core.config import ConfigError
from tritium.core.formats import RecordError
from tritium.core.rewards import Answer, Score, judge
from tritium.core.rewards.make import Ensemble, WeightedSum, make_reward
from tritium.core.rewards.model import FilterConfig
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


@pytest.fixture(scope="module")
def comparison(tiny, tmp_path_factory) -> str:
    rows = [{"prompt": f"{i}?", "chosen": "1" * 8, "rejected": "2"} for i in range(9)]
    return train(tiny, tmp_path_factory.mktemp("compares"), rows, "--loss=comparison", "--run.steps=40")


def test_a_model_of_comparisons_judges_against_a_reference_and_filters_pairs(tiny, comparison):
    reward, better, worse = make_reward(f"judge({comparison!r}, pairwise=True)"), "1" * 8, "2"
    answers = [Answer([], better, "3?", worse), Answer([], worse, "3?", better), Answer([], better, "3?")]
    judged = judge(reward, answers)
    won, lost, alone = judged.scores
    assert won.value > 0.6 and won.solved and not lost.solved and alone is None
    assert won.value + lost.value == pytest.approx(1.0) and "no reference answer" in str(judged.failures)
    keep = FilterConfig([comparison], margin=0.1).around(lambda record: [record], "fp32", Mesh.single())
    record = {"prompt": "3?", "chosen": better, "rejected": worse}
    assert keep(record) == [record]
    with pytest.raises(RecordError, match="too close, or disagree"):
        keep({"prompt": "3?", "chosen": worse, "rejected": better})


def test_a_model_of_comparisons_is_not_taken_for_one_of_answers(tiny, comparison, steps_judge):
    with pytest.raises(ConfigError, match=r"scores no whole answers: judge\(.*pairwise=True\)"):
        make_reward(f"model({comparison!r})")
    with pytest.raises(ConfigError, match=r"scores no whole answers: process\("):
        make_reward(f"model({steps_judge!r})")
    with pytest.raises(ConfigError, match="is a reward model, which can't speak"):
        make_reward(f"judge({steps_judge!r}, pairwise=True)")


HEADS = ("helpfulness", "verbosity")


@pytest.fixture(scope="module")
def heads_judge(tiny, tmp_path_factory) -> str:
    says = {"yes": (4, 0), "no": (0, 0), "yes and yes": (4, 3)}
    rows = [
        {"prompt": f"{i} = ?", "response": text} | dict(zip(HEADS, marks, strict=True))
        for i in range(12)
        for text, marks in says.items()
    ] + [{"prompt": "Q", "response": "no", "helpfulness": 5, "verbosity": 0}]
    options = ("--loss=score", f"--heads={','.join(HEADS)}", "--highest=4", "--pooling=mean", "--run.steps=60")
    return train(tiny, tmp_path_factory.mktemp("heads"), rows, *options)


def test_heads_learn_their_own_scores_and_are_weighed(heads_judge):
    reward = make_reward(f"model({heads_judge!r}, helpfulness=1, verbosity=-0.5)")
    texts = ("yes", "no", "yes and yes")
    yes, no, both = judge(reward, [Answer([], text, "5 = ?") for text in texts]).scores
    assert yes.parts["helpfulness"] > 0 > no.parts["helpfulness"] and both.parts["helpfulness"] > 0
    assert both.parts["verbosity"] > 0 > max(yes.parts["verbosity"], no.parts["verbosity"])
    assert both.value == pytest.approx(both.parts["helpfulness"] - 0.5 * both.parts["verbosity"])


def test_heads_and_pooling_come_back_from_the_folder_and_the_mean_knows_its_document_alone(heads_judge, tmp_path):
    network = read_model(heads_judge, "fp32", Mesh.single())
    assert (network.heads, network.pooling) == (HEADS, "mean")
    ids, ends = torch.arange(9), torch.tensor([0, 4, 9, 9], dtype=torch.int32)
    pooled = network.scores(ids, ends)
    for i, (a, b) in enumerate(((0, 4), (4, 9))):
        torch.testing.assert_close(pooled[i], network.values(ids[a:b]).mean(0), atol=1e-5, rtol=1e-5)
    assert pooled.shape == (3, 2) and not pooled[2].any()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_reward_model_goes_on_with_its_heads_and_gets_new_ones_for_others(tiny, heads_judge, tmp_path, kind):
    """A refresh on newer answers: at a rate of 0 it stays what it was, and its evaluation says so."""
    rows = [{"prompt": f"{i} = ?", "response": "yes", "helpfulness": 4, "verbosity": 0} for i in range(4)]
    more = (f"--model={heads_judge}", f"--finetune.kind={kind}", "--optim.lr=1e-12", "--run.steps=1")
    same = ("--loss=score", f"--heads={','.join(HEADS)}", "--highest=4", "--pooling=mean")
    (again := tmp_path / "again").mkdir()
    folders = heads_judge, train(tiny, again, rows, *same, *more)
    before, after = (read_model(folder, "fp32", Mesh.single()) for folder in folders)
    assert (after.heads, after.pooling) == (HEADS, "mean")
    ids, ends = torch.arange(9), torch.tensor([0, 9], dtype=torch.int32)
    torch.testing.assert_close(after.scores(ids, ends), before.scores(ids, ends), atol=1e-5, rtol=1e-5)
    (other := tmp_path / "other").mkdir()
    pairs = [{"prompt": "Q", "chosen": "yes", "rejected": "no"}] * 4
    assert read_model(train(tiny, other, pairs, *more), "fp32", Mesh.single()).heads == ("reward",)


def test_an_adapter_keeps_its_heads(tiny, tmp_path):
    rows = [{"prompt": "Q", "completion": str(i), "a": i / 9, "b": 0} for i in range(10)]
    more = ("--finetune.kind=lora", "--finetune.rank=2", "--loss=score", "--heads=a,b", "--pooling=mean")
    folder = train(tiny, tmp_path, rows, *more, "--run.steps=1")
    network = read_model(folder, "fp32", Mesh.single())
    assert (network.heads, network.pooling, len(network.score)) == (("a", "b"), "mean", 2)


def test_an_ensemble_doubts_what_its_members_disagree_on():
    one, two = (lambda ids, text, v=v, **_: Score(v * len(text)) for v in (1.0, 3.0))
    score = Ensemble((one, two), 0.5)([], "x")
    assert score.value == 2.0 - 0.5 * 1.0 and score.parts == {"mean": 2.0, "std": 1.0} and score.solved
    broken = lambda ids, text, **_: 1 / 0  # noqa: E731
    assert "ZeroDivisionError" in str(judge(Ensemble((one, broken)), [Answer([], "x")]).failures)
    doubted = make_reward("ensemble(exact, gate(exact, exact, closed=1), k=1)")([1], "x", reference="y")
    assert doubted.parts["std"] == 0.5 and doubted.value == 0.0
    with pytest.raises(ConfigError, match="two judges or more"):
        make_reward("ensemble(exact)")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--heads=a,a", "--loss=score"], "different names"),
        (["--heads=a,b"], "heads=a,b: loss=pairwise has none; these do: score"),
        (["--loss=process", "--pooling=mean"], "pooling=mean: loss=process has none"),
    ],
)
def test_heads_that_can_not_be_are_explained(tiny, capsys, options, told):
    assert cli.main(["reward", f"--model={tiny.model}", "--data.sources=x", *options]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_that_holds_no_such_judge_is_explained(tiny, heads_judge, steps_judge):
    with pytest.raises(ConfigError, match="/no/such.*does not exist"):
        make_reward("process('/no/such')")
    with pytest.raises(ConfigError, match="min or product"):
        make_reward(f"process({steps_judge!r}, over='mean')")
    with pytest.raises(ConfigError, match="train one with `tritium reward`"):
        make_reward(f"model({tiny.model!r})")
    for wrong in ("", ", honesty=1"):
        with pytest.raises(ConfigError, match="helpfulness=0.5, verbosity=0.5"):
            make_reward(f"model({heads_judge!r}{wrong})")
