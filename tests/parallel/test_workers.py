"""The pool of workers that the other tests stand on."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tritium.parallel.mesh import init_mesh

WORKERS = pathlib.Path(__file__).parent.parent / "workers.py"


def who():
    mesh = init_mesh()
    return mesh.rank, mesh.world_size, os.getpid()


def doubled(x):
    return 2 * x


def fail_on(bad_rank):
    mesh = init_mesh()
    if mesh.rank == bad_rank:
        raise KeyError("the broken rank")
    mesh.barrier()  # the peer never comes


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(a)


def raise_unpicklable():
    raise Unpicklable("needs", "two")


def hang_on(bad_rank):
    if int(os.environ["RANK"]) == bad_rank:
        signal.pause()


def leave_a_group_behind():
    dist.new_group([0])
    return dist.get_pg_count()


def die():
    os._exit(7)


def test_a_job_runs_on_every_rank_of_the_same_processes(pool2):
    first, second = pool2.run(who), pool2.run(who)
    assert [(rank, size) for rank, size, _ in first] == [(0, 2), (1, 2)]
    assert first == second and len({pid for *_, pid in first}) == 2


def test_tensors_go_in_and_come_out(pool2):
    x = torch.randn(3, 2, dtype=torch.bfloat16)
    assert all(torch.equal(y, 2 * x) for y in pool2.run(doubled, x))


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_exception_keeps_its_type_and_traceback_and_frees_the_waiting_rank(pool2, bad_rank):
    before = pool2.run(who)
    with pytest.raises(KeyError, match="the broken rank") as caught:
        pool2.run(fail_on, bad_rank)
    note = "".join(caught.value.__notes__)
    assert f"on rank {bad_rank}" in note and "in fail_on" in note
    assert pool2.run(who) == before  # nobody had to be killed


def test_an_exception_that_cannot_be_pickled_arrives_in_words(pool2):
    with pytest.raises(RuntimeError, match="Unpicklable"):
        pool2.run(raise_unpicklable)


def test_a_hung_worker_is_killed_and_replaced(pool2):
    before = pool2.run(who)
    with pytest.raises(TimeoutError, match=r"hang_on: no answer from ranks \[.*1\]"):
        pool2.run(hang_on, 1, timeout=1.0)
    assert pool2.processes == []
    assert not any(alive(pid) for *_, pid in before)
    assert {pid for *_, pid in pool2.run(who)}.isdisjoint(pid for *_, pid in before)


def test_a_dead_worker_is_named_and_replaced(pool2):
    with pytest.raises(RuntimeError, match="rank 0 died, exit code 7|rank 1 died, exit code 7"):
        pool2.run(die)
    assert len(pool2.run(who)) == 2


def test_a_job_starts_without_the_groups_of_the_one_before(pool2):
    for _ in range(2):
        assert pool2.run(leave_a_group_behind) == [2, 2]


def test_a_local_function_is_refused(pool2):
    with pytest.raises(ValueError, match="local function"):
        pool2.run(lambda: None)


def print_and_hang():
    print("hanging", flush=True)
    signal.pause()


def test_workers_end_when_the_session_is_killed(tmp_path):
    """The worker's stdout is the session's: it ends when both are gone, though the worker is stuck in a job."""
    code = f"""if True:
        import runpy
        Pool = runpy.run_path({str(WORKERS)!r})["Pool"]
        job = runpy.run_path({__file__!r})["print_and_hang"]
        Pool(1).run(job)
    """
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # the killed session leaves its folder there
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as session:
        assert session.stdout.readline() == "hanging\n"
        session.kill()
        assert session.communicate(timeout=60) == ("", None)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
