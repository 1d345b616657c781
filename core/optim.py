"""Parameters, gradients and AdamW state as a few flat buffers, whatever the number of tensors.

    master    fp32  the weights that the optimizer moves
    shadow    the compute dtype; the model's parameters are views into it (the master itself where dtypes agree)
    gradient  fp32  every micro-batch's gradient is added here, so that accumulation does not round in bf16
    exp_avg, exp_avg_sq  fp32

(fp64 throughout for an fp64 model.) A buffer holds the parameters that share a weight decay and a way of being
sharded, so that the optimizer step, the clip and the data-parallel sum each run over two to four long tensors.
Nothing here reads a tensor's value on the host: skipping a step is arithmetic with `found_inf`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritium.core.config import ConfigError, opt
from tritium.kernels import adamw_
from tritium.model.transformer import full_shape
from tritium.parallel.data import global_grad_norm, reduce_gradients
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import shard, unshard


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


@dataclass
class Buffer:
    """The flat tensors of the parameters that are treated alike."""

    parameters: list[tuple[str, nn.Parameter]]
    decay: bool
    master: Tensor
    shadow: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Optimizer:
    """AdamW over the trainable parameters of a module, with their gradients' accumulation, reduction and clip."""

    def __init__(self, module: nn.Module, config: OptimConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.buffers = build_buffers(module)
        self.step_count = torch.zeros(
            (), device=mesh.device
        )  # of updates really made; fp32, as AdamW's kernel reads it

    def zero_grad(self) -> None:
        for buffer in self.buffers:
            buffer.gradient.zero_()

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """Sum the gradients over the data-parallel ranks, clip, update. Returns (gradient norm, 1.0 if skipped).

        A gradient that is not finite changes nothing but the count of skipped steps.
        """
        reduce_gradients([b.gradient for b in self.buffers], self.mesh)
        runs = [run for b in self.buffers for run in gradient_runs(b)]
        add_parts([gradient for gradient, _, partial in runs if partial], self.mesh)
        norm = global_grad_norm([(gradient, cut) for gradient, cut, _ in runs], self.mesh)
        found_inf = (~norm.isfinite()).float()
        scale = (self.config.clip / (norm + 1e-6)).clamp_max(1.0)
        self.step_count += 1.0 - found_inf
        for decay in (True, False):
            chosen = [b for b in self.buffers if b.decay == decay]
            self.update(chosen, lr, self.config.weight_decay if decay else 0.0, scale, found_inf)
        return norm, found_inf

    def update(self, buffers: list[Buffer], lr: float, weight_decay: float, scale: Tensor, found_inf: Tensor) -> None:
        for own_master in (True, False):  # buffers whose parameters are their own masters, and bf16 ones
            chosen = [b for b in buffers if (b.shadow is b.master) == own_master]
            if chosen:
                adamw_(
                    [b.shadow for b in chosen],
                    [b.gradient for b in chosen],
                    [b.exp_avg for b in chosen],
                    [b.exp_avg_sq for b in chosen],
                    masters=None if own_master else [b.master for b in chosen],
                    lr=lr,
                    beta1=self.config.beta1,
                    beta2=self.config.beta2,
                    eps=self.config.eps,
                    weight_decay=weight_decay,
                    step=self.step_count,
                    grad_scale=scale,
                    found_inf=found_inf,
                )

    def state_dict(self) -> dict[str, Tensor]:
        """Whole (unsharded) tensors under "master.NAME", "exp_avg.NAME", "exp_avg_sq.NAME", and "step".

        A collective on a tensor-parallel mesh; the result does not depend on the mesh.
        """
        state = {"step": self.step_count.clone()}
        for buffer in self.buffers:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                for (name, p), piece in zip(buffer.parameters, views(getattr(buffer, kind), buffer), strict=True):
                    state[f"{kind}.{name}"] = unshard(piece, p.sharding, self.mesh).contiguous()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`, on any mesh. Raises: ValueError naming a missing, odd or mis-shaped tensor."""
        kinds = ("master", "exp_avg", "exp_avg_sq")
        known = {f"{kind}.{name}" for buffer in self.buffers for name, _ in buffer.parameters for kind in kinds}
        if odd := sorted(state.keys() - known - {"step"}):
            raise ValueError(f"optimizer state {odd[0]}: the model has no such parameter")
        self.step_count.copy_(state["step"])
        for buffer in self.buffers:
            for kind in kinds:
                for (name, p), piece in zip(buffer.parameters, views(getattr(buffer, kind), buffer), strict=True):
                    key, wanted = f"{kind}.{name}", full_shape(p, self.mesh.tp)
                    if key not in state or tuple(state[key].shape) != wanted:
                        found = list(state[key].shape) if key in state else "nothing"
                        raise ValueError(f"optimizer state {key}: found {found}, the model wants {list(wanted)}")
                    piece.copy_(shard(state[key], p.sharding, self.mesh))
            if buffer.shadow is not buffer.master:
                buffer.shadow.copy_(buffer.master)


def build_buffers(module: nn.Module) -> list[Buffer]:
    """Move the trainable parameters of `module` into flat buffers and hook their gradients' accumulation."""
    kinds: dict[tuple, list[tuple[str, nn.Parameter]]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            # What is cut over tp and what is not lie apart, in few long runs.
            kinds.setdefault((p.dim() >= 2, p.sharding is None, p.dtype), []).append((name, p))
    return [build_buffer(members, decay) for (decay, _, _), members in kinds.items()]


def gradient_runs(buffer: Buffer) -> list[tuple[Tensor, bool, bool]]:
    """(a view of the gradient, whether it is cut over tp, whether it is only a part) for each run treated alike."""
    lengths: list[tuple[int, bool, bool]] = []
    for _, p in buffer.parameters:
        for n, cut, partial in p.sharding.runs(p) if p.sharding else [(p.numel(), False, p.partial)]:
            if lengths and lengths[-1][1:] == (cut, partial):
                n += lengths.pop()[0]
            lengths.append((n, cut, partial))
    views = buffer.gradient.split([n for n, _, _ in lengths])
    return [(view, cut, partial) for view, (_, cut, partial) in zip(views, lengths, strict=True)]


def add_parts(gradients: list[Tensor], mesh: Mesh) -> None:
    """Sum, over tp and in one exchange, the gradients of which each rank has a part."""
    if mesh.tp > 1 and gradients:
        together = torch.cat(gradients)
        dist.all_reduce(together, group=mesh.tp_group)
        torch._foreach_copy_(gradients, together.split([len(g) for g in gradients]))


def build_buffer(members: list[tuple[str, nn.Parameter]], decay: bool) -> Buffer:
    first = members[0][1]
    wide = torch.promote_types(first.dtype, torch.float32)
    master = torch.cat([p.detach().to(wide).flatten() for _, p in members])
    shadow = master if wide == first.dtype else master.to(first.dtype)
    gradient, exp_avg, exp_avg_sq = (torch.zeros_like(master) for _ in range(3))
    buffer = Buffer(members, decay, master, shadow, gradient, exp_avg, exp_avg_sq)
    for (_, p), data, grad in zip(members, views(shadow, buffer), views(gradient, buffer), strict=True):
        p.data = data
        p.main_grad = grad
        p.register_post_accumulate_grad_hook(accumulate)
    return buffer


def accumulate(p: nn.Parameter) -> None:
    """Add a micro-batch's gradient to the fp32 buffer and let it go."""
    p.main_grad.add_(p.grad)
    p.grad = None


def views(flat: Tensor, buffer: Buffer) -> list[Tensor]:
    """The parameters' shapes as views into a flat tensor of `buffer`."""
    pieces = flat.split([p.numel() for _, p in buffer.parameters])
    return [piece.view(p.shape) for piece, (_, p) in zip(pieces, buffer.parameters, strict=True)]
