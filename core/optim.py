"""AdamW, or Muon and AdamW, over the flat buffers of a network, sharded as ZeRO wants it.

    master    fp32  the weights that the optimizer updates (the parameters themselves if they are fp32)
    exp_avg, exp_avg_sq  fp32

(fp64 for an fp64 model.) Each covers this rank's part of a flat buffer: see parallel/zero.py. Muon updates the matrices
of the layers (core/muon.py), which need no exp_avg_sq; AdamW updates all the rest. Learning rate and weight decay can
differ by parameter (`treatment`). With `ema`, an average of the weights is kept, in the master's dtype.

With `offload`, all of this is in host memory (pinned if there is a GPU), and the CPU computes the step; the parameters
of one buffer are copied back while the next is computed (ZeRO-Offload, arXiv 2101.06840). Without it there is no host
sync: skipping a step is arithmetic with `found_inf`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.muon import directions
from tritium.kernels import adamw_
from tritium.model.transformer import full_shape
from tritium.parallel.tensor import shard, unshard
from tritium.parallel.zero import Flat, FlatModule, grad_norm, sum_over_tp


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), or Muon for the layers' matrices and AdamW for the rest."""

    kind: str = opt("adamw", "optimizer of the layers' matrices; AdamW for all else", choices=("adamw", "muon"))
    momentum: float = opt(0.95, "muon: momentum", least=0, below=1)
    offload: bool = opt(False, "keep the optimizer state in host memory and step on the CPU")
    lr: float = opt(3e-4, "peak learning rate", above=0)
    beta1: float = opt(0.9, "decay rate of the first moment", least=0, below=1)
    beta2: float = opt(0.95, "decay rate of the second moment", least=0, below=1)
    eps: float = opt(1e-8, "added to the square root of the second moment", above=0)
    weight_decay: float = opt(0.1, "decoupled weight decay of matrices; norms and biases are not decayed")
    lr_scale: dict[str, float] = opt(
        {}, "PATTERN=FACTOR: scale lr by parameter name; the first match counts, e.g. *.b=16,embedding=0.1"
    )
    decay: dict[str, float] = opt({}, "PATTERN=DECAY: weight decay by parameter name, e.g. *norm=0.1,head=0")
    mup: bool = opt(False, "muP: scale the lr of the layers' matrices by width_base / hidden_size (MiniCPM)")
    ema: float = opt(0.0, "decay of a weight average, which is evaluated and exported (0: off)", least=0, below=1)
    clip: float = opt(1.0, "clip the global gradient norm to this", above=0)

    def __post_init__(self):
        check_ranges(self, "optim.")
        for name in ("lr_scale", "decay"):
            if odd := [pattern for pattern, value in getattr(self, name).items() if value < 0]:
                raise ConfigError(f"optim.{name}: {odd[0]}={getattr(self, name)[odd[0]]} must not be negative")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The tensors of optimizer state that are kept for each parameter."""
        return ("master", "exp_avg", "exp_avg_sq", *(["ema"] if self.ema else []))


class Treatment(NamedTuple):
    """How a parameter is updated: its learning rate is `lr` times the schedule's."""

    matrix: bool
    lr: float
    decay: float


def treatment(config: OptimConfig, name: str, p: nn.Parameter, width: float) -> Treatment:
    """The first matching pattern counts. `width`: muP's factor for Adam (Yang et al., arXiv 2203.03466; MiniCPM)."""

    def own(table: dict[str, float], default: float) -> float:
        return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), default)

    matrix = p.dim() >= 2
    lr = own(config.lr_scale, 1.0) * (width if config.mup and matrix and "layers." in name else 1.0)
    return Treatment(matrix, lr, own(config.decay, config.weight_decay if matrix else 0.0))


class LossScale:
    """Dynamic loss scaling for fp16 gradients: halved after a non-finite gradient, doubled after `patience` steps in a
    row without one (Micikevicius et al., arXiv 1710.03740). Kept in tensors, without a host sync."""

    def __init__(self, device: torch.device, start: float = 2.0**14, patience: int = 2000):
        self.value, self.good = torch.tensor(start, device=device), torch.zeros((), device=device)
        self.patience = patience

    def update(self, found_inf: Tensor | float) -> None:
        """`found_inf` is not 0 if the step was skipped."""
        bad = torch.as_tensor(found_inf, device=self.good.device) > 0
        self.good = torch.where(bad, 0.0, self.good + 1)
        full = self.good >= self.patience
        factor = torch.where(bad, 0.5, torch.where(full, 2.0, 1.0))
        self.value = (self.value * factor).clamp(1.0, 2.0**24)
        self.good = torch.where(full, 0.0, self.good)

    def state(self) -> list[float]:
        return [float(self.value), float(self.good)]

    def load(self, state: list[float]) -> None:
        self.value.fill_(state[0])
        self.good.fill_(state[1])


class State:
    """The optimizer state of this rank's part of a flat buffer, on `device`."""

    def __init__(self, flat: Flat, config: OptimConfig, width: float):
        wide = flat.gradient.dtype
        self.device = torch.device("cpu") if config.offload else flat.part.device
        self.pinned = config.offload and flat.part.is_cuda
        self.flat, self.own_master = flat, flat.part.dtype == wide and not config.offload
        self.master = flat.part if self.own_master else self.like(flat.part)
        self.runs = runs_of(flat, config, width)
        self.orthogonal = config.kind == "muon" and flat.layer and any(p.dim() >= 2 for _, p in flat.members)
        # Muon's elements; matrices lie first. A part may have none, but takes part in the exchange.
        matrices = [run.stop for how, runs in self.runs.items() for run in runs if how.matrix and self.orthogonal]
        self.muon = max(matrices, default=0)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master[self.muon :])
        self.ema = self.master.clone() if config.ema else None
        self.gradient = self.like(flat.own_gradient) if self.pinned else None

    def like(self, x: Tensor) -> Tensor:
        """A copy of a part on `device`, in the master's dtype."""
        return torch.empty_like(x, dtype=self.flat.gradient.dtype, device=self.device, pin_memory=self.pinned).copy_(x)

    def fetch(self) -> Tensor:
        """This part's gradient on `device`; into pinned memory the copy is asynchronous."""
        own = self.flat.own_gradient
        return own if self.gradient is None else self.gradient.copy_(own, non_blocking=True)

    def whole(self, kind: str) -> Tensor:
        """One kind of state, as long as the part: zeros for the second moments that Muon does not keep."""
        found = getattr(self, kind)
        return F.pad(found, (len(self.master) - len(found), 0)).to(self.flat.part.device)


def runs_of(flat: Flat, config: OptimConfig, width: float) -> dict[Treatment, list[slice]]:
    """The slices of this rank's part that are updated with the same settings."""
    found: dict[Treatment, list[slice]] = {}
    for span in flat.spans():
        runs = found.setdefault(treatment(config, *flat.members[span.member], width), [])
        start = runs.pop().start if runs and runs[-1].stop == span.start else span.start
        runs.append(slice(start, span.stop))
    return found


class Optimizer:
    """The trained parameters of a network: sum, clip, update. `width` is muP's (None: the model has none).

    Raises: ConfigError for optim.mup without a width.
    """

    def __init__(self, network: FlatModule, config: OptimConfig, width: float | None = None):
        if config.mup and width is None:
            raise ConfigError("optim.mup: the model's config.json has no dim_model_base, which muP's rates go by")
        self.network, self.config, self.mesh = network, config, network.mesh
        self.states = [State(flat, config, width or 1.0) for flat in network.trained]
        # of updates really made; fp32, as AdamW's kernel reads it
        self.step_count = torch.zeros((), device="cpu" if config.offload else self.mesh.device)

    @torch.no_grad()
    def step(self, lr: float, loss_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip and update, once every gradient has been reduced. Returns (gradient norm, 1.0 if skipped).

        Gradients are those of the loss times `loss_scale`, if that is given; the norm is that of the loss's.
        A gradient that is not finite changes nothing but the count of skipped steps.
        """
        sum_over_tp(self.network.trained, self.mesh)
        gradients = [state.fetch() for state in self.states]
        norm = grad_norm(self.network.trained, self.mesh).to(self.step_count.device)  # with offload, waits for all
        found_inf = (~norm.isfinite()).float()
        unscale = 1.0 if loss_scale is None else loss_scale.to(norm.device).reciprocal()
        norm = norm * unscale
        scale = (self.config.clip / (norm + 1e-6)).clamp_max(1.0) * unscale
        self.step_count += 1.0 - found_inf
        chosen = list(zip(self.states, gradients, strict=True))
        self.move_matrices([pair for pair in chosen if pair[0].orthogonal], lr, scale, found_inf)
        for part in [[pair] for pair in chosen] if self.config.offload else [chosen]:
            alike: dict[tuple[Treatment, bool], list] = {}
            for s, g in part:
                for how, runs in s.runs.items():
                    here = [(s, g, run) for run in runs if run.start >= s.muon]
                    alike.setdefault((how, s.own_master), []).extend(here)
            for (how, own_master), here in alike.items():
                self.update(here, how, own_master, lr, scale, found_inf)
            for state, _ in part if self.config.offload else ():
                state.flat.part.copy_(state.master, non_blocking=True)
        self.network.spread()
        for state in self.states if self.config.ema else ():
            state.ema.lerp_(state.master, ((1.0 - self.config.ema) * (1.0 - found_inf)).to(state.ema))
        return norm, found_inf

    def update(
        self, chosen: Sequence, how: Treatment, own_master: bool, lr: float, scale: Tensor, found_inf: Tensor
    ) -> None:
        """One fused AdamW update of everything with the same settings: `chosen` holds (state, gradient, slice)."""
        if not chosen:
            return
        adamw_(
            [(s.master if self.config.offload else s.flat.part)[run] for s, _, run in chosen],
            [g[run] for _, g, run in chosen],
            [s.exp_avg[run] for s, _, run in chosen],
            [s.exp_avg_sq[run.start - s.muon : run.stop - s.muon] for s, _, run in chosen],
            masters=None if own_master or self.config.offload else [s.master[run] for s, _, run in chosen],
            lr=lr * how.lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=how.decay,
            step=self.step_count,
            grad_scale=scale,
            found_inf=found_inf,
        )

    def move_matrices(self, chosen: list, lr: float, scale: Tensor, found_inf: Tensor) -> None:
        """Muon, on as many layers at a time as ZeRO has parts; `chosen` holds (state, gradient)."""
        beta, taken = self.config.momentum, 1.0 - found_inf
        for start in range(0, len(chosen), chosen[0][0].flat.parts) if chosen else ():
            window, looks = chosen[start : start + chosen[0][0].flat.parts], []
            for s, g in window:
                g = torch.where(found_inf > 0, 0.0, g[: s.muon] * scale)
                momentum = s.exp_avg[: s.muon]
                momentum.copy_(torch.where(found_inf > 0, momentum, momentum.lerp(g, 1 - beta)))
                looks.append(g.lerp(momentum, beta).to(s.flat.part.device))
            moves = directions([s.flat for s, _ in window], looks, self.mesh)
            for (s, _), move in zip(window, moves, strict=True):
                move = move.to(s.device)
                for how, run in ((how, run) for how, runs in s.runs.items() if how.matrix for run in runs):
                    master = s.master[run]
                    master.sub_(taken * (move[run] + how.decay * master), alpha=lr * how.lr)
                s.flat.part[: s.muon].copy_(s.master[: s.muon], non_blocking=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the network has its averaged weights, if `ema` is on. A collective, like `step`."""
        if not self.config.ema:
            yield
            return
        kept = [state.master.clone() if state.own_master else state.master for state in self.states]
        self.put([state.ema for state in self.states])
        try:
            yield
        finally:
            self.put(kept)

    @torch.no_grad()
    def put(self, parts: Sequence[Tensor]) -> None:
        """Set the network's weights, given this rank's parts."""
        for state, part in zip(self.states, parts, strict=True):
            state.flat.part.copy_(part)
        self.network.spread()

    # ------------------------------------------------------------------------------------------ checkpoints

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The whole tensors, whatever the mesh: "step", "master.NAME", "exp_avg.NAME" and so on.

        A collective: every rank must consume all of them, and may drop those that it does not write.
        """
        yield "step", self.step_count.clone()
        for state in self.states:
            for kind in self.config.kinds:
                whole = state.flat.join(state.whole(kind))
                for (name, p), view in zip(state.flat.members, state.flat.views(whole), strict=True):
                    if self.keeps(state, kind, p):
                        yield f"{kind}.{name}", unshard(view, p.sharding, self.mesh)

    def keeps(self, state: State, kind: str, p: nn.Parameter) -> bool:
        """Whether this kind of state exists for the parameter."""
        return kind != "exp_avg_sq" or not state.orthogonal or p.dim() < 2

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, on any mesh. `saved` may read its tensors when they are asked for, one by one.

        Raises: ValueError naming a missing, odd or mis-shaped tensor.
        """
        kinds = self.config.kinds
        every = ((state, kind, *member) for state in self.states for kind in kinds for member in state.flat.members)
        known = {f"{kind}.{name}" for state, kind, name, p in every if self.keeps(state, kind, p)}
        if odd := sorted(set(saved) - known - {"step"}):
            raise ValueError(f"optimizer state {odd[0]}: the model has no such parameter")
        self.step_count.copy_(saved["step"])
        for state in self.states:
            for kind in self.config.kinds:
                whole = torch.zeros_like(state.flat.full, dtype=state.master.dtype, device="cpu")
                for (name, p), view in zip(state.flat.members, state.flat.views(whole), strict=True):
                    if self.keeps(state, kind, p):
                        view.copy_(shard(self.checked(saved, f"{kind}.{name}", p), p.sharding, self.mesh))
                kept = getattr(state, kind)
                kept.copy_(state.flat.own(whole)[state.flat.size - len(kept) :])
        self.put([state.master for state in self.states])

    def checked(self, saved: Mapping[str, Tensor], key: str, p: nn.Parameter) -> Tensor:
        found, wanted = saved.get(key), full_shape(p, self.mesh.tp)
        if found is None or tuple(found.shape) != wanted:
            shown = "nothing" if found is None else list(found.shape)
            raise ValueError(f"optimizer state {key}: found {shown}, the model wants {list(wanted)}")
        return found
