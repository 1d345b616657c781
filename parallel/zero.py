"""A network as flat buffers, and what ZeRO cuts of them over the data-parallel ranks (arXiv 1910.02054).

A unit is what is gathered and reduced together: each layer of a decoder, and the root, which is all the rest (the
embedding, a last norm, heads). Its parameters are views into one flat tensor, padded to equal parts:

    flat       q k v │ o │ gate up │ down │ norms │ pad
    part of    rank 0      │ rank 1      │ rank 2            of `data_group`

    level   parameters   gradients   optimizer's state   communication, for P parameters and m micro-batches
      0     whole        whole       whole               all-reduce P (= 2P)
      1     whole        whole       part                reduce-scatter P, all-gather P
      2     whole        part        part                m · reduce-scatter P, all-gather P
      3     part         part        part                m · (reduce-scatter P, all-gather 2P)

In hybrid ZeRO (`mesh.shard`) the ranks of a part's `replica_group` add their parts of the gradient, too, once a step.

Gradients are *added* over the ranks: losses are sums over the global batch, divided by global counts. They are fp32
(fp64 in an fp64 model) whatever the parameters' dtype. A unit is reduced as soon as the backward is done with it,
while the backward goes on; always in the same order, whatever order a rank's gradients come in, and also where a rank
has none. At level 3 a layer is gathered before its forward and again before its backward, while its predecessor
computes; its storage is emptied in between, so that what autograd saved finds its memory filled again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritium.kernels import global_norm
from tritium.parallel.mesh import Mesh, all_gather_single, reduce_scatter_single


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of a flat buffer that are treated alike."""

    start: int
    stop: int
    member: int  # the parameter that they are of
    cut: bool  # whether tp ranks hold different ones
    partial: bool  # the same on all tp ranks, but each has only a part of the gradient


class Flat:
    """Parameters of one dtype, all trained or all frozen, as views into one flat tensor."""

    def __init__(self, members: Sequence[tuple[str, nn.Parameter]], mesh: Mesh, layer: bool):
        level, self.layer = mesh.zero, layer  # whether it is of a layer, and not of the root
        first = members[0][1]
        self.members, self.level, self.trained = list(members), level, first.requires_grad
        self.group, self.replicas = (mesh.shard_group, mesh.replica_group) if level else (mesh.data_group, None)
        cut = level and self.group is not None
        self.parts, self.rank = (dist.get_world_size(self.group), dist.get_rank(self.group)) if cut else (1, 0)
        self.size = -(-sum(p.numel() for _, p in members) // self.parts)  # of a part
        self.full = torch.zeros(self.size * self.parts, dtype=first.dtype, device=first.device)
        for (_, p), view in zip(members, self.views(self.full), strict=True):
            source = p.__dict__.pop("source", None)  # of a streamed model
            view.copy_(source() if source else p.detach())
            p.data = view
        self.part = self.own(self.full) if level < 3 else self.own(self.full).clone()
        self.present, self.gathering = True, None
        if self.trained:
            self.make_gradients(torch.promote_types(first.dtype, torch.float32))

    def own(self, flat: Tensor) -> Tensor:
        """This rank's part of a flat tensor, as a view."""
        return flat.narrow(0, self.rank * self.size, self.size)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' shapes as views into a flat tensor."""
        sizes = [p.numel() for _, p in self.members]
        pieces = flat[: sum(sizes)].split(sizes)
        return [piece.view(p.shape) for piece, (_, p) in zip(pieces, self.members, strict=True)]

    def spans(self) -> Iterator[Span]:
        """The spans of this rank's part, with places in that part."""
        offset = -self.rank * self.size
        for i, (_, p) in enumerate(self.members):
            for length, cut, is_partial in p.sharding.runs(p) if p.sharding else [(p.numel(), False, p.partial)]:
                start, stop = max(0, offset), min(self.size, offset + length)
                if start < stop:
                    yield Span(start, stop, i, cut, is_partial)
                offset += length

    # ------------------------------------------------------------------------------------------ parameters

    def start_gather(self) -> None:
        """Begin to make the parameters whole, where they are not."""
        if not self.present:
            self.full.untyped_storage().resize_(self.full.nbytes)
            self.present = True
            if self.group is None:
                self.full.copy_(self.part)
            else:
                self.gathering = all_gather_single(self.full, self.part, group=self.group, async_op=True)

    def gather(self) -> None:
        """Make the parameters whole."""
        self.start_gather()
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def release(self) -> None:
        """At level 3, give back the memory of the whole parameters."""
        if self.level == 3 and self.present:
            self.gather()  # what is on its way must not arrive in freed memory
            self.full.untyped_storage().resize_(0)
            self.present = False

    def spread(self) -> None:
        """After a step: send the changed parts to all ranks (levels 1 and 2), or drop what is no longer so (3)."""
        if self.level == 3:
            self.release()
        elif self.parts > 1:
            self.gathering = all_gather_single(self.full, self.part, group=self.group, async_op=True)

    @torch.no_grad()
    def join(self, part: Tensor) -> Tensor:
        """The whole flat tensor of which every rank has a part like `part`. A collective."""
        if self.parts == 1:
            return part
        whole = part.new_empty(len(self.full))
        all_gather_single(whole, part, group=self.group)
        return whole

    # ------------------------------------------------------------------------------------------ gradients

    def make_gradients(self, dtype: torch.dtype) -> None:
        """`gradient` is whole at levels 0 and 1, else a part, to which each micro-batch's `whole` is reduced."""
        size = len(self.full) if self.level < 2 else self.size
        self.gradient = torch.zeros(size, dtype=dtype, device=self.full.device)
        self.whole: Tensor | None = self.gradient if self.level < 2 else None
        self.missing, self.reducing, self.reduced, self.replicating = 0, None, None, None
        for i, (_, p) in enumerate(self.members):
            p.register_post_accumulate_grad_hook(partial(self.accumulate, i))
            if self.level < 2:
                p.main_grad = self.views(self.gradient)[i]

    @property
    def own_gradient(self) -> Tensor:
        """The gradient of this rank's part, [size] fp32 or fp64; the sum over the ranks once all is reduced."""
        return self.own(self.gradient) if self.level < 2 else self.gradient

    def whole_gradient(self) -> Tensor:
        if self.whole is None:
            self.whole = torch.zeros(len(self.full), dtype=self.gradient.dtype, device=self.full.device)
        return self.whole

    def accumulate(self, i: int, p: nn.Parameter) -> None:
        """Add a parameter's new gradient to the wide buffer and let it go."""
        self.views(self.whole_gradient())[i].add_(p.grad)
        p.grad = None
        self.missing -= 1
        self.on_gradient()

    def on_gradient(self) -> None:
        """Set by the module that this belongs to."""

    def start_reduce(self) -> None:
        """Begin to sum the gradient over the ranks: every rank does, whether it has a gradient or not."""
        whole = self.whole_gradient()
        if self.level >= 2:
            self.reduced = torch.empty_like(self.gradient) if self.group else whole
        if self.group is None:
            return
        if self.level == 0:
            self.reducing = dist.all_reduce(whole, group=self.group, async_op=True)
        else:  # at level 1 into its place in the whole
            part = self.own(whole) if self.level == 1 else self.reduced
            self.reducing = reduce_scatter_single(part, whole, group=self.group, async_op=True)

    def finish_reduce(self, last: bool) -> None:
        if self.reducing is not None:
            self.reducing.wait()
        if self.level >= 2 and self.reduced is not None:
            self.gradient.add_(self.reduced)
            self.whole = None
        self.reducing = self.reduced = None
        if last and self.replicas is not None:
            self.replicating = dist.all_reduce(self.own_gradient, group=self.replicas, async_op=True)

    def finish(self) -> None:
        """Wait for the sum over the replicas."""
        if self.replicating is not None:
            self.replicating.wait()
            self.replicating = None


class FlatModule:
    """The flat buffers of a network, unit by unit: gathered when they are needed, reduced when they are ready."""

    def __init__(self, module: nn.Module, mesh: Mesh):
        self.level, self.mesh = mesh.zero, mesh
        self.queue, self.in_flight, self.in_backward, self.kept = [], [], False, 0
        layers = next((m for m in module.modules() if isinstance(m, nn.ModuleList)), nn.ModuleList())
        inside = {p for layer in layers for p in layer.parameters()}
        root = [(name, p) for name, p in module.named_parameters() if p not in inside]
        names = {p: name for name, p in module.named_parameters()}
        members = [root, *([(names[p], p) for p in layer.parameters()] for layer in layers)]
        self.units: list[list[Flat]] = []
        for i, unit in enumerate(members):
            self.units.append(self.flats_of(unit, layer=i > 0))
            for flat in self.units[i]:
                flat.release()
        self.flats = [flat for unit in self.units for flat in unit]
        self.trained = [flat for flat in self.flats if flat.trained]
        for flat in self.trained:
            flat.on_gradient = self.reduce_ready
        if self.level == 3:
            for i, layer in enumerate(layers, 1):
                self.hook(layer, i)

    def flats_of(self, members: list[tuple[str, nn.Parameter]], layer: bool) -> list[Flat]:
        kinds: dict[tuple, list[tuple[str, nn.Parameter]]] = {}
        for name, p in sorted(members, key=lambda member: (member[1].dim() < 2, member[1].sharding is None)):
            if p.requires_grad or self.level == 3:  # alike ones lie together, in few long spans
                kinds.setdefault((p.dtype, p.requires_grad), []).append((name, p))
        return [Flat(alike, self.mesh, layer) for alike in kinds.values()]

    # ------------------------------------------------------------------------------------------ parameters

    def hook(self, layer: nn.Module, i: int) -> None:
        """Gather unit i before the layer's forward and before its backward, and the next one meanwhile."""

        def before(following: int) -> None:
            for flat in self.units[i]:
                flat.gather()
            for flat in self.units[following] if 0 < following < len(self.units) else ():
                flat.start_gather()

        def after(*_) -> None:
            if not self.kept and not self.in_backward:  # (a forward within the backward is recomputation)
                self.release(i)

        def before_backward(*_) -> None:
            if not self.kept and i + 1 < len(self.units):  # its backward is over: also of what is frozen in it
                self.release(i + 1)
            before(i - 1)

        layer.register_forward_pre_hook(lambda *_: before(i + 1))
        layer.register_forward_hook(after)
        layer.register_full_backward_pre_hook(before_backward)

    @contextmanager
    def whole(self, layers: bool = False) -> Iterator[None]:
        """Within, the root is whole, for a micro-batch; or with `layers` the whole network, for many decoding steps."""
        flats = self.flats if layers else self.units[0]
        for flat in flats:
            flat.start_gather()
        for flat in flats:
            flat.gather()
        self.kept += layers
        try:
            yield
        finally:
            self.kept -= layers
            if not self.kept:
                self.release()

    @contextmanager
    def unit_by_unit(self) -> Iterator[Callable[[nn.Parameter], None]]:
        """For a walk over the parameters: a function that makes one whole with its unit, and lets go of the last."""
        unit_of = {p: i for i, unit in enumerate(self.units) for flat in unit for _, p in flat.members}
        here = None

        def make_whole(p: nn.Parameter) -> None:
            nonlocal here
            if (unit := unit_of.get(p, here)) != here:
                self.release(here)
                here = unit
                for flat in self.units[unit]:
                    flat.gather()

        try:
            yield make_whole
        finally:
            self.release()

    def release(self, unit: int | None = None) -> None:
        for flat in self.flats if unit is None else self.units[unit]:
            flat.release()

    def spread(self) -> None:
        """After a step: let every rank see the changed parameters."""
        for flat in self.trained:
            flat.spread()
        for flat in self.trained if self.level < 3 else ():
            flat.gather()

    # ------------------------------------------------------------------------------------------ gradients

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's backward; around nothing, where this rank has no such micro-batch but others have.

        Gradients are reduced within at levels 2 and 3, and at 0 and 1 where it is the `last` one before the step.
        """
        self.queue = [(i, flat) for i, unit in enumerate(self.units) for flat in unit if flat.trained][::-1]
        self.queue = self.queue if last or self.level >= 2 else []
        self.in_backward, self.in_flight, self.last = True, [], last
        for _, flat in self.queue:
            flat.missing = len(flat.members)
        try:
            yield
            while self.queue:  # with parameters that were not used, or with none where there was no backward
                self.reduce_next()
            self.finish()
            for flat in self.trained:
                flat.finish()
        finally:
            self.queue, self.in_backward = [], False
        if not self.kept:
            self.release()

    def reduce_ready(self) -> None:
        """Reduce what is complete, in the one order that all ranks keep."""
        while self.queue and self.queue[0][1].missing == 0:
            self.reduce_next()

    def reduce_next(self) -> None:
        unit, flat = self.queue.pop(0)
        if self.level >= 2 or flat.replicas:  # at most one whole gradient is under way while the next is made
            self.finish()
        flat.start_reduce()
        self.in_flight.append(flat)
        if unit and not self.kept and self.units[unit] == [flat]:  # (what is frozen may still be needed)
            self.release(unit)

    def finish(self) -> None:
        for flat in self.in_flight:
            flat.finish_reduce(self.last)
        self.in_flight = []

    def zero_grad(self) -> None:
        for flat in self.trained:
            flat.gradient.zero_()


# The whole gradient ---------------------------------------------------------------------------------------------------


def sum_over_tp(flats: Sequence[Flat], mesh: Mesh) -> None:
    """Complete the gradients of which each tensor-parallel rank has a part, in one exchange."""
    if mesh.tp == 1:
        return
    parts = [flat.own_gradient[s.start : s.stop] for flat in flats for s in flat.spans() if s.partial]
    if parts:
        together = torch.cat(parts)
        dist.all_reduce(together, group=mesh.tp_group)
        torch._foreach_copy_(parts, list(together.split([len(part) for part in parts])))


def grad_norm(flats: Sequence[Flat], mesh: Mesh) -> Tensor:
    """The L2 norm of the whole gradient, the same 0-d tensor on every rank, without a host sync.

    What is cut over tp is summed there, what is replicated is counted once. fp64 where gradients are, else fp32.
    """
    norms = []
    for cut in (True, False):
        chosen = [flat.own_gradient[s.start : s.stop] for flat in flats for s in flat.spans() if s.cut == cut]
        norms.append(global_norm(chosen) if chosen else torch.zeros((), device=mesh.device))
    dtype = torch.promote_types(norms[0].dtype, norms[1].dtype)
    squares = torch.stack([norm.to(dtype) for norm in norms]).square()
    if flats and flats[0].parts > 1:
        dist.all_reduce(squares, group=flats[0].group)
    if mesh.tp > 1:
        dist.all_reduce(squares[:1], group=mesh.tp_group)
    return squares.sum().sqrt()
