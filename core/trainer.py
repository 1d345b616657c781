"""The one loop: steps, accumulation, denominators, clipping, schedule, metrics, checkpoints.

    trainer = Trainer(networks, objective, settings, mesh, …)
    for step in trainer.steps():                    # resumes; saves; stops cleanly on Ctrl-C
        trainer.step(batches)                       # any number of micro-batches, any of them empty

What a step does, for micro-batches b and data-parallel ranks r:

    counts_d = Σ_r Σ_b batch.counts[d]              one exchange, before the first backward
    loss     = Σ_terms coefficient · Σ_r Σ_b sum / counts[denominator]
    backward per micro-batch, gradients added in fp32, summed over r once, clipped over the mesh, one AdamW step

so that the loss and its gradient do not depend on how the batch was cut up.
"""

import json
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritium.core.batch import FILLER, PackedBatch, counts_of, pack
from tritium.core.checkpoint import CheckpointError, Save, checkpoints, latest, prune, read_state
from tritium.core.config import ConfigError, to_toml
from tritium.core.files import Skipped
from tritium.core.health import IDLE
from tritium.core.metrics import Clock, Metrics, Numbers, Pace, matmul_rate
from tritium.core.objectives.base import Objective
from tritium.core.optim import LossScale, OptimConfig, Optimizer
from tritium.core.output import alone, whole_file
from tritium.core.reference import Follower
from tritium.core.run import LoopConfig, Result, RunConfig, changed_lines
from tritium.core.schedule import BatchRamp, ScheduleConfig, learning_rate
from tritium.core.setup import check_patterns, trained_share
from tritium.core.tokenizer import Tokenizer
from tritium.model.hf import decoder_of, export
from tritium.model.transformer import Transformer
from tritium.parallel.data import all_reduce_counts, diverged, fingerprint
from tritium.parallel.files import deal, open_tensors
from tritium.parallel.mesh import Mesh
from tritium.parallel.watch import Watch
from tritium.parallel.zero import FlatModule


class TrainingError(RuntimeError):
    """The run can't go on: gradients that stay non-finite, replicas that are no longer the same."""


class Trainer:
    """See the module's docstring.

    `networks` are trained where their parameters require a gradient; the first one is what a checkpoint exports.
    `followers` are frozen ones that move towards it (`follow`).
    `settings` is the stage's config: its `run`, `optim` and `schedule` are read, and all of it is saved.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        objective: Objective,
        settings: Any,
        mesh: Mesh,
        *,
        name: str,
        total_steps: int,
        tokenizer: Tokenizer | None = None,
        evaluation: Sequence[PackedBatch] = (),
        skipped: Skipped | None = None,
        followers: Sequence[str] = (),
    ):
        self.networks, self.objective, self.mesh = nn.ModuleDict(networks), objective, mesh
        self.run: LoopConfig = settings.run
        self.eval_every = self.run.eval_every if isinstance(self.run, RunConfig) else total_steps
        self.optim: OptimConfig = settings.optim
        self.schedule: ScheduleConfig = settings.schedule
        self.config_toml, self.tokenizer, self.total_steps = to_toml(settings), tokenizer, total_steps
        self.evaluation, self.skipped = evaluation, skipped or Skipped()
        self.flat = {k: FlatModule(m, mesh) for k, m in networks.items()}
        decoders = {k: decoder_of(networks[k]) for k, flat in self.flat.items() if flat.trained}
        widths = {k: d.config.head_scale if d.config.width_base else None for k, d in decoders.items()}
        self.optimizers = {k: Optimizer(self.flat[k], self.optim, widths[k]) for k in decoders}
        names = [name for key in self.optimizers for flat in self.flat[key].trained for name, _ in flat.members]
        for option in ("lr_scale", "decay"):
            check_patterns(f"optim.{option}", getattr(self.optim, option), names)
        for decoder in decoders.values():
            decoder.set_recompute(self.run.recompute)
        halves = [p for n in networks.values() for p in n.parameters() if p.dtype == torch.float16]
        self.loss_scale = LossScale(mesh.device) if halves else None
        self.shares = {k: trained_share(networks[k]) for k in self.optimizers}
        first = next(iter(networks))
        followed = (networks[first], self.flat[first], mesh)
        self.followers = {key: Follower(networks[key], self.flat[key], *followed) for key in followers}
        self.out = Path(self.run.out)
        self.clock, self.metrics = Clock(), Metrics(self.run.out, main=mesh.main, total_steps=total_steps, name=name)
        self.index = self.bad_steps = 0  # steps done; steps skipped in a row
        self.saved = -1  # the step of the newest checkpoint
        self.saving: tuple[int, Save] | None = None  # the step of the one that is being written
        self.pending: tuple[int, Numbers, Numbers] | None = None  # the last step's metrics, not yet read
        self.before: dict[str, float] = {}  # the evaluation at step 0
        self.notes: dict[str, Any] = {}  # what a driver wants to find again after a resume; JSON
        self.lr_scale = dict.fromkeys(self.optimizers, 1.0)  # by network, of the learning rate; 0 leaves it where it is
        self.last: dict[str, float] = {}  # the newest value of everything logged
        self.stop_signal = 0
        self.watch = Watch(mesh)
        self.pace = Pace(self.measure_peak(), queued=mesh.device.type == "cuda")
        self.idle = 0  # steps that had nothing to learn from
        with self.own():  # what another process logs must not be cut
            self.resume()
        self.begun = self.index  # steps done before this process
        self.ramp = self.open_ramp(getattr(settings.data, "bins_per_step", None) if hasattr(settings, "data") else None)
        self.write_config()

    def open_ramp(self, bins: int | None) -> BatchRamp | None:
        """How the batch of `bins` grows, where it does. Raises: ConfigError in a stage whose batches are not bins."""
        if self.schedule.batch_start == 1:
            return None
        if bins is None:
            raise ConfigError("schedule.batch_start: the batches of this stage are not data.bins_per_step bins")
        return BatchRamp(self.schedule, bins, self.mesh.dp, self.total_steps, self.notes.setdefault("batch", {}))

    def own(self) -> AbstractContextManager[None]:
        """Within, no other process has the run's folder."""
        return alone(self.out, "run.out") if self.mesh.main and self.out.is_dir() else nullcontext()

    def write_config(self) -> None:
        """Leave the resolved config in the run's folder. Raises: UserError where it can't be written."""
        if self.mesh.main:
            with whole_file(self.out / "config.toml") as file:
                file.write(self.config_toml.encode())

    # ------------------------------------------------------------------------------------------ the loop

    def steps(self) -> Iterator[int]:
        """The steps still to do. A driver may take several at a time (`step` counts them); what happens between
        steps happens here: evaluation, checkpoints, and on SIGINT, SIGTERM or SIGUSR1 a checkpoint before it acts.
        """
        with self.own(), self.signals(), self.watch:
            self.say(self.skipped.summary())  # of all that a driver reads
            if self.index == 0:
                self.before = self.log(self.evaluate(self.evaluation))
            self.pace.start()
            while self.index < self.total_steps and not self.told_to_stop():
                first = self.index
                yield first
                self.after_steps(first)
            self.finish_save()
            if self.saved != self.index:
                self.save()
                self.finish_save(last=True)
            self.say(self.skipped.summary())
            self.metrics.close()
        if self.told_to_stop():
            self.mesh.close()  # its threads, where the interpreter ended among them, aborted the process
            self.obey()

    def step(self, batches: Sequence[PackedBatch], extra: dict[str, float] | None = None) -> None:
        """One optimizer step on this rank's micro-batches. `extra` numbers go into the step's metrics."""
        self.watch.step = self.index + 1
        with self.phase("count"):
            local = counts_of(batches) | {"work": sum(map(self.flops, batches), 0.0)}
            counts, batches = all_reduce_counts(local, self.mesh), self.in_step(batches)
        self.prepare(batches)
        torch.manual_seed(hash((self.run.seed, self.index, self.mesh.rank)) % 2**63)  # of dropout, when resumed too
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches or [None]):
            with self.whole():
                with self.phase("forward"):
                    loss = None if batch is None else self.micro_loss(batch, counts, sums)
                with self.phase("backward"), self.reducing(last=i + 1 >= len(batches)):
                    if loss is not None:
                        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()
        rate = learning_rate(self.schedule, self.optim.lr, self.index, self.total_steps)
        values: dict[str, Any] = {"lr": rate}
        with self.phase("optimizer"):
            if counts.get("tokens"):  # with nothing supervised, not even momentum moves a parameter
                values |= self.update(rate)
            else:
                self.idle += 1
            for flat in self.flat.values():  # also where there was only text beside answers, and no answer
                flat.zero_grad()
        # without any batch, nothing is counted
        values |= self.pace.step(counts.get("stream", 0.0), counts["work"], self.clock.take()) | (extra or {})
        self.index += 1
        self.flush_metrics()
        self.pending = (self.index, Numbers(values), Numbers(sums))

    def micro_loss(self, batch: PackedBatch, counts: dict[str, float], sums: dict[str, Tensor]) -> Tensor | None:
        """The micro-batch's share of the step's loss; adds its terms and metrics to `sums`. None if it is empty."""
        if not batch.sequences:
            return self.idle_loss(batch) if self.mesh.zero >= 2 else None
        terms, metrics = self.objective.loss(self.objective.outputs(self.networks, batch), batch)
        loss = None
        for key, (total, denominator, coefficient) in terms.items():
            share = total * (coefficient / (counts[denominator] or 1.0))
            loss = share if loss is None else loss + share
            sums[key] = sums.get(key, 0.0) + total.detach() / (counts[denominator] or 1.0)
        for key, (total, denominator) in metrics.items():
            sums[key] = sums.get(key, 0.0) + total / (counts[denominator] or 1.0)
        return loss

    def update(self, rate: float) -> dict[str, Tensor]:
        """Step every optimizer, each with its own clip."""
        values: dict[str, Tensor] = {}
        for key, optimizer in self.optimizers.items():
            suffix = "" if len(self.optimizers) == 1 else f".{key}"
            if self.lr_scale[key]:
                values["grad_norm" + suffix], values["skipped" + suffix] = optimizer.step(
                    rate * self.lr_scale[key], self.loss_scale and self.loss_scale.value
                )
        if self.loss_scale:
            values["loss_scale"] = self.loss_scale.value
            self.loss_scale.update(sum(v for k, v in values.items() if k.startswith("skipped")))
        return values

    def after_steps(self, first: int) -> None:
        """What the steps since `first` make due."""
        if self.passed(first, self.eval_every) or self.index >= self.total_steps:
            self.pace.peaks.append(self.measure_peak())  # a machine's speed drifts: MFU is relative to the mean
            self.log(self.evaluate(self.evaluation))
        if self.passed(first, self.run.check_every):
            self.check_replicas()
        if self.passed(first, self.run.save_every) and self.index < self.total_steps:
            self.save()

    def passed(self, first: int, every: int) -> bool:
        """Whether the steps since `first` reached a multiple of `every`."""
        return self.index // every > first // every

    # ------------------------------------------------------------------------------------------ parts of a step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the work, for the step's breakdown and for the watch."""
        with self.watch.phase(name), self.clock(name):
            yield

    def prepare(self, batches: Sequence[PackedBatch]) -> None:
        """Let the objective note what must be fixed before the parameters move; again, it finds it there."""
        with self.phase("prepare"), self.whole():
            self.objective.prepare(self.networks, self.in_step(batches))

    def estimate(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Let a policy objective note what must be fixed before the updates on a rollout; its numbers."""
        with self.phase("prepare"), self.whole():
            return self.objective.estimate(self.networks, self.in_step(batches), self.mesh)

    def idle_loss(self, batch: PackedBatch) -> Tensor:
        """Nothing, by way of every layer and score that the others' losses need: they wait for this rank to gather, and
        to reduce one network's gradients before it gathers the next."""
        names = [k for k in (*self.optimizers, *self.objective.asks) if k not in self.objective.leaves_out(batch)]
        passes = [getattr(self.networks[name], "values", None) or self.networks[name].hidden for name in names]
        return sum(f(batch.tokens, batch.cu_seqlens, positions=batch.positions).sum() * 0.0 for f in passes)

    def in_step(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches, and where ranks work layer by layer together, empty ones up to the most that a rank has."""
        if self.mesh.zero < 2:
            return list(batches)
        most = max(self.mesh.gather_objects(len(batches)))
        return [*batches, *[pack([], multiple_of=FILLER).to(self.mesh.device)] * (most - len(batches))]

    def reducing(self, last: bool) -> AbstractContextManager[None]:
        """Around a backward: every network's gradients are summed over the ranks in time."""
        return within(self.flat[key].backward(last) for key in self.optimizers)

    def whole(self, layers: bool = False) -> AbstractContextManager[None]:
        """Within, what the networks' forward passes need is there; with `layers`, all of them: for decoding."""
        return within(flat.whole(layers) for flat in self.flat.values())

    def averaged(self) -> AbstractContextManager[None]:
        """Within, networks have the running means of their weights, with optim.ema."""
        return within(optimizer.averaged() for optimizer in self.optimizers.values())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """The objective's terms and metrics over held-out batches as eval_NAME, averaged by their denominators; {}
        without any batch on any rank."""
        sums: dict[str, Tensor] = {}
        with self.phase("evaluate"), self.averaged(), self.whole():
            counts = all_reduce_counts(counts_of(batches), self.mesh)
            if not counts:
                return {}
            batches = self.in_step(batches)
            self.objective.prepare(self.networks, batches)
            for batch in batches:
                self.micro_loss(batch, counts, sums)
            return {f"eval_{k}": v for k, v in self.reduce(Numbers(sums)).items()}

    # ------------------------------------------------------------------------------------------ numbers

    def reduce(self, sums: Numbers) -> dict[str, float]:
        with self.phase("metrics"):
            return all_reduce_counts(sums.read(), self.mesh)

    def flush_metrics(self) -> None:
        """Read and log the metrics of the step before: by now they are there without waiting for them."""
        if self.pending is None:
            return
        step, values, sums = self.pending
        self.pending = None
        numbers = values.read() | self.reduce(sums)
        self.last |= numbers
        self.metrics.log(step, numbers)
        if self.ramp and "loss" in numbers:
            self.ramp.observe(step - 1, numbers["loss"])
        skipped = any(v for k, v in numbers.items() if k.startswith("skipped"))
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if self.bad_steps >= self.run.max_bad_steps:
            self.finish_save()
            raise TrainingError(
                f"the gradient was not finite in {self.bad_steps} steps in a row, up to step {step}: lower optim.lr, "
                f"or look at the data of these steps; checkpoints are in {self.out}"
            )

    def log(self, values: dict[str, float]) -> dict[str, float]:
        """Log numbers that belong to no step (an evaluation, say) at the present one; returns them."""
        self.flush_metrics()
        if values:
            self.metrics.log(self.index, values)
            self.last |= values
        return values

    def flops(self, batch: PackedBatch) -> float:
        """Useful FLOPs of a training step on the batch, by the trained decoders: a forward pass, one for the input's
        gradients, and one for the parameters', as far as these are trained."""
        total = 0.0
        for key in self.optimizers:
            network = self.networks[key]
            head_tokens = len(batch.supervised) if isinstance(network, Transformer) else 0
            total += (2 + self.shares[key]) * network.config.flops(batch.lengths, head_tokens)
        return total

    def measure_peak(self) -> float:
        """FLOP/s that this machine reaches in matmuls of the model's own shapes: what MFU is relative to."""
        network = next(iter(self.networks.values()))
        dtype, shapes = next(network.parameters()).dtype, network.config.matmul_shapes(4096)
        return matmul_rate(dtype, shapes, device=self.mesh.device) * self.mesh.world_size

    # ------------------------------------------------------------------------------------------ stopping and resuming

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While training, these signals ask for a stop after the step; a second Ctrl-C acts at once. A scheduler's
        second signal is the first: it sends one to each process, and make or torchrun hand theirs on."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number, frame):
            self.stop_signal = number
            if number == signal.SIGINT:
                signal.signal(number, previous[number])

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        previous = {number: signal.signal(number, remember) for number in numbers}
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, previous[number])

    def told_to_stop(self) -> bool:
        """Whether any rank was sent a signal; the same on every rank. A checkpoint that all have written is sealed."""
        with self.phase("between steps"):
            said = self.mesh.gather_objects((self.stop_signal, self.saving is None or self.saving[1].written))
        if all(written for _, written in said):
            self.finish_save()
        return any(stop for stop, _ in said)

    def obey(self) -> None:
        """Let the signal act as it would have without us; a rank that got none stops with the others."""
        if self.stop_signal:
            signal.raise_signal(self.stop_signal)  # its own handler is back
        raise KeyboardInterrupt

    def save(self) -> None:
        """Begin a checkpoint: copy what is in it to the host, each rank its share, and let a thread write it."""
        self.finish_save()
        self.flush_metrics()  # what is before a checkpoint must be on disk, too: a resumed run will not write it again
        (key, model), *_ = self.networks.items()
        with self.phase("save"):
            with self.averaged(), self.flat[key].unit_by_unit() as make_whole:
                exported, texts = export(model, make_whole)
            kept = self.optimizers | self.followers
            shares = [deal(o.tensors(), f"trainer/{key}", self.mesh) for key, o in kept.items()]
            state = {"step": self.index, "before": self.before, "last": self.last, "config": self.config_toml}
            state |= {"notes": self.notes, "loss_scale": self.loss_scale and self.loss_scale.state()}
            texts |= {"trainer/state.json": json.dumps(state, indent=2) + "\n"}

            def write_small(folder: Path) -> None:
                for name, text in texts.items():
                    (folder / name).write_text(text)
                if self.tokenizer is not None:
                    self.tokenizer.save(folder)

            folder = self.out / f"step-{self.index:08d}"
            self.saving = self.index, Save(folder, self.mesh, [exported, *shares], write_small)

    def finish_save(self, last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if there is one. A failure stops the run only at its end."""
        if self.saving is None:
            return
        (step, save), self.saving = self.saving, None
        try:
            with self.phase("save"):
                save.seal()
            prune(save.folder, self.run.keep, self.mesh)
            self.saved = step
        except CheckpointError as error:
            if last:
                raise
            self.say(f"{error} (the run goes on; older checkpoints are untouched)")

    def check_replicas(self) -> None:
        """Compare what several ranks hold of the parameters: replicas all of their shard, tensor-parallel ranks what
        is not cut (norms). At ZeRO-3 every part is on one rank, unless `mesh.shard` makes replicas of it.

        Raises: TrainingError on every rank where ranks differ.
        """
        if self.mesh.world_size == 1:
            return
        with self.phase("check"):
            if self.mesh.zero == 3:
                wrong = diverged(self.mesh, fingerprint(f.part for flat in self.flat.values() for f in flat.flats))
            else:
                parameters = list(self.networks.parameters())
                common = fingerprint(p for p in parameters if p.sharding is None)
                wrong = diverged(self.mesh, fingerprint(parameters), common)
        if wrong:
            self.finish_save()
            raise TrainingError(
                f"after step {self.index} the parameters of rank {', '.join(map(str, wrong))} are not those of the "
                f"other ranks: look at its machine; checkpoints in {self.out} of the last {self.run.check_every} steps "
                "may have them, too"
            )

    def resume(self) -> None:
        """Go on from the newest undamaged checkpoint of this run's folder, if there is one.

        Raises: CheckpointError where the folder belongs to a run with another config or model.
        """
        folder = latest(self.out, self.mesh, self.say)
        if folder is None:
            if checkpoints(self.out):
                self.say(f"no undamaged checkpoint in {self.out}: starting from the beginning")
            self.metrics.resume(0)
            return
        state = read_state(folder)
        changed = changed_lines(state["config"], self.config_toml)
        if changed:
            raise CheckpointError(
                f"{self.out} holds a run with another configuration ({changed}): use another --run.out, or delete it"
            )
        try:
            for key, kept in (self.optimizers | self.followers).items():
                with open_tensors(folder, f"trainer/{key}") as tensors:
                    kept.load(tensors)
        except ValueError as error:
            raise CheckpointError(f"{folder} does not fit this model: {error}") from None
        self.index = self.saved = state["step"]
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale.load(state["loss_scale"])
        self.before, self.last, self.notes = state["before"], state["last"], state["notes"]
        self.metrics.resume(self.index + 1 if self.index else 0)  # step 0 is evaluated again
        if self.index:
            self.say(f"resuming from {folder}")

    def result(self) -> Result:
        """The finished run's last checkpoint and numbers; rates are means over this process's steps."""
        self.last |= self.pace.total()
        if self.idle:
            self.say(IDLE.format(idle=self.idle, steps=self.index - self.begun))
        self.mesh.close()
        return Result(str(checkpoints(self.out)[-1]), dict(self.last), dict(self.before))

    def say(self, text: str) -> None:
        """Tell the reader something, on the main rank; nothing where `text` is empty."""
        self.metrics.message(text)


@contextmanager
def within(contexts: Iterable[AbstractContextManager]) -> Iterator[None]:
    """Enter all of them, and leave them in reverse."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
