"""NF4: error, size, exact values, odd sizes."""

import pytest
import torch

from tritium.kernels import dequantize_nf4, quantize_nf4
from tritium.kernels.nf4 import CODES, dequantize_nf4_reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (0, 64), (3, 70), (129, 130)])
def test_agrees_with_the_reference(shape, dtype):
    packed = quantize_nf4(torch.randn(shape).to(dtype))
    dense = dequantize_nf4(packed)
    assert dense.shape == shape and dense.dtype == dtype
    torch.testing.assert_close(dense, dequantize_nf4_reference(packed))


def test_normal_weights_lose_what_four_bits_must_lose():
    weight = torch.randn(256, 256)
    error = (dequantize_nf4(quantize_nf4(weight)) - weight).norm() / weight.norm()
    assert 0.08 < error < 0.1  # 0.09 for N(0, 1) in blocks of 64


def test_outliers_spoil_their_own_block_only():
    weight = torch.randn(64, 64)
    weight[0, 0] = 50.0
    error = (dequantize_nf4(quantize_nf4(weight)) - weight)[1:]
    assert error.norm() / weight[1:].norm() < 0.15


def test_a_block_made_of_codes_comes_back():
    """One block: its absmax is the mean of all absmax, so that double quantisation is exact too."""
    weight = 0.5 * torch.tensor(CODES).repeat(4)
    torch.testing.assert_close(dequantize_nf4(quantize_nf4(weight)), weight)


def test_zeros_stay_zero():
    weight = torch.zeros(3, 64)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight)), weight)


def test_size():
    packed = quantize_nf4(torch.randn(512, 512))
    assert packed.nbytes * 8 / 512**2 == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)


@pytest.mark.parametrize("bad", [torch.zeros(4, dtype=torch.int32), torch.tensor([1.0, torch.nan])])
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match="quantize_nf4"):
        quantize_nf4(bad)
