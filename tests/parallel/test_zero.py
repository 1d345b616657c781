"""Flat buffers at every level of ZeRO: whole gradients are sums over the ranks, and nothing is held that need not be.

(That training is the same at every level, on every mesh: test_training.py.)
"""

import os
from unittest import mock

import pytest
import torch
from torch import nn

from tritium.model.config import ModelConfig
from tritium.model.hf import load
from tritium.model.transformer import Transformer, parameter
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.parallel.tensor import Sharding, shard
from tritium.parallel.zero import Flat, FlatModule, grad_norm, sum_over_tp


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.matrix, self.bias, self.unused = parameter(width, width), parameter(width), parameter(3)

    def forward(self, x):
        return torch.tanh(x @ self.matrix + self.bias)


class Net(nn.Module):
    """Three layers and a root; 5 is a width that no number of ranks divides."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embedding = parameter(7, 5)
        self.layers = nn.ModuleList(Layer(5) for _ in range(3))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)

    def forward(self, tokens):
        x = self.embedding[tokens]
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


TOKENS = [[torch.tensor([0, 3, 6]), torch.tensor([1, 1])], [torch.tensor([5, 2])]]  # of two ranks: micro-batches
RANKS = range(2)


def expected_gradients() -> list[torch.Tensor]:
    net = Net()
    sum(net(tokens) for rank in TOKENS for tokens in rank).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]


def gradients(zero: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Of both ranks' micro-batches together, whole, in the order of a plain net; the second rank has one fewer."""
    mesh, net = init_mesh(zero=zero), Net(dtype)
    flat = FlatModule(net, mesh)
    for i in range(2):
        mine = TOKENS[mesh.dp_rank][i : i + 1]
        mine = mine or ([torch.zeros(0, dtype=torch.int64)] if zero == 3 else [])  # every rank gathers with the others
        with flat.whole():
            losses = [net(tokens) for tokens in mine]
            with flat.backward(last=i == 1):
                for loss in losses:
                    loss.backward()
    whole = {}
    for f in flat.trained:
        joined = f.join(f.own_gradient.contiguous())
        whole |= {name: view.clone() for (name, _), view in zip(f.members, f.views(joined), strict=True)}
    return [whole[name] for name, _ in net.named_parameters()]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_are_summed_over_the_ranks(pool2, zero):
    expected = expected_gradients()
    for found in pool2.run(gradients, zero):
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_gradients_of_bf16_parameters_are_summed_in_fp32(pool2):
    for found in pool2.run(gradients, 2, torch.bfloat16):
        assert all(g.dtype == torch.float32 for g in found)


def held(zero: int) -> dict[str, int]:
    """Elements that this rank holds: of parameters outside a step, of gradients, and of both at their peak."""
    mesh, net = init_mesh(zero=zero), Net()
    for layer in net.layers:
        del layer.unused  # it would keep its layer waiting to the end
    flat = FlatModule(net, mesh)
    peak = {"parameters": 0, "gradients": 0}

    def measure(*_):
        peak["parameters"] = max(peak["parameters"], sum(f.full.untyped_storage().nbytes() // 8 for f in flat.flats))
        wholes = {f.whole.data_ptr(): f.whole.numel() for f in flat.trained if f.whole is not None}
        peak["gradients"] = max(peak["gradients"], sum(wholes.values()))

    outside = sum(f.full.untyped_storage().nbytes() // 8 for f in flat.flats)
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(measure)
    with flat.whole():
        loss = net(TOKENS[0][0])
        with flat.backward(last=True):
            loss.backward()
    after = sum(f.full.untyped_storage().nbytes() // 8 for f in flat.flats)
    return {"outside": outside, "after": after, "gradient": sum(f.gradient.numel() for f in flat.trained), **peak}


LAYER, ROOT = 30, 35  # elements of a unit


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_rank_holds_no_more_than_its_level_says(pool2, zero):
    for rank in pool2.run(held, zero):
        whole = 3 * LAYER + ROOT + (zero > 0)  # the root is filled up to two equal parts
        assert rank["outside"] == rank["after"] == (whole if zero < 3 else 0)
        assert rank["gradient"] == (whole if zero < 2 else whole // 2)
        if zero == 3:  # the root, the layer at work, and the one that is fetched meanwhile
            assert rank["parameters"] <= ROOT + 1 + 2 * LAYER
        if zero >= 2:  # the one that is made, and the one that is sent
            assert rank["gradients"] <= LAYER + ROOT + 1


def decode(zero: int) -> tuple[int, list[bool]]:
    mesh, net = init_mesh(zero=zero), Net()
    flat, plain = FlatModule(net, mesh), Net()
    gathers = []
    for f in flat.flats:
        f.start_gather = lambda f=f, start=f.start_gather: (gathers.append(f.present), start())
    with flat.whole(layers=True), torch.no_grad():
        first = gathers.count(False)
        same = [torch.equal(net(TOKENS[0][0]), plain(TOKENS[0][0])) for _ in range(3)]
        return gathers.count(False) - first, [*same, first == len(flat.flats)]


def test_many_decoding_steps_gather_once(pool2):
    assert pool2.run(decode, 3) == [(0, [True] * 4)] * 2


def walk(zero: int) -> tuple[bool, int, int]:
    """Whether a walk over all parameters finds them whole; elements held at its peak, and after it."""
    mesh, net = init_mesh(zero=zero), Net()
    flat, plain = FlatModule(net, mesh), Net()
    held = lambda: sum(f.full.untyped_storage().nbytes() // 8 for f in flat.flats)  # noqa: E731
    peak, same = 0, True
    with flat.unit_by_unit() as make_whole:
        for p, wanted in zip(net.parameters(), plain.parameters(), strict=True):
            make_whole(p)
            peak, same = max(peak, held()), same and torch.equal(p, wanted)
    return same, peak, held()


def test_what_is_saved_is_made_whole_unit_by_unit(pool2):
    for same, peak, after in pool2.run(walk, 3):
        assert same and peak <= ROOT + 1 and after == 0  # the largest unit, filled up to equal parts
    assert all(same for same, _, _ in pool2.run(walk, 1))


def stream(folder: str | None, zero: int = 3) -> tuple[int, int, int, bool]:
    """Bytes that a streamed model holds before it is cut, at most while it is, and of its largest unit; whether it is
    the plain one."""
    mesh = init_mesh(zero=zero)
    shape = ModelConfig(64, 32, 64, 4, num_heads=2, num_kv_heads=1, head_dim=16, max_positions=32)
    if folder:
        plain, model = load(folder, torch.float32), load(folder, torch.float32, mesh=mesh, streamed=True)
    else:
        plain, model = Transformer(shape).initialize(3), Transformer(shape, mesh, streamed=True).initialize(3)

    def held() -> int:
        storages = [p.untyped_storage() for p in model.parameters()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    before, peak, make = held(), 0, Flat.__init__

    def measured(*args):
        nonlocal peak
        make(*args)
        peak = max(peak, held())

    with mock.patch.object(Flat, "__init__", measured):
        flat = FlatModule(model, mesh)
    after = held()
    with flat.whole(layers=True):
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
        largest = max(sum(f.full.untyped_storage().nbytes() for f in unit) for unit in flat.units)
    return before, peak - before, largest, same and after == 0


@pytest.mark.parametrize("from_folder", [True, False])
def test_a_streamed_model_is_cut_unit_by_unit_and_never_whole(pool2, tiny, from_folder):
    for before, more, largest, same in pool2.run(stream, tiny.model if from_folder else None):
        assert same and before < 400 and 0 < more <= largest


def norm(cut: list[torch.Tensor], whole: list[torch.Tensor], parts: bool, zero: int = 0) -> torch.Tensor:
    """The norm of a net with these gradients, of parameters cut over tp=2 or not; `parts`: a half on each rank."""
    mesh, net = init_mesh(tp=2, zero=zero), nn.Module()
    gradients = [shard(g, Sharding(0), mesh) for g in cut] + [g / 2 if parts else g for g in whole]
    shardings = [Sharding(0)] * len(cut) + [None] * len(whole)
    net.all = nn.ParameterList()
    for gradient, sharding in zip(gradients, shardings, strict=True):
        net.all.append(parameter(*gradient.shape, sharding=sharding))
        net.all[-1].data = torch.zeros_like(gradient)
        net.all[-1].partial &= parts
    flat = FlatModule(net, mesh)
    for f in flat.trained:
        for (name, _), view in zip(f.members, f.views(f.gradient), strict=True):
            view.copy_(gradients[int(name.split(".")[1])])
    sum_over_tp(flat.trained, mesh)
    return grad_norm(flat.trained, mesh)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("cut,whole", [((4, 6), (5, 3)), ((4,), ()), ((), (5,))])
@pytest.mark.parametrize("parts", [False, True])
def test_the_norm_counts_replicated_gradients_once_and_parts_as_their_sum(pool2, cut, whole, parts):
    cut, whole = [draw(n, 3) for n in cut], [draw(n) for n in whole]
    expected = torch.cat([g.flatten() for g in (*cut, *whole)]).norm()
    for actual in pool2.run(norm, cut, whole, parts):
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


def test_the_norm_shows_on_every_rank_what_is_not_finite_on_one(pool2):
    broken = torch.zeros(4, dtype=torch.float64)
    broken[3] = torch.inf  # on rank 1 only; both must skip the step
    assert [x.item() for x in pool2.run(norm, [broken], [], False)] == [torch.inf] * 2


def test_the_norm_of_nothing_is_zero():
    assert grad_norm([], Mesh.single()).item() == 0


def refuse(zero_of_rank: list[int]) -> str:
    try:
        init_mesh(zero=zero_of_rank[int(os.environ["RANK"])])
    except ValueError as error:
        return str(error)
    return ""


def test_levels_that_are_none_or_differ_are_refused_on_every_rank(pool2):
    assert all(s.startswith("zero=4: the levels are 0, 1, 2 and 3") for s in pool2.run(refuse, [4, 4]))
    assert all("rank 0 has cp=1, tp=1, zero=1, shard=0" in s for s in pool2.run(refuse, [1, 2]))


def refuse_shard(zero: int, shard: int) -> str:
    try:
        init_mesh(zero=zero, shard=shard)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("zero,shard", [(0, 2), (3, 3), (3, -1)])
def test_shards_that_the_ranks_cannot_form_are_refused_on_every_rank(pool2, zero, shard):
    said = f"shard={shard} at zero={zero}: ZeRO (1, 2 or 3) cuts over a divisor of the 2 data ranks"
    assert pool2.run(refuse_shard, zero, shard) == [said] * 2
