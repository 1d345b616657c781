"""Counts summed over the replicas, what refuses to start, and replicas that are no longer the same."""

import os
from unittest import mock

import pytest
import torch

import tritium
from tritium.core import setup
from tritium.core.config import ConfigError
from tritium.parallel.data import all_reduce_counts, check_same, diverged, fingerprint
from tritium.parallel.mesh import Mesh, init_mesh


def own(per_rank):
    """This rank's entry; outside the pool a test would have no rank."""
    return per_rank[int(os.environ["RANK"])]


def count(per_rank, tp):
    return all_reduce_counts(own(per_rank), init_mesh(tp=tp))


def compare(per_rank):
    mesh = init_mesh()
    try:
        check_same(mesh, own(per_rank), "config")
    except ValueError as error:
        return str(error)
    mesh.barrier()  # nobody is left waiting
    return None


def test_counts_are_summed_in_fp64(pool2):
    big = float(2**53 - 2)  # fp32 would lose the 1
    counts = [{"tokens": big, "pairs": 0.5}, {"tokens": 1.0, "pairs": 2.0}]
    assert pool2.run(count, counts, 1) == [{"tokens": big + 1, "pairs": 2.5}] * 2


def test_counts_of_tensor_parallel_ranks_are_of_one_batch_and_not_summed(pool2):
    assert pool2.run(count, [{"tokens": 3.0}] * 2, 2) == [{"tokens": 3.0}] * 2


def test_counts_do_not_depend_on_which_rank_holds_what(pool4):
    values = [0.1, 1e16, -1e16, 0.2]
    forward = pool4.run(count, [{"x": v} for v in values], 1)
    backward = pool4.run(count, [{"x": v} for v in reversed(values)], 1)
    assert forward == backward == [{"x": pytest.approx(0.3, abs=1e-15)}] * 4


@pytest.mark.parametrize("empty", [{}, {"tokens": 0.0}])
def test_a_rank_with_an_empty_batch_gets_every_name(pool2, empty):
    full = {"tokens": 3.0, "turns": 1.0}
    for counts in ([full, empty], [empty, full]):
        assert pool2.run(count, counts, 1) == [full] * 2


def test_counts_of_one_process_are_its_own():
    assert all_reduce_counts({"tokens": 3}, Mesh.single()) == {"tokens": 3.0}


def test_ranks_that_differ_are_refused_by_name_on_every_rank(pool4):
    same, other = "steps = 5\nlr = 0.1\n", "steps = 5\nlr = 0.2\n"
    assert pool4.run(compare, [same] * 4) == [None] * 4
    for sentence in pool4.run(compare, [same, other, same, other]):
        assert "the same config, but ranks 1, 3 differ from rank 0" in sentence
        assert "'lr = 0.1' on rank 0, 'lr = 0.2' on rank 1" in sentence


def join_with(code: list[str]) -> str:
    with mock.patch.object(setup, "code_version", lambda: own(code)):
        try:
            setup.join(setup.MeshConfig(), "cpu", "the same settings")
        except ConfigError as error:
            return str(error)
    return ""


def test_ranks_with_other_code_are_refused_at_the_start(pool2):
    for sentence in pool2.run(join_with, ["0.1.0 (f00)", "0.1.0 (ba4)"]):
        assert "all ranks must have the same code, but rank 1 differs from rank 0: '0.1.0 (f00)'" in sentence
    assert setup.code_version() == setup.code_version() and tritium.__version__ in setup.code_version()


@pytest.mark.parametrize(
    "other,shown", [("a = 1\n", "'b = 2' on rank 0, '' on rank 1"), ("a = 1\nb = 2", "'a = 1\\nb")]
)
def test_a_difference_in_length_or_line_ends_is_shown(pool2, other, shown):
    for sentence in pool2.run(compare, ["a = 1\nb = 2\n", other]):
        assert "rank 1 differs from rank 0" in sentence and shown in sentence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_flipped_bit_changes_the_fingerprint_and_the_order_of_adding_does_not(dtype):
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = fingerprint([x])
    assert fingerprint([x.t().contiguous()]) == fingerprint([x[:7], x[7:]]) == before
    for bit in (0, 8 * dtype.itemsize - 1):
        y = x.clone()
        y.view(bits)[3, 3] ^= torch.tensor(1, dtype=bits) << bit
        assert fingerprint([y]) != before


def find_diverged(per_rank, tp, zero=0, shard=0, common=(0, 0, 0, 0)):
    return diverged(init_mesh(tp=tp, zero=zero, shard=shard), own(per_rank), own(common))


def test_the_rank_that_differs_from_most_is_named(pool4):
    assert pool4.run(find_diverged, [5, 5, 5, 5], 1) == [[]] * 4
    assert pool4.run(find_diverged, [4, 5, 5, 5], 1) == [[0]] * 4
    assert pool4.run(find_diverged, [5, 6, 5, 6], 2) == [[]] * 4  # of two shards, two replicas each
    assert pool4.run(find_diverged, [5, 6, 5, 7], 2) == [[3]] * 4
    assert (
        pool4.run(find_diverged, [5, 6, 5, 6], 2, 0, 0, [1, 1, 2, 1]) == [[2]] * 4
    )  # what no rank has only a shard of
    assert pool4.run(find_diverged, [5, 6, 5, 7], 1, 3, 2) == [[3]] * 4  # two replicas of two parts
    assert pool4.run(find_diverged, [5, 6, 7, 8], 1, 3) == [[]] * 4  # no part twice
