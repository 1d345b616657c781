"""The registry is complete and in order, and the backend switch does what it says. (The ops: test_all_ops.py.)"""

import pytest
import torch
from shapes import SHAPES

from tritium.kernels import all_ops
from tritium.kernels import backend as switch
from tritium.kernels.backend import HAS_TRITON, TARGETS
from tritium.kernels.registry import OPS, register

SPECS = all_ops()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_entry_is_complete(spec):
    assert spec.dtypes and len(SHAPES[spec.name]) >= 2
    for shape in SHAPES[spec.name]:
        assert spec.flops(shape) >= 0 and spec.bytes(shape, 2) >= 0
    assert spec.bytes(spec.shape, 4) > spec.bytes(spec.shape, 2) > 0 and spec.flops(spec.shape) > 0
    args, _ = spec.example(SHAPES[spec.name][0], torch.float32, "cpu")
    assert any(isinstance(x, torch.Tensor) and x.requires_grad for x in args) == spec.differentiable


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_launches_name_every_argument_of_their_kernel(spec):
    for launch in spec.launches(TARGETS["sm_90"]):
        assert {*launch.signature, *launch.constexprs} == set(launch.kernel.arg_names), launch.name
        assert set(launch.divisible) <= set(launch.signature)
    names = [(launch.kernel.__name__, launch.name) for launch in spec.launches(TARGETS["sm_90"])]
    assert len(set(names)) == len(names)


def test_registering_twice_is_refused():
    before = dict(OPS)
    with pytest.raises(ValueError, match="'rms_norm' is registered twice: import it as tritium.kernels"):
        register(**vars(SPECS["rms_norm"]))
    assert before == OPS


@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_a_tensor_on_the_cpu_takes_the_torch_path(monkeypatch, setting):
    monkeypatch.setenv("TRITIUM_BACKEND", setting)
    assert not switch.use_triton(torch.ones(1))


def test_a_backend_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="TRITIUM_BACKEND='cuda': expected one of auto, triton, torch"):
        switch.use_triton(torch.ones(1))
    monkeypatch.setenv("TRITIUM_BACKEND", "triton")
    monkeypatch.setattr(switch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        switch.use_triton(torch.ones(1))
