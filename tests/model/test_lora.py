"""LoRA and QLoRA: what acts, what is trained, what is written, and that peft reads it and computes the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tritium
from tritium.core.config import ConfigError
from tritium.core.data import DataConfig
from tritium.core.optim import OptimConfig
from tritium.core.run import RunConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import FinetuneConfig
from tritium.kernels import dequantize_nf4, quantize_nf4
from tritium.model import adapters, lora
from tritium.model.config import ModelConfig
from tritium.model.hf import ModelFolderError
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import shard
from tritium.stages import cli, dpo, grpo, reward, sft

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = ModelConfig(48, 16, 24, 2, 4, 2, 8, max_positions=40, init_std=0.3, qkv_bias=True)
TOKENS = torch.arange(20)


def base(tmp_path, dtype=torch.float32) -> Transformer:
    Transformer(CONFIG).initialize(0).save(str(tmp_path / "base"))
    return tritium.load(str(tmp_path / "base"), dtype=dtype)


def draw(model) -> None:
    """Adapters that do something."""
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


@pytest.mark.parametrize("rank", [3, 90])  # q, k and v together: 9 and 270 columns, more than the kernel takes at once
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj", "up_proj"), ("o_proj", "down_proj")])
def test_an_adapter_is_its_formula_on_every_matrix(tmp_path, rank, targets):
    model = base(tmp_path)
    before = model.logits(TOKENS)
    adapters.attach(model, lora.LoraConfig(rank, alpha=6.0, targets=targets, rslora=True))
    assert torch.equal(model.logits(TOKENS), before) or (model.logits(TOKENS) - before).abs().max() < 1e-5
    draw(model)
    adapted = model.logits(TOKENS)
    assert (adapted - before).abs().max() > 0.1
    expected = tritium.load(str(tmp_path / "base"), dtype=torch.float32)
    weights = dict(expected.named_parameters())
    for block, key, here in lora.adapted(model):
        name = next(n for n, m in model.named_modules() if m is block) + "." + key
        first = 0
        for module, rows, chosen in here.pairs["default"].pieces:
            if chosen:
                (a, b) = next((a, b) for m, a, b in here.pairs["default"].whole(model.mesh) if m == module)
                weights[name].data[first : first + rows] += 6.0 / rank**0.5 * b @ a
            first += rows
    torch.testing.assert_close(adapted, expected.logits(TOKENS), rtol=1e-4, atol=1e-4)
    with adapters.disabled(model):
        torch.testing.assert_close(model.logits(TOKENS), before, rtol=0, atol=0)
    assert lora.merge(model) == 0 and not list(lora.adapted(model))
    torch.testing.assert_close(adapted, model.logits(TOKENS), rtol=1e-4, atol=1e-4)


def test_only_the_adapter_is_trained_and_dropout_acts_only_there(tmp_path):
    model = base(tmp_path)
    adapters.attach(model, lora.LoraConfig(4, dropout=0.5))
    draw(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(".pairs.default." in n for n in names)
    assert not torch.equal(model.logits(TOKENS), model.logits(TOKENS))
    with torch.no_grad():
        assert torch.equal(model.logits(TOKENS), model.logits(TOKENS))
    model.logits(TOKENS).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_adapters_by_name_on_one_base(tmp_path):
    model = base(tmp_path)
    outputs = {}
    for name in ("one", "two"):
        adapters.attach(model, lora.LoraConfig(2, targets=("q_proj",) if name == "one" else ()), name)
        draw(model)
        outputs[name] = tritium.generate(model, [[1, 2, 3]], max_tokens=12, temperature=0.0)[0].tokens
    for name in ("two", "one"):
        adapters.use(model, name)
        assert tritium.generate(model, [[1, 2, 3]], max_tokens=12, temperature=0.0)[0].tokens == outputs[name]
    assert outputs["one"] != outputs["two"]
    with pytest.raises(ValueError, match="no adapter 'three'; there are: one, two"):
        adapters.use(model, "three")
    with pytest.raises(ValueError, match="there is an adapter 'one' already"):  # where both have a pair, both would act
        adapters.attach(model, lora.LoraConfig(2, targets=("o_proj",)), "one")


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_survives_saving_and_loading(tmp_path, dtype, quantized):
    model = base(tmp_path, dtype)
    adapters.attach(
        model, lora.LoraConfig(4, quantized=quantized, base=str(tmp_path / "base"), targets=("k_proj", "o_proj"))
    )
    draw(model)
    model.save(str(tmp_path / "adapter"))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = tritium.load(str(tmp_path / "adapter"), dtype=dtype)
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))


def test_a_qlora_adapter_is_merged_into_what_its_codes_stand_for(tmp_path):
    model = base(tmp_path)
    whole = model.layers[0].mlp.down.detach().clone()
    adapters.attach(model, lora.LoraConfig(4, quantized=True))
    assert model.layers[0].mlp.down is None  # the dense weight is gone
    draw(model)
    pair = model.layers[0].mlp.adapted["down"].pairs["default"]
    expected = dequantize_nf4(quantize_nf4(whole.bfloat16())).float() + 8.0 * pair.b @ pair.a
    logits = model.logits(TOKENS)
    assert lora.merge(model) < 0.02
    torch.testing.assert_close(model.layers[0].mlp.down, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(model.logits(TOKENS), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_peft_loads_it_with_the_same_logits(tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = base(tmp_path)
    adapters.attach(model, lora.LoraConfig(4, base=str(tmp_path / "base"), targets=targets, rslora=True))
    draw(model)
    model.save(str(tmp_path / "adapter"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32)
    torch.testing.assert_close(theirs(TOKENS[None]).logits[0], model.logits(TOKENS), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))  # and what peft writes is read
    again = tritium.load(str(tmp_path / "theirs"), dtype=torch.float32)
    torch.testing.assert_close(again.logits(TOKENS), model.logits(TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize("rank", range(2))
def test_an_adapter_on_two_ranks_starts_as_on_one(tmp_path, rank):
    mesh = Mesh(rank=rank, world_size=2, tp=2, tp_rank=rank)  # no process group: none is needed to start
    whole, part = Transformer(CONFIG).initialize(0), Transformer(CONFIG, mesh).initialize(0)
    for model in (whole, part):
        adapters.attach(model, lora.LoraConfig(4, targets=("q_proj", "v_proj", "o_proj", "gate_proj")), seed=3)
    for (name, p), full in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, shard(full, p.sharding, mesh)), name


def test_what_does_not_fit_is_said(tmp_path):
    model = base(tmp_path)
    with pytest.raises(ValueError, match="targets: qproj not in this model, which has .*q_proj"):
        adapters.attach(model, lora.LoraConfig(4, targets=("qproj",)))
    adapters.attach(model, lora.LoraConfig(4, base=str(tmp_path / "base")))
    folder = tmp_path / "adapter"
    model.save(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != name} | {"odd": TOKENS}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelFolderError, match=f"{name} is missing.*odd is not part of this model"):
        tritium.load(str(folder))
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"use_dora": True}))
    with pytest.raises(ModelFolderError, match="use_dora=True is not supported"):
        tritium.load(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"base_model_name_or_path": "gone"}))
    with pytest.raises(ModelFolderError, match="base model's folder 'gone' does not exist"):
        tritium.load(str(folder))


# Stages ---------------------------------------------------------------------------------------------------------------


def settings(tiny, out, data: str, kind: str, steps: int = 6, **finetune):
    config = {"model": tiny.model, "finetune": FinetuneConfig(kind, **finetune), "optim": OptimConfig(lr=5e-3)}
    config["schedule"] = ScheduleConfig("constant", warmup=0.0)
    config["data"] = DataConfig([tiny.data(data)], bin_tokens=512, holdout=0.2)
    return config | {"run": RunConfig(out=str(out), steps=steps, dtype="fp32", eval_bins=1, save_every=3)}


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_sft_of_an_adapter_learns_resumes_and_merges(tiny, tmp_path, kind, capsys):
    straight = sft.train(sft.Config(**settings(tiny, tmp_path / "a", "chats.jsonl", kind)))
    assert straight.metrics["eval_loss"] < straight.before["eval_loss"] - 0.02
    sft.train(sft.Config(**settings(tiny, tmp_path / "b", "chats.jsonl", kind, steps=3)))
    resumed = sft.train(sft.Config(**settings(tiny, tmp_path / "b", "chats.jsonl", kind)))
    a, b = (tritium.load(r.checkpoint, dtype=torch.float32) for r in (straight, resumed))
    assert list(a.adapters) == ["default"] and a.adapters["default"].quantized == (kind == "qlora")
    assert cli.main(["surgery", "merge", straight.checkpoint, str(tmp_path / "merged"), "--dtype=fp32"]) == 0
    assert "largest rounding of a weight" in capsys.readouterr().out
    merged = tritium.load(str(tmp_path / "merged"), dtype=torch.float32)
    torch.testing.assert_close(merged.logits(TOKENS), a.logits(TOKENS), rtol=1e-4, atol=1e-4)
    assert tritium.Tokenizer.load(str(tmp_path / "merged")).vocab_size == merged.config.vocab_size
    assert torch.equal(a.logits(TOKENS), b.logits(TOKENS))
    folder = Path(straight.checkpoint)  # as peft leaves one: no tokenizer; the base's comes along, its template too
    for file in folder.glob("*token*"):
        file.rename(tmp_path / file.name)
    Path(tiny.model, "chat_template.jinja").write_text("{{ '<|im_start|>' }}")
    assert cli.main(["surgery", "merge", str(folder), str(tmp_path / "again")]) == 0
    Path(tiny.model, "chat_template.jinja").unlink()
    assert (tmp_path / "again" / "chat_template.jinja").exists()


def test_parts_of_an_adapter_have_rates_of_their_own(tiny, tmp_path):
    still = OptimConfig(lr=5e-3, lr_scale={"*.b": 0.0})
    made = sft.train(sft.Config(**settings(tiny, tmp_path, "chats.jsonl", "lora", steps=2) | {"optim": still}))
    a, base = (tritium.load(f, dtype=torch.float32) for f in (made.checkpoint, tiny.model))
    assert torch.equal(a.logits(TOKENS), base.logits(TOKENS)) and list(a.adapters) == ["default"]


def test_an_adapter_of_an_adapter_starts_where_the_first_ended(tiny, tmp_path):
    first = sft.train(sft.Config(**settings(tiny, tmp_path / "a", "chats.jsonl", "lora")))
    options = settings(tiny, tmp_path / "b", "chats.jsonl", "lora", steps=2) | {"model": first.checkpoint}
    second = sft.train(sft.Config(**options))
    assert second.before["eval_loss"] == pytest.approx(first.metrics["eval_loss"], abs=1e-3)
    tritium.load(second.checkpoint)


def test_dpo_of_an_adapter_has_its_base_as_reference(tiny, tmp_path):
    result = dpo.train(dpo.Config(**settings(tiny, tmp_path, "pairs.jsonl", "lora")))
    assert result.before["eval_loss"] == pytest.approx(0.6931, abs=1e-4)  # ln 2
    assert result.metrics["eval_loss"] < 0.67


def test_a_reward_model_and_grpo_of_adapters(tiny, tmp_path):
    result = reward.train(reward.Config(**settings(tiny, tmp_path / "r", "pairs.jsonl", "lora", steps=2)))
    model = tritium.load(result.checkpoint, dtype=torch.float32)
    assert type(model).__name__ == "ScalarModel" and model.score.abs().sum() > 0
    options = settings(tiny, tmp_path / "g", "problems.jsonl", "lora", steps=1)
    data, run = options.pop("data"), options.pop("run")
    config = grpo.Config(**options)
    config.data.sources, config.run.out, config.run.steps, config.run.dtype = data.sources, run.out, 1, "fp32"
    config.grpo.prompts, config.grpo.group, config.grpo.beta, config.sampling.max_tokens = 2, 2, 0.1, 4
    assert list(tritium.load(grpo.train(config).checkpoint).adapters) == ["default"]


def test_freezing_by_pattern_moves_only_what_is_named(tiny, tmp_path):
    config = sft.Config(**settings(tiny, tmp_path, "chats.jsonl", "freeze", steps=2, train=["layers.1.*", "norm"]))
    before = tritium.load(tiny.model, dtype=torch.float32)
    after = tritium.load(sft.train(config).checkpoint, dtype=torch.float32)
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(a, b) != (name.startswith("layers.1.") or name == "norm"), name
    options = settings(tiny, tmp_path / "odd", "chats.jsonl", "freeze", train=["layer.1.*"])
    with pytest.raises(ConfigError, match=r"finetune.train=layer.1.\* is no parameter's name"):
        sft.train(sft.Config(**options))
    with pytest.raises(ConfigError, match="finetune.kind=freeze and finetune.train"):
        FinetuneConfig("freeze")
    with pytest.raises(ConfigError, match="finetune.rank=0 must be at least 1"):
        FinetuneConfig("lora", rank=0)
