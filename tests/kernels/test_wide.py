"""Matrix products of bf16 tensors in fp32, whatever this machine would choose."""

import pytest
import torch

from tritium.kernels import attention, backend, wide
from tritium.kernels.linear_cross_entropy import linear_cross_entropy
from tritium.kernels.linear_logprob import linear_logprob


@pytest.fixture(params=[True, False], ids=["fp32", "bf16"])
def faster(request, monkeypatch):
    """Whether the CPU is one that multiplies fp32 faster."""
    monkeypatch.setattr(wide, "fp32_is_faster", lambda dtype: request.param)
    return request.param


def operands(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]


def test_linear_is_rounded_once(faster):
    """Rows that are no multiple of a block; result and gradients are the fp64 ones to a rounding."""
    x, weight, bias, dy = operands((wide.ROWS + 77, 96), (130, 96), (130,), (wide.ROWS + 77, 130))
    y = wide.linear(x, weight, bias)
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.nn.functional.linear(*exact)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for found, right in zip((y, *grads[:2]), (expected, *wanted[:2]), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), right, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(("rows", "columns"), [(0, 128), (1, 128), (200, 4), (64, 64), (3, 3)])
def test_few_rows_and_columns(faster, rows, columns):
    a, b, dy = (x.detach() for x in operands((rows, 80), (80, columns), (rows, columns)))
    torch.testing.assert_close(wide.matmul(a, b), a @ b, rtol=2**-7, atol=2**-6)
    torch.testing.assert_close(wide.matmul_rows(a, dy), a.t() @ dy, rtol=2**-7, atol=2**-6)


def test_only_what_is_wanted_gets_a_gradient(faster):
    x, weight = operands((130, 96), (130, 96))
    wide.linear(x, weight.detach()).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("name", ["logprob", "cross_entropy", "attention"])
def test_ops_agree_on_either_kind_of_cpu(monkeypatch, name):
    """The head and attention, forward and backward, by fp32 and by bf16 products."""

    def values():
        if name == "logprob":
            x, weight = operands((150, 64), (300, 64))
            result = linear_logprob(x, weight, torch.arange(150))
            return result.logp, torch.autograd.grad(result.logp.sum() + result.entropy.sum(), (x, weight))
        if name == "cross_entropy":
            x, weight = operands((150, 64), (300, 64))
            loss = linear_cross_entropy(x, weight, torch.arange(150))
            return loss, torch.autograd.grad(loss, (x, weight))
        q, k, v = operands((150, 4, 16), (150, 2, 16), (150, 2, 16))
        out = attention(q, k, v, cu_seqlens=torch.tensor([0, 20, 120, 150], dtype=torch.int32))
        return out, torch.autograd.grad(out.float().square().sum(), (q, k, v))

    found = []
    for fast in (True, False):
        monkeypatch.setattr(wide, "fp32_is_faster", lambda dtype, fast=fast: fast)
        found.append(values())
    for x, y in zip((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), strict=True):
        assert (x - y).float().norm() <= 0.05 * y.float().norm()  # logits of size 8 in bf16 are 2 % off in exp


@pytest.mark.parametrize("op", [wide.linear, lambda x, w: linear_logprob(x, w, torch.arange(150)).logp])
def test_torch_compile_sees_one_graph(op):
    """It can't trace what asks the CPU for its instructions."""
    x, weight = operands((150, 64), (300, 64))
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(compiled.float(), op(x, weight).float(), rtol=0.05, atol=0.3)
    assert torch.autograd.grad(compiled.float().sum(), x)[0].dtype == torch.bfloat16


def test_the_choice_does_not_change_within_a_process():
    """A resumed run must multiply as it did before: the choice is by the CPU's instructions, not by a race."""
    assert backend.fp32_is_faster(torch.float32) and not backend.fp32_is_faster(torch.float16)
    assert len({backend.fp32_is_faster.__wrapped__(torch.bfloat16) for _ in range(5)}) == 1
