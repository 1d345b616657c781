"""Model folders: what is written is read back, and what does not fit is said in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tritium
from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.hf import INDEX, ModelFolderError, from_hf_config, load
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import init_mesh

pytestmark = pytest.mark.usefixtures("quick")
SHAPE = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "max_positions": 40}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "init_std": 0.3, "eos_id": 2, "norm_eps": 1e-4}
KINDS = {
    "untied": ModelConfig(**SHAPE, **HEADS),
    "tied": ModelConfig(**SHAPE, **HEADS, tie_embeddings=True),
    "qkv_bias": ModelConfig(**SHAPE, **HEADS, qkv_bias=True, rope_theta=1e6),
    "qk_norm": ModelConfig(**SHAPE, **HEADS, qk_norm=True),
}
TOKENS = torch.arange(20)


def build(kind: str, dtype=torch.float32) -> Transformer:
    """With norms and biases drawn, so that none can be lost unseen."""
    model = Transformer(KINDS[kind], dtype=dtype).initialize(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(dtype)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    build("untied").save(str(tmp_path))
    return tmp_path


def change_tensors(folder: Path, **changes) -> None:
    """Replace tensors of a folder; None takes one out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def change_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_survives_saving_and_loading(tmp_path, kind, dtype):
    model = build(kind, dtype)
    model.save(str(tmp_path))
    again = tritium.load(str(tmp_path), dtype=dtype)
    assert again.config == ModelConfig(**vars(KINDS[kind]))
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(model.logits(TOKENS), again.logits(TOKENS))
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (kind != "tied")


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_survives_saving_and_loading(tmp_path, kind):
    model = ScalarModel(build(kind)).initialize(1)
    model.save(str(tmp_path))
    again = load(str(tmp_path), torch.float32)
    assert isinstance(again, ScalarModel)
    assert torch.equal(model.values(TOKENS), again.values(TOKENS))


def test_q_k_v_and_gate_up_are_written_apart_under_their_usual_names(folder):
    tensors, model = load_file(folder / "model.safetensors"), build("untied")
    names = [f"self_attn.{n}_proj.weight" for n in "qkvo"] + [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    names += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    wanted = {f"model.layers.{i}.{name}" for i in range(2) for name in names}
    assert set(tensors) == wanted | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    q, k, v = model.layers[1].attention.qkv.split([32, 16, 16])
    for name, piece in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(tensors[f"model.layers.1.self_attn.{name}_proj.weight"], piece)
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], model.layers[0].mlp.gate_up[24:])


def test_weights_in_several_files_and_another_dtype_are_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in range(2):
        part = {k: v.bfloat16() for j, (k, v) in enumerate(tensors.items()) if j % 2 == i}
        save_file(part, folder / f"model-0000{i + 1}-of-00002.safetensors")
    assert torch.equal(load(str(folder), torch.float32).embedding, build("untied").embedding.bfloat16().float())


def save_sharded(folder: str) -> None:
    model = Transformer(KINDS["untied"], init_mesh(tp=2)).initialize(3)
    model.save(folder)


def test_what_two_ranks_save_is_one_model_and_leaves_nothing_of_the_one_before(pool2, folder):
    pool2.run(save_sharded, str(folder))
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors.index.json", *names}
    assert all(set(load_file(folder / n)) == {k for k, v in index["weight_map"].items() if v == n} for n in names)
    wanted = Transformer(KINDS["untied"]).initialize(3)
    assert torch.equal(load(str(folder), torch.float32).logits(TOKENS), wanted.logits(TOKENS))
    wanted.save(str(folder))
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_all_that_does_not_fit_is_in_one_message(folder):
    change_tensors(
        folder,
        **{
            "model.norm.weight": None,
            "model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 16),
            "model.layers.1.mlp.down_proj.weight": None,
            "model.layers.2.mlp.down_proj.weight": torch.zeros(16, 24),
        },
    )
    with pytest.raises(ModelFolderError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert str(folder) in message
    for words in (
        "model.norm.weight is missing",
        "model.layers.0.self_attn.k_proj.weight is [8, 16], config.json wants [16, 16]",
        "model.layers.1.mlp.down_proj.weight is missing",
        "model.layers.2.mlp.down_proj.weight is not part of this model",
    ):
        assert words in message, message


def test_a_long_list_of_mistakes_is_cut(folder):
    change_config(folder, num_hidden_layers=9)
    with pytest.raises(ModelFolderError, match="and 55 more"):
        load(str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported.*the nearest is gemma2"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling of type 'llama3' needs a factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope_type='longrope' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "short_factor": []}}, "with short_factor is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads=3"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"num_attention_heads": 0}, "num_heads=0 must be at least 1"),
        ({"rms_norm_eps": 0}, "norm_eps=0.0 must be above 0, and finite"),
        ({"rms_norm_eps": float("nan")}, "norm_eps=nan must be above 0"),
        ({"rope_theta": 0}, "rope_theta=0.0 must be above 0"),
        ({"rope_theta": -1e4}, "rope_theta=-10000.0 must be above 0"),
        ({"eos_token_id": 99999}, "the id of a special token is 99999, no number of one of"),
        ({"eos_token_id": [1, -1]}, "the id of a special token is -1"),
        ({"rms_norm_eps": "small"}, "config.json: could not convert string to float: 'small'"),
    ],
)
def test_a_configuration_that_this_decoder_does_not_compute(folder, changes, words):
    change_config(folder, **changes)
    with pytest.raises(ModelFolderError, match=words):
        load(str(folder))


def test_a_missing_key_is_named(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelFolderError, match="config.json has no 'intermediate_size'"):
        load(str(folder))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_a_head_dim_that_is_not_said_is_transformers(family):
    transformers = pytest.importorskip("transformers")
    raw = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    raw |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    theirs = transformers.AutoConfig.for_model(family, **raw, pad_token_id=0)
    ours = from_hf_config(raw | {"model_type": family}, Path("config.json"))
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32)


def test_a_folder_may_leave_the_architecture_out(folder):
    change_config(folder, architectures=None)
    assert isinstance(load(str(folder)), Transformer)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "can't be read"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.*safetensors"),
        (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), "index.json must hold a table weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map": null}'), "index.json must hold a table weight_map"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "is damaged"),
    ],
)
def test_a_broken_folder_is_a_sentence(folder, harm, words):
    harm(folder)
    with pytest.raises(ModelFolderError, match=words):
        load(str(folder))


def test_an_architecture_that_nobody_else_has_is_not_exported(tmp_path):
    model = Transformer(ModelConfig(**SHAPE, **HEADS, qkv_bias=True, qk_norm=True)).initialize(0)
    with pytest.raises(ValueError, match="no published architecture"):
        model.save(str(tmp_path))
