"""Divergences of two heads and of a top-k teacher: tiles, gradients, and what must be zero."""

import importlib

import pytest
import torch

from tritium.kernels import TopK, linear_kl

head = importlib.import_module("tritium.kernels.head")
reference = importlib.import_module("tritium.kernels.linear_kl").linear_kl_reference
KINDS = ("forward", "reverse", "jsd")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(head, "TILE_ROWS", 3)
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 3 * 4 * 4)
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
