"""Models made of models."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tritium
from tritium.model import surgery
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.stages import cli

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = ModelConfig(
    48, 16, 24, 3, 4, 2, 8, 40, init_std=0.3, eos_id=5, bos_id=7, windows=(4, None, 8), family="mistral"
)
TOKENS = torch.arange(20)


def build(seed: int = 0) -> Transformer:
    return Transformer(CONFIG).initialize(seed)


def test_duplicated_layers_that_add_nothing_change_nothing():
    model = build()
    with torch.no_grad():
        model.layers[1].attention.o.zero_()
        model.layers[1].mlp.down.zero_()
    deeper = surgery.with_layers(model, [0, 1, 1, 2])
    assert deeper.config.num_layers == 4 and deeper.config.windows == (4, None, None, 8)
    assert torch.equal(deeper.logits(TOKENS), model.logits(TOKENS))
    found = surgery.layer_similarities(model, TOKENS)
    assert found.shape == (3,) and int(found.argmax()) == 1 and found[1].item() == pytest.approx(1.0, abs=1e-6)
    assert surgery.layer_similarities(model, TOKENS, span=3).shape == (1,)
    with pytest.raises(ValueError, match="layers are 0 to 2"):
        surgery.with_layers(model, [0, 3])


def test_a_pruned_vocabulary_keeps_the_logits_of_what_is_kept():
    model, rows = build(), [7, 5, *range(20, 40)]
    small = surgery.with_vocabulary(model, rows, new=2)
    assert (small.config.vocab_size, small.config.bos_id, small.config.eos_id) == (24, 0, 1)
    ids = torch.tensor([7, 20, 33, 39])
    found = small.logits(torch.tensor([rows.index(i) for i in ids.tolist()]))
    torch.testing.assert_close(found[:, :22], model.logits(ids)[:, rows])
    torch.testing.assert_close(found[:, 22:], found[:, :22].mean(1, keepdim=True).expand(-1, 2))


def test_averages_are_their_formulas():
    models = [build(seed) for seed in range(3)]
    heads = [m.head.detach().clone() for m in models]
    fishers = [surgery.fisher(m, [TOKENS, TOKENS[5:]]) for m in models]
    expected = sum(f["head"] * h for f, h in zip(fishers, heads, strict=True)) / sum(f["head"] for f in fishers)
    weighed = surgery.averaged([build(seed) for seed in range(3)], [1, 1, 1], fishers).head
    moved = fishers[0]["head"] > 1e-6
    torch.testing.assert_close(weighed[moved], expected[moved], rtol=1e-3, atol=1e-4)
    weights = surgery.ema_weights(3, 0.9)
    assert sum(weights) == pytest.approx(1)
    running = heads[0]
    for head in heads[1:]:
        running = 0.9 * running + 0.1 * head
    torch.testing.assert_close(surgery.averaged(models, weights).head, running)
    with pytest.raises(ValueError, match="one each"):
        surgery.averaged(models, [1.0])


def test_fisher_is_the_mean_of_squared_gradients():
    model, documents = build(), [TOKENS, TOKENS[5:]]
    expected = torch.zeros_like(model.head)
    for tokens in documents:
        model.zero_grad()
        F.cross_entropy(model.logits(tokens)[:-1], tokens[1:], reduction="sum").backward()
        expected += model.head.grad**2 / 2
    torch.testing.assert_close(surgery.fisher(model, documents)["head"], expected, rtol=1e-3, atol=1e-6)


def test_the_commands(tiny, tmp_path, capsys):
    (text := tmp_path / "text.jsonl").write_text('{"text": 3}\n' + Path(tiny.data("text.jsonl")).read_text())
    assert cli.main(["surgery", "similarity", tiny.model, f"--text={text}"]) == 0
    found, told = capsys.readouterr()
    assert 'skipped 1 × a record without a "text"' in told
    assert found.count("changes least") == 1 and found.startswith("layer 0  ")
    assert cli.main(["surgery", "similarity", tiny.model, f"--text={text}", "--span=2", "--dtype=bf16"]) == 0
    assert capsys.readouterr().out.startswith("layers 0-1  ")
    assert cli.main(["surgery", "layers", tiny.model, str(tmp_path / "deep"), "--order=0-1,0-1"]) == 0
    assert tritium.load(str(tmp_path / "deep")).config.num_layers == 4
    assert tritium.Tokenizer.load(str(tmp_path / "deep")).vocab_size == 340
    assert cli.main(["surgery", "vocabulary", tiny.model, str(tmp_path / "wide"), "--size=352"]) == 0
    assert tritium.load(str(tmp_path / "wide")).config.vocab_size == 352
    same = ["surgery", "average", str(tmp_path / "same"), tiny.model, tiny.model, f"--fisher={text}"]
    assert cli.main(same) == 0
    a, b = (tritium.load(str(f), dtype=torch.float32) for f in (tmp_path / "same", tiny.model))
    torch.testing.assert_close(a.logits(TOKENS), b.logits(TOKENS))
    (tmp_path / "run" / "step-00000001").mkdir(parents=True)
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for command, words in (
        (
            ["layers", str(adapter), str(tmp_path / "x"), "--order=0"],
            "is an adapter: make one model of it and",
        ),
        (["average", str(tmp_path / "x"), tiny.model, str(adapter)], "is an adapter"),
        (["layers", tiny.model, str(tmp_path / "run"), "--order=0"], "holds a model already"),
        (["vocabulary", tiny.model, str(tmp_path / "x"), "--size=9"], "the tokenizer has 340 tokens"),
        (["layers", tiny.model, str(tmp_path / "x"), "--order=0-7"], "layers are 0 to 1"),
        (["layers", tiny.model, str(tmp_path / "x"), "--order=a"], "neither a layer nor a range"),
        (["average", str(tmp_path / "x"), tiny.model, "--weights=1,2"], "one each"),
        (["average", str(tmp_path / "x"), tiny.model, tiny.model, "--ema=2"], "ema=2.0 must be at least 0 and below 1"),
        (["merge", str(tmp_path / "none"), str(tmp_path / "x")], "there is no such folder"),
        (["merge", tiny.model, str(tmp_path / "x")], "holds no adapter"),
        (["layers", str(tmp_path / "none"), str(tmp_path / "x"), "--order=0"], "does not exist"),
        (["vocabulary", tiny.model, str(tmp_path / "x"), f"--text={tmp_path}/none"], "does not exist"),
        (["layers", tiny.model, f"{text}/x", "--order=0"], "can't be written: Not a directory"),
        (same[1:], "holds a model already"),
    ):
        assert cli.main(["surgery", *command]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists()  # nothing is made of a mistake


def test_wider_mlps_compute_the_same_and_learn_apart():
    model = build()
    wider = surgery.with_wider_mlps(model, 2)
    assert wider.config.intermediate_size == 2 * model.config.intermediate_size
    torch.testing.assert_close(wider.logits(TOKENS), model.logits(TOKENS), rtol=0, atol=1e-5)
    wider.logits(TOKENS).square().sum().backward()
    first, second = wider.layers[0].mlp.gate_up.grad[: wider.config.intermediate_size].chunk(2)
    assert not torch.allclose(first, second)  # else the copies would stay copies
