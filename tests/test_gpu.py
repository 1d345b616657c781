"""Whole training steps on a GPU: the same bits twice, no waiting host, graphs, and the equalities of the CPU's tests.

The kernels' own tests are in tests/kernels (`pytest -m gpu`). What can be is rehearsed on a CPU, so that on a GPU no
test fails for a mistake of its own.
"""

import contextlib
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tritium.bench.contenders import Loop, Settings
from tritium.bench.step import WARM, documents, random_model, training_step
from tritium.core.batch import Document, pack
from tritium.core.data import DataConfig
from tritium.core.objectives.base import supervised_logprob
from tritium.core.objectives.distill import Distill
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.objectives.policy import ALGORITHMS, PPO, PolicyGradient
from tritium.core.objectives.reward import Listwise, Pairwise, Process, Scoring
from tritium.core.run import RunConfig
from tritium.core.trainer import Trainer
from tritium.kernels.backend import HAS_TRITON
from tritium.model.config import ModelConfig
from tritium.model.generate import generate
from tritium.model.heads import ScalarModel
from tritium.stages import sft

SHAPE = ModelConfig(512, 128, 256, 2, 4, 2, 64, max_positions=256, init_std=0.1)
needs_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
pytestmark = pytest.mark.usefixtures("quick")


def made(device, dtype=torch.bfloat16, finetune="full"):
    """A model and a batch of six documents."""
    return random_model(SHAPE, torch.device(device), dtype, finetune), documents(SHAPE.vocab_size, 640, 120).to(device)


def after_steps(device, finetune, steps=3):
    """Losses and parameters."""
    model, batch = made(device, finetune=finetune)
    step = training_step(model, batch, lr=1e-2)
    losses = torch.stack([step() for _ in range(steps)])
    return [losses, *(p.detach().clone() for p in model.parameters())]


@on_each_device
@pytest.mark.parametrize("finetune", ["full", "lora", "qlora"])
def test_a_training_step_gives_the_same_bits_again(device, finetune):
    first, again = after_steps(device, finetune), after_steps(device, finetune)
    assert first[0][-1] < first[0][0], "it learns"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@contextlib.contextmanager
def no_waiting(device):
    """Within, whatever makes the host wait for the GPU is an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@on_each_device
@pytest.mark.parametrize("finetune", ["full", "qlora"])
def test_the_host_does_not_wait_in_a_training_step(device, finetune):
    model, batch = made(device, finetune=finetune)
    step = training_step(model, batch, lr=1e-2)
    before = [step() for _ in range(WARM)][0]
    with no_waiting(device):
        after = step()
    assert after < before


def trainer_of(device, finetune, out):
    """The trainer of a stage, with a batch."""
    model, batch = made(device, finetune=finetune)
    return Loop({"policy": model}, CrossEntropy(), Settings(RunConfig(out=str(out))), model.mesh), batch


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_without_a_gpu_no_number_is_read_in_a_step_for_one(monkeypatch, tmp_path, finetune):
    """On tensors with shapes and no numbers, whose kernels are not launched: what would make a host wait for a value (a
    condition on one, item, nonzero, tolist, a copy to the CPU) is an error."""
    monkeypatch.setenv("TRITIUM_BACKEND", "triton")
    trainer, batch = trainer_of("meta", finetune, tmp_path)
    for _ in range(2):
        trainer.step([batch])
        _, values, sums = trainer.pending
        trainer.pending = None  # read a step later
    with pytest.raises(RuntimeError, match="meta"):
        (values.read() if finetune == "full" else sums.read())


OBJECTIVES = {
    "pairwise": (Pairwise(), ["reward"]),
    "process": (Process(), ["reward"]),
    "scoring": (Scoring(), ["reward"]),
    "listwise": (Listwise(), ["reward"]),
    "all_pairs": (Listwise(pairs=True), ["reward"]),
    "distill": (Distill(), ["policy", "teacher"]),
    "grpo": (PolicyGradient(), ["policy"]),
    "gspo": (ALGORITHMS["gspo"], ["policy"]),
    "ppo": (PPO(), ["policy", "critic"]),
}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_a_gpu_no_number_is_read_by_an_objective(monkeypatch, name):
    """As the trainer's step above, for what else is learned; what `estimate` notes for policies is there."""
    monkeypatch.setenv("TRITIUM_BACKEND", "triton")
    monkeypatch.setattr(
        importlib.import_module("tritium.kernels.segment_sum"), "check_segments", lambda *_: None
    )  # CPUs'
    objective, names = OBJECTIVES[name]
    networks = {key: made("meta")[0] for key in names}
    networks |= {key: ScalarModel(networks[key]) for key in ("reward", "critic") if key in networks}
    weights = (np.arange(20) > 5).astype(np.float32)
    fields = {"score": 0.5, "label": np.ones(20, np.float32)}
    documents = [Document(np.arange(20, dtype=np.int32), weights, fields | {"rank": float(i)}) for i in range(2)]
    batch = pack([documents], {"pairs": 1.0}).to("meta")
    noted = ("old_logp", "advantages", "sampler_logp", "old_values", "returns")
    batch.fields.update({key: torch.zeros(len(batch.supervised), device="meta") for key in noted})
    terms, _ = objective.loss(objective.outputs(networks, batch), batch)
    sum(term.sum for term in terms.values()).backward()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_the_trainer_waits_for_the_step_before_and_not_for_its_own(tmp_path, device):
    trainer, batch = trainer_of(device, "full", tmp_path)
    for _ in range(WARM):
        trainer.step([batch])
    with no_waiting(device):
        trainer.step([batch])
    trainer.flush_metrics()
    assert trainer.last["loss"] > 0 and trainer.last["grad_norm"] > 0


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_a_cuda_graph_of_a_training_step_makes_the_same_steps(device):
    (model, batch), (twin, _) = made(device), made(device)
    step, plain = training_step(model, batch, lr=1e-2), training_step(twin, batch, lr=1e-2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(WARM):
        plain()
    for _ in range(3):
        graph.replay()
        expected = plain()
        assert torch.equal(loss, expected)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@on_each_device
def test_compiled_it_has_the_same_gradients(device):
    model, batch = made(device, torch.float32)

    def loss():
        return supervised_logprob(model, batch).logp.mean()

    compiled = torch.compile(loss, backend="inductor" if device == "cuda" else "aot_eager")
    plain, found = ([*torch.autograd.grad(function(), [*model.parameters()])] for function in (loss, compiled))
    for a, b in zip(plain, found, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-8


@on_each_device
def test_how_a_batch_is_cut_up_does_not_show(device):
    """Packed together, one by one, and with a filler: to the rounding of fp32."""
    model, _ = made(device, torch.float32)
    rng = np.random.default_rng(0)
    texts = [Document(rng.integers(0, 512, n).astype(np.int32), np.ones(n, np.float32)) for n in (2, 17, 129, 1, 64)]

    def gradients(batches):
        losses = [supervised_logprob(model, batch.to(device)).logp.sum() for batch in batches if batch.counts["tokens"]]
        return torch.autograd.grad(sum(losses), [*model.parameters()])

    together = gradients([pack([[d] for d in texts])])
    for other in ([pack([[d]]) for d in texts], [pack([[d] for d in texts], multiple_of=256)]):
        for a, b in zip(together, gradients(other), strict=True):
            assert (a - b).norm() <= 2e-5 * a.norm()


@on_each_device
def test_what_is_sampled_has_the_training_forwards_log_probs(device):
    model, _ = made(device, torch.float32)
    prompts = [np.random.default_rng(i).integers(0, 512, n).tolist() for i, n in enumerate((1, 40, 3, 17))]
    found = generate(model, prompts, max_tokens=20, stop_ids=range(8), max_batch=3, seed=2)
    whole = [np.array(p + c.tokens, np.int32) for p, c in zip(prompts, found, strict=True)]
    learned = [(np.arange(len(ids)) >= len(p)).astype(np.float32) for ids, p in zip(whole, prompts, strict=True)]
    batch = pack([[Document(ids, weights)] for ids, weights in zip(whole, learned, strict=True)]).to(device)
    expected = supervised_logprob(model, batch).logp.tolist()
    np.testing.assert_allclose([x for c in found for x in c.logps], expected, rtol=0, atol=1e-4)


@on_each_device
def test_killed_and_resumed_it_ends_with_the_same_bits(tiny, tmp_path, monkeypatch, device):
    class Killed(Exception):
        pass

    def trained(name: str) -> bytes:
        data = DataConfig([tiny.data("chats.jsonl")], bin_tokens=256, holdout=0.1)
        run = RunConfig(out=str(tmp_path / name), steps=4, dtype="bf16", device=device, save_every=2)
        return (
            Path(sft.train(sft.Config(data=data, run=run, model=tiny.model)).checkpoint) / "model.safetensors"
        ).read_bytes()

    def fatal(trainer, *args, step=Trainer.step):
        if trainer.index == 3:
            trainer.finish_save()
            raise Killed
        return step(trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", fatal)
        trained("cut")
    assert trained("cut") == trained("whole")
