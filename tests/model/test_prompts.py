"""Soft prompts: they act as peft's do, alone are trained, leave the base as it is, and are in the cache."""

import json

import pytest
import torch
from torch.nn import functional as F

import tritium
from tritium.core.config import ConfigError, UserError
from tritium.core.data import DataConfig
from tritium.core.optim import OptimConfig
from tritium.core.run import RunConfig
from tritium.core.schedule import ScheduleConfig
from tritium.core.setup import FinetuneConfig
from tritium.model import adapters
from tritium.model.beam import beam_search
from tritium.model.config import ModelConfig
from tritium.model.hf import ModelFolderError
from tritium.model.lora import LoraConfig, merge
from tritium.model.prompts import PromptConfig
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.stages import cli, dpo, reward, sft

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = ModelConfig(48, 32, 24, 2, 4, 2, 8, max_positions=40, init_std=0.3, qkv_bias=True)
TOKENS = torch.arange(12)
KINDS = ("prompt", "p_tuning", "prefix")


def with_prompt(tmp_path, kind: str, tokens: int = 5, **config) -> Transformer:
    base = ModelConfig(**vars(CONFIG) | config)
    Transformer(base).initialize(0).save(str(tmp_path / "base"))
    model = tritium.load(str(tmp_path / "base"), dtype=torch.float32)
    adapters.attach(model, PromptConfig(kind, tokens, str(tmp_path / "base")), seed=1)
    for i, p in enumerate(model.prompts.parameters()):
        p.data.copy_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("windows", [(), (4, None)])
def test_peft_loads_it_with_the_same_logits(tmp_path, kind, windows):
    peft = pytest.importorskip("peft")
    family = {"windows": windows, "family": "qwen2"} if windows else {}
    model = with_prompt(tmp_path, kind, **family)
    model.save(str(tmp_path / "adapter"))
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32)
    logits = theirs(input_ids=TOKENS[None], attention_mask=torch.ones(1, 12)).logits[0, -12:]
    torch.testing.assert_close(logits, model.logits(TOKENS), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))  # and what peft writes is read
    again = tritium.load(str(tmp_path / "theirs"), dtype=torch.float32)
    torch.testing.assert_close(again.logits(TOKENS), model.logits(TOKENS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_as_each_alone_and_the_base_is_untouched(tmp_path, kind):
    model = with_prompt(tmp_path, kind)
    bare = tritium.load(str(tmp_path / "base"), dtype=torch.float32)
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)  # an empty one among them
    packed = model.hidden(TOKENS, cu)
    alone = torch.cat([model.hidden(part) for part in TOKENS.split([5, 7])])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (packed - bare.hidden(TOKENS, cu)).abs().max() > 0.1
    with adapters.disabled(model):
        assert torch.equal(model.hidden(TOKENS, cu), bare.hidden(TOKENS, cu))
    F.cross_entropy(model.logits(TOKENS)[:-1], TOKENS[1:]).backward()
    assert all((p.grad is not None and bool(p.grad.any())) == p.requires_grad for p in model.parameters())
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"prompts"}


@pytest.mark.parametrize("kind", KINDS)
def test_generation_goes_on_from_the_prompt_as_a_full_forward_does(tmp_path, kind):
    model = with_prompt(tmp_path, kind)
    prompts = [[1, 2, 3], [4] * 30]
    for prompt, got in zip(prompts, tritium.generate(model, prompts, max_tokens=20, temperature=0.0), strict=True):
        ids = list(prompt)
        for token in got.tokens:
            assert int(model.logits(torch.tensor(ids))[-1].argmax()) == token
            ids.append(token)
        assert len(ids) <= 40 - 5 + 1 and got.finish_reason == ("length" if len(prompt) == 3 else "context")
    three = tritium.generate(model, [[1, 2, 3]], n=3, max_tokens=4, temperature=0.0, repetition_penalty=1.2)
    assert three[0].tokens == three[1].tokens == three[2].tokens
    assert (
        beam_search(model, [[1, 2, 3]], beams=1, max_tokens=20)[0].tokens
        == tritium.generate(model, [[1, 2, 3]], max_tokens=20, temperature=0.0)[0].tokens
    )
    with pytest.raises(ValueError, match="the prompt has 35 tokens; the model's context is 35"):
        tritium.generate(model, [[1] * 35], max_tokens=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_learns_what_its_base_does_not_say(tmp_path, kind):
    model = with_prompt(tmp_path, kind)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(40):
        losses.append(F.cross_entropy(model.logits(TOKENS)[:-1], TOKENS[1:]))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3


def test_prompts_and_loras_side_by_side_on_one_base(tmp_path):
    model, outputs = with_prompt(tmp_path, "prefix"), {}
    adapters.attach(model, LoraConfig(2), "../runs/lo.ra")
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
    adapters.attach(model, PromptConfig("prompt", 3), "two")
    for name in (None, "default", "../runs/lo.ra", "two"):
        adapters.use(model, name)
        outputs[name] = model.logits(TOKENS).detach()
        assert model.config.max_positions == 40 - {"default": 5, "two": 3}.get(name, 0)
    values = list(outputs.values())
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(values) for b in values[:i])
    adapters.use(model, "default")
    assert torch.equal(model.logits(TOKENS), outputs["default"])
    adapters.use(model, "../runs/lo.ra")
    merge(model)
    assert not model.prompts and not model.adapters
    torch.testing.assert_close(model.logits(TOKENS), outputs["../runs/lo.ra"], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_said(tmp_path):
    model = with_prompt(tmp_path, "prompt")
    model.save(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    raw = json.loads(file.read_text())
    for change, words in (
        ({"num_virtual_tokens": 4}, r"prompt_embeddings is \[5, 32\], wanted \[4, 32\]"),
        ({"num_virtual_tokens": "many"}, "adapter"),
        ({"num_virtual_tokens": 39}, "leave nothing of the context of 40"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
    ):
        file.write_text(json.dumps(raw | change))
        with pytest.raises(ModelFolderError, match=words):
            tritium.load(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"data parallelism only"):
        adapters.attach(Transformer(CONFIG, Mesh(rank=0, world_size=2, tp=2)), PromptConfig("prompt"))
    with pytest.raises(ConfigError, match="finetune.tokens=0 must be at least 1"):
        FinetuneConfig("prefix", tokens=0)
    with pytest.raises(ConfigError, match="finetune.kind=prompt is for language models"):
        reward.Config(model="x", finetune=FinetuneConfig("prompt"))


# Stages ---------------------------------------------------------------------------------------------------------------


def settings(tiny, out, data: str, kind: str, steps: int = 6):
    config = {"model": tiny.model, "finetune": FinetuneConfig(kind, tokens=4), "optim": OptimConfig(lr=0.1)}
    config["schedule"] = ScheduleConfig("constant", warmup=0.0)
    config["data"] = DataConfig([tiny.data(data)], bin_tokens=512, holdout=0.2)
    return config | {"run": RunConfig(out=str(out), steps=steps, dtype="fp32", eval_bins=1, save_every=3)}


@pytest.mark.parametrize("kind", KINDS)
def test_sft_of_a_prompt_resumes_and_it_is_not_merged(tiny, tmp_path, kind, capsys):
    straight = sft.train(sft.Config(**settings(tiny, tmp_path / "a", "chats.jsonl", kind)))
    sft.train(sft.Config(**settings(tiny, tmp_path / "b", "chats.jsonl", kind, steps=3)))
    resumed = sft.train(sft.Config(**settings(tiny, tmp_path / "b", "chats.jsonl", kind)))
    a, b = (tritium.load(r.checkpoint, dtype=torch.float32) for r in (straight, resumed))
    assert torch.equal(a.logits(TOKENS), b.logits(TOKENS))
    started = settings(tiny, tmp_path / "d", "chats.jsonl", kind, steps=1) | {"optim": OptimConfig(lr=1e-9)}
    start = tritium.load(sft.train(sft.Config(**started)).checkpoint, dtype=torch.float32)
    assert not torch.equal(a.soft_prompt.table, start.soft_prompt.table)
    assert cli.main(["surgery", "merge", straight.checkpoint, str(tmp_path / "merged")]) == 2
    assert f"a soft prompt ({kind}) can't be merged" in capsys.readouterr().err
    options = settings(tiny, tmp_path / "c", "chats.jsonl", "full") | {"model": straight.checkpoint}
    with pytest.raises(UserError, match="can't be merged.*train a new one on that base"):
        sft.train(sft.Config(**options | {"finetune": FinetuneConfig("full")}))


def test_dpo_of_a_prompt_has_its_base_as_reference(tiny, tmp_path):
    tritium.load(dpo.train(dpo.Config(**settings(tiny, tmp_path, "pairs.jsonl", "prefix", steps=2))).checkpoint)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval_loss"] == pytest.approx(
        0.6931, abs=0.01
    )  # about ln 2: the policy has a prompt, the base none
