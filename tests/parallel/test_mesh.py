"""The grid of processes: who is where, what is started, and what is ended."""

import os

import pytest
import torch
import torch.distributed as dist

from tritium.parallel.mesh import Mesh, init_mesh


def place(tp, cp):
    mesh = init_mesh(tp, cp, device="cpu")
    sums = []
    for group in (mesh.dp_group, mesh.cp_group, mesh.tp_group, mesh.data_group):
        x = torch.tensor([float(mesh.rank)])
        if group is not None:
            dist.all_reduce(x, group=group)
        sums.append(x.item())
    named = mesh.device_mesh.get_coordinate()
    assert named == (mesh.dp_rank, mesh.cp_rank, mesh.tp_rank) and mesh.main == (mesh.rank == 0)
    return mesh.rank, mesh.world_size, (mesh.dp, mesh.cp, mesh.tp), named, sums


def has_groups(tp, cp):
    mesh = init_mesh(tp, cp)
    return [group is not None for group in (mesh.dp_group, mesh.cp_group, mesh.tp_group, mesh.data_group)]


def broadcast_and_gather():
    mesh = init_mesh()
    mesh.barrier()
    return mesh.broadcast_object({"from": mesh.rank}), mesh.gather_objects(mesh.rank * 10)


def embedded(tp, cp):
    before = len(dist.distributed_c10d._world.pg_map)
    mesh = init_mesh(tp, cp)
    mesh.close()
    x = torch.ones(1)
    dist.all_reduce(x)
    return mesh.owns_process_group, mesh.tp, x.item(), len(dist.distributed_c10d._world.pg_map) - before


def start_and_close(port, timeout):
    """As under torchrun: nothing runs yet, and the environment says who is who."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    mesh = init_mesh(timeout=timeout)
    x = torch.ones(1)
    dist.all_reduce(x, group=mesh.dp_group)
    groups = (mesh.dp_group, dist.group.WORLD)
    limits = [group._get_backend(mesh.device).options._timeout.total_seconds() for group in groups]
    mesh.close()
    return mesh.owns_process_group, x.item(), limits, dist.is_initialized()


def refused(tp_of_rank, cp=1):
    try:
        init_mesh(tp_of_rank[dist.get_rank()], cp)
    except ValueError as error:
        return str(error)
    return None


def test_one_process_needs_no_group():
    mesh = init_mesh(device="cpu")
    assert mesh == Mesh.single("cpu") and mesh.main and not dist.is_initialized()
    assert mesh.broadcast_object("x") == "x" and mesh.gather_objects("x") == ["x"]
    mesh.barrier()
    mesh.close()


def test_four_ranks_make_a_grid_with_tensor_parallel_neighbours(pool4):
    for rank, placed in enumerate(pool4.run(place, 2, 1)):
        dp_rank, tp_rank = divmod(rank, 2)
        dp_sum, tp_sum = float(2 * tp_rank + 2), float(4 * dp_rank + 1)  # the ranks of each group, added
        assert placed == (rank, 4, (2, 1, 2), (dp_rank, 0, tp_rank), [dp_sum, rank, tp_sum, dp_sum])


def test_data_ranks_are_those_that_hold_the_same_parameters(pool4):
    for rank, (*_, sums) in enumerate(pool4.run(place, 1, 2)):
        dp_rank, cp_rank = divmod(rank, 2)
        assert sums == [2 * cp_rank + 2, 4 * dp_rank + 1, rank, 0 + 1 + 2 + 3]
    for rank, (*_, sums) in enumerate(pool4.run(place, 2, 2)):
        cp_rank, tp_rank = divmod(rank, 2)
        assert sums == [rank, 2 * tp_rank + 2, 4 * cp_rank + 1, 2 * tp_rank + 2]


@pytest.mark.parametrize(
    "tp,cp,groups", [(1, 1, [True, False, False, True]), (2, 1, [False, False, True, False]), (1, 2, [False, True] * 2)]
)
def test_an_axis_of_size_one_has_no_group(pool2, tp, cp, groups):
    assert pool2.run(has_groups, tp, cp) == [groups, groups]


def test_objects_travel(pool2):
    assert pool2.run(broadcast_and_gather) == [({"from": 0}, [0, 10])] * 2


@pytest.mark.parametrize("tp,cp", [(2, 1), (1, 2)])
def test_a_process_group_of_the_host_program_is_used_and_left_running(pool4, tp, cp):
    assert pool4.run(embedded, tp, cp) == [(False, tp, 4.0, 0)] * 4  # and no group of the mesh's own is left


def test_what_was_started_has_the_time_limit_and_is_closed(pool2):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert pool2.run(start_and_close, store.port, 77.0) == [(True, 2.0, [77.0, 77.0], False)] * 2


@pytest.mark.parametrize("tp,cp", [(0, 1), (3, 1), (1, 3), (2, 2), (1, 0)])
def test_a_mesh_that_does_not_divide_the_world_is_refused_on_every_rank(pool2, tp, cp):
    sentence = f"cp={cp} × tp={tp} does not divide the 2 processes of this run: start a multiple"
    assert pool2.run(refused, [tp, tp], cp) == [sentence] * 2


def test_ranks_that_want_different_meshes_are_refused_without_a_hang(pool2):
    sentence = "rank 0 has cp=1, tp=1, zero=0, shard=0 on cpu, rank 1 cp=1, tp=2, zero=0, shard=0 on cpu: "
    sentence += "start all processes with one command"
    assert pool2.run(refused, [1, 2]) == [sentence] * 2


def test_an_unknown_or_absent_device_is_refused():
    with pytest.raises(ValueError, match="expected auto, cpu or cuda"):
        init_mesh(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU here"):
            init_mesh(device="cuda")


@pytest.mark.parametrize("options,words", [({"timeout": 0}, "timeout=0"), ({"timeout": float("nan")}, "timeout=nan"),
                                           ({"ring": True}, "cp of at least 2")])  # fmt: skip
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        init_mesh(device="cpu", **options)
