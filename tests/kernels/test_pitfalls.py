"""Public reports of kernels that bit their users, and where a test holds that ours do not.

| report | held by |
|---|---|
| int32 offsets past 2^31 elements | `*64_bits*` in each op's file |
| grid axes y and z stop at 65,535 | `test_only_axis_x_grows_with_the_tokens`, here |
| strided, expanded, transposed gradients | `test_all_ops.py`, layouts of `test_as_good_as_plain_torch_in_that_dtype` |
| the vocabulary's tail enters the log-sum-exp | odd V in `shapes.py`; `test_head.py`, chunks and shards |
| all masked; rows past cu_seqlens[-1] | `test_no_cu_seqlens_leads_out_of_the_tensors`, with NaN in `torch.empty` |
| a weight without its gradient; "none" scaled by one element | `test_all_ops.py`, all gradients under random seeds |
| `softmax - 1` in bf16 | `*confident_target*` |
| sums over more than 250,000 words | `test_vocabularies_over_250_000_are_summed_in_fp32`, here |
| host syncs | `test_torch_compile_sees_one_graph`: with `fullgraph=True` an `.item()` is an error |
| fp64 scalars | `test_no_launch_has_an_fp64_argument`, here |
| a chunk that reads the head's weight dozens of times | `test_the_weight_is_walked_once_for_a_thousand_tokens`, here |
| the backward without causality; miscompilation | `test_attention*.py`, OPTIONS; on a GPU `pytest -m gpu` |
| 99 KB of shared memory | `test_doctor.py`, `problems` |
| gradients that change from run to run | `test_all_ops.py`, `test_the_same_bits_again_and_in_any_order_of_programs` |
"""

import interpreter
import pytest
import torch
from shapes import SHAPES
from traffic import LEAN

from tritium.kernels import all_ops, head, linear_logprob
from tritium.kernels.backend import HAS_TRITON, TARGETS

OPS = all_ops()
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def gradients(spec, args, kwargs):
    outputs = spec.function(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [y for y in outputs if isinstance(y, torch.Tensor) and y.requires_grad]
    if outputs:
        torch.autograd.grad(
            outputs, [x for x in args if getattr(x, "requires_grad", False)], [torch.ones_like(y) for y in outputs]
        )


@needs_triton
@pytest.mark.parametrize("name", [name for name in OPS if {"T", "B"} & set(LEAN[name])])
def test_only_axis_x_grows_with_the_tokens(name):
    """The axes y and z of a grid stop at 65,535."""
    spec, letter = OPS[name], "T" if "T" in LEAN[name] else "B"
    least = SHAPES[name][1]

    def other_axes(times):
        torch.manual_seed(0)
        args, kwargs = spec.example(least | {letter: least[letter] * times}, torch.float32, "cpu")
        with interpreter.checked() as trace:
            gradients(spec, args, kwargs)
        return [launch.grid[1:] for launch in trace.launches]

    for few, many in zip(other_axes(1), other_axes(8), strict=True):
        assert all(a >= b for a, b in zip(few, many, strict=True))


@needs_triton
@pytest.mark.parametrize("name", OPS)
def test_no_launch_has_an_fp64_argument(name):
    kinds = {kind for launch in OPS[name].launches(TARGETS["sm_90"]) for kind in launch.signature.values()}
    assert kinds and not any("64" in kind and "f" in kind for kind in kinds)


def test_vocabularies_over_250_000_are_summed_in_fp32(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 8).bfloat16(), torch.randn(300_000, 8).bfloat16()
    targets = torch.tensor([299_999, 0])
    ours, exact = (linear_logprob(h, w, targets) for h, w in ((hidden, weight), (hidden.double(), weight.double())))
    torch.testing.assert_close(ours.lse.double(), exact.lse, rtol=0, atol=2e-3)


def test_the_weight_is_walked_once_for_a_thousand_tokens():
    T, V = 4096, 49_152
    seen = torch.zeros(V, dtype=torch.int64)
    for _, columns, _ in head.tiles(T, V, torch.device("cpu")):
        seen[columns] += 1
    assert (seen == T // head.TILE_ROWS).all()
