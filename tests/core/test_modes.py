"""What a training run may add: noise, dropout, fp16 with a scaled loss."""

from dataclasses import replace

import pytest
import torch

import tritium
from tritium.core import setup
from tritium.core.config import ConfigError
from tritium.core.data import DataConfig
from tritium.core.optim import LossScale, OptimConfig
from tritium.core.run import RunConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import FinetuneConfig
from tritium.core.trainer import Trainer
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.stages import pretrain, sft

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = ModelConfig(48, 16, 24, 2, 4, 2, 8, max_positions=40, init_std=0.3)
TOKENS, CU = torch.arange(40), torch.tensor([0, 4, 40], dtype=torch.int32)


def test_neftune_is_uniform_and_smaller_in_longer_documents():
    model = Transformer(CONFIG).initialize(0)
    model.set_noise(neftune=5.0)
    noise = model.noise(torch.zeros(40, 16), torch.tensor([4] * 4 + [36] * 36))
    for part, length in ((noise[:4], 4), (noise[4:], 36)):
        bound = 5.0 / (length * 16) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound and part.abs().mean() == pytest.approx(bound / 2, rel=0.25)
    clean = Transformer(CONFIG).initialize(0).hidden(TOKENS, CU)
    assert not torch.equal(model.hidden(TOKENS, CU), clean)
    with torch.no_grad():
        assert torch.equal(model.hidden(TOKENS, CU), clean)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    model = Transformer(CONFIG).initialize(0)
    clean = model.hidden(TOKENS, CU)
    model.set_noise(dropout=0.2)
    torch.manual_seed(0)
    draws = torch.stack([model.hidden(TOKENS, CU).detach() for _ in range(200)])
    assert draws.std(0).mean() > 0.05 and (draws.mean(0) - clean).abs().mean() < 0.5 * draws.std(0).mean()
    with torch.no_grad():
        assert torch.equal(model.hidden(TOKENS, CU), clean)


def test_the_loss_scale_halves_where_it_must_and_grows_with_patience():
    scale = LossScale(torch.device("cpu"), start=8.0, patience=2)
    seen = []
    for skipped in (1, 0, 0, 0, 1, 0, 0):
        scale.update(torch.tensor(float(skipped)))
        seen.append(float(scale.value))
    assert seen == [4, 4, 8, 8, 4, 4, 8]


def settings(tiny, out, steps: int = 6, dtype: str = "fp32", **finetune) -> sft.Config:
    data = DataConfig([tiny.data("chats.jsonl")], bin_tokens=512, holdout=0.2)
    run = RunConfig(out=str(out), steps=steps, dtype=dtype, eval_bins=1, save_every=3, keep=5)
    return sft.Config(
        model=tiny.model, data=data, run=run, optim=OptimConfig(lr=2e-3), finetune=FinetuneConfig(**finetune)
    )


def test_noise_is_the_same_after_resuming(tiny, tmp_path):
    options = {"neftune": 5.0, "block_dropout": 0.1}
    straight = sft.train(settings(tiny, tmp_path / "a", **options))
    again = settings(tiny, tmp_path / "a", **options)
    expected = tritium.load(straight.checkpoint, dtype=torch.float32).head_weight
    (tmp_path / "a" / "step-00000006" / "manifest.json").unlink()  # damaged: it goes on from step 3
    found = tritium.load(sft.train(again).checkpoint, dtype=torch.float32).head_weight
    assert torch.equal(found, expected)


def test_fp16_learns_as_fp32_does(tiny, tmp_path):
    half, single = (sft.train(settings(tiny, tmp_path / d, dtype=d)) for d in ("fp16", "fp32"))
    assert half.metrics["loss_scale"] >= 2.0**8
    assert half.metrics["eval_loss"] == pytest.approx(single.metrics["eval_loss"], abs=0.03)
    assert half.metrics["grad_norm"] == pytest.approx(single.metrics["grad_norm"], rel=0.1)
    assert tritium.load(half.checkpoint, dtype=torch.float16).dtype == torch.float16


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="block_dropout"):
        FinetuneConfig(block_dropout=1.0)


def test_the_final_decay_has_its_own_data(tiny, tmp_path, monkeypatch):
    """Text of one word takes over in the last two of six steps, and not before."""
    (tmp_path / "good.txt").write_text("zq " * 4000)
    seen = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batches: (seen.append(batches), step(self, batches))[1])
    data = DataConfig([tiny.data("text.jsonl")], bin_tokens=256)
    run = RunConfig(out=str(tmp_path / "run"), steps=6, dtype="fp32", eval_bins=1)
    schedule = ScheduleConfig("wsd", warmup=0.0, decay=2.0)
    options = {"init": tiny.model, "anneal": [str(tmp_path / "good.txt")], "data": data, "run": run}
    pretrain.train(pretrain.Config(**options, schedule=schedule))
    common = [max(b.tokens.bincount().max().item() / len(b.tokens) for b in s) for s in seen]
    assert min(common[4:]) > max(common[:4])
    with pytest.raises(ConfigError, match="anneal needs a final decay: set schedule.kind=wsd"):
        pretrain.Config(**options)
    options["run"] = replace(run, out=str(tmp_path / "short"), steps=2)
    with pytest.raises(ConfigError, match=r"anneal: schedule.decay=0.2 of 2 steps is no step at all"):
        pretrain.train(pretrain.Config(**options, schedule=replace(schedule, decay=0.2)))


def test_auto_takes_bf16_only_where_its_matmuls_are_the_faster_ones(monkeypatch):
    for slow in (False, True):
        monkeypatch.setattr(setup, "fp32_is_faster", lambda dtype, slow=slow: slow)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        assert setup.parameter_dtype("auto", Mesh.single()) == (torch.float32 if slow else torch.bfloat16)
        assert setup.parameter_dtype("bf16", Mesh.single()) == torch.bfloat16
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # an ARM without it
    monkeypatch.setattr(setup, "fp32_is_faster", lambda dtype: False)
    assert setup.parameter_dtype("auto", Mesh.single()) == torch.float32
