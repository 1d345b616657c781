"""Options of the training stages that can't be: each gets a sentence that names the option."""

import json
from pathlib import Path

import pytest

import tritium
from tritium.core.config import ConfigError, UserError, from_dict
from tritium.core.data import DataConfig
from tritium.core.optim import OptimConfig
from tritium.core.run import RunConfig
from tritium.core.setup import FinetuneConfig
from tritium.stages import grpo, pretrain

pytestmark = pytest.mark.usefixtures("quick")


def pretrained(tiny, out: Path, **options) -> None:
    data = DataConfig([tiny.data("text.jsonl")], bin_tokens=256)
    run = RunConfig(out=str(out), steps=1, dtype="fp32", eval_bins=1)
    shape = pretrain.ShapeConfig(1, 16, 16, heads=2, kv_heads=1, head_dim=8, context=32)
    pretrain.train(pretrain.Config(**{"vocab_size": 330, "data": data, "run": run, "model": shape} | options))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"layers": 0}, r"^model.layers=0 must be at least 1"),
        ({"hidden_size": 0}, r"^model.hidden_size=0 must be at least 1"),
        ({"heads": 3, "kv_heads": 2}, r"^model.heads=3 must be a multiple of model.kv_heads=2"),
        ({"head_dim": 12}, r"^model.head_dim=12 must be a multiple of 8"),
    ],
)
def test_a_shape_that_cannot_be_is_told_in_the_options_names(tiny, tmp_path, shape, words):
    with pytest.raises(ConfigError, match=words):
        pretrained(tiny, tmp_path, tokenizer=tiny.model, model=pretrain.ShapeConfig(**shape))


def test_a_shape_that_cannot_be_used_later():
    with pytest.raises(ConfigError, match="model.context=4 must be at least 8"):
        pretrain.ShapeConfig(context=4)
    for both in ({"qkv_bias": True, "qk_norm": True}, {"qk_norm": True, "width_base": 64}):
        with pytest.raises(ConfigError, match="no published architecture has more than one of them"):
            pretrain.ShapeConfig(**both)


def test_a_new_minicpm_is_trained_by_mups_rates(tiny, tmp_path):
    shape = pretrain.ShapeConfig(
        2, 16, 16, 2, 1, head_dim=8, context=32, embedding_scale=12.0, residual_depth=1.4, width_base=8
    )
    pretrained(tiny, tmp_path, tokenizer=tiny.model, model=shape, optim=OptimConfig(mup=True))
    raw = json.loads((tmp_path / "step-00000001" / "config.json").read_text())
    assert (raw["model_type"], raw["scale_emb"], raw["scale_depth"], raw["dim_model_base"]) == ("minicpm", 12.0, 1.4, 8)


def test_an_adapter_goes_on_with_pretraining(tiny, tmp_path):
    lora = FinetuneConfig("lora", rank=4)
    pretrained(tiny, tmp_path, init=tiny.model, finetune=lora, optim=OptimConfig(lr=1e-2))
    raw = json.loads((tmp_path / "step-00000001" / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA" and raw["base_model_name_or_path"] == tiny.model


def test_a_small_text_gets_the_vocabulary_that_it_supports(tiny, tmp_path):
    pretrained(tiny, tmp_path, vocab_size=None)
    assert 300 < tritium.Tokenizer.load(tmp_path / "tokenizer").vocab_size < 8192
    pretrained(tiny, tmp_path, vocab_size=None)  # again: what is there is taken


def test_the_tokenizer_of_an_earlier_run_is_not_taken_for_one_of_another_size(tiny, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(Path(tiny.model, "tokenizer.model").read_bytes())
    with pytest.raises(ConfigError, match=r"vocab_size=330, but .*tokenizer holds a tokenizer of 340 tokens"):
        pretrained(tiny, tmp_path)
    pretrained(tiny, tmp_path, vocab_size=340)


def test_a_mistake_in_replay_is_told_before_a_tokenizer_is_trained(tiny, tmp_path):
    with pytest.raises(UserError, match=r"^replay: no/such.txt does not exist"):
        pretrained(tiny, tmp_path, replay=["no/such.txt"])
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("option", ["holdout", "difficulty", "bins_per_step", "on_overlong"])
def test_grpo_has_no_option_that_it_would_ignore(option):
    with pytest.raises(ConfigError, match=f"data.{option}: no such option"):
        from_dict(grpo.Config, {"model": "m", "data": {option: 1}})
    with pytest.raises(ConfigError, match="run.eval_every: no such option"):
        from_dict(grpo.Config, {"model": "m", "run": {"eval_every": 5}})


def test_grpo_needs_answers_that_differ():
    with pytest.raises(ConfigError, match="sampling.temperature=0 makes all answers of a group equal"):
        from_dict(grpo.Config, {"model": "m", "sampling": {"temperature": 0}})
