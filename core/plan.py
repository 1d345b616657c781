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
from dataclasses import replace
from functools import cache, cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from tritium.core.machines import Machine, Work
from tritium.core.muon import owners, pieces
from tritium.kernels.attention_mask import Options
from tritium.kernels.attention_torch import KEPT_BYTES, ROWS
from tritium.kernels.backend import fp32_is_faster
from tritium.kernels.head import TILE_ROWS
from tritium.kernels.head_triton import TILE_BYTES
from tritium.kernels.wide import ROWS as BLOCK
from tritium.model.cache import PAGE, cache_pages
from tritium.model.config import ModelConfig
from tritium.model.transformer import HEAD_ROWS, Transformer
from tritium.parallel.context import Split
from tritium.parallel.mesh import Mesh
from tritium.parallel.zero import FlatModule

GIB = 1 << 30
ITEMSIZE = {"bf16": 2, "fp32": 4}
WIDE = 4  # bytes of gradients, masters and moments, log-probs and statistics: fp32
ROOM = 0.92  # of the memory is for tensors: the rest is the driver's, NCCL's and what fragmentation costs
REMEDY = {
    "parameters": "cut them: mesh.tp, or mesh.zero=3",
    "gradients": "cut them: mesh.zero=2 or 3, or mesh.tp",
    "optimizer": "cut it: mesh.zero ≥ 1, or mesh.tp; or optim.offload",
    "frozen models": "cut them: mesh.zero=3, or mesh.tp",
    "tables": "lower model.context",
    "activations": "fewer tokens of a rank: data.bin_tokens, mesh.cp or mesh.tp",
    "working": "fewer tokens of a rank (data.bin_tokens, mesh.cp), or mesh.tp",
    "kv cache": "sample fewer sequences together: sampling.max_batch",
}


class Collective(NamedTuple):
    """What a rank's group does `count` times in a step. `payload` is the whole tensor's bytes: what is summed, what
    there is after a gather, what there is before a scatter. `behind` is the work that it hides behind, if any."""

    kind: str  # "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send", "objects" (few bytes, on the host)
    axis: str  # "dp", "cp", "tp", "data", "shard", "replica" or "world"
    count: int
    payload: int
    what: str
    behind: str = ""  # "", "last backward", "backward" (of every micro-batch), "layers" (both passes)


class Unit(NamedTuple):
    """What is gathered and reduced together (parallel/zero.py), as it lies on a tensor-parallel rank."""

    runs: list[tuple[int, bool]]  # elements, and whether a rank has only a part of their gradient
    matrices: list[int]  # elements of each

    @property
    def elements(self) -> int:
        return sum(size for size, _ in self.runs)

    def partial_in(self, start: int, stop: int) -> int:
        """The elements in [start, stop) of whose gradient a rank has only a part."""
        ends = accumulate(size for size, _ in self.runs)
        inside = [max(0, min(stop, end) - max(start, end - n)) for end, (n, _) in zip(ends, self.runs, strict=True)]
        return sum(size for size, (_, partial) in zip(inside, self.runs, strict=True) if partial)


@cache
def units_of(model: ModelConfig, tp: int) -> tuple[Unit, Unit]:
    """The root and a layer: the flat buffers of a model of one layer that has no memory.

    Raises: ValueError where tp does not divide the model.
    """
    mesh = Mesh(world_size=tp, tp=tp, device=torch.device("meta"))
    one = Transformer(replace(model, num_layers=1, windows=model.windows[:1]), mesh)
    found = []
    for (flat,) in FlatModule(one, mesh).units:
        runs = [(span.stop - span.start, span.partial) for span in flat.spans()]
        found.append(Unit(runs, [p.numel() for _, p in flat.members if p.dim() >= 2]))
    return found[0], found[1]


class Plan:
    """One rank's step on a mesh. `mesh` needs no process group; its ranks say which rank is meant.

    Raises: ValueError where the mesh does not divide the model.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, work: Work, machine: Machine):
        self.model, self.mesh, self.work, self.machine = model, mesh, work, machine
        self.root, self.layer = units_of(model, mesh.tp)
        self.split, self.itemsize = Split.of(work.tokens, mesh), ITEMSIZE[work.dtype]
        self.f, self.v = model.intermediate_size // mesh.tp, model.vocab_size // mesh.tp  # of this rank
        self.heads = model.num_heads // mesh.tp, max(1, model.num_kv_heads // mesh.tp)
        own = work.tokens // mesh.cp if work.supervised is None else work.supervised
        self.head_tokens = own + -own % HEAD_ROWS  # filled up as `local_logprob` does
        self.length = min(work.context, work.tokens)  # of a document
        self.documents = work.tokens / self.length  # of a micro-batch
        self.rank = (mesh.dp_rank * mesh.cp + mesh.cp_rank) % mesh.parts  # of those over which ZeRO cuts
        self.forwards = work.micro_batches * (1 + work.passes + work.frozen)
        self.windows = sum(window is not None for window in model.windows)  # layers that have one
        data = mesh.dp * mesh.cp
        sizes = {"tp": mesh.tp, "cp": mesh.cp, "dp": mesh.dp, "data": data, "shard": mesh.parts}
        self.sizes = sizes | {"replica": data // mesh.parts if mesh.shard else 1}  # ranks along each axis
        self.axis = "shard" if mesh.shard else "data"  # along which ZeRO cuts

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
        level, b, work = self.mesh.zero, self.itemsize, self.work
        frozen = self.total(self.part) if level == 3 else self.total(lambda unit: unit.elements)
        in_layer = self.layer_working + self.gathered(min(2, self.model.num_layers))
        working = [self.head_working + self.gathered(0), in_layer + self.reduced(1)]
        if self.model.num_layers > 1:  # a layer later: one gradient is on its way while the next is made
            working.append(in_layer + self.reduced(2) - self.saved_by_layer)
        return {
            "parameters": b * self.total(self.part if level == 3 else self.whole),
            "gradients": WIDE * self.total(self.part if level >= 2 else self.whole),
            "optimizer": 0 if work.offload and self.machine.device == "cuda" else self.optimizer,
            "frozen models": b * work.frozen * frozen,
            "tables": WIDE * self.model.max_positions * self.model.head_dim * (1 + work.frozen),
            "activations": self.model.num_layers * self.saved_by_layer + self.saved_once,
            "working": max(working),
            "kv cache": self.cache,
        }

    @property
    def optimizer(self) -> int:
        """Bytes of what it keeps, on the device or the host: fp32 parameters there are their own masters, and Muon's
        matrices have no second moment."""
        kept = 2 + (self.itemsize < WIDE or self.work.offload) + self.work.ema
        found = pieces(self.layer.matrices, self.part(self.layer), self.mesh.parts) if self.work.muon else []
        matrices = self.model.num_layers * sum(lengths[self.rank] for lengths in found)
        return WIDE * (kept * self.total(self.part) - matrices)

    @property
    def peak(self) -> int:
        """Bytes of a rank at its fullest: while it trains, or, where it samples, while the cache is there.

        Sampling has whole parameters (`Trainer.whole(layers=True)`), and no activations or gradients under way.
        """
        training = sum(self.memory.values()) - self.cache
        if not self.cache:
            return training
        gathered = self.itemsize * self.total(self.whole) if self.mesh.zero == 3 else 0
        return max(training, training - self.memory["activations"] - self.memory["working"] + gathered + self.cache)

    @property
    def cache(self) -> int:
        """Keys and values of `sequences` (`PagedCache`)."""
        slots = PAGE * cache_pages(self.work.sequences, self.work.sampled_tokens) if self.work.sequences else 0
        return self.itemsize * slots * self.model.num_layers * 2 * self.heads[1] * self.model.head_dim

    def gathered(self, layers: int) -> int:
        """Whole parameters at level 3: the root, the layer at work, and the one that is fetched meanwhile."""
        root = self.whole(self.root) * (1 + self.work.frozen)
        return self.itemsize * (root + layers * self.whole(self.layer)) if self.mesh.zero == 3 else 0

    def reduced(self, layers: int) -> int:
        """Whole gradients at levels 2 and 3: the root's from the head on, and those of the layers under way."""
        under_way = self.part(self.layer) if layers > 1 else 0
        found = WIDE * (self.whole(self.root) + layers * self.whole(self.layer) + under_way)
        return found if self.mesh.zero >= 2 else 0

    @cached_property
    def saved_by_layer(self) -> int:
        """What autograd keeps of a layer (model/transformer.py), in bytes.

        x, sum of the residual stream (2 norms) and their outputs · qkv, whose rows v is · q, k rotated · o, lse · gate
        and up · their product. Under context parallelism k and v are the gathered ones, and o is joined of chunks.
        """
        model, (h, g), d = self.model, self.heads, self.model.head_dim
        tokens, e, tp, alone = self.split.local, model.hidden_size, self.mesh.tp, self.mesh.cp == 1
        around = self.split.size  # tokens of the keys; a ring's are those of a rank, but not in layers with a window
        if self.mesh.ring:
            around = (self.windows * around + (model.num_layers - self.windows) * tokens) // model.num_layers
        kept = 2 * e * tokens // tp + 2 * e * tokens + 3 * self.f * tokens
        kept += (h + 2 * g) * d * tokens if alone or model.qk_norm else 0
        kept += (2 * h + g) * d * tokens if alone else 3 * h * d * tokens + 2 * g * d * around
        kept += (h + 2 * g) * d * e if model.num_kv_heads < tp else 0  # `Attention.used` makes a matrix
        wide = h * tokens + 2 * tokens // tp + ((h + g) * tokens if model.qk_norm else 0)
        return self.itemsize * (kept + self.kept_probabilities) + WIDE * wide

    @property
    def kept_probabilities(self) -> int:
        """Of the torch path of attention, which keeps them where they are few (kernels/attention_torch.py)."""
        n, (h, _) = self.length, self.heads
        if self.machine.device != "cpu" or self.itemsize * self.split.chunk * n * h > KEPT_BYTES:
            return 0
        layers = [Options(True, window, None, 1.0) for window in self.model.windows or (None,) * self.model.num_layers]
        blocks = [slice(start, min(n, start + ROWS)) for start in range(0, n, ROWS)]
        sides = [(rows, options.keys_of(rows, n, n)) for options in layers for rows in blocks]
        pairs = sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in sides)
        return self.split.local * h * pairs // (n * self.model.num_layers)

    @property
    def saved_once(self) -> int:
        """The last norm's input, cos and sin, and the step's batches (seven vectors, of 44 bytes a token)."""
        t, tokens = self.split.local // self.mesh.tp, self.split.local
        batches = 44 * self.work.tokens * self.work.micro_batches
        return self.itemsize * t * self.model.hidden_size + WIDE * tokens * self.model.head_dim + batches

    @property
    def widens(self) -> bool:
        """Whether a CPU multiplies what is in bf16 in fp32 (kernels/wide.py)."""
        return self.machine.device == "cpu" and self.itemsize < WIDE and fp32_is_faster(torch.bfloat16)

    @property
    def head_working(self) -> int:
        """The head's saved rows and few vectors, and what its backward makes (kernels/head.py): dhidden in fp32,
        dweight and a tile; then, at levels 2 and 3, the root's whole gradient.
        """
        n, e, v, b = self.head_tokens, self.model.hidden_size, self.v, self.itemsize
        tile = min(b * n * v, TILE_BYTES["cuda"]) + WIDE * n * e
        if self.machine.device == "cpu":
            rows = max(1, min(n, TILE_ROWS))
            columns = min(v, TILE_BYTES["cpu"] // (4 * rows))
            tile = 2 * WIDE * rows * columns + WIDE * columns * e  # logits, softmax, the sum of a chunk's dweight
            passing = 0
            if self.widens:  # the hidden states, and the words of a chunk while those of the next are made
                tile, passing = tile + WIDE * (n + columns) * e, WIDE * columns * e * (columns < v)
            elif b < WIDE:  # the tile in bf16, and a product in both dtypes
                tile, passing = tile + b * rows * columns, (WIDE + b) * max(columns, rows) * e
            if self.mesh.cp * self.mesh.tp > 1:  # joined with others, the entropy has a gradient too, if one of zeros
                passing = max(passing, WIDE * rows * columns)
            tile += passing
        return n * (b * e + 10 * WIDE) + b * v * e + max(WIDE * n * e + tile, b * n * e + self.reduced(0))

    @property
    def layer_working(self) -> int:
        """The most that the last layer's backward adds, at `down`, at SwiGLU, or at `gate_up`.

        (Attention's adds less than what the MLP has given back by then, or little more where it is widened.) A tied
        head's gradient waits for the embedding's, to be added to it.
        """
        tokens, e, f, b = self.split.local, self.model.hidden_size, self.f, self.itemsize
        swiglu = (4 if self.machine.device == "cpu" else 2) * tokens * f
        down, gate_up = b * (tokens * f + e * f), b * (tokens * e + 2 * e * f - tokens * f)
        if self.widens:  # the weight's gradient in fp32, and blocks of rows of what it is the product of
            block = WIDE * min(BLOCK, tokens)
            down += WIDE * e * f + max(0, block * (e + f) - b * e * f)
            gate_up += WIDE * 2 * e * f + max(0, block * (e + 2 * f) - b * 2 * e * f)
        waiting = self.v * e if self.model.tie_embeddings else 0
        return b * (tokens * e + waiting) + max(down, b * swiglu, gate_up)

    # ------------------------------------------------------------------------------------------ collectives

    @cached_property
    def collectives(self) -> list[Collective]:
        """All of `Trainer.step`, the second step or a later one, with cross-entropy's counts."""
        found = [*self.of_tensor_parallel(), *self.of_context_parallel(), *self.of_zero(), *self.of_update()]
        # Counts before the step and metrics after it; with levels 2 and 3 also how many micro-batches there are.
        found += [*self.of_muon(), Collective("objects", "dp", 2 * (self.mesh.dp > 1), 0, "counts, metrics")]
        together = self.mesh.zero >= 2 and self.mesh.world_size > 1
        found.append(Collective("objects", "world", 2 * together, 0, "batches"))
        return [c._replace(count=int(c.count)) for c in found if c.count]

    def of_tensor_parallel(self) -> Iterator[Collective]:
        """Around two blocks a layer, the embedding and the head's input (parallel/tensor.py): what a gather does
        forward, a scatter does backward. The head's shards exchange bounds, then sums (`_merge_shards`)."""
        if self.mesh.tp == 1:
            return
        hidden = self.itemsize * self.split.local * self.model.hidden_size
        both = (2 * self.model.num_layers + 1) * (self.forwards + self.work.micro_batches)
        head = WIDE * self.head_tokens
        yield Collective("all-gather", "tp", both, hidden, "hidden states")
        yield Collective("reduce-scatter", "tp", both, hidden, "hidden states")
        yield Collective("all-reduce", "tp", self.forwards, 2 * head, "head: log-sum-exp and maximum")
        yield Collective("all-reduce", "tp", self.forwards, 4 * head, "head: target, share, mass and mean")

    def of_context_parallel(self) -> Iterator[Collective]:
        """Keys and values of every layer, their gradients, and four results of each token (parallel/context.py). A
        ring passes them on instead, but in layers with a window (parallel/ring.py)."""
        if self.mesh.cp == 1:
            return
        keys = self.itemsize * self.split.size * 2 * self.heads[1] * self.model.head_dim
        cp, m, what = self.mesh.cp, self.work.micro_batches, "keys and values"
        rings = self.model.num_layers - self.windows if self.mesh.ring else 0
        gathers, wide = self.model.num_layers - rings, WIDE * keys // self.itemsize
        yield Collective("send", "cp", rings * (self.forwards + m) * (cp - 1), keys // cp, what, "layers")
        yield Collective("send", "cp", rings * m * cp, wide // cp, f"gradients of {what}", "layers")
        yield Collective("all-gather", "cp", gathers * self.forwards, keys, what)
        yield Collective("reduce-scatter", "cp", gathers * m, keys, f"gradients of {what}")
        yield Collective("all-gather", "cp", self.forwards, 4 * WIDE * self.split.size, "log-probs")

    def of_zero(self) -> Iterator[Collective]:
        """The table of parallel/zero.py; the root is reduced last, and at level 3 `prepare` gathers it once more."""
        m, level, cut = self.work.micro_batches, self.mesh.zero, self.sizes[self.axis] > 1
        kind, times = (("all-reduce", 1), ("reduce-scatter", 1), ("reduce-scatter", m), ("reduce-scatter", m))[level]
        for unit, count, name in ((self.root, 1, "root"), (self.layer, self.model.num_layers, "layers")):
            gathers = count if level else 0
            if level == 3:
                gathers = (1 + self.work.frozen) * (1 + m) if name == "root" else count * (m + self.forwards)
            behind = "" if name == "root" else ("last backward", "last backward", "backward", "layers")[level]
            gradient, what = WIDE * self.whole(unit), f"gradients, {name}"
            yield Collective(kind, self.axis, count * times * cut, gradient, what, behind)
            parameters, behind = self.itemsize * self.whole(unit), behind if level == 3 else ""
            yield Collective("all-gather", self.axis, gathers * cut, parameters, f"parameters, {name}", behind)
            copies, behind = count * (self.sizes["replica"] > 1), "" if name == "root" else "last backward"
            yield Collective("all-reduce", "replica", copies, WIDE * self.part(unit), what, behind)

    def of_update(self) -> Iterator[Collective]:
        """The sum of partial gradients over tp, and the norm (`sum_over_tp`, `grad_norm`)."""
        if self.mesh.tp > 1:
            rank, size = self.rank, self.part
            partial = self.total(lambda unit: unit.partial_in(rank * size(unit), (rank + 1) * size(unit)))
            yield Collective("all-reduce", "tp", partial > 0, WIDE * partial, "gradients of norms, shared K and V")
            yield Collective("all-reduce", "tp", 1, WIDE, "gradient norm")
        yield Collective("all-reduce", self.axis, self.mesh.parts > 1, 2 * WIDE, "gradient norm")

    def of_muon(self) -> Iterator[Collective]:
        """To whoever orthogonalises, and back (core/muon.py), of a window of layers; over tp, a matrix made whole."""
        parts, layers, sizes = self.mesh.parts, self.model.num_layers, self.layer.matrices
        for start in range(0, layers, parts) if self.work.muon else ():
            count = min(parts, layers - start)
            sent = count * sum(lengths[self.rank] for lengths in pieces(sizes, self.part(self.layer), parts))
            own = [n for n, rank in zip(count * sizes, owners(count * sizes, parts), strict=True) if rank == self.rank]
            most = WIDE * max(sent, sum(own))
            yield Collective("all-to-all", self.axis, 2 * (parts > 1), most, "Muon's directions")
            for n in own if self.mesh.tp > 1 else ():
                yield Collective("all-gather", "tp", 1, WIDE * n * self.mesh.tp, "Muon's matrices")

    # ------------------------------------------------------------------------------------------ time

    def rate(self, axis: str) -> float:
        """Bytes/s at which a rank of this axis's group passes data on around a ring.

        Ranks are [dp, cp, tp], tp fastest. A ring that crosses hosts uses an adapter of each of its ranks on a host,
        and at most a rank's link.
        """
        mesh, machine = self.mesh, self.machine
        stride = {"tp": 1, "dp": mesh.cp * mesh.tp, "replica": mesh.parts * mesh.tp}.get(axis, mesh.tp)
        if stride * self.sizes[axis] <= machine.node:
            return machine.reached * machine.link
        return machine.reached * min(machine.link, machine.network * max(1, machine.node // stride))

    def seconds_of(self, c: Collective) -> float:
        """A ring moves (n-1)/n of the tensor through each rank, twice for an all-reduce (Patarasuk & Yuan 2009)."""
        if c.kind == "objects":
            return 0.0
        share = 1.0 if c.kind == "send" else (1 + (c.kind == "all-reduce")) * (1 - 1 / self.sizes[c.axis])
        return c.count * share * c.payload / self.rate(c.axis)

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
        (h, g), d, b, f, e = self.heads, self.model.head_dim, self.itemsize, self.f, self.model.hidden_size
        tokens = self.split.local
        matmuls = sum(
            self.roof(2 * tokens * rows * columns, b * (rows * columns + tokens * (rows + columns)))
            for rows, columns in (((h + 2 * g) * d, e), (e, h * d), (2 * f, e), (e, f))
        )
        pairs = self.model.pairs(self.length) * self.documents / self.model.num_layers / self.mesh.cp
        heads = b * tokens * (2 * h + 2 * g) * d  # q, k, v and o
        attention = self.roof(4 * d * h * pairs, heads), self.roof(14 * d * h * pairs, 2 * heads)
        # Each norm reads two and writes two, in both passes; RoPE reads and writes q and k.
        small = 2 * 4 * tokens // self.mesh.tp * e + 2 * tokens * (h + g) * d
        forward = self.roof(0, b * (small + 3 * tokens * f))
        backward = self.roof(0, b * (small + 5 * tokens * f) + (b + 2 * WIDE) * self.layer.elements)
        return matmuls + attention[0] + forward, 2 * matmuls + attention[1] + backward

    @property
    def head_seconds(self) -> tuple[float, float]:
        """The root's passes: 2·N·V·E FLOPs forward, 6 backward, where logits are made again (kernels/head.py)."""
        n, e, v, b = self.head_tokens, self.model.hidden_size, self.v, self.itemsize
        moved, added = b * (v * e + n * e), (b + 2 * WIDE) * self.root.elements  # to the flat gradient
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
        room = {"": 0.0, "last backward": layers * backward, "backward": m * layers * backward}
        room["layers"] = layers * (self.forwards * forward + m * backward)
        sent = dict.fromkeys(room, 0.0)
        for c in self.collectives:
            sent[c.behind] += self.seconds_of(c)
        messages = sum(max(0.0, seconds - room[behind]) for behind, seconds in sent.items())
        # AdamW reads and writes master and moments and reads the gradient, which the norm reads and zero_grad writes.
        update = self.roof(0, ((9 + 2 * self.work.ema) * WIDE + self.itemsize) * self.total(self.part))
        update *= self.machine.bandwidth / self.machine.host if self.work.offload else 1
        compute = forwards + m * (layers * backward + head_backward)
        return {"compute": compute, "messages": messages, "optimizer": update}

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
        work, ranks = self.work, self.mesh.cp * self.mesh.tp
        head = work.tokens if work.supervised is None else work.supervised * self.mesh.cp
        useful = 3 * self.model.flops([self.length], head / self.documents) * self.documents
        return useful * work.micro_batches / (ranks * self.peak_flops * self.seconds)

    # ------------------------------------------------------------------------------------------ verdict

    @property
    def fits(self) -> bool:
        return self.peak <= ROOM * self.machine.memory

    @property
    def verdict(self) -> str:
        """Whether it fits, and if not, what is in the way and what would help."""
        used = f"{self.peak / GIB:.1f} of {ROOM * self.machine.memory / GIB:.1f} GiB"
        if self.fits:
            return f"fits: {used}"
        name, largest = max(self.memory.items(), key=lambda item: item[1])
        cut = self.mesh.zero == 3 and name in ("parameters", "gradients", "optimizer", "frozen models")
        return f"does not fit: {used}, of which {name} {largest / GIB:.1f}; {'take more GPUs' if cut else REMEDY[name]}"


def plans(model: ModelConfig, machine: Machine, gpus: int, work: Work, step_tokens: int) -> Iterator[Plan]:
    """Every plan of a step of `step_tokens` on `gpus` ranks: tp inside a host, cp, ZeRO's levels, micro-batches.

    Of `work`, tokens and micro_batches are chosen here: whole documents of `context` tokens.
    """
    pairs = [(tp, cp) for tp in divisors(math.gcd(gpus, machine.node)) for cp in divisors(gpus // tp)]
    for tp, cp in pairs:
        dp, host = gpus // tp // cp, machine.node // tp  # data ranks of a host
        documents, odd = divmod(step_tokens, dp * work.context)  # of a replica
        levels = [(zero, 0) for zero in range(4 if dp * cp > 1 else 1)]
        levels += [(zero, host) for zero in (1, 2, 3) if dp * cp > host > 1 and dp * cp % host == 0]
        for count in divisors(documents) if not odd else ():
            batch = replace(work, tokens=count * work.context, micro_batches=documents // count)
            for zero, shard in levels:
                try:
                    yield Plan(model, last_rank(gpus, tp, cp, zero, shard), batch, machine)
                except ValueError:  # tp does not divide the model
                    break


def last_rank(gpus: int, tp: int, cp: int, zero: int, shard: int, ring: bool = False) -> Mesh:
    """The mesh as the last of `gpus` ranks sees it: the one whose part may be filled up."""
    grid = {"world_size": gpus, "dp": gpus // tp // cp, "cp": cp, "tp": tp, "zero": zero, "shard": shard, "ring": ring}
    return Mesh(**grid, dp_rank=grid["dp"] - 1, cp_rank=cp - 1)


def best(found: Iterator[Plan], count: int = 5) -> list[Plan]:
    """The fastest that fit, one for each mesh and level; if none does, the smallest ones."""
    found = list(found)
    fitting = [plan for plan in found if plan.fits]
    ordered = sorted(fitting, key=lambda plan: plan.seconds) if fitting else sorted(found, key=lambda plan: plan.peak)
    firsts = {(plan.mesh.tp, plan.mesh.cp, plan.mesh.zero): plan for plan in reversed(ordered)}
    return sorted(firsts.values(), key=ordered.index)[:count]


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
