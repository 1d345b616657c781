"""The one loop: what a step is, and that stopping, failing and resuming leave no trace in the result."""

import json
import resource
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tritium.core.batch import Document, PackedBatch, pack
from tritium.core.checkpoint import CheckpointError, checkpoints
from tritium.core.config import ConfigError, UserError, opt
from tritium.core.objectives.base import Metric, Term, supervised
from tritium.core.objectives.likelihood import CrossEntropy
from tritium.core.optim import OptimConfig
from tritium.core.run import LoopConfig, RunConfig, changed_lines
from tritium.core.schedule import ScheduleConfig
from tritium.core.trainer import Trainer, TrainingError
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.parallel.files import Share, open_tensors
from tritium.parallel.mesh import Mesh

pytestmark = pytest.mark.usefixtures("quick")
SHAPE = ModelConfig(32, 16, 24, 2, 2, 1, 8, max_positions=32, init_std=0.2)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass
class Settings:
    run: RunConfig = opt(RunConfig, "")
    optim: OptimConfig = opt(OptimConfig(lr=1e-2), "")
    schedule: ScheduleConfig = opt(ScheduleConfig(warmup=0.0), "")


def trainer(out: Path, steps: int = 6, objective=None, shape=SHAPE, evaluation=(), lr=1e-2, **run) -> Trainer:
    options = {"dtype": "fp32", "save_every": 2, "eval_every": 100} | run
    settings = Settings(RunConfig(out=str(out), **options), OptimConfig(lr=lr))
    model = Transformer(shape, dtype=DTYPES[options["dtype"]]).initialize(0)
    objective = objective or CrossEntropy()
    networks, mesh = {"policy": model}, Mesh.single()
    return Trainer(networks, objective, settings, mesh, name="toy", total_steps=steps, evaluation=evaluation)


def documents(seed: int, count: int) -> list[Document]:
    """Of different lengths and weights."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(rng.integers(3, 20))
        weights = np.append(1.0, rng.integers(0, 3, n - 1) / 2)
        weights[-1] = 1.0
        made.append(Document(rng.integers(0, 32, n).astype(np.int32), weights.astype(np.float32)))
    return made


def micro_batches(step: int, cut: int = 2) -> list[PackedBatch]:
    """Eight documents of the step, in `cut` bins."""
    made = documents(step, 8)
    return [pack([[d] for d in made[i::cut]]) for i in range(cut)]


def train(one: Trainer, until: int | None = None) -> Trainer:
    """Run to the end, or raise before step `until`, as a crash would."""
    for step in one.steps():
        if step == until:
            one.finish_save()  # or it would depend on the disk's speed which checkpoint there is
            raise RuntimeError("crash")
        one.step(micro_batches(step))
    return one


def weights(one: Trainer) -> dict[str, torch.Tensor]:
    """Masters, moments and the step count."""
    return {k: v.clone() for k, v in one.optimizers["policy"].tensors()}


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(actual[key], value), key


# ---------------------------------------------------------------------------------------------- a step


def test_the_loss_and_its_gradient_do_not_depend_on_how_the_batch_was_cut(tmp_path):
    seen = []
    for cut in (1, 3, 8):
        one = trainer(tmp_path / str(cut), steps=2, dtype="fp64")
        for step in one.steps():
            one.step(micro_batches(step, cut))
        found = lines(tmp_path / str(cut))
        seen.append(([[m[k] for k in ("loss", "accuracy", "entropy", "grad_norm")] for m in found], weights(one)))
    for numbers, state in seen[1:]:
        np.testing.assert_allclose(numbers, seen[0][0], rtol=0, atol=1e-9)
        for key, value in seen[0][1].items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-9)


def test_the_loss_is_the_weighted_mean_over_the_whole_step(tmp_path):
    one = trainer(tmp_path, steps=1, dtype="fp64")
    model, made = one.networks["policy"], documents(0, 8)
    total = weight = 0.0
    with torch.no_grad():
        for d in made:
            ids, w = torch.from_numpy(d.ids).long(), torch.from_numpy(d.weights[1:]).double()
            logp = model.logits(ids).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
            total, weight = total - (w * logp).sum().item(), weight + w.sum().item()
    train(one)
    assert lines(tmp_path)[0]["loss"] == pytest.approx(total / weight, abs=1e-10)


@pytest.mark.parametrize("kind", ["no batch", "an empty batch", "a batch without a supervised token"])
def test_a_step_on_nothing_moves_nothing(tmp_path, kind):
    one = trainer(tmp_path, steps=2)
    silent = Document(np.arange(5, dtype=np.int32), np.zeros(5, np.float32))
    nothing = {"no batch": [], "an empty batch": [pack([])]}.get(kind, [pack([[silent]])])
    for step in one.steps():
        if step == 0:
            one.step(micro_batches(step))
            before = weights(one)  # with momentum and weight decay, which would move the parameters
        else:
            one.step(nothing)
    assert_equal(weights(one), before)
    assert [m["step"] for m in lines(tmp_path)] == [1, 2] and "grad_norm" not in lines(tmp_path)[1]


def test_evaluation_is_averaged_over_all_its_batches_and_changes_nothing(tmp_path):
    batches = micro_batches(50, cut=3)
    one = trainer(tmp_path / "a", steps=4, evaluation=batches, eval_every=2)
    train(one)
    train(two := trainer(tmp_path / "b", steps=4))
    assert_equal(weights(one), weights(two))
    found = [m for m in lines(tmp_path / "a") if "eval_loss" in m]
    assert [m["step"] for m in found] == [0, 2, 4]
    whole = one.evaluate(micro_batches(50, cut=1))
    assert found[-1]["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)
    assert one.result().before["eval_loss"] == found[0]["eval_loss"]
    assert one.result().metrics["eval_loss"] == found[-1]["eval_loss"]


def test_throughput_counts_what_is_trained_on_and_not_what_fills_the_stream(tmp_path):
    found = []
    for name, multiple in (("bare", 1), ("filled", 256)):
        one = trainer(tmp_path / name, steps=1)
        for step in one.steps():
            batch = pack([[d] for d in documents(step, 8)], multiple_of=multiple)
            one.step([batch])
        assert len(batch.tokens) == (256 if multiple > 1 else sum(map(len, documents(0, 8))))
        found.append((lines(tmp_path / name)[0]["tokens"], one.pace.sums[2]))
    assert found[0] == found[1] and found[0][0] == sum(map(len, documents(0, 8)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "run.seed=-1 must be at least 0"),
        ({"steps": 0}, "run.steps=0 must be at least 1"),
        ({"epochs": 0.0}, "run.epochs=0.0 must be above 0"),
        ({"keep": 0}, "run.keep=0 must be at least 1"),
        ({"check_every": 0}, "run.check_every=0 must be at least 1"),
    ],
)
def test_a_run_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        LoopConfig(**options)


# ---------------------------------------------------------------------------------------------- gradients that fail


class Poisoned(CrossEntropy):
    """NaN in the steps that are named; steps count from 0."""

    def __init__(self, *steps: int):
        self.poisoned, self.index = steps, 0

    def loss(self, outputs, batch):
        terms, metrics = super().loss(outputs, batch)
        factor = float("nan") if self.index in self.poisoned else 1.0
        return {k: t._replace(sum=t.sum * factor) for k, t in terms.items()}, metrics


def poisoned_run(out: Path, *steps: int, **options) -> tuple[Trainer, list[dict[str, torch.Tensor]]]:
    objective = Poisoned(*steps)
    one, states = trainer(out, objective=objective, **options), []
    for step in one.steps():
        objective.index = step
        one.step(micro_batches(step))
        states.append(weights(one))
    return one, states


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(tmp_path):
    _, states = poisoned_run(tmp_path, 0, 2, 3, max_bad_steps=3)
    assert states[0]["step"] == 0
    assert_equal(states[2], states[1])
    assert_equal(states[3], states[1])
    assert not torch.equal(states[4]["master.embedding"], states[3]["master.embedding"])
    assert [m["skipped"] for m in lines(tmp_path)] == [1, 0, 1, 1, 0, 0]
    assert lines(tmp_path)[2]["loss"] == "nan"


def test_too_many_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row, up to step 5"):
        poisoned_run(tmp_path, 2, 3, 4, 5, 6, 7, steps=20, max_bad_steps=3, save_every=100)
    assert len(lines(tmp_path)) == 5


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("crash", [1, 3, 4])  # before the first checkpoint; between two; just after one
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, dtype, crash):
    options = {"dtype": dtype, "evaluation": micro_batches(50), "eval_every": 3}
    whole = train(trainer(tmp_path / "whole", **options))
    with pytest.raises(RuntimeError, match="crash"):
        train(trainer(tmp_path / "cut", **options), until=crash)
    resumed = train(trainer(tmp_path / "cut", **options))
    assert_equal(weights(resumed), weights(whole))
    for a, b in zip(resumed.networks.parameters(), whole.networks.parameters(), strict=True):
        assert a.dtype == DTYPES[dtype] and torch.equal(a, b)
    keys = ("step", "loss", "eval_loss", "grad_norm", "lr")
    wanted = [{k: m[k] for k in keys if k in m} for m in lines(tmp_path / "whole")]
    assert [{k: m[k] for k in keys if k in m} for m in lines(tmp_path / "cut")] == wanted
    assert resumed.result().before == whole.result().before


def test_a_finished_run_is_not_run_again(tmp_path):
    first = train(trainer(tmp_path))
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.suffix == ".safetensors"}
    again = trainer(tmp_path)
    assert list(again.steps()) == []
    assert_equal(weights(again), weights(first))
    assert again.result().checkpoint == first.result().checkpoint
    assert again.result().metrics["loss"] == first.result().metrics["loss"]
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.suffix == ".safetensors"}


def test_a_run_can_be_made_longer(tmp_path):
    train(trainer(tmp_path, steps=4))
    longer = trainer(tmp_path, steps=6)
    assert longer.index == 4
    train(longer)
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_what_a_run_may_change_when_it_is_resumed():
    before = "[run]\nsteps = 4\nkeep = 2\n[mesh]\ntp = 1\ntimeout = 600.0\n[optim]\nlr = 0.1\n"
    after = "[run]\nsteps = 9\nkeep = 3\n[mesh]\ntp = 2\ntimeout = 60.0\n[optim]\nlr = 0.1\n"
    assert changed_lines(before, after) == ""
    assert changed_lines(before, after + "clip = 2.0\n") == "optim.clip: unset → 2.0"
    many = "".join(f"x{i} = 1\n" for i in range(9))  # as of another stage's run: the line stays readable
    assert changed_lines("", many).endswith("x4: unset → 1, and 4 more")


def test_checkpoints_come_as_often_as_asked_and_the_last_ones_stay(tmp_path):
    train(trainer(tmp_path, steps=7, keep=2))
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000006", "step-00000007"]


def test_another_configuration_is_refused(tmp_path):
    train(trainer(tmp_path))
    with pytest.raises(CheckpointError, match=r"another configuration \(optim.lr: 0.01 → 0.5\): use another --run.out"):
        trainer(tmp_path, lr=0.5)


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_layers": 1}, {"hidden_size": 24}])
def test_the_checkpoint_of_another_model_is_refused(tmp_path, change):
    train(trainer(tmp_path))
    with pytest.raises(CheckpointError, match="step-00000006 does not fit this model: optimizer state"):
        trainer(tmp_path, shape=ModelConfig(**(vars(SHAPE) | change)))


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, harm, capsys):
    whole = train(trainer(tmp_path / "whole"))
    with pytest.raises(RuntimeError):
        train(trainer(tmp_path / "cut"), until=5)
    file = tmp_path / "cut" / "step-00000004" / "trainer" / "policy.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    resumed = trainer(tmp_path / "cut")
    assert resumed.index == 2 and "step-00000004 is damaged: trainer/policy.safetensors" in capsys.readouterr().err
    assert_equal(weights(train(resumed)), weights(whole))
    assert [m["step"] for m in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


def test_with_every_checkpoint_damaged_the_run_starts_again(tmp_path, capsys):
    whole = weights(train(trainer(tmp_path)))
    for folder in checkpoints(tmp_path):
        (folder / "manifest.json").unlink()
    again = trainer(tmp_path)
    assert again.index == 0 and "starting from the beginning" in capsys.readouterr().err
    assert_equal(weights(train(again)), whole)


# ---------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("at", [0, 2, 5])  # the first step, one between two checkpoints, the last one
def test_ctrl_c_saves_before_it_acts(tmp_path, at):
    whole = train(trainer(tmp_path / "whole"))
    one = trainer(tmp_path / "cut", save_every=100)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        for step in one.steps():
            if step == at:
                signal.raise_signal(signal.SIGINT)
            one.step(micro_batches(step))
    assert signal.getsignal(signal.SIGINT) is handler
    assert [p.name for p in checkpoints(tmp_path / "cut")] == [f"step-{at + 1:08d}"]
    resumed = train(trainer(tmp_path / "cut", save_every=100))
    assert_equal(weights(resumed), weights(whole))
    assert [m["step"] for m in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_saves_before_it_acts(tmp_path, number):
    def act(*_):
        raise InterruptedError

    before = signal.signal(number, act)
    try:
        one = trainer(tmp_path, save_every=100)
        with pytest.raises(InterruptedError):
            for step in one.steps():
                if step == 2:
                    signal.raise_signal(number)  # twice: to the process group, and handed on by make or torchrun
                    signal.raise_signal(number)
                one.step(micro_batches(step))
        assert signal.getsignal(number) is act
    finally:
        signal.signal(number, before)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The disk takes three steps: the checkpoint of step 2 has its name after step 5, and holds step 2's weights."""
    free, write = threading.Event(), Share.write
    monkeypatch.setattr(Share, "write", lambda share, folder: (free.wait(30), write(share, folder)))
    one, states, seen = trainer(tmp_path, steps=8, save_every=100), [], []
    for step in one.steps():
        one.step(micro_batches(step))
        states.append(weights(one))
        seen.append([p.name for p in checkpoints(tmp_path)])
        if step == 1:
            one.save()
        if step == 4:
            free.set()
            one.saving[1].thread.join()
    assert seen[:5] == [[]] * 5 and seen[5] == ["step-00000002"]
    with open_tensors(tmp_path / "step-00000002", "trainer/policy") as found:
        assert_equal(dict(found), states[1])


def test_ctrl_c_before_the_first_step_can_be_resumed(tmp_path):
    options = {"evaluation": micro_batches(50)}
    one = trainer(tmp_path, **options)
    one.stop_signal = signal.SIGINT  # it came while the model was evaluated
    with pytest.raises(KeyboardInterrupt):
        train(one)
    train(trainer(tmp_path, **options))
    assert [m["step"] for m in lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6, 6]  # 0 and 6 twice: evaluations


def test_a_second_ctrl_c_acts_at_once(tmp_path):
    one, before = (
        trainer(tmp_path),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a shell's "&" ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in one.steps():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("the second signal did nothing")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not checkpoints(tmp_path)


class FullDisk:
    """While it is entered, no file grows beyond 6000 bytes: metrics fit, checkpoints don't."""

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_in_the_middle_does_not_end_the_run(tmp_path, capsys):
    whole = train(trainer(tmp_path / "whole"))
    one = trainer(tmp_path / "full")
    for step in one.steps():
        if step == 3:  # the checkpoint of step 4 fails, that of 6 is written
            one.finish_save()  # that of step 2 may still be under way
            with FullDisk():
                one.step(micro_batches(step))
                one.save()
                one.finish_save()
                assert [p.name for p in (tmp_path / "full").glob("step-*")] == ["step-00000002"]
        else:
            one.step(micro_batches(step))
    assert "could not be written" in capsys.readouterr().err
    assert_equal(weights(one), weights(whole))
    assert checkpoints(tmp_path / "full")[-1].name == "step-00000006"


def test_a_run_whose_last_checkpoint_cannot_be_written_has_failed(tmp_path):
    one = trainer(tmp_path)
    with pytest.raises(CheckpointError, match="step-00000006 could not be written: .*free some space"), FullDisk():
        train(one)
    assert not list(tmp_path.glob("step-*"))


def test_a_metrics_file_that_cannot_grow_does_not_end_the_run(tmp_path, capsys):
    one = trainer(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for step in one.steps():
            size = 100 if step in (1, 2) else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            one.step(micro_batches(step))
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("metrics.jsonl can't be written") == 1
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert one.index == 6


def test_a_disk_that_is_full_from_the_beginning_is_a_sentence(tmp_path):
    train(trainer(tmp_path, steps=4))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(UserError, match="metrics.jsonl can't be written: .*; free some space"):
            trainer(tmp_path, steps=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    train(trainer(tmp_path, steps=6))
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------- several terms


class TwoTerms(CrossEntropy):
    """Terms with denominators of their own."""

    def loss(self, outputs, batch):
        logp = outputs.logp
        squares = (supervised(batch.weights, batch, logp) * logp.square()).sum()
        terms = {"a": Term(-logp.sum(), "sequences"), "b": Term(squares, "tokens", 0.5)}
        return terms, {"hits": Metric(outputs.hit.sum(), "groups")}


def test_terms_have_their_own_denominators_and_coefficients(tmp_path):
    found = []
    for cut in (1, 4):
        one = trainer(tmp_path / str(cut), steps=1, objective=TwoTerms(), dtype="fp64")
        for step in one.steps():
            one.step(micro_batches(step, cut))
        found.append((weights(one), lines(tmp_path / str(cut))[0]))
    (state, numbers), (other, others) = found
    for key in ("a", "b", "hits", "grad_norm"):
        assert numbers[key] == pytest.approx(others[key], abs=1e-9)
    torch.testing.assert_close(state["exp_avg.head"], other["exp_avg.head"], rtol=0, atol=1e-9)

    model, batch = Transformer(SHAPE, dtype=torch.float64).initialize(0), micro_batches(0, 1)[0]
    outputs = TwoTerms().outputs(nn.ModuleDict({"policy": model}), batch)
    terms, _ = TwoTerms().loss(outputs, batch)
    assert numbers["a"] == pytest.approx(terms["a"].sum.item() / 8, abs=1e-10)
    assert numbers["b"] == pytest.approx(terms["b"].sum.item() / batch.counts["tokens"], abs=1e-10)
    (terms["a"].sum / 8 + 0.5 * terms["b"].sum / batch.counts["tokens"]).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert numbers["grad_norm"] == pytest.approx(norm.item(), abs=1e-9)
