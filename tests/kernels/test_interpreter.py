"""The harness must let right kernels pass and wrong ones fail: each check meets a kernel that is broken its way."""

import os

import interpreter
import pytest
import torch

pytest.importorskip("triton")
from tritium.kernels import rms_norm
from tritium.kernels.backend import tl, triton, use_triton
from tritium.kernels.interpreter import internals

# Right and wrong kernels ----------------------------------------------------------------------------------------------


@triton.jit
def copy_rows(p_x, p_y, stride_x, stride_y, E, BLOCK: tl.constexpr, INT64: tl.constexpr, MASK: tl.constexpr):
    i_row = tl.program_id(0)
    if INT64:
        i_row = i_row.to(tl.int64)
    i_col = tl.arange(0, BLOCK)
    m = i_col < (E if MASK else BLOCK)
    tl.store(p_y + i_row * stride_y + i_col, tl.load(p_x + i_row * stride_x + i_col, mask=m), mask=m)


@triton.jit
def store_at(p_y, shift, FROM_ZERO: tl.constexpr):
    tl.store(p_y + (0 if FROM_ZERO else tl.program_id(0)) + shift, 1.0)


@triton.jit
def load_tail(p_x, p_y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(p_y + i, tl.load(p_x + i, mask=i < n))


@triton.jit
def store_folded(p_y, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    tl.store(p_y + tl.arange(0, BLOCK) % FOLD, 1.0)


@triton.jit
def running_sum(p_x):
    i = tl.program_id(0)
    tl.store(p_x + i + 1, tl.load(p_x + i) + tl.load(p_x + i + 1))


@triton.jit
def count(p_n):
    tl.atomic_add(p_n, 1)


@triton.jit
def bf16_arithmetic(p_x, p_y, p_out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    b_x, b_y = tl.load(p_x + i), tl.load(p_y + i)
    tl.store(p_out + i, b_x + b_y)
    tl.store(p_out + BLOCK + i, b_x * b_y)
    tl.store(p_out + 2 * BLOCK + i, tl.where(b_x < b_y, b_x - b_y, 0.5))
    tl.store(p_out + 3 * BLOCK + i, b_x.to(tl.float16).to(tl.bfloat16))


@triton.jit
def round_to_bf16(p_x, p_y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(p_y + i, tl.load(p_x + i).to(tl.bfloat16))


@triton.jit
def matmul(p_a, p_b, p_c, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p_c + i, tl.dot(tl.load(p_a + i), tl.load(p_b + i), input_precision=PRECISION))


@triton.jit
def sum_in_bf16(p_x, p_y, BLOCK: tl.constexpr):
    tl.store(p_y, tl.sum(tl.load(p_x + tl.arange(0, BLOCK)), 0))


@triton.jit
def double_all(p_table, N, shift, BLOCK: tl.constexpr):
    i, i_tensor = tl.arange(0, BLOCK) + shift, tl.program_id(0) % N
    n, p = tl.load(p_table + i_tensor), tl.load(p_table + N + i_tensor).to(tl.pointer_type(tl.float32))
    tl.store(p + i, 2 * tl.load(p + i, mask=i < n), mask=i < n)


@triton.jit
def _affine(scale_a, shift_a, scale_b, shift_b):
    return scale_a * scale_b, shift_a * scale_b + shift_b


@triton.jit
def scan_rows(p_x, p_y, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    i = tl.arange(0, 2)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_x = tl.load(p_x + i)
    tl.store(p_y + i, tl.associative_scan((0.5 * b_x, b_x), 1, _affine, reverse=REVERSE)[1])


def run_copy(x, y, rows=None, int64=True, mask=True):
    block = triton.next_power_of_2(x.shape[1])
    grid = (rows or len(x),)
    with interpreter.checked() as trace:
        copy_rows[grid](x, y, x.stride(0), y.stride(0), x.shape[1], BLOCK=block, INT64=int64, MASK=mask)
    return trace


# Numbers --------------------------------------------------------------------------------------------------------------


def test_bf16_arithmetic_is_that_of_torch():
    torch.manual_seed(0)
    x, y, out = torch.randn(64).bfloat16(), torch.randn(64).bfloat16(), torch.empty(4, 64).bfloat16()
    with interpreter.checked():
        bf16_arithmetic[(1,)](x, y, out, BLOCK=64)
    wanted = torch.stack([x + y, x * y, torch.where(x < y, x - y, 0.5), x.half().bfloat16()])
    assert torch.equal(out, wanted)


def test_fp32_is_rounded_to_the_nearest_bf16():
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1e-40, 3.3e38, 3.4e38, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875])
    x = torch.cat([special, torch.randn(54)])
    y = torch.empty(64, dtype=torch.bfloat16)
    with interpreter.checked():
        round_to_bf16[(1,)](x, y, BLOCK=64)
    assert torch.equal(y.nan_to_num(7), x.bfloat16().nan_to_num(7)) and y[7].isnan()


@pytest.mark.parametrize(
    "dtype, precision, low, high",
    [
        (torch.bfloat16, "ieee", 0, 1e-6),  # products of bf16 are exact in fp32
        (torch.float32, "ieee", 0, 1e-6),
        (torch.float32, "tf32", 1e-4, 1e-3),  # Triton's default on NVIDIA: 10 bits of mantissa
    ],
)
def test_dot_has_the_precision_of_the_hardware(dtype, precision, low, high):
    torch.manual_seed(0)
    a, b, c = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32)
    with interpreter.checked():
        matmul[(1,)](a, b, c, BLOCK=32, PRECISION=precision)
    wanted = a.double() @ b.double()
    assert low <= (c - wanted).norm() / wanted.norm() < high


def test_a_reduction_in_bf16_is_refused():
    with interpreter.checked(), pytest.raises(TypeError, match="cast to fp32"):
        sum_in_bf16[(1,)](torch.ones(16).bfloat16(), torch.empty(1).bfloat16(), BLOCK=16)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_the_recurrence(reverse):
    torch.manual_seed(0)
    x, y = torch.randn(2, 16), torch.empty(2, 16)
    with interpreter.checked():
        scan_rows[(1,)](x, y, BLOCK=16, REVERSE=reverse)
    x, y = (t.flip(1) if reverse else t for t in (x, y))
    running = torch.zeros(2)
    for i in range(16):
        running = 0.5 * x[:, i] * running + x[:, i]
        torch.testing.assert_close(y[:, i], running)


# Traffic --------------------------------------------------------------------------------------------------------------


def test_traffic_is_counted_by_argument_without_masked_lanes():
    x, y = torch.randn(3, 5), torch.empty(3, 5)
    trace = run_copy(x, y)
    launch = trace.launches[0]
    assert torch.equal(x, y)
    assert (launch.kernel, launch.grid) == ("copy_rows", (3, 1, 1))
    assert launch.loaded == {"p_x": 60} and launch.stored == {"p_y": 60}
    assert (trace.bytes_loaded, trace.bytes_stored) == (60, 60)


def test_what_no_program_writes_is_nan():
    with interpreter.checked():
        y = torch.empty(4)
        store_at[(3,)](y, 0, FROM_ZERO=False)
    assert y[:3].eq(1).all() and y[3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8])
def test_masked_lanes_without_a_value_are_poisoned(dtype):
    y = torch.zeros(8, dtype=dtype)
    with interpreter.checked():
        load_tail[(1,)](torch.ones(5, dtype=dtype), y, 5, BLOCK=8)
    assert y[:5].eq(1).all() and (y[5:].isnan().all() if dtype.is_floating_point else y[5:].gt(200).all())


# Addresses ------------------------------------------------------------------------------------------------------------


def test_a_missing_mask_is_out_of_bounds_even_inside_the_same_memory():
    storage = torch.zeros(4, 8)
    with pytest.raises(interpreter.OutOfBounds, match=r"copy_rows.*read outside p_x .*5 elements from its start"):
        run_copy(storage[:1, :5], torch.empty(1, 8), mask=False)
    with pytest.raises(interpreter.OutOfBounds, match="write outside p_y"):
        run_copy(torch.zeros(1, 8), storage[:1, :5], mask=False)


@pytest.mark.parametrize("shift", [-1, 1, 2**40, -(2**40)])
def test_one_element_off_is_out_of_bounds(shift):
    with interpreter.checked(), pytest.raises(interpreter.OutOfBounds, match="store_at.*p_y"):
        store_at[(1,)](torch.empty(1), shift, FROM_ZERO=True)


def test_strided_transposed_and_expanded_tensors_are_within_bounds():
    y = torch.empty(6, 8)
    run_copy(torch.randn(6, 16)[:, 4:12], y)
    run_copy(torch.randn(8).expand(6, 8), y)
    run_copy(torch.randn(12, 8)[::2], y)
    assert not y.isnan().any()


def test_int32_offsets_overflow_and_int64_offsets_do_not():
    x = torch.empty_strided((4, 8), (2**30, 1), device="meta")  # row 3 starts 3 · 2^30 elements in
    y = torch.empty_strided((4, 8), (2**30, 1), device="meta")
    trace = run_copy(x, y)
    assert trace.bytes_loaded == trace.bytes_stored == 4 * 8 * 4
    with pytest.raises(interpreter.OutOfBounds, match="-1073741824 elements|-2147483648 elements"):
        run_copy(x, y, int64=False)


def run_double_all(tensors, programs=None, shift=0):
    table = torch.tensor([[len(x) for x in tensors], [x.data_ptr() for x in tensors]])
    before = table.clone()
    table.pointees = {"xs": tensors}
    with interpreter.checked() as trace:
        double_all[(programs or len(tensors),)](table, len(tensors), shift, BLOCK=8)
    assert torch.equal(table, before)
    return trace.launches[0]


def test_tensors_behind_a_table_of_addresses_are_checked_and_counted():
    storage = torch.ones(20)
    launch = run_double_all([storage[:5], storage[10:13]])
    assert storage.tolist() == [2.0] * 5 + [1.0] * 5 + [2.0] * 3 + [1.0] * 7
    assert launch.loaded == {"p_table": 4 * 8, "xs": 8 * 4} and launch.stored == {"xs": 8 * 4}
    with pytest.raises(interpreter.OutOfBounds, match=r"double_all.*read outside xs \(shape \(5,\).*-1 elements"):
        run_double_all([storage[5:10]], shift=-1)
    with pytest.raises(interpreter.DataRace, match=r"double_all.*both write xs"):
        run_double_all([storage[:5]], programs=2)


def test_an_address_that_no_table_gave_is_out_of_bounds():
    x = torch.ones(5)
    table = torch.tensor([[5], [x.data_ptr()]])  # without pointees
    with interpreter.checked(), pytest.raises(interpreter.OutOfBounds, match="an address that no argument gave"):
        double_all[(1,)](table, 1, 0, BLOCK=8)


# Order and races ------------------------------------------------------------------------------------------------------


def test_two_programs_that_write_one_address_race():
    with interpreter.checked(), pytest.raises(interpreter.DataRace, match=r"store_at.*both write p_y"):
        store_at[(2,)](torch.empty(1), 0, FROM_ZERO=True)


def test_a_store_that_writes_one_address_twice_races():
    with interpreter.checked(), pytest.raises(interpreter.DataRace, match="4 addresses of p_y more than once"):
        store_folded[(1,)](torch.empty(4), BLOCK=8, FOLD=4)


def test_a_program_that_reads_what_another_writes_races():
    with interpreter.checked(), pytest.raises(interpreter.DataRace, match=r"running_sum.*both write and read p_x"):
        running_sum[(3,)](torch.ones(4))


def test_atomics_are_refused():
    with interpreter.checked(), pytest.raises(interpreter.CheckFailed, match="count uses an atomic"):
        count[(2,)](torch.zeros(1, dtype=torch.int32))


def test_programs_run_in_an_order_drawn_from_the_seed():
    def first_program(seed):
        with interpreter.checked(seed), pytest.raises(interpreter.OutOfBounds) as error:
            store_at[(8,)](torch.empty(1), 9, FROM_ZERO=True)  # every program fails; the first one is named
        return str(error.value).split("program ")[1].split(":")[0]

    programs = [first_program(seed) for seed in range(6)]
    assert programs == [first_program(seed) for seed in range(6)]
    assert len(set(programs)) > 2


# The switch -----------------------------------------------------------------------------------------------------------


def test_outside_the_context_everything_is_as_before(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITIUM_BACKEND", "auto")
    before = triton.runtime.jit.JITFunction.run
    with pytest.raises(ZeroDivisionError), interpreter.checked():
        assert use_triton(torch.zeros(1))
        raise ZeroDivisionError
    assert not use_triton(torch.zeros(1)) and not torch.are_deterministic_algorithms_enabled()
    assert triton.runtime.jit.JITFunction.run is before and os.environ["TRITIUM_BACKEND"] == "auto"


def test_triton_on_a_cpu_without_the_interpreter_is_explained(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITIUM_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        rms_norm(torch.ones(2, 4), torch.ones(4))


def test_an_unknown_interpreter_is_refused_by_name(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.delattr(InterpreterBuilder, "create_dot")
    with pytest.raises(RuntimeError, match=r"lacks create_dot.*3\.6\.0 and 3\.7\.1"):
        internals.__wrapped__()
