"""The grid of processes, handed to whoever needs it; nothing here is global.

    mesh = init_mesh(tp=2, cp=2)      # under torchrun; Mesh.single() without it
    …
    mesh.close()

Ranks lie in the grid as [dp, cp, tp] with tp the fast axis, so that the ranks of one tensor-parallel group, which talk
most, are neighbours on one host:

    rank = (dp_rank · cp + cp_rank) · tp + tp_rank            world_size = dp · cp · tp

    axis    its ranks have                                 and share
    dp      different batches                              counts, and with cp the gradients
    cp      chunks of the same batch                       keys and values
    tp      shards of the same parameters                  hidden states
    data    dp × cp: everything but the parameters         gradients (added), and ZeRO's parts of the optimizer

With `shard` (hybrid ZeRO, as MiCS, arXiv 2205.00119), ZeRO cuts over that many neighbours of a data group only, those
of one host, say; gradients are added over its like-placed ranks, the `replica` groups, once a step.
"""

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from tritium.parallel.restart import own_part

AXES = ("dp", "cp", "tp")

# torch 2.13 has renamed these, and warns of the old names, which older ones need.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Mesh:
    """This process's place in the grid. A group is None where its axis has size 1: no collective is ever needed."""

    rank: int = 0
    world_size: int = 1
    dp: int = 1  # data-parallel replicas
    cp: int = 1  # context-parallel parts of one replica's stream
    tp: int = 1  # tensor-parallel shards of the parameters
    dp_rank: int = 0
    cp_rank: int = 0
    tp_rank: int = 0
    dp_group: ProcessGroup | None = None
    cp_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None  # the dp × cp ranks that hold the same shard of the parameters
    shard: int = 0  # data ranks over which ZeRO cuts; 0: all of them
    shard_group: ProcessGroup | None = None  # these ranks: the data group, where shard is 0
    replica_group: ProcessGroup | None = None  # the data ranks with the same part of everything, where shard is not 0
    ring: bool = False  # whether context-parallel ranks pass keys and values round: parallel/ring.py
    zero: int = 0  # how much the data ranks share of a network: see parallel/zero.py
    timeout: float = 600.0  # seconds that a collective waits for the other ranks
    device: torch.device = torch.device("cpu")
    device_mesh: DeviceMesh | None = None  # the same grid with named axes ("dp", "cp", "tp"), for torch's own tools
    owns_process_group: bool = False  # whether `init_mesh` started torch.distributed, so that `close` ends it

    @classmethod
    def single(cls, device: str | torch.device = "cpu", zero: int = 0) -> "Mesh":
        """The mesh of one process, which needs no process group."""
        return cls(device=torch.device(device), zero=zero)

    @property
    def parts(self) -> int:
        """Ranks over which ZeRO cuts."""
        return (self.shard or self.dp * self.cp) if self.zero else 1

    @property
    def main(self) -> bool:
        """Whether this is rank 0: the one that prints, logs and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast_object(self, value: Any, axes: tuple[str, ...] = AXES) -> Any:
        """The `value` (any picklable object) of the first rank along `axes`, rank 0 where these are all, on all ranks
        along them. ("tp", "cp") are a replica's: on what a clock or a foreign program says they may differ."""
        for group in filter(None, (getattr(self, f"{axis}_group") for axis in axes)):
            box = [value]
            dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
            value = box[0]
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` (any picklable object), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """End the process groups that `init_mesh` started, and only these. The mesh is of no use afterwards."""
        if self.owns_process_group:
            dist.destroy_process_group()
        elif self.device_mesh is not None:
            groups = [self.device_mesh.get_group(axis) for axis in AXES]
            more = (self.data_group, self.shard_group, self.replica_group)
            for group in dict.fromkeys([*groups, *filter(None, more)]):
                dist.destroy_process_group(group)


def check_grid(world_size: int, cp: int, tp: int, zero: int, shard: int, ring: bool) -> None:
    """Raise ValueError for a mesh that so many processes can't be."""
    if min(cp, tp) < 1 or world_size % (cp * tp):
        raise ValueError(f"cp={cp} × tp={tp} does not divide the {world_size} processes of this run: start a multiple")
    if ring and cp == 1:
        raise ValueError("ring goes with context parallelism: cp of at least 2")
    if zero not in range(4):
        raise ValueError(f"zero={zero}: the levels are 0, 1, 2 and 3")
    if shard and (shard < 0 or not zero or world_size // tp % shard):
        raise ValueError(
            f"shard={shard} at zero={zero}: ZeRO (1, 2 or 3) cuts over a divisor of the {world_size // tp} data ranks"
        )


def init_mesh(
    tp: int = 1, cp: int = 1, zero: int = 0, device: str = "auto", timeout: float = 600.0, shard: int = 0, ring=False
) -> Mesh:
    """Place this process in a grid of `tp` tensor-parallel × `cp` context-parallel ranks × the rest data-parallel.

    RANK, WORLD_SIZE and LOCAL_RANK come from torchrun; a process group that already runs is used instead, and left
    running by `close`. `device` is "cpu", "cuda" or "auto" (cuda where there is one); a rank takes the GPU of its
    LOCAL_RANK. A collective that waits longer than `timeout` seconds for a peer fails.

    Raises: ValueError where cp · tp does not divide the world, or `shard` the data ranks, the device asked for is not
    there, or the ranks ask for different meshes. What was started is ended then.
    """
    running = dist.is_initialized()
    world_size = dist.get_world_size() if running else int(os.environ.get("WORLD_SIZE", 1))
    check_grid(world_size, cp, tp, zero, shard, ring)
    if not timeout > 0:
        raise ValueError(f"timeout={timeout}: ranks wait for one another for some seconds, at least")
    place = local_device(device)
    if world_size == 1:
        return Mesh.single(place, zero)
    limit = timedelta(seconds=timeout)
    if not running:
        # gloo stays beside NCCL: objects and counts are on the host already, and reading them back is no device sync.
        store, rank, _ = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = own_part(store, rank, world_size, timeout)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    try:
        _check_agreement(f"cp={cp}, tp={tp}, zero={zero}, shard={shard}{', ring' * ring} on {place.type}")
        placed = _place(cp, tp, shard, place, limit)
        return replace(placed, zero=zero, ring=ring, timeout=timeout, owns_process_group=not running)
    except Exception:
        if not running:
            dist.destroy_process_group()
        raise


def _check_agreement(mine: str) -> None:
    """Ranks that want different grids would wait for one another for ever while making their groups."""
    answers: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            raise ValueError(f"rank 0 has {answers[0]}, rank {rank} {answer}: start all processes with one command")


def _place(cp: int, tp: int, shard: int, device: torch.device, timeout: timedelta) -> Mesh:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    grid = torch.arange(world_size).view(-1, cp, tp)  # [dp, cp, tp], of ranks
    dp, places = len(grid), (grid == rank).nonzero()[0].tolist()

    def groups(name: str, ranks: torch.Tensor) -> ProcessGroup:
        # Made here and not by init_device_mesh, which gives its groups torch's default timeout whatever the parent's.
        return dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout, group_desc=name)[0]

    axes = [groups(AXES[i], grid.movedim(i, -1).flatten(0, 1)) for i in range(3)]
    along: dict[str, Any] = {}
    for axis, size, place, group in zip(AXES, grid.shape, places, axes, strict=True):
        along |= {axis: size, f"{axis}_rank": place, f"{axis}_group": group if size > 1 else None}
    dp_group, cp_group, _ = axes
    data_group = dp_group if cp == 1 else cp_group if dp == 1 else groups("data", grid.flatten(0, 1).t())
    shard_group, replica_group = data_group, None
    if shard:
        shard_group = groups("shard", grid.view(-1, shard, tp).movedim(1, -1).flatten(0, 1))
        replica_group = groups("replica", grid.view(-1, shard * tp).t())
    dist.barrier()  # gloo fails a rank that still connects to one which has closed its groups again
    return Mesh(
        rank=rank,
        world_size=world_size,
        **along,
        data_group=data_group if dp * cp > 1 else None,
        shard=shard,
        shard_group=shard_group if (shard or dp * cp) > 1 else None,
        replica_group=replica_group if dp * cp > shard else None,
        device=device,
        device_mesh=DeviceMesh.from_group(axes, device.type, grid, mesh_dim_names=AXES),
    )


def local_device(name: str) -> torch.device:
    """The device of this process for "auto", "cpu" or "cuda": the GPU numbered LOCAL_RANK, made the current one.

    Raises: ValueError for another name, for "cuda" without a GPU, and for more processes on a host than it has GPUs.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r}: expected auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': torch sees no GPU here; use device='cpu', or install a torch built for yours")
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"LOCAL_RANK={local_rank} on a host with {count} GPU(s): start one process per GPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
