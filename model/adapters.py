"""What is attached to a model by name, several at once of which one acts: LoRA (model/lora.py), soft prompts
(model/prompts.py).

    use(model, "poems")                      # which one acts; with disabled(model): none does, the base alone
    load_adapter(model, "folder", "poems")   # another one, from a peft folder

Folders are peft's: adapter_config.json and adapter_model.safetensors.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tritium.model.heads import ScalarModel
from tritium.model.hf import ADAPTER_CONFIG, ModelFolderError, complain, decoder_of, load, read_json
from tritium.model.lora import PREFIX, LoraConfig, Model, adapted, attach_lora, merge
from tritium.model.prompts import PEFT_TYPES, PromptConfig, attach_prompt
from tritium.model.transformer import Transformer
from tritium.parallel.files import Share, TensorFileError, TensorFiles, deal, open_tensors
from tritium.parallel.mesh import Mesh


def attach(model: Model, config: LoraConfig | PromptConfig, name: str = "default", seed: int = 0) -> None:
    """Give the model an adapter to train, and let it act; nothing else (but a reward model's score) is trained from
    then on. A LoRA does nothing yet. Raises: ValueError for what this model can't have, and for a name that it has."""
    if name in decoder_of(model).adapters:
        raise ValueError(f"there is an adapter {name!r} already: give this one another name")
    give = attach_lora if isinstance(config, LoraConfig) else attach_prompt
    decoder_of(model).requires_grad_(False)
    give(model, config, key_of(name), seed)
    decoder_of(model).adapters[name] = config
    use(model, name)


def key_of(name: str) -> str:
    """The name as a module's, which has no dots: an adapter may be called by its folder."""
    return name.replace(".", "\u2024")


def use(model: Model, name: str | None) -> None:
    """Let the adapter `name` act from now on, and be the one that is trained and saved; None: the base alone.

    Raises: ValueError for a name that the model does not have."""
    decoder = decoder_of(model)
    if name is not None and name not in decoder.adapters:
        raise ValueError(f"no adapter {name!r}; there are: {', '.join(decoder.adapters) or 'none'}")
    key = decoder.active = None if name is None else key_of(name)
    for _, _, here in adapted(model):
        here.active = key if key in here.pairs else None
        for other, pair in here.pairs.items():
            pair.requires_grad_(other == key)
    for other, soft in decoder.prompts.items():
        soft.requires_grad_(other == key)
    decoder.config = replace(decoder.config, max_positions=decoder.positions - len(decoder.virtual_ids))


@contextmanager
def disabled(model: Model) -> Iterator[None]:
    """Within, the base alone acts: the reference of an adapter that is trained."""
    holders = [decoder_of(model), *(here for _, _, here in adapted(model))]
    states = [here.active for here in holders]
    for here in holders:
        here.active = None
    try:
        yield
    finally:
        for here, active in zip(holders, states, strict=True):
            here.active = active


class Base(nn.Module):
    """A policy's base as a network of its own, without a second copy of it: the reference of DPO, GRPO and PPO."""

    def __init__(self, policy: Transformer):
        super().__init__()
        self.policy = (policy,)  # no submodule: nothing is here twice
        self.config, self.mesh = policy.config, policy.mesh

    def hidden(self, *args, **options) -> Tensor:
        """Transformer.hidden, without gradients."""
        with disabled(self.policy[0]), torch.no_grad():
            return self.policy[0].hidden(*args, **options)

    def logprob(self, *args, **options):
        """Transformer.logprob: the head has no adapter."""
        return self.policy[0].logprob(*args, **options)


def twin(policy: Transformer, folder: str, seed: int = 0) -> Model | None:
    """A second model on the base of a `policy` with a LoRA, which is in memory once: with a new one where `folder` is
    the base's, with the folder's own where that is one on this base. None where it is neither, or the base is dense in
    one and NF4 in the other. At ZeRO-3, which cuts every network by itself, a new one has a base of its own, and None
    is for the folder's."""
    own, path, cut = next(iter(policy.adapters.values()), None), Path(folder), policy.mesh.zero == 3
    raw = read_json(path / ADAPTER_CONFIG) if (path / ADAPTER_CONFIG).is_file() else None
    if not isinstance(own, LoraConfig) or (raw and (cut or raw.get("peft_type") != "LORA")):
        return None
    quantized, base = (LoraConfig.from_peft(raw).quantized, base_folder(path, raw)) if raw else (own.quantized, path)
    if base.resolve() != Path(own.base).resolve() or quantized != own.quantized:
        return None
    shared = {id(t): t for t in (*policy.parameters(), *policy.buffers()) if not t.requires_grad}
    shared[id(policy.mesh)] = policy.mesh
    model: Model = load(folder, policy.dtype, mesh=policy.mesh) if cut else copy.deepcopy(policy, shared)
    for _, _, here in adapted(model):
        here.pairs, here.active = nn.ModuleDict(), None
    model.adapters.clear()
    if raw is None:
        attach(model, own, seed=seed)
        return model
    if raw.get("task_type") == "SEQ_CLS":
        model = ScalarModel.described(model, raw)
    load_adapter(model, str(path))
    return model


# Folders --------------------------------------------------------------------------------------------------------------


def export_adapter(model: Model, make_whole: Callable[[nn.Parameter], None]) -> tuple[Share, dict[str, str]]:
    """(this rank's share of the active adapter's tensors: all on rank 0, adapter_config.json). A collective."""
    decoder, scalar = decoder_of(model), isinstance(model, ScalarModel)
    soft, pairs = decoder.soft_prompt, [h.pairs[h.active] for _, _, h in adapted(model) if h.active]
    if soft is None and not pairs:
        raise ValueError("no adapter is active: adapters.use(model, name) says which one to save")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for p in soft.parameters() if soft else ():
            make_whole(p)
        if soft:
            yield "prompt_embeddings", soft.flat().detach()
        for pair in pairs:
            make_whole(pair.a)
            for module, a, b in pair.whole(model.mesh):
                yield f"{PREFIX}{module}.lora_A.weight", a
                yield f"{PREFIX}{module}.lora_B.weight", b
        if scalar:
            make_whole(model.score)
            yield f"{PREFIX}score.weight", model.score.detach()

    config = soft.config if soft else pairs[0].config
    raw = model.description() | {"modules_to_save": ["score"]} if scalar else {}
    raw |= {"task_type": "SEQ_CLS" if scalar else "CAUSAL_LM"}
    raw |= {"base_model_name_or_path": config.base, "inference_mode": True}
    raw |= config.to_peft(decoder.config) if soft else config.to_peft(sorted({n for p in pairs for n in p.targets}))
    texts = {ADAPTER_CONFIG: json.dumps(raw, indent=2) + "\n"}
    return deal(tensors(), "adapter_model", model.mesh, one_file=True), texts


def load_adapted(path: Path, dtype: torch.dtype, mesh: Mesh) -> Model:
    """The base that an adapter's folder names, with the adapter attached and active. Raises: ModelFolderError."""
    raw = read_json(path / ADAPTER_CONFIG)
    model = load(str(base_folder(path, raw)), dtype, mesh=mesh)
    if decoder_of(model).adapters:  # an adapter on an adapter
        try:
            merge(model)
        except ValueError as error:
            raise ModelFolderError(f"{path / ADAPTER_CONFIG}: its base: {error}") from None
    if raw.get("task_type") == "SEQ_CLS":  # its head is its own, also on the base of a reward model
        model = ScalarModel.described(decoder_of(model), raw)
    load_adapter(model, str(path))
    return model


def base_folder(path: Path, raw: dict) -> Path:
    """Where the base of an adapter's folder is: as the folder says, from here or from there."""
    base = raw.get("base_model_name_or_path") or ""
    for candidate in (Path(base), path / base):
        if base and candidate.is_dir():
            return candidate
    raise ModelFolderError(f"{path / ADAPTER_CONFIG}: the base model's folder {base!r} does not exist")


def load_adapter(model: Model, folder: str, name: str = "default") -> None:
    """Attach the adapter of a peft folder to a model, which may have others, and let it act.

    Raises: ModelFolderError naming every missing, unexpected and mis-shaped tensor.
    """
    path = Path(folder)
    raw = read_json(path / ADAPTER_CONFIG)
    kind = next((ours for ours, theirs in PEFT_TYPES.items() if theirs == raw.get("peft_type")), None)
    try:
        if kind is None:
            config = LoraConfig.from_peft(raw)
        else:
            config = PromptConfig(kind, raw["num_virtual_tokens"], raw.get("base_model_name_or_path") or "", made=True)
        attach(model, config, name)
        with open_tensors(path, "adapter_model") as tensors:
            fill_adapter(model, tensors)
    except KeyError as error:
        raise ModelFolderError(f"{path / ADAPTER_CONFIG} has no {error.args[0]!r}") from None
    except (TensorFileError, TypeError, ValueError) as error:
        raise ModelFolderError(f"{path}: {error}") from None


@torch.no_grad()
def fill_adapter(model: Model, tensors: TensorFiles) -> None:
    """Give the active adapter the values of the files. Raises: ModelFolderError where they do not fit."""
    problems, used, soft = [], set(), decoder_of(model).soft_prompt

    def take(key: str, shape: tuple[int, ...]) -> Tensor:
        used.add(key)
        found = tensors.get(key)
        if found is None or tuple(found.shape) != shape:
            problems.append(f"{key} is {'missing' if found is None else list(found.shape)}, wanted {list(shape)}")
            return torch.zeros(shape)
        return found

    if soft is not None:
        soft.table.copy_(take("prompt_embeddings", tuple(soft.table.shape)))
    for pair in (here.pairs[here.active] for _, _, here in adapted(model) if here.active):
        pieces = list(pair.whole(model.mesh))
        a = [take(f"{PREFIX}{module}.lora_A.weight", tuple(x.shape)) for module, x, _ in pieces]
        b = [take(f"{PREFIX}{module}.lora_B.weight", tuple(x.shape)) for module, _, x in pieces]
        pair.fill(a, b, model.mesh)
    if isinstance(model, ScalarModel):
        model.score.copy_(take(f"{PREFIX}score.weight", tuple(model.score.shape)))
    complain(problems + [f"{key} is not part of this model" for key in tensors if key not in used], ADAPTER_CONFIG)
