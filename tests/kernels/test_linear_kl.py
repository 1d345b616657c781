"""Divergences of two heads and of a top-k teacher: tiles, gradients, and what must be zero."""

import contextlib
import importlib

import interpreter
import pytest
import torch
import traffic

from tritium.kernels import TopK, linear_kl
from tritium.kernels.backend import HAS_TRITON, TARGETS

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
head = importlib.import_module("tritium.kernels.head")
head_triton = importlib.import_module("tritium.kernels.head_triton")
module = importlib.import_module("tritium.kernels.linear_kl")
reference = module.linear_kl_reference
KINDS = ("forward", "reverse", "jsd")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(head, "TILE_ROWS", 3)
    monkeypatch.setitem(head_triton.TILE_BYTES, "cpu", 3 * 4 * 4)
    torch.manual_seed(0)


def make(T=7, V=18, E=6, E_teacher=9):
    student, student_weight = (torch.randn(n, E, dtype=torch.float64).requires_grad_() for n in (T, V))
    teacher, teacher_weight = (torch.randn(n, E_teacher, dtype=torch.float64).requires_grad_() for n in (T, V))
    return student, student_weight, teacher, teacher_weight


def top_k(teacher, teacher_weight, k):
    values, ids = (teacher @ teacher_weight.t()).detach().log_softmax(-1).topk(k, -1)
    return TopK(ids, values)


def check(student, student_weight, teacher, teacher_weight, **options):
    ours, expected = (f(student, student_weight, teacher, teacher_weight, **options) for f in (linear_kl, reference))
    torch.testing.assert_close(ours, expected)
    seed = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, (student, student_weight), seed) for y in (ours, expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_equal_the_whole(kind):
    check(*make(), temperature=1.7, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 17])
def test_top_k_teacher(kind, k):
    """k = 17 of 18 words: whole chunks of the vocabulary are excluded from the rest."""
    student, student_weight, *teacher = make()
    check(student, student_weight, top_k(*teacher, k), None, temperature=0.8, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_top_k_teacher_sure_of_its_tokens(kind, dtype):
    """fp32 makes of the rest, e^-25, 1 - Σ p ≤ 0: that it is less likely than rounding can tell must not cost 1e38."""
    student, student_weight, *_ = in_dtype(make(V=50), dtype)
    z = torch.randn(7, 50, dtype=torch.float64)
    z[:, 7] += 25
    logp, ids = z.log_softmax(-1).topk(8)
    kl = linear_kl(student, student_weight, TopK(ids, logp.to(dtype)), None, kind=kind)
    gradients = torch.autograd.grad(kl.sum(), (student, student_weight))
    log_q = (student.double() @ student_weight.double().t()).log_softmax(-1)
    p, q = (
        torch.cat([x.gather(1, ids), x.scatter(1, ids, -torch.inf).logsumexp(-1, True)], 1)
        for x in (z.log_softmax(-1), log_q)
    )
    exact = module.divergence(p, q, kind)
    lower = 0.65 if kind == "reverse" else 0.98  # fp32 leaves log eps, -16, of the rest's log p, -24
    assert (kl >= lower * exact).all() and (kl <= 1.02 * exact).all()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_teacher_with_nothing_left(kind):
    """A teacher whose k tokens have all the probability, to rounding, and one of them none."""
    student, student_weight, *_ = make()
    logp = torch.tensor([[0.25, 0.75, 0.0]]).log().expand(7, 3).clone().requires_grad_()
    kl = linear_kl(student, student_weight, TopK(torch.tensor([[3, 5, 7]]).expand(7, 3), logp), None, kind=kind)
    gradients = torch.autograd.grad(kl.sum(), (student, student_weight), retain_graph=True)
    assert (kl > 0).all() and all(g.isfinite().all() for g in (kl, *gradients))
    assert torch.autograd.grad(kl.sum(), logp, allow_unused=True) == (None,)  # the teacher gets none


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_do_not_count_are_left_to_the_rest(kind, monkeypatch):
    """-1, and, under torch.compile as on a GPU, ids out of range and the second of two: these are counted."""
    monkeypatch.setattr(head, "_INVALID", {})
    monkeypatch.setattr(head, "TILE_ROWS", 7)
    monkeypatch.setitem(head_triton.TILE_BYTES, "cpu", 1 << 20)  # one tile: each is a part of the graph
    student, student_weight, *teacher = make()
    ids, logp = top_k(*teacher, 3)
    expected = linear_kl(student, student_weight, TopK(ids, logp), None, kind=kind)
    none = torch.full((7, 1), -1)
    empty = torch.cat([ids[:, :1], none, ids[:, 1:], none], 1), torch.cat([logp[:, :1], logp, logp[:, :1]], 1)
    ours = linear_kl(student, student_weight, TopK(*empty), None, kind=kind)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), (student, student_weight)) for y in (ours, expected)))
    wrong = torch.cat([ids, none + 19, none - 1, ids[:, 1:2]], 1), torch.cat([logp, logp], 1)
    compiled = torch.compile(linear_kl, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, student_weight, TopK(*wrong), None, kind=kind), expected)
    assert int(head.invalid_targets("cpu")) == 3 * 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(kind):
    student, weight, *_ = make()
    kl = linear_kl(student, weight, student.detach(), weight.detach(), kind=kind)
    gradients = torch.autograd.grad(kl.sum(), (student, weight))
    for x in (kl, *gradients):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_may_be_changed_in_place(kind):
    inputs = make()
    kept, changed = (linear_kl(*inputs, kind=kind) for _ in range(2))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), inputs[:2]) for y in (2 * kept, changed.mul_(2))))


def test_the_teacher_gets_no_gradient():
    student, student_weight, teacher, teacher_weight = make()
    linear_kl(student, student_weight, teacher, teacher_weight).sum().backward()
    assert teacher.grad is None and teacher_weight.grad is None and student_weight.grad.norm() > 0


ALONE = {"teacher_weight": None}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": "backward"}, "kind must be one of forward, reverse, jsd"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"teacher": torch.randn(6, 9).double()}, r"wanted \[7, E_t\] and \[18, E_t\]"),
        ({"teacher": TopK(torch.zeros(7, 18).long(), torch.zeros(7, 18)), **ALONE}, "with k < 18"),
        ({"teacher": TopK(torch.zeros(7, 2).long(), torch.zeros(7, 2))}, "teacher_weight must be None"),
        (
            {"teacher": TopK(torch.full((7, 1), 18), torch.zeros(7, 1)), **ALONE},
            r"TopK.ids hold 18: .* in \[0, 18\) or -1",
        ),
        ({"teacher": TopK(torch.ones(7, 2).long(), torch.zeros(7, 2)), **ALONE}, "hold 1 twice for one token"),
        ({"teacher": TopK(torch.ones(7, 1), torch.zeros(7, 1)), **ALONE}, "TopK.ids is torch.float32"),
        ({"teacher": TopK(torch.ones(7, 1).long(), torch.ones(7, 1).long()), **ALONE}, "TopK.logp is torch.int64"),
        ({"teacher": TopK(torch.ones(7, 1).long().to("meta"), torch.ones(7, 1)), **ALONE}, "on cpu and on meta"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = dict(zip(("student", "student_weight", "teacher", "teacher_weight"), make(), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_kl(**inputs | change)


# Vocabulary shards ----------------------------------------------------------------------------------------------------


def sharded(kind, kernels):
    """On a rank: divergence and gradients with its half of both heads' words, of `make()` in fp32."""
    torch.manual_seed(0)
    student, student_weight, teacher, teacher_weight = (x.detach().float() for x in make(V=42))
    own = slice(21 * torch.distributed.get_rank(), 21 * torch.distributed.get_rank() + 21)
    leaves = [x.clone().requires_grad_() for x in (student, student_weight[own])]
    with interpreter.checked() if kernels else contextlib.nullcontext():
        group = torch.distributed.group.WORLD
        kl = linear_kl(*leaves, teacher, teacher_weight[own], temperature=0.7, kind=kind, group=group)
        return [kl.detach(), *torch.autograd.grad(kl.sum(), leaves)]


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_shards_equal_the_whole(pool2, kind, kernels):
    (kl, dhidden, dweight), (kl_1, dhidden_1, dweight_1) = pool2.run(sharded, kind, kernels)
    assert torch.equal(kl, kl_1)
    inputs = in_dtype(in_dtype(make(V=42), torch.float32), torch.float64)
    expected = reference(*inputs, temperature=0.7, kind=kind)
    whole = torch.autograd.grad(expected.sum(), inputs[:2])
    for a, e in zip((kl, dhidden + dhidden_1, torch.cat([dweight, dweight_1])), (expected, *whole), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=3e-5, atol=3e-5)  # plain torch: 8e-6


# Triton, interpreted --------------------------------------------------------------------------------------------------


def kl_and_gradients(function, inputs, **options):
    kl = function(*inputs, **options)
    leaves = [x for x in inputs[:2] if x.requires_grad]
    return [kl.detach(), *torch.autograd.grad(kl, leaves, torch.linspace(-1, 2, len(kl)).to(kl))]


def in_dtype(tensors, dtype):
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in tensors]


def assert_kernels_agree(inputs, tolerance=5e-6, **options):
    with interpreter.checked() as trace:
        actual = kl_and_gradients(linear_kl, inputs, **options)
    for a, e in zip(actual, kl_and_gradients(reference, in_dtype(inputs, torch.float64), **options), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)
    return [launch.kernel for launch in trace.launches]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_with_long_shares_and_chunks_of_the_vocabulary(kind, monkeypatch):
    """A program sums over several blocks of the vocabulary, and dz is made in several chunks."""
    monkeypatch.setattr(head_triton, "PROGRAMS", 1)
    monkeypatch.setattr(module, "SHARE", 2)
    kernels = assert_kernels_agree(in_dtype(make(T=5, V=79), torch.float32), temperature=1.7, kind=kind)
    walks = ["_linear_kl_online", "_linear_kl_jsd"] if kind == "jsd" else ["_linear_kl_online"]
    assert kernels == [*walks, *3 * ["_linear_kl_dz"]]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_one_token_and_two_words(kind):
    assert_kernels_agree(in_dtype(make(T=1, V=2, E=1, E_teacher=17), torch.float32), kind=kind)


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_a_student_equal_to_its_teacher_give_zeros(kind):
    student, weight, *_ = in_dtype(make(V=40), torch.bfloat16)
    with interpreter.checked():
        results = kl_and_gradients(linear_kl, (student, weight, student.detach(), weight.detach()), kind=kind)
    exact = kind != "jsd"  # whose log m is rounded
    assert all(x.abs().max() <= (0 if exact else 1e-6) for x in results)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows beyond T, which nobody stores
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_zero_give_no_nan(kind):
    """Sure of different words, or of the same one."""
    student, teacher = torch.tensor([[3000.0], [-3000.0]]), torch.tensor([[-2500.0], [-2500.0]])
    weight = torch.linspace(-1, 1, 35)[:, None]
    inputs = student.requires_grad_(), weight.clone().requires_grad_(), teacher, weight
    assert_kernels_agree(inputs, kind=kind)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows beyond T
@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_of_the_logits_costs_no_precision(kind, kernels):
    """Logits that fp32 has exactly, all near 1000: z - lse would lose what the rounding of lse, 6e-5, takes."""
    T, V = 9, 40
    weight = torch.cat([torch.randint(-300, 300, (V, 1)) / 128, torch.ones(V, 1)], 1)
    student, teacher = (torch.cat([torch.randint(-8, 8, (T, 1)) / 8, torch.full((T, 1), 1000.0)], 1) for _ in range(2))
    inputs = student.requires_grad_(), weight.clone().requires_grad_(), teacher, weight
    with interpreter.checked() if kernels else contextlib.nullcontext():
        ours = kl_and_gradients(linear_kl, inputs, kind=kind)
    plain = kl_and_gradients(reference, inputs, kind=kind)
    exact = kl_and_gradients(reference, in_dtype(inputs, torch.float64), kind=kind)
    for a, p, e in zip(ours, plain, exact, strict=True):
        error, own, size = ((x.double() - y).square().mean().sqrt() for x, y in ((a, e), (p, e), (e, 0 * e)))
        assert error <= 1.5 * own + 2 * 2.0**-23 * size


@needs_triton
def test_dhidden_of_several_chunks_is_summed_in_fp32():
    """As in test_head.py: bf16 would round away what the second and the third chunk add."""
    student, weight = torch.zeros(1, 1).bfloat16().requires_grad_(), torch.zeros(3 * 64, 1).bfloat16()
    weight[::64, 0] = torch.tensor([32768.0, 100.0, 100.0])
    teacher_weight = torch.zeros(3 * 64, 1).bfloat16()
    teacher_weight[::64, 0] = -60.0  # p is 0 there: dz = q = 1 / 192
    with interpreter.checked() as trace:
        kl = linear_kl(student, weight, torch.ones(1, 1).bfloat16(), teacher_weight)
        (gradient,) = torch.autograd.grad(192 * kl.sum(), student)
    assert len(trace.launches) == 4 and gradient.item() == 33024  # 32968, rounded once


@needs_triton
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_the_teacher_may_have_another_dtype(dtypes):
    inputs = make(V=40)
    inputs = in_dtype(inputs[:2], dtypes[0]) + in_dtype(inputs[2:], dtypes[1])
    assert_kernels_agree(inputs, tolerance=5e-6 if dtypes[0] == torch.float32 else 5e-3)


@needs_triton
def test_a_teacher_in_fp64_takes_the_torch_path():
    inputs = make()
    inputs = in_dtype(inputs[:2], torch.float32) + in_dtype(inputs[2:], torch.float64)
    assert not any("linear_kl" in kernel for kernel in assert_kernels_agree(inputs))


@needs_triton
@pytest.mark.parametrize("frozen", [0, 1])
def test_kernels_skip_the_gradient_of_what_is_frozen(frozen):
    inputs = in_dtype(make(), torch.float32)
    inputs[frozen].requires_grad_(False)
    assert_kernels_agree(inputs, kind="reverse")


@needs_triton
def test_any_strides_of_operands():
    heads = [x.detach() for x in in_dtype(make(T=9, V=20), torch.float32)]
    student, student_weight = (x.t().contiguous().t().requires_grad_() for x in heads[:2])
    teacher, teacher_weight = heads[2][:1].expand(9, -1), heads[3].repeat_interleave(2, 0)[::2]
    assert_kernels_agree([student, student_weight, teacher, teacher_weight])


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_traffic_is_each_operand_once_for_each_tile(kind, monkeypatch):
    """2 × 5 tiles of 128 × 64; the model of the docstring is exact but for what lies beyond a tile's end."""
    monkeypatch.setitem(head_triton.TILE_BYTES, "cpu", 1 << 20)
    shape = {"T": 150, "E": 64, "V": 300, "kind": KINDS.index(kind)}
    inputs, options = module._example(shape, torch.bfloat16, "cpu")
    with interpreter.checked() as trace:
        kl_and_gradients(linear_kl, inputs, **options)
    *walks, backward = trace.launches
    operands = 2 * 3 * 64 * (2 * 5 * (128 + 64))
    assert len(walks) == (2 if kind == "jsd" else 1)
    assert walks[0].bytes_loaded == operands and walks[0].stored == {"p_parts": 5 * 5 * 150 * 4}
    assert backward.bytes_loaded == operands + 4 * 150 * 5 * (5 if kind == "forward" else 6)
    assert backward.stored == {"p_dz": 2 * 150 * 320}
    moved = [sum(x.bytes_loaded + x.bytes_stored for x in part) for part in (walks, [backward])]
    model = traffic.linear_kl(shape, 2)
    assert moved[0] <= 1.05 * model[0] * len(walks) and moved[1] <= 1.01 * model[1]


@needs_triton
def test_offsets_of_heads_are_64_bits_wide():
    """Rows 2^30 elements apart: the third is out of an int32's reach."""
    config = module._config(4, TARGETS["sm_80"])

    def far(rows, columns=32):
        return torch.empty_strided((rows, columns), (2**30, 1), device="meta")

    stride, few, norm = 2**30, torch.empty(5, device="meta"), torch.empty(2, 5, device="meta")
    heads, sizes = [far(5), far(6), far(5), far(6)], config | {"E_S": 32, "E_T": 32}
    with interpreter.checked() as trace:
        module._linear_kl_online[(1,)](
            *heads, torch.empty(5, 1, 5, device="meta"), *4 * [stride], 5, 6, 1, 1, 1.0, **config, E_A=32, E_B=32
        )
        parts = torch.empty(2, 1, 5, device="meta")
        module._linear_kl_jsd[(1,)](*heads, norm, norm, parts, *4 * [stride], 5, 6, 1, 1, 1.0, **sizes)
        for kind in KINDS:
            vectors = norm, norm, few, few, far(5, 32)
            module._linear_kl_dz[(1,)](*heads, *vectors, *5 * [stride], 5, 6, 1.0, KIND=kind, **sizes)
    online, jsd, *backward = trace.launches
    assert online.bytes_stored == 4 * 5 * 5 and jsd.bytes_stored == 4 * 2 * 5
    assert all(launch.stored["p_dz"] == 4 * 5 * 32 for launch in backward)


@needs_triton
def test_registered_linear_kl_ops_pass_opcheck():
    inputs = [x.detach() for x in in_dtype(make(T=3, V=20), torch.float32)]
    norm, grad = torch.ones(2, 3), torch.ones(3)
    checks = ("test_schema", "test_faketensor")
    with interpreter.checked():
        torch.library.opcheck(module._statistics, (*inputs, 2.0), test_utils=checks)
        torch.library.opcheck(module._jsd, (*inputs, norm, norm, 2.0), test_utils=checks)
        for needs in ([True, False], [False, True]):
            arguments = (*inputs, norm, norm, grad, grad, 2.0, "jsd", needs)
            torch.library.opcheck(module._backward, arguments, test_utils=checks)
