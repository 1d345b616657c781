"""AdamW over the flat buffers of a network, sharded as ZeRO wants it.

    master    fp32  the weights that the optimizer moves (the parameters themselves where they are fp32)
    exp_avg, exp_avg_sq  fp32

(fp64 throughout for an fp64 model.) Each is as long as this rank's part of a flat buffer: see parallel/zero.py.
Nothing here reads a tensor's value on the host: skipping a step is arithmetic with `found_inf`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritium.core.config import ConfigError, opt
from tritium.kernels import adamw_
from tritium.model.transformer import full_shape
from tritium.parallel.tensor import shard, unshard
from tritium.parallel.zero import Flat, FlatModule, grad_norm, sum_over_tp

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

    lr: float = opt(3e-4, "peak learning rate")
    beta1: float = opt(0.9, "decay of the gradient's running mean")
    beta2: float = opt(0.95, "decay of the squared gradient's running mean")
    eps: float = opt(1e-8, "added to the root of the second moment")
    weight_decay: float = opt(0.1, "decoupled decay of matrices; norms and biases have none")
    clip: float = opt(1.0, "largest global gradient norm")

    def __post_init__(self):
        for name in ("lr", "clip", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be in [0, 1)")


class State:
    """What AdamW keeps for this rank's part of a flat buffer."""

    def __init__(self, flat: Flat):
        wide = flat.gradient.dtype
        self.flat, self.own_master = flat, flat.part.dtype == wide
        self.master = flat.part if self.own_master else flat.part.to(wide)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.slices = {decay: merged(flat, decay) for decay in (True, False)}


def merged(flat: Flat, decay: bool) -> list[slice]:
    """The runs of a part on which weight decay acts, or does not."""
    runs: list[slice] = []
    for span in flat.spans():
        if span.decay != decay:
            continue
        if runs and runs[-1].stop == span.start:
            runs[-1] = slice(runs[-1].start, span.stop)
        else:
            runs.append(slice(span.start, span.stop))
    return runs


class Optimizer:
    """AdamW over the trained parameters of a network: sum, clip, update."""

    def __init__(self, network: FlatModule, config: OptimConfig):
        self.network, self.config, self.mesh = network, config, network.mesh
        self.states = [State(flat) for flat in network.trained]
        # of updates really made; fp32, as AdamW's kernel reads it
        self.step_count = torch.zeros((), device=self.mesh.device)

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """Clip and update, once every gradient has been reduced. Returns (gradient norm, 1.0 if skipped).

        A gradient that is not finite changes nothing but the count of skipped steps.
        """
        sum_over_tp(self.network.trained, self.mesh)
        norm = grad_norm(self.network.trained, self.mesh)
        found_inf = (~norm.isfinite()).float()
        scale = (self.config.clip / (norm + 1e-6)).clamp_max(1.0)
        self.step_count += 1.0 - found_inf
        for decay in (True, False):
            for own_master in (True, False):
                self.update(decay, own_master, lr, scale, found_inf)
        self.network.spread()
        return norm, found_inf

    def update(self, decay: bool, own_master: bool, lr: float, scale: Tensor, found_inf: Tensor) -> None:
        """One fused update of all that is treated alike."""
        chosen = [(s, run) for s in self.states if s.own_master == own_master for run in s.slices[decay]]
        if not chosen:
            return
        adamw_(
            [s.flat.part[run] for s, run in chosen],
            [s.flat.own_gradient[run] for s, run in chosen],
            [s.exp_avg[run] for s, run in chosen],
            [s.exp_avg_sq[run] for s, run in chosen],
            masters=None if own_master else [s.master[run] for s, run in chosen],
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay if decay else 0.0,
            step=self.step_count,
            grad_scale=scale,
            found_inf=found_inf,
        )

    # ------------------------------------------------------------------------------------------ checkpoints

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors one after another, whatever the mesh: "master.NAME", "exp_avg.NAME", "exp_avg_sq.NAME", "step".

        A collective: every rank must take all of them, and may drop what is not its to write.
        """
        yield "step", self.step_count.clone()
        for state in self.states:
            for kind in KINDS:
                whole = state.flat.join(getattr(state, kind))
                for (name, p), view in zip(state.flat.members, state.flat.views(whole), strict=True):
                    yield f"{kind}.{name}", unshard(view, p.sharding, self.mesh)

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, on any mesh. `saved` may read its tensors when they are asked for, one by one.

        Raises: ValueError naming a missing, odd or mis-shaped tensor.
        """
        known = {f"{kind}.{name}" for state in self.states for name, _ in state.flat.members for kind in KINDS}
        if odd := sorted(set(saved) - known - {"step"}):
            raise ValueError(f"optimizer state {odd[0]}: the model has no such parameter")
        self.step_count.copy_(saved["step"])
        for state in self.states:
            for kind in KINDS:
                whole = torch.zeros_like(state.flat.full, dtype=state.master.dtype, device="cpu")
                for (name, p), view in zip(state.flat.members, state.flat.views(whole), strict=True):
                    view.copy_(shard(self.checked(saved, f"{kind}.{name}", p), p.sharding, self.mesh))
                getattr(state, kind).copy_(state.flat.own(whole))
            state.flat.part.copy_(state.master)
        self.network.spread()

    def checked(self, saved: Mapping[str, Tensor], key: str, p: nn.Parameter) -> Tensor:
        found, wanted = saved.get(key), full_shape(p, self.mesh.tp)
        if found is None or tuple(found.shape) != wanted:
            shown = "nothing" if found is None else list(found.shape)
            raise ValueError(f"optimizer state {key}: found {shown}, the model wants {list(wanted)}")
        return found
