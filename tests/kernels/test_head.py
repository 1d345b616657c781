"""The head's statistics on the torch path and as Triton kernels: chunks, shares, addresses, memory, FLOPs."""

import contextlib
import importlib

import interpreter
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tritium.kernels import TopK, cross_entropy, linear_cross_entropy, linear_kl, linear_logprob
from tritium.kernels.backend import HAS_TRITON

head = importlib.import_module("tritium.kernels.head")
head_triton = importlib.import_module("tritium.kernels.head_triton")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", request.param)
    with interpreter.checked(seed=1) if request.param == "triton" else contextlib.nullcontext():
        yield request.param


def make(T, V, E, K=1, dtype=torch.float32):
    """Hidden states, a head and K distinct targets for each token; every fourth token has none."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, E).to(dtype), (2 * torch.randn(V, E) / E**0.5).to(dtype)
    targets = torch.stack([torch.randperm(V)[:K] for _ in range(T)])
    targets[::4] = -1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(hidden, weight, targets, options):
    z = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    z = z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)
    z = z / options.temperature
    picked = torch.where(targets >= 0, z.gather(1, targets.clamp_min(0)), 0.0)
    if options.exclude:
        out = torch.zeros(len(z), z.shape[1] + 1, dtype=torch.bool).scatter_(1, targets % (z.shape[1] + 1), True)
        z = z.masked_fill(out[:, :-1], -torch.inf)
    expected = (z.softmax(-1) * z.clamp_min(-1e9)).sum(-1) if options.expected else None
    top = z.amax(-1)
    mass = (z - top[:, None]).exp().sum(-1)
    return head.HeadStatistics(z.logsumexp(-1), picked, expected, z.sum(-1) if options.total else None, top, mass)


def results(function, hidden, weight, targets, options):
    """Statistics, and gradients for fixed multiples of 1/16, the same numbers in every dtype."""
    out = [x for x in function(hidden, weight, targets, options) if x is not None]
    generator = torch.Generator().manual_seed(1)
    seeds = [(torch.randint(-32, 33, x.shape, generator=generator) / 16).to(x.dtype) for x in out[:-2]]
    return *out, *torch.autograd.grad(out[:-2], (hidden, weight), seeds)


def in_fp64(tensor):
    return tensor.detach().double().requires_grad_()


def rms(x):
    return x.double().square().mean().sqrt().item()


VARIANTS = {
    "plain": (1, {}),
    "no target": (0, {}),
    "three targets, total": (3, {"total": True, "temperature": 0.7}),
    "excluded": (11, {"exclude": True, "temperature": 1.3}),
    "everything, capped": (2, {"expected": True, "total": True, "softcap": 2.0, "temperature": 0.7}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ULP)
def test_as_good_as_plain_torch(backend, variant, dtype):
    """Error against fp64 ≤ 1.5 × that of the same in plain torch and this dtype, + 2 ulp of the result's RMS."""
    K, flags = VARIANTS[variant]
    inputs, options = make(130, 261, 70, K, dtype), head.HeadOptions(**flags)
    ours, plain = (results(f, *inputs, options) for f in (head.head_statistics, reference))
    exact = results(reference, *map(in_fp64, inputs[:2]), inputs[2], options)
    for a, p, e in zip(ours, plain, exact, strict=True):
        if e.numel():
            assert rms(a.double() - e) <= 1.5 * rms(p.double() - e) + 2 * ULP[dtype] * rms(e)


@pytest.mark.parametrize("option", [{"softcap": 50.0}, {}], ids=str)
def test_logits_of_any_size_stay_finite(backend, option):
    """Also tanh of what is small, of what is large, and a softmax that leaves one word."""
    hidden = torch.tensor([[1.0], [-1.0], [1e-7], [0.0]]).requires_grad_()
    weight = torch.tensor([[1e4], [-1e4], [0.0]]).requires_grad_()
    out = linear_logprob(hidden, weight, torch.tensor([0, 0, 2, 1]), **option)
    high = option.get("softcap", 1e4)
    exact = linear_logprob(*map(in_fp64, (hidden, weight)), torch.tensor([0, 0, 2, 1]), **option)
    assert out.logp[:2].tolist() == [0.0, -2 * high] and out.hit.tolist() == [True, False, False, True]
    torch.testing.assert_close(out.logp, exact.logp.float(), rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(backend, needed):
    hidden, weight, targets = make(5, 11, 8)
    whole = dict(
        zip(
            ("hidden", "weight"),
            torch.autograd.grad(
                linear_logprob(hidden, weight, targets[:, 0].clamp_min(0)).logp.sum(), (hidden, weight)
            ),
            strict=True,
        )
    )
    (hidden if needed == "weight" else weight).requires_grad_(False)
    leaf = hidden if needed == "hidden" else weight
    for loss in (linear_logprob(hidden, weight, targets[:, 0].clamp_min(0)).logp.sum(),
                 -linear_cross_entropy(hidden, weight, targets[:, 0].clamp_min(0))):  # fmt: skip
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], whole[needed])


@pytest.mark.parametrize("function", [linear_logprob, linear_cross_entropy])
@pytest.mark.parametrize("dtype, high", [(torch.bfloat16, 10.0), (torch.float32, 10.0), (torch.float32, 30000.0)])
def test_a_confident_target_keeps_its_gradient(backend, function, dtype, high):
    """p = 0.9993: within 1 % of fp64 on the same logits. bf16(p) - 1 would be 0, and e^(z - lse) no number at 30000."""
    hidden, weight = torch.ones(1, 1, dtype=dtype), torch.full((16, 1), high - 10, dtype=dtype)
    weight[3] = high
    inputs = hidden.requires_grad_(), weight.requires_grad_()

    def gradient(hidden, weight):
        out = function(hidden, weight, torch.tensor([3]))
        loss = out.logp.sum() if function is linear_logprob else -out
        return torch.autograd.grad(loss, weight)[0][3].item()

    exact = gradient(*map(in_fp64, inputs))
    assert 0 < exact < 1e-3 and gradient(*inputs) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("operand", ["hidden", "weight"])
def test_gradients_are_summed_in_fp32(backend, operand, monkeypatch):
    """32768 + 100 + 100, from three chunks of the vocabulary or tiles of tokens: bf16 would round each 100 away."""
    monkeypatch.setitem(head_triton.TILE_BYTES, "cpu", 1)
    monkeypatch.setattr(head, "TILE_ROWS", 1)
    summed, other = torch.zeros(3 * 128, 1).bfloat16(), torch.ones(1, 1).bfloat16().requires_grad_()
    summed[::128, 0] = torch.tensor([32768.0, 100.0, 100.0])
    operands = (other, summed) if operand == "hidden" else (summed, other)
    no_targets = torch.zeros(len(operands[0]), 0).long()
    statistics = head.head_statistics(*operands, no_targets, head.HeadOptions(total=True))
    (gradient,) = torch.autograd.grad(statistics.total.sum(), other)
    assert gradient.item() == 33024  # 32968, rounded once


def call_all(T=6, V=20, E=8, dtype=torch.float32):
    """Each op of a head: name → (leaves, call)."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, E).to(dtype).requires_grad_(), torch.randn(V, E).to(dtype).requires_grad_()
    targets, teacher = torch.arange(T) % V, (torch.randn(T, E).to(dtype), torch.randn(V, E).to(dtype))
    top = TopK(torch.arange(3).expand(T, 3), torch.full((T, 3), -2.0))
    return {
        "linear_logprob": ((hidden, weight), lambda: linear_logprob(hidden, weight, targets).logp),
        "linear_cross_entropy": ((hidden, weight), lambda: linear_cross_entropy(hidden, weight, targets)),
        "cross_entropy": ((hidden,), lambda: cross_entropy(hidden, targets % E)),
        "linear_kl": ((hidden, weight), lambda: linear_kl(hidden, weight, *teacher)),
        "linear_kl, top k": ((hidden, weight), lambda: linear_kl(hidden, weight, top, None)),
    }


@pytest.mark.parametrize("op", call_all())
def test_autocast_changes_no_bit(backend, op):
    leaves, function = call_all()[op]
    plain = function()
    expected = plain, *torch.autograd.grad(plain.sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function()
        actual = loss, *torch.autograd.grad(loss.sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("flags", [{"softcap": 2.0}, {"total": True}], ids=str)
def test_what_is_excluded_can_be_neither_capped_nor_added(flags):
    with pytest.raises(ValueError, match="exclude can't be combined with softcap or total"):
        head.HeadOptions(exclude=True, **flags)


# Vocabulary shards ----------------------------------------------------------------------------------------------------


def shards(group, rows):
    """Name → (value, leaves): the ops that take a group, on these rows of the weight, in fp64 without a group."""
    torch.manual_seed(0)
    dtype = torch.float64 if group is None else torch.float32
    hidden, weight = torch.randn(9, 6).to(dtype).requires_grad_(), torch.randn(90, 6)[rows].to(dtype).requires_grad_()
    # Two hits, two that are the best of their shard only, and some beyond a shard's end but within its last block.
    targets = torch.tensor([17, 73, 89, 44, -100, 44, 45, 57, 0])
    top = TopK(torch.stack([torch.randperm(90)[:11] for _ in range(9)]), torch.full((9, 11), -3.0))
    options = dict(label_smoothing=0.1, z_loss=0.01, softcap=3.0, group=group)
    logprob = linear_logprob(hidden, weight, targets, temperature=0.7, group=group)
    values = {
        "logprob": torch.stack(logprob[:3], 1),
        "hit": logprob.hit.to(dtype),
        "sum": linear_cross_entropy(hidden, weight, targets, **options),
        "none": linear_cross_entropy(hidden, weight, targets, reduction="none", **options),
        "top k": linear_kl(hidden, weight, top, None, kind="jsd", group=group),
    }
    leaves = hidden, weight
    gradients = {k: torch.autograd.grad(y.square().sum(), leaves) for k, y in values.items() if y.requires_grad}
    return {k: y.detach() for k, y in values.items()}, gradients


def own_shard(kernels):
    start = 45 * torch.distributed.get_rank()
    with interpreter.checked() if kernels else contextlib.nullcontext():
        return shards(torch.distributed.group.WORLD, slice(start, start + 45))


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)])
def test_vocabulary_shards_equal_the_whole(pool2, kernels):
    (values, first), (again, second) = pool2.run(own_shard, kernels)
    exact, gradients = shards(None, slice(None))
    assert all(torch.equal(x, again[name]) for name, x in values.items()) and exact["hit"].sum() == 2
    for name, e in exact.items():
        torch.testing.assert_close(values[name].double(), e, rtol=1e-5, atol=1e-5)
    for name, (dhidden, dweight) in gradients.items():
        own = first[name][0] + second[name][0], torch.cat([first[name][1], second[name][1]])
        torch.testing.assert_close([x.double() for x in own], [dhidden, dweight], rtol=1e-5, atol=1e-4)


# Targets --------------------------------------------------------------------------------------------------------------


def test_targets_nobody_may_look_at_are_left_out_and_counted(monkeypatch):
    """Under torch.compile, as on a GPU: no error, but no loss, no gradient, and two more in the counter."""
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(head, "_INVALID", {})
    hidden, weight, _ = make(4, 9, 8)
    compiled = torch.compile(linear_logprob, backend="aot_eager", fullgraph=True)
    for calls in (1, 2):  # the counter is made by the first
        ours = compiled(hidden, weight, torch.tensor([3, 9, -100, -7]))
        assert int(head.invalid_targets("cpu")) == 2 * calls
    expected = linear_logprob(hidden, weight, torch.tensor([3, -100, -100, -100]))
    assert torch.equal(ours.logp, expected.logp) and torch.equal(ours.hit, expected.hit)
    gradients = (torch.autograd.grad(out.logp.sum(), (hidden, weight)) for out in (ours, expected))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_counter_outlives_inference_mode_and_tracing(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    monkeypatch.setattr(head, "_INVALID", {})
    tensors = torch.ones(2, 3, device="meta"), torch.ones(5, 3, device="meta"), torch.zeros(2, device="meta").long()
    with FakeTensorMode() as fake:
        linear_logprob(*(fake.from_tensor(x) for x in tensors))
    assert not head._INVALID
    with torch.inference_mode():
        linear_logprob(*tensors)
    linear_logprob(*tensors)
    with FakeTensorMode() as fake:
        linear_logprob(*(fake.from_tensor(x) for x in tensors))
    assert type(head.invalid_targets("meta")) is torch.Tensor and not head.invalid_targets("meta").is_inference()


HIDDEN, WEIGHT, LOGITS, IDS = torch.ones(3, 4), torch.ones(5, 4), torch.ones(3, 5), torch.zeros(3, dtype=torch.long)
WRONG = {
    "capped at nothing": (lambda: linear_logprob(HIDDEN, WEIGHT, IDS, softcap=0.0), "softcap must be positive"),
    "no temperature": (lambda: linear_logprob(HIDDEN, WEIGHT, IDS, temperature=0.0), "temperature must be positive"),
    "float ids": (lambda: linear_logprob(HIDDEN, WEIGHT, IDS + 0.5), "targets is torch.float32, wanted torch.int32"),
    "bool ids": (lambda: linear_cross_entropy(HIDDEN, WEIGHT, IDS > 1), "targets is torch.bool"),
    "float ids of logits": (lambda: cross_entropy(LOGITS, IDS.float()), "cross_entropy: targets is torch.float32"),
    "int hidden": (lambda: linear_logprob(HIDDEN.long(), WEIGHT.long(), IDS), "hidden is torch.int64, wanted a float"),
    "int logits": (lambda: cross_entropy(LOGITS.long(), IDS), "logits is torch.int64"),
    "no word": (lambda: linear_logprob(HIDDEN, WEIGHT[:0], IDS), r"V ≥ 1, got \(3, 4\) and \(0, 4\)"),
    "no logit": (lambda: cross_entropy(LOGITS[:, :0], IDS), r"V ≥ 1, got \[3, 0\]"),
    "a scalar": (lambda: linear_cross_entropy(HIDDEN, torch.tensor(1.0), IDS), r"got \(3, 4\) and \(\)"),
    "1-D": (lambda: linear_cross_entropy(HIDDEN[0], WEIGHT, IDS), r"must be \[T, E\] and \[V, E\]"),
    "other widths": (lambda: linear_logprob(HIDDEN, LOGITS, IDS), "hidden and weight must be"),
    "other dtypes": (lambda: linear_logprob(HIDDEN, WEIGHT.double(), IDS), "cast one of them"),
    "other device": (lambda: linear_logprob(HIDDEN, WEIGHT.to("meta"), IDS), "on cpu and on meta"),
    "weights elsewhere": (
        lambda: linear_cross_entropy(HIDDEN, WEIGHT, IDS, weights=torch.ones(3, device="meta")),
        "on cpu and on meta",
    ),
    "too few ids": (lambda: linear_logprob(HIDDEN, WEIGHT, IDS[:2]), r"targets must be \[3\], one id .*, got \[2\]"),
    "ids beyond": (lambda: linear_logprob(HIDDEN, WEIGHT, IDS + 5), r"targets hold 5: ids must be in \[0, 5\) or -100"),
    "ids below": (lambda: cross_entropy(LOGITS, IDS - 1), "targets hold -1"),
    "teacher of no words": (lambda: linear_kl(HIDDEN, WEIGHT, HIDDEN, None), "teacher_weight is None, wanted"),
    "teacher of ints": (lambda: linear_kl(HIDDEN, WEIGHT, HIDDEN.long(), WEIGHT), "teacher is torch.int64"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_named(backend, what):
    function, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        function()


# Torch only -----------------------------------------------------------------------------------------------------------


class _LiveBytes(TorchDispatchMode):
    """`peak`: the bytes of all tensors made inside that lived at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()).data_ptr() not in known:
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


def call(function, hidden, weight, targets):
    out = function(hidden, weight, targets)
    loss = out if function is linear_cross_entropy else out.logp.sum()
    return torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("function", [linear_logprob, linear_cross_entropy])
def test_needs_100_megabytes_beside_inputs_and_gradients(function, monkeypatch):
    """At V = 49152 and E = 384 in bf16; T adds a few vectors. The logits of T = 512 alone would be 150 MB in fp32."""
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 384).bfloat16().requires_grad_() for n in (512, 49152))
    with _LiveBytes() as live:
        gradients = call(function, hidden, weight, torch.randint(0, 49152, (512,)))
    assert live.peak - sum(g.nbytes for g in gradients) < 100e6


@pytest.mark.parametrize("function, matmuls", [(linear_logprob, 4), (linear_cross_entropy, 3)])
def test_matmuls_on_a_cpu(function, matmuls, monkeypatch):
    """The logits are made twice, or, for a summed loss, once."""
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    T, V, E = 100, 300, 16
    hidden, weight, targets = make(T, V, E)
    with FlopCounterMode(display=False) as counter:
        call(function, hidden, weight, targets[:, 0].clamp_min(0))
    assert counter.get_total_flops() == matmuls * 2 * T * V * E


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_gradient_of_a_scaled_sum(dtype, monkeypatch):
    """The factor that only the backward knows, several blocks of tokens, and twice: nothing saved may change."""
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    hidden, weight, targets = make(50, 101, 24, dtype=dtype)
    targets, weights = targets[:, 0].masked_fill(targets[:, 0] < 0, -100), torch.rand(50)
    options = dict(weights=weights, label_smoothing=0.1, z_loss=1e-2, softcap=5.0)
    loss = linear_cross_entropy(hidden, weight, targets, **options) / 3
    once, again = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    wide = [in_fp64(x) for x in (hidden, weight)]
    exact = torch.autograd.grad(linear_cross_entropy(*wide, targets, **options) / 3, wide)
    for a, b, e in zip(once, again, exact, strict=True):
        assert torch.equal(a, b) and rms(a.double() - e) < 2 * torch.finfo(dtype).eps * rms(e)


def test_a_loss_scale_keeps_small_gradients_in_fp16(monkeypatch):
    """p · weight is 2e-9, which fp16 has not; times the scale, which only the backward knows, it is 1e-4."""
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    hidden, weight = torch.ones(4, 8).half().requires_grad_(), torch.zeros(50, 8).half().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.zeros(4).long(), weights=torch.full((4,), 1e-7))
    (gradient,) = torch.autograd.grad(loss * 65536, weight)
    torch.testing.assert_close(gradient[1:], torch.full((49, 8), 4e-7 * 65536 / 50).half(), rtol=2e-3, atol=0)


def test_gradient_of_the_weights_of_tokens(monkeypatch):
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")
    hidden, weight, targets = make(6, 11, 4)
    weights = torch.rand(6, requires_grad=True)
    targets = targets[:, 0].clamp_min(0)
    (ours,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, weights=weights), weights)
    torch.testing.assert_close(ours, linear_cross_entropy(hidden, weight, targets, reduction="none").detach())


# Triton only ----------------------------------------------------------------------------------------------------------


@needs_triton
def test_chunks_of_the_gradient_and_shares_of_the_vocabulary_change_nothing(monkeypatch):
    inputs, options = make(130, 700, 20, 2, torch.bfloat16), head.HeadOptions(expected=True, total=True)

    def run():
        with interpreter.checked() as trace:
            out = results(head.head_statistics, *inputs, options)
        return out, [launch.grid[0] for launch in trace.launches]

    whole, grids = run()
    monkeypatch.setitem(head_triton.TILE_BYTES, "cpu", 2 * 130 * 300)  # 256 columns of dz
    monkeypatch.setattr(head_triton, "PROGRAMS", 3)  # 4 of the 6 blocks of the vocabulary to a share
    chunked, chunked_grids = run()
    assert grids == [12, 12] and chunked_grids == [4, 4, 4, 4]
    for a, b in zip(chunked[:-2], whole[:-2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    for a, b in zip(chunked[-2:], whole[-2:], strict=True):
        assert rms(a - b) < 2.0**-8 * rms(b)


@needs_triton
def test_offsets_are_64_bits_wide():
    """Rows 2^30 elements apart: the third is out of an int32's reach."""

    def far(rows, columns, dtype=torch.float32):
        return torch.empty_strided((rows, columns), (2**30, 1), dtype=dtype, device="meta")

    T, V, E, stride = 20, 32, 16, 2**30
    targets = torch.full((T, 1), V - 1)
    vectors = [torch.ones(T, device="meta") for _ in range(4)]
    flags = {"EXPECTED": True, "TOTAL": True, "EXCLUDE": False, "HAS_CAP": False}
    config = flags | {"E": E, "K": 1, "BLOCK_T": 16, "BLOCK_V": 16, "BLOCK_E": 16, "BLOCK_K": 1}
    with interpreter.checked() as trace:
        head_triton._head_forward[(4,)](
            far(T, E), far(V, E), targets, torch.zeros(T, 1), torch.empty(2, 4, T),
            stride, stride, T, V, 2, 1, 0.0, 1.0, **config,
        )  # fmt: skip
        head_triton._head_dz[(4,)](
            far(T, E), far(V, E), targets, *vectors, torch.ones(T, 1), far(T, V),
            stride, stride, stride, T, V, 0, 0.0, 1.0, **config,
        )  # fmt: skip
    forward, dz = trace.launches
    assert forward.loaded["p_hidden"] == forward.loaded["p_weight"] == 4 * 16 * E * 4
    assert dz.stored["p_dz"] == T * V * 4 and forward.stored["p_parts"] == 2 * 4 * T * 4


@needs_triton
def test_more_blocks_of_tokens_than_run_together(monkeypatch):
    """35 of them: two whole groups of 16 and one that is cut off, each with three blocks of the vocabulary."""
    config = {"E": 16, "K": 1, "BLOCK_T": 4, "BLOCK_V": 16, "BLOCK_E": 16, "BLOCK_K": 1}
    monkeypatch.setattr(head_triton, "_config", lambda *_: config | {"num_warps": 4, "num_stages": 2})
    inputs, options = make(4 * 35 - 1, 40, 16), head.HeadOptions(expected=True)
    with interpreter.checked() as trace:
        ours = results(head.head_statistics, *inputs, options)
    assert [launch.grid[0] for launch in trace.launches] == [35 * 3, 35 * 3]
    for a, e in zip(ours, results(reference, *inputs, options), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@needs_triton
def test_rows_are_aligned_for_wide_loads():
    """A row that begins anywhere is loaded element by element: it is copied, with zeros to a multiple of 64."""
    x = torch.randn(6, 33).bfloat16()
    assert head_triton.aligned(x[:, :0]).shape == (6, 0)
    kept = torch.randn(6, 80)[:, :64]
    assert head_triton.aligned(kept) is kept and head_triton.aligned(kept[:1].expand(6, -1)).stride(0) == 0
    for view in (x, x[:, 1:], x.t(), x[:, ::2], x[:1].expand(6, -1), kept[:, 1:17]):
        rows = head_triton.aligned(view)
        assert rows.shape[1] % 64 == rows.stride(0) % 16 == rows.data_ptr() % 16 == 0 and rows.stride(1) == 1
        assert torch.equal(rows[:, : view.shape[1]], view) and not rows[:, view.shape[1] :].any()


@needs_triton
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_backward_without_one_of_its_gradients_passes_opcheck(needs):
    hidden, weight, targets = make(5, 12, 8, 2)
    lse, picked = torch.randn(5), torch.randn(5, 2)
    given = lse, picked, lse, None, hidden.detach(), weight.detach(), targets, lse, lse, lse.exp(), 0.5, 3.0, False
    with interpreter.checked():
        torch.library.opcheck(
            head_triton.head_backward, (*given, *needs), test_utils=("test_schema", "test_faketensor")
        )
