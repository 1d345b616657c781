"""Objectives of reward models: formulas in fp64, TRL's own loss, ties and partial orders."""

import contextlib
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tritium.core.batch import Document, pack
from tritium.core.chat import render
from tritium.core.formats import RecordError
from tritium.core.groups import comparison_group, preference_group, ranking_group, score_group, step_group
from tritium.core.objectives.reward import Comparison, Listwise, Pairwise, Process, Scoring, plackett_luce
from tritium.core.tokenizer import Tokenizer
from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.stages.reward import calibration

SHAPE = ModelConfig(40, 16, 24, 2, 2, 1, 8, max_positions=32, init_std=0.3)
pytestmark = pytest.mark.usefixtures("quick")


def scorer() -> ScalarModel:
    return ScalarModel(Transformer(SHAPE, dtype=torch.float64).initialize(0)).initialize(1)


def document(rng, size: int, **fields) -> Document:
    return Document(rng.integers(0, 40, size).astype(np.int32), np.ones(size, np.float32), fields)


def value(network: ScalarModel, doc: Document) -> torch.Tensor:
    """The score by the document alone."""
    return network.values(torch.from_numpy(doc.ids).long())[-1]


def found(objective, network: ScalarModel, batch) -> torch.Tensor:
    networks = torch.nn.ModuleDict({"reward": network})
    terms, _ = objective.loss(objective.outputs(networks, batch), batch)
    return sum(t.sum * t.coefficient / batch.counts[t.denominator] for t in terms.values())


def assert_same(network, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10)
    parameters = list(network.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("margin", [float("nan"), float("inf"), "much"])
def test_a_margin_that_is_no_number_is_told_and_none_at_all_is_0(tokenizer, margin):
    convert, pair = preference_group(tokenizer), {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert [d.fields["margin"] for d in convert(pair | {"margin": None})] == [0.0, 0.0]
    with pytest.raises(RecordError, match="a margin that is not a number"):
        convert(pair | {"margin": margin})


@pytest.mark.parametrize(("margins", "centering"), [(False, None), (True, None), (True, 0.1)])
def test_pairs_are_trls(margins, centering):
    from trl import RewardTrainer

    rng = np.random.default_rng(1)
    pairs = [[document(rng, n), document(rng, m)] for n, m in ((2, 4), (7, 3), (5, 5))]
    if margins:
        for i, pair in enumerate(pairs):
            for d in pair:
                d.fields["margin"] = float(i) / 2
    network = scorer()
    ours = found(Pairwise(centering or 0.0), network, pack(pairs, {"pairs": 3.0}))
    scores = torch.stack([value(network, p[i]) for i in (0, 1) for p in pairs])[:, None]
    state = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = {"margin": torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)} if margins else {}
    forward = lambda margin=None, use_cache=False: SimpleNamespace(logits=scores)  # noqa: E731
    forward.training = False
    assert_same(network, ours, RewardTrainer.compute_loss(state, forward, inputs))


def test_smoothed_labels():
    rng = np.random.default_rng(2)
    pair = [document(rng, 4), document(rng, 6)]
    network = scorer()
    d = value(network, pair[0]) - value(network, pair[1])
    expected = -0.8 * torch.log(torch.sigmoid(d)) - 0.2 * torch.log(torch.sigmoid(-d))
    assert_same(network, found(Pairwise(0.0, 0.2), network, pack([pair], {"pairs": 1.0})), expected)


@pytest.mark.parametrize("by_pairs", [False, True])
def test_equal_answers_are_not_compared(by_pairs):
    rng = np.random.default_rng(3)
    rankings = [[document(rng, 5, rank=float(r)) for r in ranks] for ranks in ((0, 0, 1, 1, 2), (0, 1), (0, 0, 1))]
    network, batch, expected = scorer(), pack(rankings, {"rankings": 3.0}), 0.0
    for ranking in rankings:
        s = [(d.fields["rank"], value(network, d).exp()) for d in ranking]
        if by_pairs:
            compared = [(a, b) for (i, a), (j, b) in itertools.product(s, s) if i < j]
            expected = expected - sum(torch.log(a / (a + b)) for a, b in compared) / len(compared) / 3
        else:
            for rank, strength in s:
                expected = expected - torch.log(strength / (strength + sum(x for r, x in s if r > rank))) / 3
    assert_same(network, found(Listwise(by_pairs), network, batch), expected)


def test_the_order_of_equal_answers_does_not_matter():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64)
    ranks = torch.tensor([0.0, 1.0, 1.0, 2.0])
    assert plackett_luce(scores, ranks) == pytest.approx(plackett_luce(scores[[0, 2, 1, 3]], ranks).item())
    strict = torch.arange(4.0)
    assert plackett_luce(scores, strict) == plackett_luce(scores)


def test_a_score_that_somebody_gave():
    rng = np.random.default_rng(4)
    documents = [document(rng, n, score=float(np.float32(s))) for n, s in ((3, 0.0), (6, 0.75), (4, 1.0))]
    network = scorer()
    expected = sum((1 / (1 + torch.exp(-value(network, d))) - d.fields["score"]) ** 2 for d in documents) / 3
    assert_same(network, found(Scoring(), network, pack([[d] for d in documents])), expected)


def test_scores_of_several_qualities():
    rng, heads = np.random.default_rng(4), ("a", "b")
    documents = [document(rng, n, a=float(np.float32(s)), b=0.5) for n, s in ((3, 0.0), (6, 0.75), (4, 1.0))]
    network = ScalarModel(Transformer(SHAPE, dtype=torch.float64).initialize(0), heads).initialize(1)
    errors = [1 / (1 + torch.exp(-value(network, d)[i])) - d.fields[k] for d in documents for i, k in enumerate(heads)]
    expected = sum(error**2 for error in errors) / 6
    assert_same(network, found(Scoring(heads), network, pack([[d] for d in documents])), expected)


def test_the_calibration_table_says_how_often_the_surer_answer_is_right():
    rng, network = np.random.default_rng(6), scorer()
    pairs = [[document(rng, n), document(rng, n + 1)] for n in range(2, 18)]
    parts = {"networks": torch.nn.ModuleDict({"reward": network}), "mesh": Mesh.single(), "pad_with_empty": list}
    trainer = SimpleNamespace(**parts, averaged=contextlib.nullcontext, whole=contextlib.nullcontext)
    _, *lines = calibration(trainer, [pack(pairs[:5]), pack(pairs[5:])]).splitlines()
    margins = [float(value(network, a) - value(network, b)) for a, b in pairs]
    sure, expected = [1 / (1 + math.exp(-abs(m))) for m in margins], []
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        if own := [i for i, s in enumerate(sure) if low <= s < low + 0.1]:
            right = sum(margins[i] > 0 for i in own) / len(own)
            expected.append(f"  {sum(sure[i] for i in own) / len(own):6.1%} {right:6.1%} {len(own):6.0f}")
    assert len(lines) > 2 and lines == expected


def test_a_comparison_has_no_favourite_place():
    rng = np.random.default_rng(5)
    pair = [document(rng, 4), document(rng, 6)]
    network = scorer()
    a, b = (value(network, d) for d in pair)
    expected = -(torch.log(torch.sigmoid(a)) + torch.log(1 - torch.sigmoid(b))) / 2
    assert_same(network, found(Comparison(), network, pack([pair], {"pairs": 1.0})), expected)


# ---------------------------------------------------------------------------------------------- from records


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.load(tiny.model)


def test_a_step_is_judged_at_its_last_token(tokenizer):
    prompt = [{"role": "user", "content": "1+1+1="}]
    record = {"prompt": prompt, "completions": ["1+1=2", "2+1=4"], "labels": [True, False]}
    (document,) = step_group(tokenizer)(record)
    network = ScalarModel(
        Transformer(ModelConfig(400, 16, 24, 1, 2, 1, 8), dtype=torch.float64).initialize(0)
    ).initialize(1)
    expected = 0.0
    for n, right in ((1, True), (2, False)):
        ids = list(render(tokenizer, prompt, generation_prompt=True).ids)
        for step in record["completions"][:n]:
            ids += tokenizer.encode(step) + tokenizer.encode("\n")
        p = torch.sigmoid(network.values(torch.tensor(ids))[-1])
        expected = expected - torch.log(p if right else 1 - p) / 2
    assert_same(network, found(Process(), network, pack([[document]])), expected)


def test_records_become_groups(tokenizer):
    prompt = {"prompt": "Q"}
    levels = ranking_group(tokenizer)(prompt | {"ranked": [["a", "b"], "c"]})
    assert [d.fields["rank"] for d in levels] == [0.0, 0.0, 1.0]
    (scored,) = score_group(tokenizer)(prompt | {"completion": "a", "score": 0.25})
    assert scored.fields["score"] == 0.25
    pair = preference_group(tokenizer)(prompt | {"chosen": "a", "rejected": "b", "margin": 2})
    assert [d.fields["margin"] for d in pair] == [2.0, 2.0]
    first, second = comparison_group(tokenizer)(prompt | {"chosen": "yes", "rejected": "no"})
    texts = [tokenizer.decode(d.ids.tolist()) for d in (first, second)]
    assert "A:\nyes" in texts[0] and "B:\nno" in texts[0] and "A:\nno" in texts[1]


@pytest.mark.parametrize(
    ("loss", "row"),
    [
        ("all_pairs", {"prompt": "Q", "ranked": [["yes", "yes!"], "no"]}),
        ("score", {"prompt": "Q", "completion": "yes", "score": 1}),
        ("process", {"prompt": "Q", "completions": ["a", "b"], "labels": [1, 0]}),
        ("comparison", {"prompt": "Q", "chosen": "yes", "rejected": "no"}),
        ("pairwise", {"prompt": "Q", "chosen": "yes", "rejected": "no", "margin": 0.5}),
    ],
)
def test_each_loss_trains_from_the_command_line(tiny, tmp_path, capsys, loss, row):
    import json

    from tritium.stages import cli

    file = tmp_path / "records.jsonl"
    bad = {"prompt": "Q", "completion": "yes", "score": 1.5, "completions": ["a"], "labels": []}
    file.write_text("".join(json.dumps(r) + "\n" for r in [*[row] * 8, bad]))
    arguments = [f"--model={tiny.model}", f"--loss={loss}", f"--data.sources={file}", f"--run.out={tmp_path / 'run'}"]
    quick = ["--data.bin_tokens=256", "--run.dtype=fp32", "--run.eval_bins=1", "--run.epochs=12", "--optim.lr=3e-3"]
    assert cli.main(["reward", *arguments, *quick]) == 0
    said = capsys.readouterr().err
    assert "skipped 1 ×" in said and ("calibration" in said) == (loss == "pairwise")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [r["eval_loss"] for r in rows if "eval_loss" in r]
    assert after < before
