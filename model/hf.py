"""Hugging Face folders: `config.json` and `model*.safetensors`, read and written.

Ours and theirs differ in two ways only: q, k, v are one matrix here, and gate, up another. Both use the half-split
rotary layout, so nothing is permuted. Safetensors only: no pickle is ever read.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.transformer import Transformer, full_shape
from tritium.parallel.files import Share, TensorFileError, deal, open_tensors, tensor_files
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import shard, unshard

ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # model_type → class prefix


class ModelFolderError(ValueError):
    """A model folder that can't be read: the message says which file or tensor, and what was expected."""


def load(
    folder: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", mesh: Mesh | None = None
) -> Transformer | ScalarModel:
    """Read a model: a `Transformer`, or a `ScalarModel` where the folder holds a sequence classifier with one label.
    A folder of a peft adapter is its base with the adapter attached.

    `dtype` is that of the parameters. On a `mesh`, each rank keeps its shards.
    Raises: ModelFolderError naming every missing, unexpected and mis-shaped tensor.
    """
    path = Path(folder)
    if (path / ADAPTER_CONFIG).exists():
        from tritium.model.lora import load_adapted

        return load_adapted(path, dtype, mesh or Mesh.single(device))
    raw = read_json(path / "config.json")
    config = from_hf_config(raw, path / "config.json")
    model = Transformer(config, mesh or Mesh.single(device), dtype)
    if any(name.endswith("ForSequenceClassification") for name in raw.get("architectures") or []):
        model = ScalarModel(model)
    try:
        with open_tensors(path, "model") as tensors:
            fill(model, tensors, path)
    except TensorFileError as error:
        raise ModelFolderError(str(error)) from None
    return model


def save(model: Transformer | ScalarModel, folder: str) -> None:
    """Write `model` so that transformers can load it. Every rank must call it, and writes its share of the tensors."""
    path, share, texts = Path(folder), *export(model)
    if model.mesh.main:
        path.mkdir(parents=True, exist_ok=True)
        for old in [*tensor_files(path, "model"), path / INDEX]:  # of another number of ranks, they would stay
            old.unlink(missing_ok=True)
        for name, text in texts.items():
            (path / name).write_text(text)
    model.mesh.barrier()
    share.write(path)
    model.mesh.barrier()


def export(
    model: Transformer | ScalarModel, make_whole: Callable[[nn.Parameter], None] = lambda p: None
) -> tuple[Share, dict[str, str]]:
    """(this rank's share of the model's tensors, the folder's text files by name). A collective.

    `make_whole` is called with each parameter before it is read, for where ZeRO has cut it. Of a model with adapters,
    what is trained of it: the active one.
    """
    if decoder_of(model).adapters:
        from tritium.model.lora import export_adapter

        return export_adapter(model, make_whole)
    texts = {"config.json": json.dumps(to_hf_config(model), indent=2) + "\n"}
    share = deal(hf_tensors(model, make_whole), "model", model.mesh)
    return share, texts | ({INDEX: share.index()} if model.mesh.world_size > 1 else {})


def decoder_of(model: Transformer | ScalarModel) -> Transformer:
    return model.backbone if isinstance(model, ScalarModel) else model


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{path} does not exist: a model folder holds config.json and *.safetensors") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFolderError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} must hold a JSON object")
    return value


def from_hf_config(raw: dict, path: Path) -> ModelConfig:
    """transformers' names → ours. Raises: ModelFolderError for what this decoder does not compute."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ModelFolderError(f"{path}: model_type {family!r} is not supported; these are: {', '.join(FAMILIES)}")
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    unsupported = {
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        "use_sliding_window": raw.get("use_sliding_window", False),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
    }
    for key, wrong in unsupported.items():
        if wrong:
            raise ModelFolderError(f"{path}: {key}={raw.get(key)!r} is not supported yet")
    try:
        heads, width = raw["num_attention_heads"], raw["hidden_size"]
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=width,
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or width // heads,
            max_positions=raw.get("max_position_embeddings", 2048),
            rope_theta=float(raw.get("rope_theta") or scaling.get("rope_theta", 10000.0)),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            init_std=raw.get("initializer_range", 0.02),
            bos_id=raw.get("bos_token_id"),
            eos_id=raw.get("eos_token_id"),
        )
    except KeyError as error:
        raise ModelFolderError(f"{path} has no {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ModelFolderError(f"{path}: {error}") from None


def to_hf_config(model: Transformer | ScalarModel) -> dict:
    config = model.config
    if config.qkv_bias and config.qk_norm:
        raise ValueError("qkv_bias with qk_norm is no published architecture: it can't be exported")
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    scalar = isinstance(model, ScalarModel)
    dtype = next(model.parameters()).dtype
    raw = {
        "architectures": [FAMILIES[family] + ("ForSequenceClassification" if scalar else "ForCausalLM")],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return raw | ({"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}} if scalar else {})


def parts(model: Transformer | ScalarModel) -> Iterator[tuple[nn.Module, str, list[tuple[str, int]]]]:
    """Each parameter's module and name in it, with the Hugging Face tensors that it is made of: their names and sizes
    along dimension 0."""
    decoder = decoder_of(model)
    config = decoder.config
    width, heads = config.intermediate_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    yield decoder, "embedding", [("model.embed_tokens.weight", config.vocab_size)]
    for i, layer in enumerate(decoder.layers):
        at, attn, mlp = f"model.layers.{i}.", layer.attention, layer.mlp
        yield layer, "attention_norm", [(at + "input_layernorm.weight", config.hidden_size)]
        for key, kind in (("qkv", "weight"), ("qkv_bias", "bias"))[: 1 + config.qkv_bias]:
            yield attn, key, [(f"{at}self_attn.{n}_proj.{kind}", s) for n, s in (("q", heads), ("k", kv), ("v", kv))]
        for key in ("q_norm", "k_norm") if config.qk_norm else ():
            yield attn, key, [(f"{at}self_attn.{key}.weight", config.head_dim)]
        yield attn, "o", [(at + "self_attn.o_proj.weight", config.hidden_size)]
        yield layer, "mlp_norm", [(at + "post_attention_layernorm.weight", config.hidden_size)]
        yield mlp, "gate_up", [(f"{at}mlp.{n}_proj.weight", width) for n in ("gate", "up")]
        yield mlp, "down", [(at + "mlp.down_proj.weight", config.hidden_size)]
    yield decoder, "norm", [("model.norm.weight", config.hidden_size)]
    if decoder.head is not None:
        yield decoder, "head", [("lm_head.weight", config.vocab_size)]
    if isinstance(model, ScalarModel):
        yield model, "score", [("score.weight", 1)]


def hf_tensors(
    model: Transformer | ScalarModel, make_whole: Callable[[nn.Parameter], None]
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors whole, one by one, under their Hugging Face names. A collective; see `export`."""
    for module, key, names in parts(model):
        p = getattr(module, key)
        make_whole(p)
        full = unshard(p.detach(), p.sharding, model.mesh)
        for (name, _), piece in zip(names, full.split([n for _, n in names], 0), strict=True):
            yield name, piece


@torch.no_grad()
def fill(model: Transformer | ScalarModel, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy every tensor into its parameter; complain about all that is wrong at once."""
    problems, used = [], set()
    for module, key, names in parts(model):
        p, pieces = getattr(module, key), []
        for name, rows in names:
            used.add(name)
            if name not in tensors:
                problems.append(f"{name} is missing")
                continue
            piece, wanted = tensors[name], (rows, *full_shape(p, model.mesh.tp)[1:])
            if tuple(piece.shape) != wanted:
                problems.append(f"{name} is {list(piece.shape)}, config.json wants {list(wanted)}")
            pieces.append(piece)
        if not problems:
            p.copy_(shard(torch.cat(pieces) if len(pieces) > 1 else pieces[0], p.sharding, model.mesh))
    ignored = {"lm_head.weight"}  # a tied head written out, or the head of a backbone that becomes a reward model
    extra = [name for name in tensors if name not in used | ignored and not name.endswith("rotary_emb.inv_freq")]
    problems += [f"{name} is not part of this model" for name in extra]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelFolderError(f"{path} does not fit its config.json: {shown}")
