"""The training loop: gradient accumulation, loss denominators, clipping, schedule, metrics, checkpoints.

    trainer = Trainer(networks, objective, settings, mesh, …)
    for step in trainer.steps():                    # resumes, saves checkpoints, stops cleanly on Ctrl-C
        trainer.step(batches)                       # any number of micro-batches, any of them empty

One step, over micro-batches b and data-parallel ranks r:

    counts_d = Σ_r Σ_b batch.counts[d]              one all-reduce, before the first backward
    loss     = Σ_terms coefficient · Σ_r Σ_b sum / counts[denominator]
    backward per micro-batch; gradients accumulate in fp32, are summed over r once, clipped, and applied by one step

so that the loss and its gradient do not depend on how the global batch is split into micro-batches and ranks.
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
    """The run can't continue: gradients that stay non-finite, or replicas that have diverged."""


class Trainer:
    """See the module's docstring.

    `networks`: those with parameters that require a gradient are trained; checkpoints export the first one.
    `followers`: names of frozen networks that are updated towards the first one (`Follower`).
    `settings`: the stage's config, of which `run`, `optim` and `schedule` are used here, and all is saved.
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
        self.index = self.bad_steps = 0  # steps done; consecutive skipped steps
        self.saved = -1  # step of the newest checkpoint
        self.saving: tuple[int, Save] | None = None  # the checkpoint that is being written, and its step
        self.pending: tuple[int, Numbers, Numbers] | None = None  # the last step's metrics, not yet read
        self.before: dict[str, float] = {}  # the evaluation at step 0
        self.notes: dict[str, Any] = {}  # a stage's own state, saved in checkpoints as JSON
        self.lr_scale = dict.fromkeys(self.optimizers, 1.0)  # factor on each network's learning rate; 0 freezes it
        self.last: dict[str, float] = {}  # newest value of every metric
        self.stop_signal = 0
        self.watch = Watch(mesh)
        self.pace = Pace(self.measure_peak(), queued=mesh.device.type == "cuda")
        self.idle = 0  # steps without a supervised token
        with self.own():  # so that resuming does not truncate the metrics of another process
            self.resume()
        self.begun = self.index  # steps done before this process
        self.ramp = self.open_ramp(getattr(settings.data, "bins_per_step", None) if hasattr(settings, "data") else None)
        self.write_config()

    def open_ramp(self, bins: int | None) -> BatchRamp | None:
        """The ramp of a batch size that grows. Raises: ConfigError in a stage without data.bins_per_step."""
        if self.schedule.batch_start == 1:
            return None
        if bins is None:
            raise ConfigError("schedule.batch_start needs data.bins_per_step, which this stage does not have")
        return BatchRamp(self.schedule, bins, self.mesh.dp, self.total_steps, self.notes.setdefault("batch", {}))

    def own(self) -> AbstractContextManager[None]:
        """Hold a lock on the run's folder."""
        return alone(self.out, "run.out") if self.mesh.main and self.out.is_dir() else nullcontext()

    def write_config(self) -> None:
        """Write the resolved config to the run's folder. Raises: UserError if it can't be written."""
        if self.mesh.main:
            with whole_file(self.out / "config.toml") as file:
                file.write(self.config_toml.encode())

    # ------------------------------------------------------------------------------------------ the loop

    def steps(self) -> Iterator[int]:
        """Yields the steps still to do; evaluates and saves checkpoints between them.

        The caller may do several steps at a time, as `step` counts them. On SIGINT, SIGTERM or SIGUSR1 a checkpoint is
        saved before the signal takes effect.
        """
        with self.own(), self.signals(), self.watch:
            self.say(self.skipped.summary())  # records that the stage skipped while reading its data
            if self.index == 0:
                self.before = self.log(self.evaluate(self.evaluation))
            self.pace.start()
            while self.index < self.total_steps and not self.stop_requested():
                first = self.index
                yield first
                self.after_steps(first)
            self.finish_save()
            if self.saved != self.index:
                self.save()
                self.finish_save(last=True)
            self.say(self.skipped.summary())
            self.metrics.close()
        if self.stop_requested():
            self.mesh.close()  # if the interpreter exits while its threads run, the process aborts
            self.raise_stop_signal()

    def step(self, batches: Sequence[PackedBatch], extra: dict[str, float] | None = None) -> None:
        """One optimizer step on this rank's micro-batches. `extra` is added to the step's metrics."""
        self.watch.step = self.index + 1
        with self.phase("count"):
            local = counts_of(batches) | {"work": sum(map(self.flops, batches), 0.0)}
            counts, batches = all_reduce_counts(local, self.mesh), self.pad_with_empty(batches)
        self.prepare(batches)
        torch.manual_seed(hash((self.run.seed, self.index, self.mesh.rank)) % 2**63)  # dropout, the same when resumed
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
            if counts.get("tokens"):
                values |= self.update(rate)
            else:  # no supervised token on any rank: skip the update, which momentum alone would make
                self.idle += 1
            for flat in self.flat.values():  # also if the update was skipped: ptx text alone has gradients, too
                flat.zero_grad()
        values |= self.pace.step(counts.get("stream", 0.0), counts["work"], self.clock.take()) | (extra or {})
        self.index += 1
        self.flush_metrics()
        self.pending = (self.index, Numbers(values), Numbers(sums))

    def micro_loss(self, batch: PackedBatch, counts: dict[str, float], sums: dict[str, Tensor]) -> Tensor | None:
        """The micro-batch's part of the step's loss, or None if it is empty; adds its terms and metrics to `sums`."""
        if not batch.sequences:
            return self.zero_loss(batch) if self.mesh.zero >= 2 else None
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
        """Step every network's optimizer, each with its own gradient clipping."""
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
        """Evaluate, check replicas and save, as far as the steps since `first` make it due."""
        if self.passed(first, self.eval_every) or self.index >= self.total_steps:
            self.pace.peaks.append(self.measure_peak())  # a machine's speed drifts: MFU uses the mean peak
            self.log(self.evaluate(self.evaluation))
        if self.passed(first, self.run.check_every):
            self.check_replicas()
        if self.passed(first, self.run.save_every) and self.index < self.total_steps:
            self.save()

    def passed(self, first: int, every: int) -> bool:
        """Whether the steps since `first` crossed a multiple of `every`."""
        return self.index // every > first // every

    # ------------------------------------------------------------------------------------------ parts of a step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step, for the metrics, and name it for the watchdog."""
        with self.watch.phase(name), self.clock(name):
            yield

    def prepare(self, batches: Sequence[PackedBatch]) -> None:
        """Let the objective compute what must be fixed before the update, e.g. reference log-probs; idempotent."""
        with self.phase("prepare"), self.whole():
            self.objective.prepare(self.networks, self.pad_with_empty(batches))

    def estimate(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Let a policy objective compute what must be fixed before the updates on a rollout; returns its metrics."""
        with self.phase("prepare"), self.whole():
            return self.objective.estimate(self.networks, self.pad_with_empty(batches), self.mesh)

    def zero_loss(self, batch: PackedBatch) -> Tensor:
        """A loss of 0 through every network that the other ranks' losses use: at ZeRO 2 and 3 they wait for this rank
        to gather parameters and reduce gradients, network by network."""
        unused, loss = self.objective.unused_networks(batch), 0.0
        for name in (*self.optimizers, *self.objective.frozen_networks):
            if name not in unused:
                forward = getattr(self.networks[name], "values", None) or self.networks[name].hidden
                loss = loss + 0.0 * forward(batch.tokens, batch.cu_seqlens, positions=batch.positions).sum()
        return loss

    def pad_with_empty(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches; at ZeRO 2 and 3, where all ranks must run equally many passes, padded with empty ones."""
        if self.mesh.zero < 2:
            return list(batches)
        most = max(self.mesh.gather_objects(len(batches)))
        return [*batches, *[pack([], multiple_of=FILLER).to(self.mesh.device)] * (most - len(batches))]

    def reducing(self, last: bool) -> AbstractContextManager[None]:
        """Around a backward: reduce all gradients over the ranks; at ZeRO 0 and 1 only in the `last` one."""
        return within(self.flat[key].backward(last) for key in self.optimizers)

    def whole(self, layers: bool = False) -> AbstractContextManager[None]:
        """Within, ZeRO-3's root parameters are gathered; with `layers`, all parameters, for decoding."""
        return within(flat.whole(layers) for flat in self.flat.values())

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the networks have their averaged weights, if optim.ema is on."""
        return within(optimizer.averaged() for optimizer in self.optimizers.values())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """The objective's terms and metrics on held-out batches, as eval_NAME, each divided by its denominator.

        {} if no rank has a batch.
        """
        sums: dict[str, Tensor] = {}
        with self.phase("evaluate"), self.averaged(), self.whole():
            counts = all_reduce_counts(counts_of(batches), self.mesh)
            if not counts:
                return {}
            batches = self.pad_with_empty(batches)
            self.objective.prepare(self.networks, batches)
            for batch in batches:
                self.micro_loss(batch, counts, sums)
            return {f"eval_{k}": v for k, v in self.reduce(Numbers(sums)).items()}

    # ------------------------------------------------------------------------------------------ numbers

    def reduce(self, sums: Numbers) -> dict[str, float]:
        with self.phase("metrics"):
            return all_reduce_counts(sums.read(), self.mesh)

    def flush_metrics(self) -> None:
        """Read and log the previous step's metrics, which by now are on the host without a sync."""
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
                f"or inspect the data of these steps; checkpoints are in {self.out}"
            )

    def log(self, values: dict[str, float]) -> dict[str, float]:
        """Log metrics that belong to no step, such as an evaluation's, at the current one; returns them."""
        self.flush_metrics()
        if values:
            self.metrics.log(self.index, values)
            self.last |= values
        return values

    def flops(self, batch: PackedBatch) -> float:
        """Useful FLOPs of the trained decoders on the batch: the forward pass, as many again for the gradients of
        activations, and as many for those of parameters, times the fraction of parameters that is trained."""
        total = 0.0
        for key in self.optimizers:
            network = self.networks[key]
            head_tokens = len(batch.supervised) if isinstance(network, Transformer) else 0
            total += (2 + self.shares[key]) * network.config.flops(batch.lengths, head_tokens)
        return total

    def measure_peak(self) -> float:
        """FLOP/s that this machine reaches in matmuls of the model's shapes: the denominator of MFU."""
        network = next(iter(self.networks.values()))
        dtype, shapes = next(network.parameters()).dtype, network.config.matmul_shapes(4096)
        return matmul_rate(dtype, shapes, device=self.mesh.device) * self.mesh.world_size

    # ------------------------------------------------------------------------------------------ stopping and resuming

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While training, SIGINT, SIGTERM and SIGUSR1 request a stop after the step; a second Ctrl-C acts at once.

        A second SIGTERM does not: a scheduler signals every process, and make and torchrun forward their own.
        """
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

    def stop_requested(self) -> bool:
        """Whether any rank got a signal, the same on every rank. Seals a checkpoint that all have written, too."""
        with self.phase("between steps"):
            states = self.mesh.gather_objects((self.stop_signal, self.saving is None or self.saving[1].written))
        if all(written for _, written in states):
            self.finish_save()
        return any(stop for stop, _ in states)

    def raise_stop_signal(self) -> None:
        """Raise the signal again, for the handler that was there before; a rank that got none stops with the others."""
        if self.stop_signal:
            signal.raise_signal(self.stop_signal)
        raise KeyboardInterrupt

    def save(self) -> None:
        """Begin a checkpoint: each rank copies its share to the host, and a thread writes it."""
        self.finish_save()
        self.flush_metrics()  # a resumed run will not log the steps before the checkpoint again
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
        """Wait for the checkpoint that is being written, if any, and seal it. A failure stops only the `last` one."""
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
            self.say(f"{error} (the run continues; older checkpoints are intact)")

    def check_replicas(self) -> None:
        """Compare the parameters that several ranks hold: replicas their whole shard, tensor-parallel ranks what is
        replicated (norms). At ZeRO-3 every part is on one rank only, unless `mesh.shard` makes replicas.

        Raises: TrainingError, on every rank, if ranks differ.
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
                f"after step {self.index} the parameters of rank {', '.join(map(str, wrong))} differ from those of the "
                f"other ranks: check that machine; checkpoints in {self.out} from the last {self.run.check_every} "
                "steps may be affected"
            )

    def resume(self) -> None:
        """Continue from the newest undamaged checkpoint in the run's folder, if there is one.

        Raises: CheckpointError if the folder belongs to a run with another config or model.
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
        """The finished run's last checkpoint and metrics; rates are means over this process's steps."""
        self.last |= self.pace.total()
        if self.idle:
            self.say(IDLE.format(idle=self.idle, steps=self.index - self.begun))
        self.mesh.close()
        return Result(str(checkpoints(self.out)[-1]), dict(self.last), dict(self.before))

    def say(self, text: str) -> None:
        """Print a message on the main rank, unless it is empty."""
        self.metrics.message(text)


@contextmanager
def within(contexts: Iterable[AbstractContextManager]) -> Iterator[None]:
    """Enter all contexts, and leave them in reverse order."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
