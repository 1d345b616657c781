"""Hugging Face folders: `config.json` and `model*.safetensors`, read and written.

Ours and theirs differ in two ways only: q, k, v are one matrix here, and gate, up another (in Phi-3, there too). Both
use the half-split rotary layout, so nothing is permuted. Safetensors only: no pickle is ever read.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel, head_names
from tritium.model.rope import RopeScaling
from tritium.model.transformer import Transformer, come_from, full_shape
from tritium.parallel.files import Share, TensorFileError, deal, open_tensors, tensor_files
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import Sharding, shard, unshard

ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"
BARE = "embed_tokens.weight"  # in a folder of the decoder alone, as sentence-transformers writes one
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}
FAMILIES |= {"gemma2": "Gemma2", "minicpm": "MiniCPM"}  # model_type → class prefix; Yi and DeepSeek-LLM are Llamas

# Our names → Hugging Face's: of what every family has, and of what some have, with what it is where it is not said.
NAMES = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size"}
NAMES |= {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
NEEDED = tuple(NAMES)
NAMES |= {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "max_positions": "max_position_embeddings"}
NAMES |= {"rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "init_std": "initializer_range"}
NAMES |= {"tie_embeddings": "tie_word_embeddings", "bos_id": "bos_token_id"}
SOFTCAPS = {"attention_softcap": ("attn_logit_softcapping", 50.0), "head_softcap": ("final_logit_softcapping", 30.0)}
EXTRAS = {"gemma2": SOFTCAPS | {"query_scalar": ("query_pre_attn_scalar", 256)}}
EXTRAS["minicpm"] = {"embedding_scale": ("scale_emb", 1.0), "residual_depth": ("scale_depth", None)}
EXTRAS["minicpm"] |= {"width_base": ("dim_model_base", None)}


class ModelFolderError(ValueError):
    """A model folder that can't be read: the message says which file or tensor, and what was expected."""


def load(
    folder: str,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    mesh: Mesh | None = None,
    streamed: bool = False,
) -> Transformer | ScalarModel:
    """Read a model: a `Transformer`, or a `ScalarModel` where the folder holds a sequence classifier.
    A folder of a peft adapter is its base with the adapter attached.

    `dtype` is that of the parameters. On a `mesh`, each rank keeps its shards. Files are mapped into memory, and read
    tensor by tensor: at once, or for a `streamed` model (see `Transformer`) when it is cut over the ranks.
    Raises: ModelFolderError naming every missing, unexpected and mis-shaped tensor.
    """
    path, mesh = Path(folder), mesh or Mesh.single(device)
    if (path / ADAPTER_CONFIG).exists():
        from tritium.model.adapters import load_adapted

        return load_adapted(path, dtype, mesh)
    raw = read_json(path / "config.json")
    config = from_hf_config(raw, path / "config.json")
    try:
        check_files(path)
        with open_tensors(path, "model") as tensors:
            if BARE in tensors and "lm_head.weight" not in tensors:  # Qwen3-Embedding: the embedding stands in
                config = replace(config, tie_embeddings=True)
            model = Transformer(config, mesh, dtype, streamed)
            model = ScalarModel.described(model, raw) if classifies(raw) else model
            fill(model, tensors)
    except (TensorFileError, ModelFolderError) as error:
        raise ModelFolderError(f"{path}: {error}") from None
    return model


def check_files(path: Path) -> None:
    """Raises: ModelFolderError for shards that the index names but that are not there, and for pickles."""
    if not tensor_files(path, "model") and any(path.glob("*.bin")):
        raise ModelFolderError("its weights are pickles (*.bin), which are never read: convert them to safetensors")
    if (path / INDEX).exists():
        places = read_json(path / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ModelFolderError(f"{INDEX} must hold a table weight_map: fetch the model again")
        named = set(map(str, places.values()))
        if missing := sorted(name for name in named if not (path / name).exists()):
            raise ModelFolderError(f"{', '.join(missing)} of {INDEX} is missing: fetch the model again")


def classifies(raw: dict) -> bool:
    names = raw.get("architectures") or []
    return raw.get("task_type") == "SEQ_CLS" or any(str(name).endswith("ForSequenceClassification") for name in names)


def heads_in(folder: str) -> tuple[str, ...]:
    """The names of a `ScalarModel`'s heads, without reading it; none of a language model. Raises: ModelFolderError."""
    adapter = Path(folder) / ADAPTER_CONFIG
    raw = read_json(adapter if adapter.exists() else Path(folder) / "config.json")
    return head_names(raw) if classifies(raw) else ()


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
        from tritium.model.adapters import export_adapter

        return export_adapter(model, make_whole)
    texts = {"config.json": json.dumps(to_hf_config(model), indent=2) + "\n"}
    share = deal(hf_tensors(model, make_whole), "model", model.mesh)
    return share, texts | ({INDEX: share.index()} if model.mesh.world_size > 1 else {})


def decoder_of(model: Transformer | ScalarModel) -> Transformer:
    return model.backbone if isinstance(model, ScalarModel) else model


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
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
    if not isinstance(family, str) or family not in FAMILIES:
        near = difflib.get_close_matches(str(family), FAMILIES, n=1, cutoff=0.3)
        hint = f" (the nearest is {near[0]})" if near else ""
        raise ModelFolderError(f"{path}: model_type {family!r} is not supported; there are {', '.join(FAMILIES)}{hint}")
    wrong = {key: raw.get(key) for key in ("attention_bias", "mlp_bias") if raw.get(key)}
    key, wanted = ("hidden_activation", "gelu_pytorch_tanh") if family == "gemma2" else ("hidden_act", "silu")
    if raw.get(key) not in (wanted, None):
        wrong[key] = raw[key]
    if (quantized := raw.get("quantization_config")) is not None:
        method = quantized.get("quant_method", quantized) if isinstance(quantized, dict) else quantized
        raise ModelFolderError(f"{path}: its weights are quantised ({method}): take the model in bf16, fp16 or fp32")
    if wrong:
        raise ModelFolderError(f"{path}: {', '.join(f'{k}={v!r}' for k, v in wrong.items())} is not supported")
    try:
        return ModelConfig(**shape_of(raw) | rope_of(raw) | extras_of(raw))
    except KeyError as error:
        raise ModelFolderError(f"{path} has no {error.args[0]!r}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelFolderError(f"{path}: {error}") from None


def shape_of(raw: dict) -> dict:
    """What every family has."""
    family, heads, width = raw["model_type"], raw["num_attention_heads"], raw["hidden_size"]
    usual = {"gemma2": 256, "qwen3": 128}.get(family, width // (heads or 1))  # transformers', of a missing head_dim
    found = {"num_kv_heads": heads, "head_dim": usual, "norm_eps": 1e-6}
    found["tie_embeddings"] = family in ("gemma2", "minicpm")
    found |= {ours: raw[theirs] for ours, theirs in NAMES.items() if ours in NEEDED or raw.get(theirs) is not None}
    eos = raw.get("eos_token_id")
    eos = eos if isinstance(eos, list) and eos else [None if eos == [] else eos]
    found |= {"family": family, "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    return found | {"norm_eps": float(found["norm_eps"]), "eos_id": eos[0], "more_eos_ids": tuple(eos[1:])}


def rope_of(raw: dict) -> dict:
    """The rotary embedding's base, scaling and dimensions. Raises: ValueError for a kind that is not computed."""
    scaling = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", kind)
    theta = next(float(t) for t in (raw.get("rope_theta"), scaling.get("rope_theta"), 10000.0) if t is not None)
    share = raw.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0
    found: dict[str, Any] = {"rope_theta": theta, "logn_length": raw.get("logn_length")}
    if share != 1:
        found["rotary_dim"] = int((raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]) * share)
    if kind == "default":
        return found
    positions, options = raw.get("max_position_embeddings", 2048), {f.name for f in fields(RopeScaling)}
    scaling = {k: v for k, v in scaling.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if odd := sorted(set(scaling) - options):
        raise ValueError(f"rope_scaling of type {kind!r} with {', '.join(odd)} is not supported")
    if not scaling.get("factor"):
        raise ValueError(f"rope_scaling of type {kind!r} needs a factor")
    scaling = {"original_max_position_embeddings": positions} | scaling
    found["rope_scaling"] = made = RopeScaling(kind, **scaling)
    if kind in ("yarn", "dynamic"):  # these files give the context before it was stretched
        found["max_positions"] = max(positions, int(made.original_max_position_embeddings * made.factor))
    return found


def extras_of(raw: dict) -> dict:
    """What only some families have."""
    family, layers, first = raw["model_type"], raw["num_hidden_layers"], raw.get("max_window_layers", 28)
    qwen = family.startswith("qwen")
    found = {ours: raw.get(theirs, usual) for ours, (theirs, usual) in EXTRAS.get(family, {}).items()}
    if family == "gemma2":
        found["embedding_scale"] = raw["hidden_size"] ** 0.5
    window = raw.get("sliding_window", 4096 if qwen or family in ("mistral", "gemma2") else None)
    if window is None or qwen and not raw.get("use_sliding_window"):
        return found
    if family in ("mistral", "phi3"):
        sliding = [True] * layers
    elif raw.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in raw["layer_types"]]
    else:  # Llama's and MiniCPM's have none, whatever another model's keys say that were left there
        sliding = [i % 2 == 0 if family == "gemma2" else qwen and i >= first for i in range(layers)]
    return found | ({"windows": tuple(window if s else None for s in sliding)} if any(sliding) else {})


def to_hf_config(model: Transformer | ScalarModel) -> dict:
    """config.json of the model. Raises: ValueError where its family can't say what it computes."""
    config, scalar = model.config, isinstance(model, ScalarModel)
    raw = (
        {
            "architectures": [FAMILIES[config.family] + ("ForSequenceClassification" if scalar else "ForCausalLM")],
            "model_type": config.family,
            "hidden_act": "gelu_pytorch_tanh" if config.gemma else "silu",
            "attention_bias": False,
            "eos_token_id": [config.eos_id, *config.more_eos_ids] if config.more_eos_ids else config.eos_id,
            "torch_dtype": str(model.dtype).removeprefix("torch."),
        }
        | {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
        | hf_extras(config)
    )
    if from_hf_config(raw, Path("config.json")) != config:
        raise ValueError(f"this is no published architecture: {config.family} can't be exported with {config}")
    return raw | (model.description() if scalar else {})


def hf_extras(config: ModelConfig) -> dict:
    """The inverse of `rope_of` and `extras_of`, where there is something to say."""
    raw: dict[str, Any] = {"logn_length": config.logn_length} if config.logn_length else {}
    if config.rotary_dim:
        raw["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if scaling := config.rope_scaling:
        usual = {f.name: f.default for f in fields(scaling) if scaling.rope_type != "llama3" or "freq" not in f.name}
        raw["rope_scaling"] = {k: v for k, v in asdict(scaling).items() if k not in usual or v != usual[k]}
        if scaling.rope_type == "dynamic":
            raw["max_position_embeddings"] = scaling.original_max_position_embeddings
    windows = {w for w in config.windows if w is not None}
    raw |= {"sliding_window": None} if config.family in ("mistral", "phi3", "gemma2") else {}
    if windows:
        kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
        raw["sliding_window"] = windows.pop()
        raw |= {} if config.family in ("mistral", "phi3") else {"layer_types": kinds}
        raw |= {"use_sliding_window": True} if config.family.startswith("qwen") else {}
    if config.gemma:
        raw["hidden_activation"] = "gelu_pytorch_tanh"
    raw |= {theirs: getattr(config, ours) for ours, (theirs, _) in EXTRAS.get(config.family, {}).items()}
    if config.family == "phi3":
        raw["pad_token_id"] = None
    return raw


def parts(model: Transformer | ScalarModel) -> Iterator[tuple[nn.Module, str, list[tuple[str, int]]]]:
    """Each parameter's module and name in it, with the Hugging Face tensors that it is made of: their names and sizes
    along dimension 0."""
    decoder = decoder_of(model)
    config = decoder.config
    width, heads = config.intermediate_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    yield decoder, "embedding", [("model.embed_tokens.weight", config.vocab_size)]
    fused = config.family == "phi3"
    qkv = [("qkv", heads + 2 * kv)] if fused else [("q", heads), ("k", kv), ("v", kv)]
    gate_up = [("gate_up", 2 * width)] if fused else [("gate", width), ("up", width)]
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.gemma:
        norms |= {"after_attention_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
        norms |= {"after_mlp_norm": "post_feedforward_layernorm"}
    for i, layer in enumerate(decoder.layers):
        at, attn, mlp = f"model.layers.{i}.", layer.attention, layer.mlp
        for key, name in norms.items():
            yield layer, key, [(f"{at}{name}.weight", config.hidden_size)]
        for key, kind in (("qkv", "weight"), ("qkv_bias", "bias"))[: 1 + config.qkv_bias]:
            yield attn, key, [(f"{at}self_attn.{n}_proj.{kind}", s) for n, s in qkv]
        for key in ("q_norm", "k_norm") if config.qk_norm else ():
            yield attn, key, [(f"{at}self_attn.{key}.weight", config.head_dim)]
        yield attn, "o", [(at + "self_attn.o_proj.weight", config.hidden_size)]
        yield mlp, "gate_up", [(f"{at}mlp.{n}_proj.weight", s) for n, s in gate_up]
        yield mlp, "down", [(at + "mlp.down_proj.weight", config.hidden_size)]
    yield decoder, "norm", [("model.norm.weight", config.hidden_size)]
    if decoder.head is not None:
        yield decoder, "head", [("lm_head.weight", config.vocab_size)]
    if isinstance(model, ScalarModel):
        yield model, "score", [("score.weight", len(model.heads))]


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


def joined(tensors: Mapping[str, Tensor], names: list[tuple[str, int]], cut: Sharding | None, mesh: Mesh) -> Tensor:
    """This rank's shard of the matrix that the tensors are together."""
    pieces = [tensors[name] for name, _ in names]
    for (name, _), piece in zip(names, pieces, strict=True):
        if piece.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ModelFolderError(f"{name} is {piece.dtype}, not a float of 16 bits or more: a quantised model?")
        if piece.numel() and not all(bool(end.isfinite()) for end in piece.aminmax()):
            raise ModelFolderError(f"{name} holds NaN or infinity: the model is broken")
    return shard(torch.cat(pieces) if len(pieces) > 1 else pieces[0], cut, mesh)


@torch.no_grad()
def fill(model: Transformer | ScalarModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy every tensor into its parameter; complain about all that is wrong at once."""
    problems, used, prefix = [], set(), "model." if BARE in tensors else ""
    # The largest first: while it is copied, the others take no memory yet.
    for module, key, names in sorted(parts(model), key=lambda part: -getattr(part[0], part[1]).numel()):
        p, names = getattr(module, key), [(name.removeprefix(prefix), rows) for name, rows in names]
        for name, rows in names:
            used.add(name)
            if name not in tensors:
                problems.append(f"{name} is missing")
                continue
            piece, wanted = tensors[name], (rows, *full_shape(p, model.mesh.tp)[1:])
            if tuple(piece.shape) != wanted:
                problems.append(f"{name} is {list(piece.shape)}, config.json wants {list(wanted)}")
        if not problems:
            come_from(p, partial(joined, tensors, names, p.sharding, model.mesh))
    ignored = {"lm_head.weight"}  # a tied head written out, or the head of a backbone that becomes a reward model
    extra = [name for name in tensors if name not in used | ignored and not name.endswith("rotary_emb.inv_freq")]
    complain(problems + [f"{name} is not part of this model" for name in extra], "config.json")


def complain(problems: list[str], config: str) -> None:
    """Raises: ModelFolderError, if there are any, with the first of them."""
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelFolderError(f"the tensors do not fit {config}: {shown}")
