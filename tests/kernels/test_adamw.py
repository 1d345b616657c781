"""AdamW against torch's own, with masters, scaling, skipping, chunks and strange layouts."""

import importlib

import pytest
import torch

from tritium.kernels import adamw_

file = importlib.import_module("tritium.kernels.adamw")
OPTIONS = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(file, "CHUNK", 8)
    torch.manual_seed(0)


def state(params):
    return [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch(lr, dtype):
    params = [torch.randn(21, dtype=dtype), torch.randn(3, 5, dtype=dtype), torch.randn(0, dtype=dtype)]
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
    # the fused kernel computes in fp32 scalars, hence 1e-7 also in fp64
    torch.testing.assert_close(params, [p.detach() for p in expected], rtol=1e-5, atol=1e-6)


def test_params_are_cast_copies_of_their_masters():
    masters = [torch.randn(21), torch.randn(3, 5)]
    params = [x.bfloat16() for x in masters]
    plain = [x.clone() for x in masters]
    grads = [torch.randn(x.shape).bfloat16() for x in masters]
    (m, v), (m_plain, v_plain) = state(masters), state(masters)
    adamw_(params, grads, m, v, masters=masters, step=torch.tensor(1.0), **OPTIONS)
    adamw_(plain, [g.float() for g in grads], m_plain, v_plain, step=torch.tensor(1.0), **OPTIONS)
    for p, master, expected in zip(params, masters, plain, strict=True):
        assert torch.equal(master, expected) and torch.equal(p, master.bfloat16())


def test_nothing_changes_when_a_gradient_is_not_finite():
    masters = [torch.randn(21)]
    params, (m, v) = [torch.randn(21).bfloat16()], state(masters)  # params differ from their masters: that stays, too
    step = torch.tensor(7.0)
    before = [x.clone() for x in (*params, *masters, *m, *v, step)]
    grads = [torch.full((21,), torch.nan)]
    adamw_(params, grads, m, v, masters=masters, step=step, found_inf=torch.tensor(3.0), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip((*params, *masters, *m, *v, step), before, strict=True))


def test_any_layout():
    tensors = [torch.randn(6, 5) for _ in range(2)] + [torch.rand(6, 5) for _ in range(2)]
    strided = [x.t().contiguous().t() if i % 2 else x.repeat_interleave(2, 1)[:, ::2] for i, x in enumerate(tensors)]
    for p, g, m, v in (tensors, strided):
        adamw_([p], [g], [m], [v], step=torch.tensor(2.0), **OPTIONS)
    torch.testing.assert_close(strided[0], tensors[0])
    torch.testing.assert_close(strided[2:], tensors[2:])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"grads": []}, "1 params but 0 grads"),
        ({"exp_avgs": [torch.zeros(4)]}, r"params\[0\] is \(3,\) but exp_avgs\[0\] is \(4,\)"),
        ({"params": [torch.zeros(3).bfloat16()]}, "give fp32 masters"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(ValueError, match=message):
        adamw_(**inputs | change, step=torch.tensor(1.0), **OPTIONS)
