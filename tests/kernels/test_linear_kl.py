"""Divergences of two heads and of a top-k teacher: tiles, gradients, and what must be zero."""

import contextlib
import importlib

import pytest
import torch

from tritium.kernels import TopK, interpreter, linear_kl
from tritium.kernels.backend import HAS_TRITON, TARGETS

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
head = importlib.import_module("tritium.kernels.head")
module = importlib.import_module("tritium.kernels.linear_kl")
reference = module.linear_kl_reference
KINDS = ("forward", "reverse", "jsd")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(head, "TILE_ROWS", 3)
    monkeypatch.setitem(module.TILE_BYTES, "cpu", 3 * 4 * 4)
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


def test_top_k_teacher_with_nothing_left():
    """A teacher whose k tokens have all the probability, to rounding."""
    student, student_weight, *_ = make()
    teacher = TopK(torch.tensor([[3, 5]]).expand(7, 2), torch.tensor([[0.25, 0.75]]).log().expand(7, 2))
    kl = linear_kl(student, student_weight, teacher, None)
    gradients = torch.autograd.grad(kl.sum(), (student, student_weight))
    assert (kl > 0).all() and all(g.isfinite().all() for g in (kl, *gradients))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(kind):
    student, weight, *_ = make()
    kl = linear_kl(student, weight, student.detach(), weight.detach(), kind=kind)
    gradients = torch.autograd.grad(kl.sum(), (student, weight))
    for x in (kl, *gradients):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_the_teacher_gets_no_gradient():
    student, student_weight, teacher, teacher_weight = make()
    linear_kl(student, student_weight, teacher, teacher_weight).sum().backward()
    assert teacher.grad is None and teacher_weight.grad is None and student_weight.grad.norm() > 0


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": "backward"}, "kind must be one of forward, reverse, jsd"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"teacher": torch.randn(6, 9).double()}, "must have 7 tokens and 18 words"),
        ({"teacher": TopK(torch.zeros(7, 18).long(), torch.zeros(7, 18)), "teacher_weight": None}, "with k < 18"),
        ({"teacher": TopK(torch.zeros(7, 2).long(), torch.zeros(7, 2))}, "pass teacher_weight=None"),
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
    monkeypatch.setattr(module, "PROGRAMS", 1)
    monkeypatch.setattr(module, "SHARE", 2)
    monkeypatch.setitem(module.TILE_BYTES, "cuda", 1)
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


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_of_the_logits_changes_no_divergence(kind):
    student, student_weight, *teacher = in_dtype(make(V=35), torch.float32)
    offset = torch.full((7, 1), 2.0**12), torch.ones(35, 1)
    with interpreter.checked():
        plain = linear_kl(student, student_weight, *teacher, kind=kind)
        moved = linear_kl(
            torch.cat([student, offset[0]], 1), torch.cat([student_weight, offset[1]], 1), *teacher, kind=kind
        )
    torch.testing.assert_close(plain, moved, rtol=0, atol=3e-3)  # ulp(4096) is 5e-4, and that of 10 is 1e-6


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
def test_traffic_is_each_operand_once_for_each_tile(kind):
    """2 × 3 tiles of 128 × 128; the model of the docstring is exact but for what lies beyond a tile's end."""
    shape = {"T": 150, "E": 32, "V": 300, "kind": KINDS.index(kind)}
    inputs, options = module._example(shape, torch.bfloat16, "cpu")
    with interpreter.checked() as trace:
        kl_and_gradients(linear_kl, inputs, **options)
    *walks, backward = trace.launches
    operands = 2 * 3 * 32 * (2 * 3 * (128 + 128))
    assert len(walks) == (2 if kind == "jsd" else 1)
    assert walks[0].bytes_loaded == operands and walks[0].stored == {"p_parts": 5 * 3 * 150 * 4}
    assert backward.bytes_loaded == operands + 4 * 150 * 3 * (3 if kind == "forward" else 4)
    assert backward.stored == {"p_dz": 2 * 150 * 300}
    moved = [sum(x.bytes_loaded + x.bytes_stored for x in part) for part in (walks, [backward])]
    model = module._traffic(shape, 2)
    assert moved[0] <= 1.01 * model[0] * len(walks) and moved[1] <= 1.01 * model[1]


@needs_triton
def test_offsets_of_heads_are_64_bits_wide():
    """Rows 2^30 elements apart: the third is out of an int32's reach."""
    config = module._config(4, TARGETS["sm_80"])

    def far(rows, columns=8):
        return torch.empty_strided((rows, columns), (2**30, 1), device="meta")

    stride, few = 2**30, torch.empty(5, device="meta")
    sizes = config | {"E_S": 8, "E_T": 8}
    with interpreter.checked() as trace:
        module._linear_kl_online[(1,)](
            far(5), far(6), far(5), far(6), torch.empty(5, 1, 5, device="meta"), *4 * [stride], 5, 6, 1, 1, 1.0,
            **config, E_A=8, E_B=8,
        )  # fmt: skip
        module._linear_kl_jsd[(1,)](
            far(5), far(6), far(5), far(6), few, few, torch.empty(2, 1, 5, device="meta"), *4 * [stride], 5, 6, 1, 1,
            1.0, **sizes,
        )  # fmt: skip
        for kind in KINDS:
            module._linear_kl_dz[(1,)](
                far(5), far(6), far(5), far(6), *4 * [few], far(5, 6), *5 * [stride], 5, 6, 1.0, KIND=kind, **sizes
            )
    online, jsd, *backward = trace.launches
    assert online.bytes_stored == 4 * 5 * 5 and jsd.bytes_stored == 4 * 2 * 5
    assert all(launch.stored["p_dz"] == 4 * 5 * 6 for launch in backward)


@needs_triton
def test_order_of_programs_changes_no_bit_of_the_jsd():
    inputs = in_dtype(make(T=70, V=40), torch.float32)

    def run(seed):
        with interpreter.checked(seed):
            return kl_and_gradients(linear_kl, inputs, kind="jsd")

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(1), strict=True))


@needs_triton
def test_registered_linear_kl_ops_pass_opcheck():
    inputs = [x.detach() for x in in_dtype(make(T=3, V=20), torch.float32)]
    lse, grad = torch.full((3,), 3.0), torch.ones(3)
    checks = ("test_schema", "test_faketensor")
    with interpreter.checked():
        torch.library.opcheck(module._statistics, (*inputs, 2.0), test_utils=checks)
        torch.library.opcheck(module._jsd, (*inputs, lse, lse, 2.0), test_utils=checks)
        for needs in ([True, False], [False, True]):
            arguments = (*inputs, lse, lse, grad, grad, 2.0, "jsd", needs)
            torch.library.opcheck(module._backward, arguments, test_utils=checks)
