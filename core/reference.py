"""The reference policy of reinforcement learning: fixed, refreshed now and then, or a moving average of the policy."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.setup import FinetuneConfig, check_same_vocabulary, load_model, load_reference
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import shard, unshard
from tritium.parallel.zero import FlatModule


@dataclass
class ReferenceConfig:
    """The reference that the KL keeps the policy close to."""

    model: str = opt("", "folder of the reference (default: the model to start from)")
    every: int = opt(0, "update the reference every this many rollouts (0: never)", least=0)
    decay: float = opt(0.0, "weight of the old reference in the update (0: copy the policy)", least=0, below=1)
    max_kl: float = opt(0.0, "stop the run when the KL per token (k3) exceeds this (0: never)", least=0)

    def __post_init__(self):
        check_ranges(self, "reference.")


def open_policy(
    folder: str, dtype: str, mesh: Mesh, finetune: FinetuneConfig, seed: int, reference: ReferenceConfig | None
) -> dict[str, nn.Module]:
    """The policy, and the reference unless it is None; of an adapter it is the base, which is here only once.

    Raises: ConfigError for one that can't move, but is to.
    """
    policy = load_model(folder, dtype, mesh, finetune=finetune, seed=seed)
    if reference is None:
        return {"policy": policy}
    if reference.model:
        check_same_vocabulary(folder, reference.model, "reference.model")
        other = load_model(reference.model, dtype, mesh, frozen=True)
    else:
        other = load_reference(folder, dtype, mesh, policy)
    if reference.every:
        check_follows(policy, other, "reference.every")
    return {"policy": policy, "reference": other}


def check_follows(policy: Transformer, reference: nn.Module, option: str) -> None:
    """Raises: ConfigError where the reference can't become what the policy is, as `option` wants."""
    if policy.adapters:
        raise ConfigError(f"{option}: a reference can't be updated from a policy that is an adapter; set {option}=0")
    if [p.shape for p in policy.parameters()] != [p.shape for p in reference.parameters()]:
        raise ConfigError(f"{option}: reference and policy have different shapes; set {option}=0")


class Follower:
    """A frozen network that moves towards a trained one of the same shape. Its numbers are kept in fp32, so that small
    moves add up; each rank moves its own part."""

    def __init__(self, copy: Transformer, flat: FlatModule, leader: Transformer, leader_flat: FlatModule, mesh: Mesh):
        self.copy, self.flat, self.mesh = copy, flat, mesh
        self.own, self.target = own_tensors(copy, flat), own_tensors(leader, leader_flat)
        self.wide = [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in self.own]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """copy ← decay · copy + (1 − decay) · leader."""
        for wide, own, target in zip(self.wide, self.own, self.target, strict=True):
            wide.lerp_(target.to(wide.dtype), 1.0 - decay)
            own.copy_(wide)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by name, whatever the mesh. A collective."""
        for (name, p), tensor in self.members(self.wide):
            yield name, unshard(tensor, p.sharding, self.mesh)

    def members(self, tensors: list[Tensor]) -> Iterator[tuple[tuple[str, nn.Parameter], Tensor]]:
        if self.flat.level < 3:
            yield from zip(self.copy.named_parameters(), tensors, strict=True)
            return
        for flat, part in zip(self.flat.flats, tensors, strict=True):
            yield from zip(flat.members, flat.views(flat.join(part)), strict=True)

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, on any mesh."""
        if self.flat.level < 3:
            for (name, p), wide in self.members(self.wide):
                wide.copy_(shard(saved[name], p.sharding, self.mesh))
        else:
            for flat, wide in zip(self.flat.flats, self.wide, strict=True):
                whole = torch.zeros_like(flat.full, dtype=wide.dtype)
                for (name, p), view in zip(flat.members, flat.views(whole), strict=True):
                    view.copy_(shard(saved[name], p.sharding, self.mesh))
                wide.copy_(flat.own(whole))
        for own, wide in zip(self.own, self.wide, strict=True):
            own.copy_(wide)


def own_tensors(network: nn.Module, flat: FlatModule) -> list[Tensor]:
    """What of a network's parameters is on this rank for good."""
    return [f.part for f in flat.flats] if flat.level == 3 else [p.data for p in network.parameters()]
