"""Sums over the replicas, the clip norm, and what refuses to start."""

import os

import pytest
import torch

from tritium.parallel import data
from tritium.parallel.data import (
    all_reduce_counts,
    check_same,
    global_grad_norm,
    reduce_gradients,
)
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.parallel.tensor import Sharding, shard


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def own(per_rank):
    """This rank's entry; outside the pool a test would have no rank."""
    return per_rank[int(os.environ["RANK"])]


def count(per_rank, tp):
    return all_reduce_counts(own(per_rank), init_mesh(tp=tp))


def reduce(per_rank, bucket_bytes):
    data.BUCKET_BYTES, before = bucket_bytes, data.BUCKET_BYTES
    try:
        buffers = own(per_rank)
        reduce_gradients(buffers, init_mesh())
        return buffers
    finally:
        data.BUCKET_BYTES = before


def refuse_buffer(buffer):
    try:
        reduce_gradients([buffer], init_mesh())
    except ValueError as error:
        return str(error)
    return None


def norm(cut, whole):
    mesh = init_mesh(tp=2)
    shards = [(shard(g, Sharding(0), mesh), True) for g in cut] + [(g, False) for g in whole]
    return global_grad_norm(shards, mesh)


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


@pytest.mark.parametrize("bucket_bytes", [64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_summed_in_place_in_any_bucket(pool2, dtype, bucket_bytes):
    per_rank = [[draw(n, seed=10 * rank + n, dtype=dtype) for n in (37, 0, 5)] for rank in range(2)]
    for buffers in pool2.run(reduce, per_rank, bucket_bytes):
        for actual, a, b in zip(buffers, *per_rank, strict=True):
            assert torch.equal(actual, a + b)


@pytest.mark.parametrize("buffer", [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2, 2), torch.zeros(8)[::2]])
def test_a_gradient_buffer_of_another_kind_is_refused(pool2, buffer):
    for sentence in pool2.run(refuse_buffer, buffer):
        assert sentence.startswith("gradients are flat fp32 or fp64 buffers")


@pytest.mark.parametrize("cut,whole", [((4, 6), (5, 3)), ((4,), ()), ((), (5,))])
def test_the_clip_norm_counts_replicated_gradients_once(pool2, cut, whole):
    cut, whole = [draw(n, 3, seed=n) for n in cut], [draw(n, seed=n) for n in whole]
    expected = torch.cat([g.flatten() for g in (*cut, *whole)]).norm()
    single = global_grad_norm([(g, True) for g in cut] + [(g, False) for g in whole], Mesh.single())
    for actual in (*pool2.run(norm, cut, whole), single):
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


def test_the_clip_norm_of_bf16_is_in_fp32_and_shows_what_is_not_finite(pool2):
    gradient = torch.full((4096,), 0.01, dtype=torch.bfloat16)
    for actual in pool2.run(norm, [gradient], []):
        torch.testing.assert_close(actual, gradient.float().norm())
    broken = torch.zeros(4)
    broken[3] = torch.inf  # on rank 1 only; both must skip the step
    assert [x.item() for x in pool2.run(norm, [broken], [])] == [torch.inf] * 2
    assert global_grad_norm([], Mesh.single()).item() == 0


def test_ranks_that_differ_are_refused_by_name_on_every_rank(pool4):
    same, other = "steps = 5\nlr = 0.1\n", "steps = 5\nlr = 0.2\n"
    assert pool4.run(compare, [same] * 4) == [None] * 4
    for sentence in pool4.run(compare, [same, other, same, other]):
        assert "the same config, but ranks 1, 3 differ from rank 0" in sentence
        assert "'lr = 0.1' on rank 0, 'lr = 0.2' on rank 1" in sentence


@pytest.mark.parametrize(
    "other,shown", [("a = 1\n", "'b = 2' on rank 0, '' on rank 1"), ("a = 1\nb = 2", "'a = 1\\nb")]
)
def test_a_difference_in_length_or_line_ends_is_shown(pool2, other, shown):
    for sentence in pool2.run(compare, ["a = 1\nb = 2\n", other]):
        assert "rank 1 differs from rank 0" in sentence and shown in sentence
