"""What a training step needs before anything runs: memory, messages and time of a rank, and the meshes that do best.

    mesh = Mesh(world_size=64, dp=32, tp=2, zero=3)
    found = Plan(PRESETS["8b"], mesh, Work(tokens=8192, context=8192), MACHINES["h100"])
    found.memory          bytes by what they hold, at the step's peak
    found.collectives     what is sent: type, axis, how often, bytes of the whole tensor
    found.seconds, .mfu   a roofline: no pass is faster than its FLOPs, its bytes or its messages allow

Arithmetic only; the formulas follow the code and name it. What is sent is exact, what lives on a rank is held to the
profiler's count within 10 % (tests/core/test_plan.py, tests/parallel/test_collectives.py), and time is an estimate:
launches, latencies, stragglers, generation and the host are left out. Letters as in the README; a rank has
t = T / (cp · tp) tokens between blocks and T / cp within one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from tritium.core.muon import owners, pieces
from tritium.kernels.attention_torch import KEPT_BYTES, ROWS
from tritium.kernels.head import TILE_ROWS
from tritium.kernels.head_triton import TILE_BYTES
from tritium.model.cache import PAGE, cache_pages
from tritium.model.config import ModelConfig
from tritium.model.transformer import HEAD_ROWS, check_divides
from tritium.parallel.context import Split
from tritium.parallel.mesh import Mesh

GIB = 1 << 30
ITEMSIZE = {"bf16": 2, "fp32": 4}
WIDE = 4  # bytes of gradients, masters and moments, log-probs and statistics: fp32


def llama(e: int, f: int, layers: int, heads: int, kv: int, d: int, v: int, tied: bool, qk_norm=False) -> ModelConfig:
    return ModelConfig(v, e, f, layers, heads, kv, d, max_positions=131072, tie_embeddings=tied, qk_norm=qk_norm)


# As the config.json of Llama 3.2 1B and 3B, Llama 3.1 8B and 70B, and Qwen3 32B.
PRESETS = {
    "1b": llama(2048, 8192, 16, 32, 8, 64, 128256, True),
    "3b": llama(3072, 8192, 28, 24, 8, 128, 128256, True),
    "8b": llama(4096, 14336, 32, 32, 8, 128, 128256, False),
    "32b": llama(5120, 25600, 64, 64, 8, 128, 151936, False, True),
    "70b": llama(8192, 28672, 80, 64, 8, 128, 128256, False),
}


@dataclass(frozen=True)
class Machine:
    """What one GPU of a cluster has. Rates are a datasheet's; `reached` is the share of them that is counted on."""

    name: str
    node: int  # GPUs of a host
    memory: float  # bytes
    flops: float  # FLOP/s of dense bf16 matmuls
    flops_fp32: float  # and of fp32 ones
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to its host's other GPUs, in one direction
    network: float  # bytes/s to other hosts, in one direction: its share of the host's adapters
    reached: float = 0.7  # an assumption; 1 for measured rates
    device: str = "cuda"  # "cpu": the torch paths, which keep and make more


# NVIDIA's datasheets of the SXM modules, NVLink's sum of both directions halved; an adapter of 400 Gb/s per GPU, as DGX
# hosts have (A100: 200).
MACHINES = {
    "a100": Machine("a100", 8, 80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
    "h100": Machine("h100", 8, 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Machine("h200", 8, 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
}


ROOM = 0.92  # of the memory is for tensors: the rest is the driver's, NCCL's and what fragmentation costs
REMEDY = {
    "parameters": "cut them: mesh.tp, or mesh.zero=3",
    "gradients": "cut them: mesh.zero=2 or 3, or mesh.tp",
    "optimizer": "cut it: mesh.zero ≥ 1, or mesh.tp",
    "frozen models": "cut them: mesh.zero=3, or mesh.tp",
    "tables": "lower model.context",
    "activations": "fewer tokens of a rank: data.bin_tokens, mesh.cp or mesh.tp",
    "working": "fewer tokens of a rank (data.bin_tokens, mesh.cp), or mesh.tp",
    "kv cache": "sample fewer sequences together: sampling.max_batch",
}


@dataclass(frozen=True)
class Work:
    """A step of one data-parallel replica: `micro_batches` streams of documents of `context` tokens."""

    tokens: int  # T of a micro-batch
    context: int
    micro_batches: int = 1
    supervised: int | None = None  # tokens of this rank that meet the head (all of them where not given)
    dtype: str = "bf16"  # of the parameters
    muon: bool = False  # moves the layers' matrices
    passes: int = 0  # forward passes of the trained model without a gradient, per micro-batch (old log-probs)
    frozen: int = 0  # other models of its shape, each with one such pass (a reference)
    sequences: int = 0  # that are sampled together, and how long their caches are
    sampled_tokens: int = 0


class Collective(NamedTuple):
    """What a rank's group does `count` times in a step. `payload` is the whole tensor's bytes: what is summed, what
    there is after a gather, what there is before a scatter. `behind` is the work that it hides behind, if any."""

    kind: (
        str  # "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send", "objects" (a few bytes, on the host)
    )
    axis: str  # "dp", "cp", "tp", "data", "shard", "replica" or "world"
    count: int
    payload: int
    what: str
    behind: str = ""  # "", "last backward", "backward" (of every micro-batch), "layers" (both passes)


class Run(NamedTuple):
    """Elements of a flat buffer; `partial`: a tensor-parallel rank has only a part of their gradient."""

    elements: int
    partial: bool


class Unit(NamedTuple):
    """What is gathered and reduced together (parallel/zero.py), as it lies on a tensor-parallel rank."""

    runs: tuple[Run, ...]

    @property
    def elements(self) -> int:
        return sum(run.elements for run in self.runs)

    def partial_in(self, start: int, stop: int) -> int:
        """The partial elements in [start, stop)."""
        found = at = 0
        for run in self.runs:
            found += run.partial * max(0, min(stop, at + run.elements) - max(start, at))
            at += run.elements
        return found


def root_of(model: ModelConfig, tp: int) -> Unit:
    """Embedding, head and the last norm, in the order of `FlatModule.flats_of`: matrices, then norms."""
    matrices = (1 if model.tie_embeddings else 2) * (model.vocab_size // tp) * model.hidden_size
    return Unit((Run(matrices, False), Run(model.hidden_size, True)))


def layer_of(model: ModelConfig, tp: int) -> Unit:
    """One decoder layer. With fewer key/value heads than ranks, every rank has all their rows (`Sharding.runs`)."""
    e, d, shared = model.hidden_size, model.head_dim, model.num_kv_heads < tp
    q = model.num_heads // tp * d
    kv = 2 * model.num_kv_heads * d // (1 if shared else tp)
    rest = e * q + 3 * e * model.intermediate_size // tp  # o; gate, up and down
    runs = [Run(q * e, False), Run(kv * e, shared), Run(rest, False)]
    runs += [Run(q, False), Run(kv, shared)] if model.qkv_bias else []
    return Unit((*runs, Run(2 * e + (2 * d if model.qk_norm else 0), True)))


def matrices_of(model: ModelConfig, tp: int) -> list[int]:
    """Elements of a layer's matrices on a rank, in their order: qkv, o, gate and up, down."""
    q, kv, rest = (run.elements for run in layer_of(model, tp).runs[:3])
    mlp = model.hidden_size * model.intermediate_size // tp
    return [q + kv, rest - 3 * mlp, 2 * mlp, mlp]


@dataclass(frozen=True)
class Plan:
    """One rank's step on a mesh. `mesh` needs no process group; its ranks say which rank is meant."""

    model: ModelConfig
    mesh: Mesh
    work: Work
    machine: Machine

    def __post_init__(self):
        check_divides(self.model, self.mesh.tp)

    # ------------------------------------------------------------------------------------------ sizes

    @cached_property
    def split(self) -> Split:
        return Split.of(self.work.tokens, self.mesh)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.work.dtype]

    @cached_property
    def root(self) -> Unit:
        return root_of(self.model, self.mesh.tp)

    @cached_property
    def layer(self) -> Unit:
        return layer_of(self.model, self.mesh.tp)

    @property
    def heads(self) -> tuple[int, int]:
        """Query and key/value heads that a rank computes."""
        return self.model.num_heads // self.mesh.tp, max(1, self.model.num_kv_heads // self.mesh.tp)

    @property
    def head_tokens(self) -> int:
        """Tokens that meet this rank's head, filled up as `local_logprob` does."""
        found = self.split.tokens // self.mesh.cp if self.work.supervised is None else self.work.supervised
        return found + -found % HEAD_ROWS

    def part(self, unit: Unit) -> int:
        """Elements of a rank's part of a unit (`Flat`): all of it without ZeRO."""
        return -(-unit.elements // self.mesh.parts)

    def whole(self, unit: Unit) -> int:
        """Elements of a unit, filled up to equal parts."""
        return self.part(unit) * self.mesh.parts

    def total(self, of: Callable[[Unit], int]) -> int:
        """`of` each unit, added up."""
        return of(self.root) + self.model.num_layers * of(self.layer)

    # ------------------------------------------------------------------------------------------ memory

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes at the step's peak: in the head's backward, or in the last layer's when more is made there."""
        level, b = self.mesh.zero, self.itemsize
        masters = 2 if b == WIDE else 3  # fp32 parameters are their own masters
        held = {
            "parameters": b * self.total(self.part if level == 3 else self.whole),
            "gradients": WIDE * self.total(self.part if level >= 2 else self.whole),
            "optimizer": WIDE * (masters * self.total(self.part) - self.without_second_moments),
        }
        frozen = self.total(self.part) if level == 3 else self.total(lambda unit: unit.elements)
        held["frozen models"] = b * self.work.frozen * frozen
        held["tables"] = WIDE * self.model.max_positions * self.model.head_dim * (1 + self.work.frozen)
        held["activations"] = self.model.num_layers * self.saved_by_layer + self.saved_once
        in_layer = self.layer_working + self.gathered(min(2, self.model.num_layers))
        working = [self.head_working + self.gathered(0), in_layer + self.reduced(1)]
        if self.model.num_layers > 1:  # a layer later: one gradient is on its way while the next is made
            working.append(in_layer + self.reduced(2) - self.saved_by_layer)
        return held | {"working": max(working), "kv cache": self.cache}

    @property
    def without_second_moments(self) -> int:
        """Elements of a rank's parts that Muon moves."""
        found = pieces(matrices_of(self.model, self.mesh.tp), self.part(self.layer), self.mesh.parts)
        return self.model.num_layers * sum(lengths[self.rank] for lengths in found) if self.work.muon else 0

    @property
    def rank(self) -> int:
        """Of those over which ZeRO cuts."""
        return (self.mesh.dp_rank * self.mesh.cp + self.mesh.cp_rank) % self.mesh.parts

    @property
    def peak(self) -> int:
        """Bytes of a rank at its fullest: while it trains, or, where it samples, while the cache is there.

        Sampling has whole parameters (`Trainer.whole(layers=True)`), and no activations or gradients under way.
        """
        memory = dict(self.memory)
        cache = memory.pop("kv cache")
        training = sum(memory.values())
        if not cache:
            return training
        gathered = self.itemsize * self.total(self.whole) if self.mesh.zero == 3 else 0
        return max(training, training - memory["activations"] - memory["working"] + gathered + cache)

    @property
    def cache(self) -> int:
        """Keys and values of `sequences` (`PagedCache`)."""
        slots = PAGE * cache_pages(self.work.sequences, self.work.sampled_tokens) if self.work.sequences else 0
        return self.itemsize * slots * self.model.num_layers * 2 * self.heads[1] * self.model.head_dim

    def gathered(self, layers: int) -> int:
        """Whole parameters at level 3: the root, the layer at work, and the one that is fetched meanwhile."""
        if self.mesh.zero < 3:
            return 0
        return self.itemsize * (self.whole(self.root) * (1 + self.work.frozen) + layers * self.whole(self.layer))

    def reduced(self, layers: int) -> int:
        """Whole gradients at levels 2 and 3: the root's from the head on, and those of the layers under way."""
        if self.mesh.zero < 2:
            return 0
        under_way = self.part(self.layer) if layers > 1 else 0
        return WIDE * (self.whole(self.root) + layers * self.whole(self.layer) + under_way)

    @property
    def saved_by_layer(self) -> int:
        """What autograd keeps of a layer (model/transformer.py), in bytes.

        x, sum of the residual stream (2 norms) and their outputs · qkv, whose rows v is · q, k rotated · o, lse · gate
        and up · their product. Under context parallelism k and v are the gathered ones, and o is joined of chunks.
        """
        model, (h, g), d = self.model, self.heads, self.model.head_dim
        tokens, e, f, cp = self.split.local, model.hidden_size, model.intermediate_size // self.mesh.tp, self.mesh.cp
        kept = 2 * e * tokens // self.mesh.tp + 2 * e * tokens + 3 * f * tokens
        kept += (h + 2 * g) * d * tokens if cp == 1 or model.qk_norm else 0
        kept += (h + g) * d * tokens if cp == 1 else h * d * tokens
        kept += 0 if cp == 1 else 2 * g * d * (tokens if self.mesh.ring else self.split.size)
        kept += (1 if cp == 1 else 2) * h * d * tokens
        kept += (h + 2 * g) * d * e if model.num_kv_heads < self.mesh.tp else 0  # `Attention.used` makes a matrix
        wide = h * tokens + 2 * tokens // self.mesh.tp + ((h + g) * tokens if model.qk_norm else 0)
        return self.itemsize * (kept + self.kept_probabilities) + WIDE * wide

    @property
    def kept_probabilities(self) -> int:
        """Of the torch path of attention, which keeps them where they are few (kernels/attention_torch.py)."""
        n, (h, _) = min(self.work.context, self.work.tokens), self.heads
        if self.machine.device != "cpu" or self.itemsize * self.split.chunk * n * h > KEPT_BYTES:
            return 0
        blocks = [(min(ROWS, n - start), min(n, start + ROWS)) for start in range(0, n, ROWS)]
        return self.split.local * h * sum(rows * keys for rows, keys in blocks) // n

    @property
    def saved_once(self) -> int:
        """The last norm's input, cos and sin, and the step's batches (seven vectors, of 44 bytes a token)."""
        t, tokens = self.split.local // self.mesh.tp, self.split.local
        batches = 44 * self.work.tokens * self.work.micro_batches
        return self.itemsize * t * self.model.hidden_size + WIDE * tokens * self.model.head_dim + batches

    @property
    def head_working(self) -> int:
        """The head's saved rows and few vectors, and what its backward makes (kernels/head.py): dhidden in fp32,
        dweight and a tile; then, at levels 2 and 3, the root's whole gradient.
        """
        n, e, v, b = self.head_tokens, self.model.hidden_size, self.model.vocab_size // self.mesh.tp, self.itemsize
        if self.machine.device == "cpu":
            rows = max(1, min(n, TILE_ROWS))
            columns = min(v, TILE_BYTES["cpu"] // (4 * rows))
            sums = (1 if (rows, columns) == (n, v) else 2) * WIDE * columns * e  # and the last tile's product
            product = (WIDE + (b if b < WIDE else 0)) * max(columns, rows) * e
            if self.mesh.cp * self.mesh.tp > 1:  # joined with others, the entropy has a gradient too, if one of zeros
                product = max(product, WIDE * rows * columns)
            tile = (2 * WIDE + b) * rows * columns + sums + product
        else:
            tile = min(b * n * v, TILE_BYTES["cuda"]) + WIDE * n * e
        made = max(WIDE * n * e + tile, b * n * e + self.reduced(0))
        return n * (b * e + 10 * WIDE) + b * v * e + made

    @property
    def layer_working(self) -> int:
        """The most that the last layer's backward adds, at `down`, at SwiGLU, or at `gate_up`.

        (Attention's adds less than what the MLP has given back by then.) A tied head's gradient waits for the
        embedding's, to be added to it.
        """
        tokens, e, f = self.split.local, self.model.hidden_size, self.model.intermediate_size // self.mesh.tp
        down = tokens * f + e * f
        swiglu = (4 if self.machine.device == "cpu" else 2) * tokens * f
        gate_up = tokens * e + 2 * e * f - tokens * f
        waiting = self.model.vocab_size // self.mesh.tp * e if self.model.tie_embeddings else 0
        return self.itemsize * (tokens * e + max(down, swiglu, gate_up) + waiting)

    # ------------------------------------------------------------------------------------------ collectives

    @cached_property
    def collectives(self) -> list[Collective]:
        """All of `Trainer.step`, the second step or a later one, with cross-entropy's counts."""
        found = [
            *self.of_tensor_parallel(),
            *self.of_context_parallel(),
            *self.of_zero(),
            *self.of_update(),
            *self.of_muon(),
        ]
        found += self.of_host()
        return [c for c in found if c.count]

    @property
    def forwards(self) -> int:
        return self.work.micro_batches * (1 + self.work.passes + self.work.frozen)

    def of_tensor_parallel(self) -> Iterator[Collective]:
        """Around two blocks a layer, the embedding and the head's input (parallel/tensor.py): what a gather does
        forward, a scatter does backward. The head's shards exchange bounds, then sums (`_merge_shards`)."""
        if self.mesh.tp == 1:
            return
        hidden = self.itemsize * self.split.local * self.model.hidden_size
        forward, backward, ends = self.forwards, self.work.micro_batches, 2 * self.model.num_layers + 1
        yield Collective("all-gather", "tp", ends * (forward + backward), hidden, "hidden states")
        yield Collective("reduce-scatter", "tp", ends * (forward + backward), hidden, "hidden states")
        yield Collective("all-reduce", "tp", forward, 2 * WIDE * self.head_tokens, "head: log-sum-exp and maximum")
        yield Collective("all-reduce", "tp", forward, 4 * WIDE * self.head_tokens, "head: target, share, mass and mean")

    def of_context_parallel(self) -> Iterator[Collective]:
        """Keys and values of every layer, their gradients, and four results of each token (parallel/context.py)."""
        if self.mesh.cp == 1:
            return
        keys = self.itemsize * self.split.size * 2 * self.heads[1] * self.model.head_dim
        layers, cp, m = self.model.num_layers, self.mesh.cp, self.work.micro_batches
        if self.mesh.ring:
            passes, wide = layers * (self.forwards + m) * (cp - 1), WIDE * keys // self.itemsize
            yield Collective("send", "cp", passes, keys // cp, "keys and values", "layers")
            yield Collective("send", "cp", layers * m * cp, wide // cp, "keys' and values' gradients", "layers")
        else:
            yield Collective("all-gather", "cp", layers * self.forwards, keys, "keys and values")
            yield Collective("reduce-scatter", "cp", layers * m, keys, "keys' and values' gradients")
        yield Collective("all-gather", "cp", self.forwards, 4 * WIDE * self.split.size, "log-probs")

    def of_zero(self) -> Iterator[Collective]:
        """The table of parallel/zero.py; the root is reduced last, and at level 3 `prepare` gathers it once more."""
        if self.size("data") == 1:
            return
        layers, m, level = self.model.num_layers, self.work.micro_batches, self.mesh.zero
        axis = "shard" if self.mesh.shard else "data"
        for unit, count, name in ((self.root, 1, "root"), (self.layer, layers, "layers")):
            gradient, parameters = WIDE * self.whole(unit), self.itemsize * self.whole(unit)
            kind, times = ("all-reduce", 1) if level == 0 else ("reduce-scatter", 1 if level == 1 else m)
            window = "" if name == "root" else ("last backward", "last backward", "backward", "layers")[level]
            yield Collective(
                kind, axis, count * times if self.size(axis) > 1 else 0, gradient, f"gradients, {name}", window
            )
            gathers = 0 if level == 0 else count
            if level == 3:
                gathers = (1 + self.work.frozen) * (1 + m) if name == "root" else count * (m + self.forwards)
            gathers = gathers if self.size(axis) > 1 else 0
            yield Collective("all-gather", axis, gathers, parameters, f"parameters, {name}", window * (level == 3))
            copies = count if self.size("replica") > 1 else 0
            window = "last backward" if window else ""
            yield Collective("all-reduce", "replica", copies, WIDE * self.part(unit), f"gradients, {name}", window)

    def of_update(self) -> Iterator[Collective]:
        """The sum of partial gradients over tp, and the norm (`sum_over_tp`, `grad_norm`)."""
        if self.mesh.tp > 1:
            rank, size = self.rank, self.part
            partial = self.total(lambda unit: unit.partial_in(rank * size(unit), (rank + 1) * size(unit)))
            yield Collective(
                "all-reduce", "tp", 1 if partial else 0, WIDE * partial, "gradients of norms, shared K and V"
            )
            yield Collective("all-reduce", "tp", 1, WIDE, "gradient norm")
        if self.mesh.parts > 1:
            yield Collective("all-reduce", "shard" if self.mesh.shard else "data", 1, 2 * WIDE, "gradient norm")

    def of_muon(self) -> Iterator[Collective]:
        """To whoever orthogonalises, and back (core/muon.py), of a window of layers; over tp, a matrix made whole."""
        parts, layers, sizes = self.mesh.parts, self.model.num_layers, matrices_of(self.model, self.mesh.tp)
        axis = "shard" if self.mesh.shard else "data"
        for start in range(0, layers, parts) if self.work.muon else ():
            count = min(parts, layers - start)
            sent = count * sum(lengths[self.rank] for lengths in pieces(sizes, self.part(self.layer), parts))
            own = [n for n, rank in zip(count * sizes, owners(count * sizes, parts), strict=True) if rank == self.rank]
            yield Collective("all-to-all", axis, 2 * (parts > 1), WIDE * max(sent, sum(own)), "Muon's directions")
            for n in own if self.mesh.tp > 1 else ():
                yield Collective("all-gather", "tp", 1, WIDE * n * self.mesh.tp, "Muon's matrices")

    def of_host(self) -> Iterator[Collective]:
        """Counts before the step and metrics after it; with levels 2 and 3 also how many micro-batches there are."""
        yield Collective("objects", "dp", 2 if self.mesh.dp > 1 else 0, 0, "counts, metrics")
        yield Collective("objects", "world", 2 if self.mesh.zero >= 2 and self.mesh.world_size > 1 else 0, 0, "batches")

    # ------------------------------------------------------------------------------------------ time

    def rate(self, axis: str) -> float:
        """Bytes/s at which a rank of this axis's group passes data on around a ring.

        Ranks are [dp, cp, tp], tp fastest. A ring that crosses hosts uses an adapter of each of its ranks on a host,
        and at most a rank's link.
        """
        strides = {"tp": 1, "dp": self.mesh.cp * self.mesh.tp, "replica": self.mesh.parts * self.mesh.tp}
        stride = strides.get(axis, self.mesh.tp)
        reach = stride * self.size(axis)
        machine = self.machine
        if reach <= machine.node:
            return machine.reached * machine.link
        return machine.reached * min(machine.link, machine.network * max(1, machine.node // stride))

    def size(self, axis: str) -> int:
        data, parts = self.mesh.dp * self.mesh.cp, self.mesh.parts
        sizes = {"tp": self.mesh.tp, "cp": self.mesh.cp, "dp": self.mesh.dp, "data": data, "shard": parts}
        return sizes.get(axis, data // parts if self.mesh.shard else 1)

    def seconds_of(self, c: Collective) -> float:
        """A ring moves (n-1)/n of the tensor through each rank, twice for an all-reduce (Patarasuk & Yuan 2009)."""
        if c.kind == "objects":
            return 0.0
        if c.kind == "send":
            return c.count * c.payload / self.rate(c.axis)
        n = self.size(c.axis)
        return c.count * (2 if c.kind == "all-reduce" else 1) * (n - 1) / n * c.payload / self.rate(c.axis)

    @property
    def peak_flops(self) -> float:
        """FLOP/s of a rank at most, in the parameters' dtype."""
        return self.machine.flops_fp32 if self.work.dtype == "fp32" else self.machine.flops

    def roof(self, flops: float, moved: float) -> float:
        """Seconds of one kernel: limited by arithmetic or by memory (Williams et al. 2009)."""
        return max(flops / self.peak_flops, moved / self.machine.bandwidth) / self.machine.reached

    @property
    def layer_seconds(self) -> tuple[float, float]:
        """Forward and backward of a layer on one micro-batch: its kernels one after the other."""
        model, (h, g), d, b = self.model, self.heads, self.model.head_dim, self.itemsize
        tokens, t, e = self.split.local, self.split.local // self.mesh.tp, model.hidden_size
        f = model.intermediate_size // self.mesh.tp
        matmuls = sum(
            self.roof(2 * tokens * rows * columns, b * (rows * columns + tokens * (rows + columns)))
            for rows, columns in (((h + 2 * g) * d, e), (e, h * d), (2 * f, e), (e, f))
        )
        pairs = self.work.tokens * min(self.work.context, self.work.tokens) / 2 / self.mesh.cp  # (query, key), causal
        heads = b * tokens * (2 * h + 2 * g) * d  # q, k, v and o
        attention = self.roof(4 * d * h * pairs, heads), self.roof(14 * d * h * pairs, 2 * heads)
        norms = 2 * 4 * t * e  # each reads two and writes two, in both passes
        rope = 2 * tokens * (h + g) * d
        forward = self.roof(0, b * (norms + rope + 3 * tokens * f))
        backward = self.roof(0, b * (norms + rope + 5 * tokens * f) + (b + 2 * WIDE) * self.layer.elements)
        return matmuls + attention[0] + forward, 2 * matmuls + attention[1] + backward

    @property
    def head_seconds(self) -> tuple[float, float]:
        """The root's passes: 2·N·V·E FLOPs forward, 6 backward, where logits are made again (kernels/head.py)."""
        n, e, v, b = self.head_tokens, self.model.hidden_size, self.model.vocab_size // self.mesh.tp, self.itemsize
        moved = b * (v * e + n * e)
        added = (b + 2 * WIDE) * self.root.elements  # to the flat gradient
        return self.roof(2 * n * v * e, moved), self.roof(6 * n * v * e, 3 * moved + added)

    @cached_property
    def times(self) -> dict[str, float]:
        """Seconds of a step: compute; what is sent while nothing is computed; the optimizer.

        Overlapped is what the code starts early: gradients behind the backward, level 3's gathers behind the layer
        before. Messages of tp and cp are waited for, as are the root's, and the parameters after a step (1 and 2).
        """
        m, layers = self.work.micro_batches, self.model.num_layers
        (forward, backward), (head_forward, head_backward) = self.layer_seconds, self.head_seconds
        forwards = self.forwards * (layers * forward + head_forward)
        compute = forwards + m * (layers * backward + head_backward)
        room = {"last backward": layers * backward, "backward": m * layers * backward}
        room["layers"] = layers * (self.forwards * forward + m * backward)
        sent, hidden = 0.0, dict.fromkeys(room, 0.0)
        for c in self.collectives:
            if c.behind:
                hidden[c.behind] += self.seconds_of(c)
            else:
                sent += self.seconds_of(c)
        sent += sum(max(0.0, seconds - room[window]) for window, seconds in hidden.items())
        # AdamW reads and writes master and moments and reads the gradient, which the norm reads and zero_grad writes.
        update = self.roof(0, (6 * WIDE + 3 * WIDE + self.itemsize) * self.total(self.part))
        return {"compute": compute, "messages": sent, "optimizer": update}

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        return sum(self.times.values())

    @property
    def step_tokens(self) -> int:
        return self.work.tokens * self.work.micro_batches * self.mesh.dp

    @property
    def mfu(self) -> float:
        """Useful FLOPs (`ModelConfig.flops`, three passes) over the ranks' peak FLOP/s · step time, at most."""
        work = self.work
        head = work.tokens if work.supervised is None else work.supervised * self.mesh.cp
        useful = 3 * self.model.flops(work.tokens, head, work.tokens * min(work.context, work.tokens))
        ranks = self.mesh.cp * self.mesh.tp
        return useful * work.micro_batches / (ranks * self.peak_flops * self.seconds)

    # ------------------------------------------------------------------------------------------ verdict

    @property
    def fits(self) -> bool:
        return self.peak <= ROOM * self.machine.memory

    @property
    def verdict(self) -> str:
        """Whether it fits, and if not, what is in the way and what would help."""
        room = ROOM * self.machine.memory / GIB
        if self.fits:
            return f"fits: {self.peak / GIB:.1f} of {room:.1f} GiB"
        name, largest = max(self.memory.items(), key=lambda item: item[1])
        share = f"{self.peak / GIB:.1f} of {room:.1f} GiB, of which {name} {largest / GIB:.1f}"
        cut = self.mesh.zero == 3 and name in ("parameters", "gradients", "optimizer", "frozen models")
        return f"does not fit: {share}; {'take more GPUs' if cut else REMEDY[name]}"


def plans(model: ModelConfig, machine: Machine, gpus: int, work: Work, step_tokens: int) -> Iterator[Plan]:
    """Every plan of a step of `step_tokens` on `gpus` ranks: tp inside a host, cp, ZeRO's levels, micro-batches.

    Of `work`, tokens and micro_batches are chosen here: whole documents of `context` tokens.
    """
    for tp in divisors(math.gcd(gpus, machine.node)):
        for cp in divisors(gpus // tp):
            dp = gpus // tp // cp
            documents = step_tokens // (dp * work.context)  # of a replica
            if documents * dp * work.context != step_tokens:
                continue
            for count in divisors(documents):
                batch = replace(work, tokens=count * work.context, micro_batches=documents // count)
                host = machine.node // tp  # data ranks of a host
                levels = [(zero, 0) for zero in range(4 if dp * cp > 1 else 1)]
                levels += [(zero, host) for zero in (1, 2, 3) if dp * cp > host > 1 and dp * cp % host == 0]
                for zero, shard in levels:
                    ranks = {"dp_rank": dp - 1, "cp_rank": cp - 1}
                    mesh = Mesh(world_size=gpus, dp=dp, cp=cp, tp=tp, zero=zero, shard=shard, **ranks)
                    try:
                        yield Plan(model, mesh, batch, machine)
                    except ValueError:  # tp does not divide the model
                        break


def best(found: Iterator[Plan], count: int = 5) -> list[Plan]:
    """The fastest that fit, one for each mesh and level; if none does, the smallest ones."""
    found = list(found)
    fitting = [plan for plan in found if plan.fits]
    ordered = sorted(fitting, key=lambda plan: plan.seconds) if fitting else sorted(found, key=lambda plan: plan.peak)
    firsts = {(plan.mesh.tp, plan.mesh.cp, plan.mesh.zero): plan for plan in reversed(ordered)}
    return sorted(firsts.values(), key=ordered.index)[:count]


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
