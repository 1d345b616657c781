"""AdamW against torch's own, with masters, scaling, skipping, chunks, strange layouts and stochastic rounding."""

import contextlib
import importlib

import interpreter
import pytest
import torch

from tritium.kernels import adamw_, multi_tensor
from tritium.kernels.backend import HAS_TRITON, tl, triton

file = importlib.import_module("tritium.kernels.adamw")
OPTIONS = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", request.param)
    monkeypatch.setattr(file, "CHUNK", 512)
    torch.manual_seed(0)
    with interpreter.checked(seed=1) if request.param == "triton" else contextlib.nullcontext():
        yield request.param


def state(params, dtype=None):
    return [torch.zeros_like(p, dtype=dtype) for p in params], [torch.zeros_like(p, dtype=dtype) for p in params]


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch(backend, lr, dtype):
    params = [torch.randn(2100, dtype=dtype), torch.randn(3, 5, dtype=dtype), torch.randn(0, dtype=dtype)]
    expected = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(expected, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    m, v = state(params)
    for step in range(1, 4):
        grads = [torch.randn_like(p) for p in params]
        for p, g in zip(expected, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        scaled = [8 * g for g in grads]
        before = [g.clone() for g in scaled]
        scalars = dict(step=torch.tensor(float(step)), grad_scale=torch.tensor(0.125))
        adamw_(params, scaled, m, v, **OPTIONS | {"lr": lr}, **scalars)
        assert all(torch.equal(a, b) for a, b in zip(scaled, before, strict=True)), "gradients were written to"
    tolerance = 1e-6 if dtype == torch.float32 else 1e-8  # an lr in fp32 is that exact
    torch.testing.assert_close(params, [p.detach() for p in expected], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("step", [1, 2, 50, 10**7])
def test_bias_corrections_at_small_and_large_steps(backend, step, beta2):
    """1 - β₂ᵗ in fp32 by subtraction has an error of 6 % at the first step of β₂ = 0.999999."""
    tensors = [torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4)]
    wide = [[x.double()] for x in tensors]
    options = OPTIONS | {"lr": 1.0, "beta2": beta2, "step": torch.tensor(step)}
    adamw_(*([x] for x in tensors), **options)
    file.adamw_reference_(*wide, **options)
    for x, (expected,) in zip(tensors, wide, strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)


def test_params_are_cast_copies_of_their_masters(backend):
    masters = [torch.randn(21), torch.randn(3, 5)]
    params = [x.bfloat16() for x in masters]
    plain = [x.clone() for x in masters]
    grads = [torch.randn(x.shape).bfloat16() for x in masters]
    (m, v), (m_plain, v_plain) = state(masters), state(masters)
    adamw_(params, grads, m, v, masters=masters, step=torch.tensor(1.0), **OPTIONS)
    adamw_(plain, [g.float() for g in grads], m_plain, v_plain, step=torch.tensor(1.0), **OPTIONS)
    for p, master, expected in zip(params, masters, plain, strict=True):
        assert torch.equal(master, expected) and torch.equal(p, master.bfloat16())


def test_nothing_changes_when_a_gradient_is_not_finite(backend):
    masters = [torch.randn(21)]
    params, (m, v) = [torch.randn(21).bfloat16()], state(masters)  # params differ from their masters: that stays, too
    step = torch.tensor(0.0)  # as when the very first step is skipped
    before = [x.clone() for x in (*params, *masters, *m, *v, step)]
    grads = [torch.full((21,), torch.nan)]
    adamw_(params, grads, m, v, masters=masters, step=step, found_inf=torch.tensor(3.0), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip((*params, *masters, *m, *v, step), before, strict=True))


def test_any_layout(backend):
    tensors = [torch.randn(6, 5) for _ in range(2)] + [torch.rand(6, 5) for _ in range(2)]
    strided = [x.t().contiguous().t() if i % 2 else x.repeat_interleave(2, 1)[:, ::2] for i, x in enumerate(tensors)]
    transposed = [x.t().contiguous().t() for x in tensors]  # one layout for all: no copies
    odd = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(6, 5) for x in tensors]  # 4 bytes off any alignment
    for p, g, m, v in (tensors, strided, transposed, odd):
        adamw_([p], [g], [m], [v], step=torch.tensor(2.0), **OPTIONS)
    for other in (strided, transposed, odd):
        torch.testing.assert_close(other, tensors)


def test_a_gradient_that_is_one_number_for_all(backend):
    params = [torch.ones(40)]
    m, v = state(params)
    adamw_(params, [torch.tensor(2.0).expand(40)], m, v, step=torch.tensor(1.0), **OPTIONS | {"weight_decay": 0.0})
    torch.testing.assert_close(params[0], torch.full((40,), 0.99))


def test_an_empty_list_is_a_step(backend):
    adamw_([], [], [], [], step=torch.tensor(1.0), **OPTIONS)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"grads": []}, "1 params but 0 grads"),
        ({"exp_avgs": [torch.zeros(4)]}, r"params\[0\] is \(3,\) but exp_avgs\[0\] is \(4,\)"),
        ({"params": [torch.zeros(3).bfloat16()]}, "give fp32 masters"),
        ({"grads": [None]}, r"grads\[0\] is a NoneType"),
        ({"step": 3}, "step is 3, wanted a scalar tensor"),
        ({"grads": [torch.zeros(3).int()]}, r"grads\[0\] is torch.int32"),
        ({"masters": [torch.zeros(3)], "seed": torch.tensor(1)}, "a seed is for params without masters"),
        ({"seed": torch.tensor(1.0)}, "seed is torch.float32, wanted torch.int64"),
        ({"step": torch.ones(3)}, r"step is \(3,\), wanted a scalar"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(ValueError, match=message):
        adamw_(**inputs | {"step": torch.tensor(1.0)} | change, **OPTIONS)


# Stochastic rounding --------------------------------------------------------------------------------------------------


def test_philox_is_the_published_generator():
    """The known answers of Random123 for a counter and a key of zeros, and of ones."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    answers = ["6627e8d5 e169c58d bc57ac4c 9b00dbd8", "408f276d 41c83b0e a20bc7c6 6d5451fd"]
    for counter, seed, answer in ((zero, zero, answers[0]), (ones, torch.tensor(-1), answers[1])):
        assert file._philox([counter] * 4, seed).tolist() == [int(number, 16) for number in answer.split()]


def decayed(seed=1, step=1, n=4096, **options):
    """Ones in bf16 after one step that is a decay alone, to 1 - 1/1024: a quarter of the way to the next lower bf16."""
    params = [torch.ones(n, dtype=torch.bfloat16)]
    options = OPTIONS | {"lr": 1.0, "weight_decay": 1 / 1024, "seed": torch.tensor(seed)} | options
    adamw_(params, [torch.zeros(n)], *state(params, torch.float32), step=torch.tensor(step), **options)
    return params[0]


def test_stochastic_rounding_is_unbiased_and_to_a_neighbour(backend):
    p = decayed()
    down = (p != 1).float().mean().item()
    assert set(p.tolist()) == {1.0, 1 - 2**-8}
    assert abs(down - 0.25) < 4 * (0.25 * 0.75 / 4096) ** 0.5  # four standard deviations


def test_the_bits_follow_from_seed_step_place_and_element(backend):
    first = decayed()
    assert torch.equal(first, decayed())
    assert not torch.equal(first, decayed(seed=2)) and not torch.equal(first, decayed(seed=1 + 2**32))
    assert not torch.equal(first, decayed(step=2))
    two = [torch.ones(4096, dtype=torch.bfloat16) for _ in range(2)]
    options = OPTIONS | {"lr": 1.0, "weight_decay": 1 / 1024, "seed": torch.tensor(1), "step": torch.tensor(1)}
    adamw_(two, [torch.zeros(4096)] * 2, *state(two, torch.float32), **options)
    assert torch.equal(two[0], first) and not torch.equal(two[1], first)
    assert torch.equal(two[0], decayed(n=4099)[:4096])
    assert torch.equal(decayed(seed=7, found_inf=torch.tensor(1.0)), torch.ones(4096, dtype=torch.bfloat16))


def test_other_params_beside_stochastic_ones_are_as_ever(backend):
    tensors = [torch.randn(9) for _ in range(3)] + [torch.rand(9)]
    plain = [x.clone() for x in tensors]
    half = [x.bfloat16() for x in tensors]
    lists = [[x, y] for x, y in zip(half, tensors, strict=True)]
    adamw_(*lists, step=torch.tensor(1), seed=torch.tensor(3), **OPTIONS)
    adamw_(*([x] for x in plain), step=torch.tensor(1), **OPTIONS)
    torch.testing.assert_close(tensors, plain)
    torch.testing.assert_close(half[0].float(), plain[0], rtol=2**-6, atol=2**-6)


@triton.jit
def _round(p_x, p_y, p_seed, step, place, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    i_start = tl.program_id(0).to(tl.int64) * BLOCK
    seed, zero = tl.load(p_seed), tl.program_id(0) * 0
    b = file._round_stochastically(tl.load(p_x + i_start + i), seed, zero + step, zero + place, i_start, BLOCK)
    tl.store(p_y + i_start + i, b)


@needs_triton
def test_both_backends_round_with_the_same_bits():
    torch.manual_seed(0)
    special = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000, 0x7F7FFFFF, 0, 1], dtype=torch.int32)
    x = torch.cat([special.view(torch.float32), torch.randn(248)])  # NaN, inf, the largest and the smallest first
    y, seed = torch.empty(256, dtype=torch.bfloat16), torch.tensor(-(2**40) - 3)
    with interpreter.checked():
        _round[(2,)](x, y, seed, 5, 6, BLOCK=128)
    expected = file._round_stochastically_torch(x, seed, torch.tensor(5), 6, 0)
    assert torch.equal(y.view(torch.int16)[3:], expected.view(torch.int16)[3:]) and y[:3].isnan().all()
    assert torch.equal(y[3:5].float(), x[3:5])


# Triton only ----------------------------------------------------------------------------------------------------------


def example(n, dtype=torch.bfloat16):
    return [[torch.rand(size).to(kind) for size in (n, 7)] for kind in (dtype, dtype, torch.float32, torch.float32)]


@needs_triton
def test_moves_each_byte_once():
    lists, masters = example(5000), [torch.rand(5000), torch.rand(7)]
    with interpreter.checked() as trace:
        adamw_(*lists, masters=masters, step=torch.tensor(1.0), **OPTIONS)
    (launch,) = trace.launches
    wide, half = 4 * 5007, 2 * 5007
    assert launch.grid == (4, 1, 1)
    scalars = {name: launch.loaded.pop(name) for name in ("p_table", "p_step")}
    assert launch.loaded == {"grads": half, "exp_avgs": wide, "exp_avg_sqs": wide, "masters": wide}
    assert launch.stored == {"params": half, "exp_avgs": wide, "exp_avg_sqs": wide, "masters": wide}
    assert sum(scalars.values()) == 4 * (8 * (2 + 2 + 5) + 4)  # a search among two, size and place, five addresses


@needs_triton
def test_a_skipped_step_touches_no_tensor():
    lists = example(5000, torch.float32)
    with interpreter.checked() as trace:
        adamw_(*lists, step=torch.tensor(1.0), found_inf=torch.tensor(True), **OPTIONS)
    assert set(trace.launches[0].loaded) == {"p_found_inf"} and not trace.launches[0].stored


@needs_triton
def test_one_launch_for_each_combination_of_dtypes_and_one_table_for_all_steps():
    lists = [[*a, *b] for a, b in zip(example(9, torch.float32), example(9, torch.float32), strict=True)]
    lists[1][1] = lists[1][1].bfloat16()
    multi_tensor._TABLES.clear()
    with interpreter.checked() as trace:
        for step in (1, 2, 3):
            adamw_(*lists, step=torch.tensor(step), **OPTIONS)
    assert len(trace.launches) == 6 and len(multi_tensor._TABLES) == 2


@needs_triton
def test_a_table_that_a_cuda_graph_was_captured_with_is_never_freed(monkeypatch):
    """And none is made meanwhile; of the others the ones used last stay."""
    monkeypatch.setattr(multi_tensor, "_TABLES", {})
    monkeypatch.setattr(multi_tensor, "KEPT", 3)
    lists = [{"x": [torch.ones(n)]} for n in range(1, 10)]

    def table(i):
        return multi_tensor.groups(lists[i], 16)[0].table

    tables = [table(i) for i in range(3)]
    with monkeypatch.context() as capture:
        capture.setattr(multi_tensor, "_captures", lambda device: True)
        assert table(1) is tables[1]
        with pytest.raises(RuntimeError, match="run one with them first"):
            table(8)
    for i in range(3, 7):
        table(i)
    assert table(1) is tables[1] and table(5) is table(5)
    assert table(0) is not tables[0] and len(multi_tensor._TABLES) == 4


@needs_triton
def test_a_table_is_used_on_another_stream_after_its_copy(monkeypatch):
    class Stream:
        waits = []

        def wait_event(self, event):
            self.waits.append(event)

    first, second, data = Stream(), Stream(), torch.zeros(1)
    data.record_stream = lambda stream: second.waits.append("kept")  # until that stream is done with it
    table = multi_tensor._Table(data, 1, first, "copied")
    multi_tensor._wait_for(table, first)
    assert not Stream.waits
    multi_tensor._wait_for(table, second)
    assert Stream.waits == ["copied", "kept"]


@needs_triton
def test_a_learning_rate_in_fp64_is_no_fp64_tensor_to_update():
    with interpreter.checked() as trace:
        options = OPTIONS | {"lr": torch.tensor(0.1, dtype=torch.float64)}
        adamw_(*example(9, torch.float32), step=torch.tensor(1.0), **options)
    assert trace.launches


def test_a_tensor_that_is_listed_twice_is_named():
    params, *others = example(9, torch.float32)
    twice = [params[0], params[0].view(-1)], *([x[0], x[0].clone()] for x in others)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] are the same tensor"):
        adamw_(*twice, step=torch.tensor(1.0), **OPTIONS)


@needs_triton
def test_offsets_are_64_bits_wide():
    """Blocks beyond 2^31 elements: a table that says that the tensor has so many programs before this launch's."""
    before = 2**31 // 2048 - 1
    far = torch.empty(2**31 + 2048 + 5, device="meta")
    table = torch.tensor([[-before], [len(far)], [0], *([0] for _ in range(5))])
    table.pointees = {name: [far] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters")}
    kinds = [tl.float32] * 4
    with interpreter.checked() as trace:
        file._adamw[(3,)](
            table, None, torch.tensor(1.0), None, None, torch.tensor(1), 1,
            0.1, 0.9, 0.9, 0.1, 0.1, -0.1, -0.1, 1e-8, 0.0, *kinds, True, BLOCK=2048,
        )  # fmt: skip
    assert trace.launches[0].stored["masters"] == 4 * (2 * 2048 + 5)


@needs_triton
def test_the_registered_op_passes_opcheck():
    lists = example(5, torch.bfloat16)
    with interpreter.checked():
        scalars = (torch.tensor(0.1), torch.tensor(1), torch.tensor(2.0), torch.tensor(0.0), torch.tensor(7))
        torch.library.opcheck(file._launch, (*lists, [], *scalars, 0.0, 0.9, 0.95, 1e-8, 0.1))
