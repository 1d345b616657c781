"""Activation checkpointing: the same gradients, from less that is kept."""

import pytest
import torch

from tritium.model import adapters, lora
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.parallel.zero import FlatModule

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = ModelConfig(48, 32, 96, 4, 4, 2, 8, 64, init_std=0.3)
TOKENS, CU = torch.arange(40), torch.tensor([0, 17, 40], dtype=torch.int32)


def kept_and_gradients(kind: str, zero: int = 0, adapter: bool = False) -> tuple[int, dict[str, torch.Tensor]]:
    model = Transformer(CONFIG, Mesh.single(zero=zero), torch.float64).initialize(0)
    if adapter:
        adapters.attach(model, lora.LoraConfig(4, dropout=0.3))
    model.set_recompute(kind)
    kept: dict[int, int] = {}

    def note(x):
        kept[x.data_ptr()] = x.nbytes
        return x

    flat = FlatModule(model, model.mesh)
    torch.manual_seed(7)
    with flat.whole():
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model.hidden(TOKENS, CU).sin().sum()
        with flat.backward(last=True):
            loss.backward()
    sizes = {p.data_ptr() for p in model.parameters()}
    gradients = [f.join(f.own_gradient).clone() for f in flat.trained]
    return sum(n for place, n in kept.items() if place not in sizes), dict(enumerate(gradients))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("zero", [0, 3])
def test_gradients_are_the_same_and_less_is_kept(zero, adapter):
    everything, expected = kept_and_gradients("none", zero, adapter)
    for kind, share in (("selective", 0.75), ("full", 0.35)):
        kept, found = kept_and_gradients(kind, zero, adapter)
        assert kept < share * everything, (kind, kept, everything)
        for key, gradient in found.items():  # the same masks of dropout, too
            torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-12)
