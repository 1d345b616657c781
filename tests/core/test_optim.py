"""AdamW over flat buffers: equal to torch's, in fp32 masters whatever the parameters' dtype, and safe from NaN."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tritium.core.config import ConfigError
from tritium.core.muon import orthogonalize
from tritium.core.optim import OptimConfig, Optimizer
from tritium.model.transformer import parameter
from tritium.parallel.mesh import Mesh
from tritium.parallel.tensor import Sharding
from tritium.parallel.zero import FlatModule

CONFIG = OptimConfig(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2, clip=0.7)


class Net(nn.Module):
    """A matrix, a bias, and a matrix that is not trained."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.matrix, self.bias, self.frozen = parameter(5, 3), parameter(5), parameter(2, 2)
        for p in self.parameters():
            p.data = torch.randn(p.shape, dtype=torch.float64).to(dtype)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.matrix.t() + self.bias).square().sum() + self.frozen.sum()


def optimizer(net: Net, config: OptimConfig = CONFIG) -> Optimizer:
    return Optimizer(FlatModule(net, Mesh.single()), config)


def state_of(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in optimizer.tensors()}


def inputs(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def test_it_is_torchs_adamw_with_clipping_and_no_decay_of_vectors():
    ours, theirs = Net(torch.float64), Net(torch.float64)
    mine = optimizer(ours)
    options = dict(lr=CONFIG.lr, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps)
    reference = torch.optim.AdamW([{"params": [theirs.matrix], "weight_decay": 0.2}], **options)
    reference.add_param_group({"params": [theirs.bias], "weight_decay": 0.0})
    for step in range(6):
        lr = CONFIG.lr / (step + 1)
        ours(inputs(step, torch.float64)).backward()
        theirs(inputs(step, torch.float64)).backward()
        norm, skipped = mine.step(lr)
        mine.network.zero_grad()
        expected = nn.utils.clip_grad_norm_([theirs.matrix, theirs.bias], CONFIG.clip)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-12) and expected > CONFIG.clip and skipped == 0
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=0, atol=1e-12)


def test_a_gradient_within_the_clip_is_left_alone():
    net = Net(torch.float64)
    mine = optimizer(net, OptimConfig(lr=1e-2, beta1=0.0, clip=1e6))
    net(inputs(0, torch.float64)).backward()
    gradient = net.matrix.main_grad.clone()
    mine.step(1e-2)
    torch.testing.assert_close(state_of(mine)["exp_avg.matrix"], gradient, rtol=1e-12, atol=0)


def test_micro_batches_accumulate_in_fp32_under_bf16_parameters():
    net = Net(torch.bfloat16)
    optimizer(net)
    expected = torch.zeros(5, 3)
    for step in range(50):
        loss = net(inputs(step, torch.bfloat16) * 0.01**step)  # too small to move a bf16 sum
        (gradient,) = torch.autograd.grad(loss, net.matrix, retain_graph=True)
        expected += gradient.float()
        loss.backward()
    assert net.matrix.grad is None and net.matrix.main_grad.dtype == torch.float32
    assert torch.equal(net.matrix.main_grad, expected)
    assert not torch.equal(expected, expected.bfloat16().float())


def test_bf16_parameters_are_copies_of_fp32_masters():
    net, wide = Net(torch.bfloat16), Net(torch.bfloat16).float()
    mine, reference = optimizer(net), optimizer(wide)
    for step in range(20):
        gradient = inputs(step, torch.float32).sum(0).expand(5, 3)
        net.matrix.main_grad.copy_(gradient)
        wide.matrix.main_grad.copy_(gradient)
        mine.step(1e-4)  # smaller than bf16 resolves: only a master remembers
        reference.step(1e-4)
    master = state_of(mine)["master.matrix"]
    assert master.dtype == torch.float32 and torch.equal(master, wide.matrix)
    assert net.matrix.dtype == torch.bfloat16 and torch.equal(net.matrix, master.bfloat16())
    assert not torch.equal(master, master.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, poison):
    net = Net(dtype)
    mine = optimizer(net)
    for step in range(3):  # the first step of all, and one with moments
        before = {k: v.clone() for k, v in state_of(mine).items()}
        seen = net.matrix.clone()
        net(inputs(step, dtype)).backward()
        net.bias.main_grad[1] = poison
        norm, skipped = mine.step(1e-2)
        assert skipped == 1 and not norm.isfinite()
        assert torch.equal(net.matrix, seen)
        assert all(torch.equal(v, before[k]) for k, v in state_of(mine).items())
        mine.network.zero_grad()
        net(inputs(step, dtype)).backward()
        assert mine.step(1e-2)[1] == 0 and not torch.equal(net.matrix, seen)
        mine.network.zero_grad()


def test_what_is_not_trained_has_no_state():
    net = Net(torch.float32)
    frozen = net.frozen.clone()
    mine = optimizer(net)
    net(inputs(0, torch.float32)).backward()
    mine.step(1.0)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert set(state_of(mine)) == {"step"} | {f"{kind}.{name}" for kind in kinds for name in ("matrix", "bias")}
    assert torch.equal(net.frozen, frozen)


def test_the_state_goes_into_another_optimizer():
    nets = [Net(torch.bfloat16), Net(torch.bfloat16)]
    first, second = map(optimizer, nets)
    for step in range(3):
        nets[0](inputs(step, torch.bfloat16)).backward()
        first.step(1e-2)
        first.network.zero_grad()
    second.load(state_of(first))
    for net, mine in zip(nets, (first, second), strict=True):
        net(inputs(3, torch.bfloat16)).backward()
        mine.step(1e-2)
    assert torch.equal(nets[0].matrix, nets[1].matrix) and torch.equal(nets[0].bias, nets[1].bias)
    for key, value in state_of(first).items():
        assert torch.equal(value, state_of(second)[key]), key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("exp_avg.bias"), "exp_avg.bias: found nothing"),
        (lambda s: s.update({"master.matrix": torch.zeros(5, 4)}), r"found \[5, 4\], the model wants \[5, 3\]"),
        (lambda s: s.update({"master.more": torch.zeros(1)}), "master.more: the model has no such parameter"),
    ],
)
def test_the_state_of_another_model_is_refused(change, words):
    mine = optimizer(Net(torch.float32))
    state = state_of(mine)
    change(state)
    with pytest.raises(ValueError, match=words):
        mine.load(state)


def test_settings_that_cannot_be_are_errors():
    with pytest.raises(ConfigError, match="optim.lr=0 must be above 0"):
        OptimConfig(lr=0)
    with pytest.raises(ConfigError, match="optim.beta2=1.0 must be below 1"):
        OptimConfig(beta2=1.0)


# ---------------------------------------------------------------------------------------------- Muon


class Layered(nn.Module):
    """A root, and a layer with a fused matrix, a tall one, a wide one and a bias."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.embedding, layer = parameter(7, 4), nn.Module()
        layer.fused, layer.wide, layer.bias = (
            parameter(7, 4, sharding=Sharding(0, (3, 4))),
            parameter(2, 9),
            parameter(5),
        )
        self.layers = nn.ModuleList([layer])
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)


def jordans(g, steps=5, eps=1e-7):
    """zeropower_via_newtonschulz5 of github.com/KellerJordan/Muon, in g's dtype."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = g.mT if g.size(-2) > g.size(-1) else g
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if g.size(-2) > g.size(-1) else X


@pytest.mark.parametrize("offload", [False, True])
def test_muon_is_jordans_with_moonlights_scale_on_each_matrix_of_the_layers(offload):
    config = OptimConfig(kind="muon", momentum=0.9, weight_decay=0.2, clip=1e9, offload=offload)
    net = Layered()
    mine = optimizer(net, config)
    plain = OptimConfig(weight_decay=0.2, clip=1e9)
    others = Layered()
    theirs = optimizer(others, plain)
    fused, wide = (net.layers[0].get_parameter(n).detach().clone() for n in ("fused", "wide"))
    pieces = [fused[:3], fused[3:], wide]
    buffers = [torch.zeros_like(piece) for piece in pieces]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, other in zip(net.parameters(), others.parameters(), strict=True):
            p.main_grad.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
            other.main_grad.copy_(p.main_grad)
        first, second = net.layers[0].fused.main_grad.split([3, 4])
        for w, m, g in zip(pieces, buffers, (first, second, net.layers[0].wide.main_grad), strict=True):
            m.lerp_(g, 1 - 0.9)
            update = jordans(g.lerp(m, 0.9)) * 0.2 * max(w.shape) ** 0.5
            w.mul_(1 - 1e-2 * 0.2).add_(update, alpha=-1e-2)
        mine.step(1e-2)
        theirs.step(1e-2)
    torch.testing.assert_close(net.layers[0].fused, fused, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.layers[0].wide, wide, rtol=0, atol=1e-12)
    assert torch.equal(net.embedding, others.embedding) and torch.equal(net.layers[0].bias, others.layers[0].bias)
    assert "exp_avg_sq.layers.0.wide" not in state_of(mine) and "exp_avg_sq.layers.0.bias" in state_of(mine)


def test_muons_update_has_singular_values_near_one():
    x = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for values in (torch.linalg.svdvals(orthogonalize(y)) for y in (x, x.t(), 1e4 * x)):
        assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("config", [OptimConfig(kind="muon"), OptimConfig(kind="muon", offload=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_skips_a_gradient_that_is_not_finite_and_its_state_goes_over(config, dtype):
    nets = [Layered(dtype), Layered(dtype)]
    first, second = (optimizer(net, config) for net in nets)
    for poison in (1.0, float("nan"), 1.0):
        before = state_of(first)
        for p in nets[0].parameters():
            p.main_grad.fill_(poison)
        _, skipped = first.step(1e-2)
        assert skipped == (poison != 1.0)
        assert all(torch.equal(before[k], v) == bool(skipped) for k, v in state_of(first).items())
    second.load(state_of(first))
    for net, mine in zip(nets, (first, second), strict=True):
        for p in net.parameters():
            p.main_grad.fill_(0.5)
        mine.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert all(torch.equal(v, state_of(second)[k]) for k, v in state_of(first).items())


# ---------------------------------------------------------------------------------------------- by parameter


def test_rates_and_decays_by_parameter_are_those_of_torchs_groups():
    options = {"lr_scale": {"mat*": 0.5, "*": 2.0}, "decay": {"bias": 0.3}}
    ours, theirs = Net(torch.float64), Net(torch.float64)
    mine = optimizer(ours, replace(CONFIG, clip=1e9, **options))
    groups = [{"params": [theirs.matrix], "lr": 0.5e-2, "weight_decay": 0.2}]
    groups += [{"params": [theirs.bias], "lr": 2e-2, "weight_decay": 0.3}]
    reference = torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps)
    for step in range(4):
        for net in (ours, theirs):
            net(inputs(step, torch.float64)).backward()
        mine.step(1e-2)
        mine.network.zero_grad()
        reference.step()
        reference.zero_grad()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=0, atol=1e-12)


def test_muon_takes_them_too_and_mup_slows_the_matrices_of_the_layers_alone():
    plain = OptimConfig(kind="muon", weight_decay=0.0, clip=1e9)
    nets = [Layered(), Layered(), Layered()]
    before = [p.detach().clone() for p in nets[0].parameters()]
    configs = plain, replace(plain, lr_scale={"*.wide": 3.0}), replace(plain, mup=True)
    for net, config in zip(nets, configs, strict=True):
        for p in net.parameters():
            p.data = p.data.clone()
        mine = Optimizer(FlatModule(net, Mesh.single()), config, 0.25)
        for i, p in enumerate(net.parameters()):
            p.main_grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
        mine.step(1e-2)
    moves = [[p.detach() - old for p, old in zip(net.parameters(), before, strict=True)] for net in nets]
    for (name, _), move, by_name, mup in zip(nets[0].named_parameters(), *moves, strict=True):
        torch.testing.assert_close(by_name, move * (3.0 if name.endswith("wide") else 1.0), rtol=1e-9, atol=1e-15)
        slowed = name in ("layers.0.fused", "layers.0.wide")
        torch.testing.assert_close(mup, move * (0.25 if slowed else 1.0), rtol=1e-9, atol=1e-15)


def test_mup_without_a_base_width_and_negative_factors_are_errors():
    with pytest.raises(ConfigError, match="has no dim_model_base"):
        optimizer(Net(torch.float32), OptimConfig(mup=True))
    with pytest.raises(ConfigError, match=r"optim.decay: a\*=-1 must not be negative"):
        OptimConfig(decay={"a*": -1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_the_running_mean_of_the_weights_is_there_within_and_gone_after(dtype, offload):
    net = Net(dtype)
    mine = optimizer(net, replace(CONFIG, ema=0.75, offload=offload))
    mean = state_of(mine)["master.matrix"]
    for step in range(5):
        net(inputs(step, dtype)).backward()
        net.bias.main_grad[0] = float("nan") if step == 2 else 0.0  # a skipped step does not count
        mine.step(1e-2)
        mine.network.zero_grad()
        mean = mean if step == 2 else 0.75 * mean + 0.25 * state_of(mine)["master.matrix"]
    torch.testing.assert_close(state_of(mine)["ema.matrix"], mean)
    own = net.matrix.clone()
    with mine.averaged():
        assert torch.equal(net.matrix, state_of(mine)["ema.matrix"].to(dtype)) and not torch.equal(net.matrix, own)
    assert torch.equal(net.matrix, own)
