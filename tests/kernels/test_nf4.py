"""NF4: error, size, exact values, odd sizes, on the torch path and as a Triton kernel, interpreted."""

import contextlib
from dataclasses import replace
from unittest import mock

import interpreter
import numpy as np
import pytest
import torch

from tritium.kernels import NF4Tensor, dequantize_nf4, quantize_nf4
from tritium.kernels.backend import HAS_TRITON
from tritium.kernels.nf4 import CODES, CONFIG, _dequantize_nf4, dequantize_nf4_reference

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", request.param)
    with interpreter.checked(seed=1) if request.param == "triton" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (0, 64), (3, 70), (129, 130), (2, 3, 257), (20, 1000)])
def test_agrees_with_the_reference(backend, shape, dtype):
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


def test_a_block_made_of_codes_comes_back(backend):
    """One block: its absmax is the mean of all absmax, so that double quantisation is exact too."""
    weight = 0.5 * torch.tensor(CODES).repeat(4)
    torch.testing.assert_close(dequantize_nf4(quantize_nf4(weight)), weight)


def test_zeros_stay_zero(backend):
    weight = torch.zeros(3, 64)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight)), weight)


def test_size():
    packed = quantize_nf4(torch.randn(512, 512))
    assert packed.nbytes * 8 / 512**2 == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)


def test_in_a_module_it_moves_is_saved_and_loaded():
    class Linear(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.shape, packed = weight.shape, quantize_nf4(weight)
            for i, part in enumerate(packed.parts):
                self.register_buffer(f"part{i}", part)

        def forward(self, x):
            weight = NF4Tensor(*(getattr(self, f"part{i}") for i in range(4)), self.shape, x.dtype)
            return x @ dequantize_nf4(weight).t()

    one, two = Linear(torch.randn(3, 70)), Linear(torch.randn(3, 70))
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 70)
    assert torch.equal(one(x), two(x))
    assert one.to("meta").part0.is_meta


def test_to_another_device_keeps_shape_and_dtype():
    packed = quantize_nf4(torch.randn(3, 70).bfloat16())
    moved = packed.to("meta")
    assert all(part.is_meta for part in moved.parts) and moved.nbytes == packed.nbytes
    assert (moved.shape, moved.dtype) == ((3, 70), torch.bfloat16)


@pytest.mark.parametrize("bad", [torch.zeros(4, dtype=torch.int32), torch.tensor([1.0, torch.nan])])
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match="quantize_nf4"):
        quantize_nf4(bad)


def test_parts_of_another_shape_are_named():
    packed = quantize_nf4(torch.randn(3, 70))
    with pytest.raises(ValueError, match=r"shape \(9, 70\).*\[\(128,\), \(4,\).*wanted \[\(320,\), \(10,\)"):
        replace(packed, shape=(9, 70))


# Triton only ----------------------------------------------------------------------------------------------------------


@needs_triton
def test_moves_each_byte_once():
    packed = quantize_nf4(torch.randn(130, 128).bfloat16())
    with interpreter.checked() as trace:
        dense = dequantize_nf4(packed)
    (launch,) = trace.launches
    programs, blocks = launch.grid[0], len(packed.absmax)
    assert programs == -(-blocks // CONFIG["ROWS"])
    once = {"p_codes": packed.codes.nbytes, "p_absmax": packed.absmax.nbytes}
    assert launch.loaded == once | {"p_absmax_scale": 4 * blocks, "p_absmax_mean": 4 * programs}
    assert launch.stored == {"p_out": dense.nbytes}


@needs_triton
def test_parts_of_any_strides():
    packed = quantize_nf4(torch.randn(5, 64))
    apart = [part.repeat_interleave(2)[::2] if part.ndim else part for part in packed.parts]
    with interpreter.checked():
        assert torch.equal(dequantize_nf4(NF4Tensor(*apart, packed.shape, packed.dtype)), dequantize_nf4(packed))


@needs_triton
def test_offsets_are_64_bits_wide():
    """The program that comes after 2^32 weights, whose codes lie past 2^31 bytes."""
    from triton.language import int32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    blocks, program = 2**26 + 64, 2**20
    codes, out = (torch.empty(n * blocks, device="meta", dtype=torch.uint8) for n in (32, 64))
    absmax, scale = torch.empty(blocks, device="meta"), torch.empty(blocks // 256 + 1, device="meta")
    number = TensorHandle(np.array([program], dtype=np.int32), int32)
    far = mock.patch.object(InterpreterBuilder, "create_get_program_id", lambda self, axis: number)
    with interpreter.checked() as trace, far:
        _dequantize_nf4[(1,)](codes, absmax, scale, torch.zeros(()), out, 64 * blocks - 1, **CONFIG)
    assert trace.launches[0].loaded["p_codes"] == 64 * 32 and trace.launches[0].stored["p_out"] == 64 * 64 - 1


@needs_triton
def test_order_of_programs_changes_no_bit():
    packed = quantize_nf4(torch.randn(130, 128))

    def run(seed):
        with interpreter.checked(seed):
            return dequantize_nf4(packed)

    assert torch.equal(run(0), run(1))
