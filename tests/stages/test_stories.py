"""The real model of the shared data, through the commands of the README: adapted, merged, and read by transformers."""

from pathlib import Path

import pytest
import torch

import tritium
from tritium.core.data import DataConfig
from tritium.core.optim import OptimConfig
from tritium.core.run import RunConfig
from tritium.core.setup import FinetuneConfig
from tritium.stages import cli, sft

DATA = Path(tritium.__file__).parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="needs the shared data beside the checkout")
MODEL = str(DATA / "models" / "stories260k")


def test_lora_on_alpaca_lowers_the_held_out_loss_and_the_merged_model_is_transformers(tmp_path):
    data = DataConfig([str(DATA / "sft" / "alpaca_en_demo.json")], bin_tokens=2048, holdout=0.02)
    run = RunConfig(out=str(tmp_path / "lora"), steps=8, dtype="fp32", eval_bins=2)
    lora = FinetuneConfig("lora", rank=8)
    config = sft.Config(model=MODEL, data=data, run=run, finetune=lora, optim=OptimConfig(lr=5e-3))
    result = sft.train(config)
    assert result.metrics["eval_loss"] < result.before["eval_loss"] - 0.5
    assert cli.main(["surgery", "merge", str(tmp_path / "lora"), str(tmp_path / "merged"), "--dtype=fp32"]) == 0
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = torch.arange(3, 60)
    adapted = tritium.load(result.checkpoint, dtype=torch.float32).logits(tokens)
    torch.testing.assert_close(theirs(tokens[None]).logits[0], adapted, rtol=1e-4, atol=1e-4)
