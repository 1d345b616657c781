"""The small ops on streams and lists: segment_sum, gae, global_norm; poison outside the segments must not leak."""

import contextlib
import importlib

import interpreter
import pytest
import torch

from tritium.kernels import gae, global_norm, segment_sum
from tritium.kernels.backend import HAS_TRITON, tl

_FILES = ("gae", "global_norm", "segment_sum")
gae_file, norm_file, sum_file = (importlib.import_module(f"tritium.kernels.{name}") for name in _FILES)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
CU = torch.tensor([2, 6, 6, 11, 11], dtype=torch.int32)


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", request.param)
    torch.manual_seed(0)
    with interpreter.checked(seed=1) if request.param == "triton" else contextlib.nullcontext():
        yield request.param


def poisoned(n, dtype=torch.float32):
    """n values with two NaN before and three after them."""
    before, after = torch.full((2,), torch.nan), torch.full((3,), torch.nan)
    return torch.cat([before, torch.randn(n), after]).to(dtype)


def test_segment_sum_of_empty_segments_and_poison(backend):
    values = poisoned(9).requires_grad_()
    sums = segment_sum(values, CU)
    torch.testing.assert_close(
        sums, torch.stack([values[2:6].sum(), sums.new_zeros(()), values[6:11].sum(), sums.new_zeros(())])
    )
    (gradient,) = torch.autograd.grad(sums, values, torch.tensor([2.0, 3.0, 5.0, 7.0]))
    assert gradient.tolist() == [0.0] * 2 + [2.0] * 4 + [5.0] * 5 + [0.0] * 3


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_segment_sum_of_any_strides(backend, cu_dtype):
    values, cu_seqlens = torch.randn(4000), torch.tensor([3, 5, 2500, 2500, 3999], dtype=cu_dtype)
    strided = values.repeat_interleave(2)[::2].requires_grad_()
    sums = segment_sum(strided, cu_seqlens.repeat_interleave(2)[::2])
    expected = sum_file.segment_sum_reference(values.double(), cu_seqlens)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(sums.sum(), strided)  # a gradient of stride 0
    assert gradient.sum() == 3996 and (gradient[3:3999] == 1).all()
    repeated = torch.tensor(0.5).expand(4000)
    assert segment_sum(repeated, cu_seqlens).tolist() == [1.0, 1247.5, 0.0, 749.5]


def test_segment_sum_accumulates_low_precision_in_fp32(backend):
    sums = segment_sum(torch.ones(1000, dtype=torch.bfloat16), torch.tensor([0, 999, 1000]))
    assert sums.dtype == torch.float32 and sums.tolist() == [999.0, 1.0]


def test_segment_sum_of_long_segments_keeps_its_digits(backend):
    values = torch.randn(1 << 16) + 1
    sums = segment_sum(values, torch.tensor([0, 4096, 1 << 16]))
    exact = torch.stack([values[:4096].double().sum(), values[4096:].double().sum()])
    assert ((sums.double() - exact).abs() <= 2 * 2.0**-23 * exact.abs()).all()


def test_segment_sum_of_no_segments(backend):
    assert segment_sum(torch.ones(3), torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize("gamma,lam", [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0), (0.0, 0.5)])
def test_gae_agrees_with_the_recurrence(backend, gamma, lam):
    rewards, values = poisoned(9), poisoned(9)
    actual = gae(rewards, values, CU, gamma, lam)
    for ours, expected in zip(actual, gae_file.gae_reference(rewards, values, CU, gamma, lam), strict=True):
        torch.testing.assert_close(ours, expected)
        assert (ours[:2] == 0).all() and (ours[11:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gae_of_segments_longer_than_a_block(backend, dtype):
    rewards, values = poisoned(2995, dtype), poisoned(2995, dtype)
    cu_seqlens = torch.tensor([2, 3, 1027, 1027, 2997])
    strided = (x.repeat_interleave(2)[::2] for x in (rewards, values))
    actual = gae(*strided, cu_seqlens, 0.99, 0.95)
    expected = gae_file.gae_reference(rewards.double(), values.double(), cu_seqlens, 0.99, 0.95)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-5)


def test_gae_without_tokens_or_segments(backend):
    empty, one = torch.zeros(0), torch.full((1,), torch.nan)
    assert all(x.shape == (0,) for x in gae(empty, empty, torch.tensor([0, 0]), 0.9, 0.8))
    assert [x.tolist() for x in gae(one, one, torch.tensor([0]), 0.9, 0.8)] == [[0.0], [0.0]]


def test_gae_segments_do_not_see_each_other(backend):
    rewards, values = torch.randn(11), torch.randn(11)
    whole = gae(rewards, values, CU, 0.9, 0.8)[0][2:6]
    for x in (rewards, values):
        x[:2], x[6:] = torch.nan, torch.nan
    assert torch.equal(gae(rewards, values, CU, 0.9, 0.8)[0][2:6], whole)


def test_gae_of_one_reward_at_the_end_is_discounted(backend):
    rewards = torch.tensor([0.0, 0.0, 1.0])
    advantages, returns = gae(rewards, torch.zeros(3), torch.tensor([0, 3]), 0.5, 1.0)
    assert advantages.tolist() == returns.tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_global_norm_of_many_elements(backend, dtype):
    """Ones: a sum in bf16 would stop at 256, one in fp16 at 2048."""
    tensors = [torch.ones(1 << 18, dtype=dtype), torch.ones(7, 5, dtype=dtype).t()[::2], torch.zeros(0, dtype=dtype)]
    norm = global_norm(tensors)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx((2**18 + 21) ** 0.5, rel=1e-6)


def test_global_norm_of_any_layout(backend):
    dense = torch.randn(70_001)
    layouts = [dense, dense[1:], dense.repeat_interleave(2)[::2], dense[:70_000].view(7, 10_000).t()]
    layouts += [torch.randn(3, 4, 5).transpose(0, 2)[1:], torch.tensor(2.0).expand(9, 9), torch.tensor(3.0)]
    expected = sum(x.double().square().sum() for x in layouts).sqrt()
    assert global_norm(layouts).item() == pytest.approx(expected.item(), rel=1e-6)


def test_global_norm_of_mixed_dtypes_and_of_nothing(backend):
    assert global_norm([torch.tensor([3.0]), torch.tensor([4.0]).bfloat16()]).item() == 5.0
    assert global_norm([torch.tensor([3.0]), torch.tensor([4.0]).double()]).dtype == torch.float64
    assert global_norm([]).item() == global_norm([torch.zeros(0)]).item() == 0.0


def test_global_norm_shows_what_is_not_finite(backend):
    assert global_norm([torch.tensor([1.0, torch.inf])]).isinf()
    assert global_norm([torch.tensor([1.0, torch.nan])]).isnan()


def test_global_norm_of_integers_is_refused():
    with pytest.raises(ValueError, match=r"tensors\[1\] is torch.int64, wanted a floating-point dtype"):
        global_norm([torch.ones(2), torch.arange(2)])


@pytest.mark.parametrize("cu_seqlens", [[0, 4, 3], [0, 5], [-1, 3]])
def test_segments_outside_the_stream_are_named(cu_seqlens, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    for call in (lambda cu: segment_sum(torch.ones(4), cu), lambda cu: gae(torch.ones(4), torch.ones(4), cu, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r"must not decrease, in 0…4"):
            call(torch.tensor(cu_seqlens))


# Triton only ----------------------------------------------------------------------------------------------------------


@needs_triton
def test_traffic():
    T, cu_seqlens = 3000, torch.tensor([5, 2000, 2990], dtype=torch.int32)
    values, rewards = torch.randn(T).bfloat16().requires_grad_(), torch.randn(T).bfloat16()
    with interpreter.checked() as trace:
        segment_sum(values, cu_seqlens).sum().backward()
        gae(rewards, values, cu_seqlens, 0.9, 0.8)
        global_norm([rewards, values])
    summed, filled, scanned, squared, added = trace.launches
    assert summed.loaded == {"p_cu": 4 * 4, "p_values": 2 * 2985} and summed.stored == {"p_sum": 4 * 2}
    assert filled.loaded == {"p_cu": 4 * 6, "p_dsum": 4 * 2} and filled.stored == {"p_dvalues": 2 * T}
    assert scanned.loaded == {"p_cu": 4 * 6, "p_rewards": 2 * 2985, "p_values": 2 * (2985 + 2983)}
    assert scanned.stored == {"p_advantages": 4 * T, "p_returns": 4 * T}
    assert squared.loaded == {"p_table": 2 * 8 * 4, "tensors": 2 * 2 * T} and squared.stored == {"p_partial": 8}
    assert (added.loaded, added.stored) == ({"p_partial": 8}, {"p_norm": 4})


@needs_triton
@pytest.mark.parametrize("cu_seqlens", [[0, 9, 4], [-5, 2, 100], [7, 3, -(2**31)]])
def test_wrong_offsets_on_a_gpu_lead_nowhere(cu_seqlens):
    """There nobody reads them before the launch: the kernels clamp them."""
    values, cu_seqlens = torch.ones(6), torch.tensor(cu_seqlens)
    with interpreter.checked():
        sum_file._forward(values, cu_seqlens)
        with contextlib.suppress(interpreter.DataRace):  # overlapping segments do that
            sum_file._backward(torch.ones(2), cu_seqlens, 6, torch.float32)
        with contextlib.suppress(interpreter.DataRace):
            gae_file._launch(values, values, cu_seqlens, 0.9, 0.8)


@needs_triton
def test_offsets_are_64_bits_wide():
    """Elements 2^30 apart, or a table that says that a launch begins 2^31 elements into its tensor."""
    far, cu_seqlens = torch.empty_strided((5,), (2**30,), device="meta"), torch.tensor([1, 3, 5])
    near = [torch.empty(5, device="meta") for _ in range(3)]
    many, ends = torch.empty_strided((4,), (2**30,), device="meta"), torch.tensor([0, 1, 2, 3, 4])
    before, long = 2**31 // norm_file.SPAN - 1, torch.empty(2**31 + 3, device="meta")
    table = torch.tensor([[-before], [len(long)], [0], [0]])
    table.pointees = {"tensors": [long]}
    config = {"BLOCK": 4}
    with interpreter.checked() as trace:
        sum_file._segment_sum[(2,)](far, cu_seqlens, near[0], 2**30, 2, 5, **config)
        sum_file._segment_fill[(6,)](many, ends, near[0], 2**30, 4, 5, **config)
        gae_file._gae[(4,)](far, far, cu_seqlens, *near[1:], 2**30, 2**30, 2, 5, 0.9, 0.8, **config)
        norm_file._square_sums[(2,)](table, near[0], 1, tl.float32, True, norm_file.SPAN, norm_file.BLOCK)
    summed, filled, scanned, squared = trace.launches
    assert summed.loaded["p_values"] == scanned.loaded["p_rewards"] == 4 * 4
    assert filled.loaded["p_dsum"] == 4 * 4 and squared.loaded["tensors"] == 4 * (norm_file.SPAN + 3)


@needs_triton
def test_order_of_programs_changes_no_bit():
    torch.manual_seed(0)
    values, cu_seqlens = torch.randn(3000), torch.tensor([5, 900, 900, 2990])
    parts = [values, values.bfloat16(), torch.randn(70_000)]

    def run(seed):
        with interpreter.checked(seed):
            return segment_sum(values, cu_seqlens), *gae(values, values, cu_seqlens, 0.9, 0.8), global_norm(parts)

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(1), strict=True))
