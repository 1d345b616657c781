"""The small ops on streams and lists: segment_sum, gae, global_norm; poison outside the segments must not leak."""

import importlib

import pytest
import torch

from tritium.kernels import gae, global_norm, segment_sum

gae_reference = importlib.import_module("tritium.kernels.gae").gae_reference
CU = torch.tensor([0, 4, 4, 9, 9], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)


def poisoned(n):
    """n values and three NaN after them."""
    return torch.cat([torch.randn(n, dtype=torch.float64), torch.full((3,), torch.nan, dtype=torch.float64)])


def test_segment_sum_of_empty_segments_and_poison():
    values = poisoned(9).requires_grad_()
    sums = segment_sum(values, CU)
    torch.testing.assert_close(
        sums, torch.stack([values[:4].sum(), sums.new_zeros(()), values[4:9].sum(), sums.new_zeros(())])
    )
    (gradient,) = torch.autograd.grad(sums, values, torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64))
    assert gradient.tolist() == [2.0] * 4 + [5.0] * 5 + [0.0] * 3


def test_segment_sum_accumulates_low_precision_in_fp32():
    sums = segment_sum(torch.ones(1000, dtype=torch.bfloat16), torch.tensor([0, 999, 1000]))
    assert sums.dtype == torch.float32 and sums.tolist() == [999.0, 1.0]


def test_segment_sum_of_no_segments():
    assert segment_sum(torch.ones(3), torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize("gamma,lam", [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0), (0.0, 0.5)])
def test_gae_agrees_with_the_recurrence(gamma, lam):
    rewards, values = poisoned(9), poisoned(9)
    for ours, expected in zip(
        gae(rewards, values, CU, gamma, lam), gae_reference(rewards, values, CU, gamma, lam), strict=True
    ):
        torch.testing.assert_close(ours, expected)
        assert (ours[9:] == 0).all()


def test_gae_segments_do_not_see_each_other():
    rewards, values = torch.randn(9), torch.randn(9)
    whole = gae(rewards, values, CU, 0.9, 0.8)[0][:4]
    rewards[4:], values[4:] = torch.nan, torch.nan
    assert torch.equal(gae(rewards, values, CU, 0.9, 0.8)[0][:4], whole)


def test_gae_of_one_reward_at_the_end_is_discounted():
    rewards = torch.tensor([0.0, 0.0, 1.0])
    advantages, returns = gae(rewards, torch.zeros(3), torch.tensor([0, 3]), 0.5, 1.0)
    assert advantages.tolist() == returns.tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_norm_of_many_elements(dtype):
    """A million ones: accumulators in fp32 that only add ones, or bf16 ones, would stop early."""
    tensors = [torch.ones(1 << 20, dtype=dtype), torch.ones(7, 5, dtype=dtype).t()[::2], torch.zeros(0, dtype=dtype)]
    norm = global_norm(tensors)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx((2**20 + 21) ** 0.5, rel=1e-6)


def test_global_norm_of_mixed_dtypes_and_of_nothing():
    assert global_norm([torch.tensor([3.0]), torch.tensor([4.0]).bfloat16()]).item() == 5.0
    assert global_norm([]).item() == 0.0


def test_global_norm_shows_what_is_not_finite():
    assert global_norm([torch.tensor([1.0, torch.inf])]).isinf()
    assert global_norm([torch.tensor([1.0, torch.nan])]).isnan()


@pytest.mark.parametrize("cu_seqlens", [[0, 4, 3], [0, 5], [-1, 3]])
def test_segments_outside_the_stream_are_named(cu_seqlens):
    for call in (lambda cu: segment_sum(torch.ones(4), cu), lambda cu: gae(torch.ones(4), torch.ones(4), cu, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r"must not decrease, in 0…4"):
            call(torch.tensor(cu_seqlens))
