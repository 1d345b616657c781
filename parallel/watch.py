"""A run that is watched: ranks that die or hang end all others in time, with a sentence that says who, when and where.

    watch = Watch(mesh)
    with watch:                        # two threads on each rank; nothing where there is one process
        watch.step = 7
        with watch.phase("backward"):  # where a collective fails in it, the process ends with the sentence
            …

    rank 1 is lost: not heard of for 45 s. It was last in step 7, backward, and did not come to collective 231 of
    the dp group, where rank 0 waits

Every half second a rank leaves a word in the run's store: what it is doing, and how many collectives it has begun in
each of its groups. Rank 0 reads all words, the others that of rank 0: n requests, not n². A rank is lost when it has
not been heard of for three quarters of `mesh.timeout`, or when it has done nothing new for so long while others wait
for it in a group. (All that before the collectives of the waiting ranks time out, since NCCL then ends the process
without a word.) Where a connection breaks, the ranks that are gone are known within seconds. The first verdict is put
into the store for all; each rank prints it and exits with code 1, so that torchrun starts the run again or ends it.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tritium.parallel.mesh import Mesh

PERIOD = 0.5  # seconds between the words of a rank
GRACE = 2.0  # seconds without a word, once a collective has failed, after which a rank is gone
VERDICT = "watch/verdict"


@dataclass
class Word:
    """What a rank last said, and when."""

    text: bytes = b""
    step: int = 0
    doing: str = ""
    begun: dict[str, int] = field(default_factory=dict)  # collectives begun in each of its groups
    heard: float = 0.0  # when it last said anything
    moved: float = 0.0  # when it last said something new

    def update(self, text: bytes, now: float) -> None:
        if text == self.text:
            return
        self.text, self.heard = text, now
        _, *said = json.loads(text)
        if said != [self.step, self.doing, self.begun]:
            self.moved, (self.step, self.doing, self.begun) = now, said


class Watch:
    """See the module's docstring. `step` and `doing` are for the sentence; whoever trains keeps them."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.limit = mesh, 0.75 * mesh.timeout
        self.step, self.doing = 0, "starting"
        self.failure, self.failed_at = "", 0.0  # of a collective on this rank
        self.told = ""  # another rank's verdict
        self.answered = 0.0  # when the store last did
        self.count = 0
        self.words = {rank: Word() for rank in range(mesh.world_size)}
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> "Watch":
        if self.mesh.world_size > 1:
            # A connection of its own: others may wait in theirs.
            self.store = dist.distributed_c10d._get_default_store().clone()
            self.groups = named_groups(self.mesh)
            self.speak()
            self.mesh.barrier()  # now every rank has spoken
            now = time.monotonic()
            self.answered = now
            self.words = {rank: Word(heard=now, moved=now) for rank in self.words}
            self.over.clear()
            self.threads = [threading.Thread(target=f, daemon=True) for f in (self.listen, self.judge)]
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(GRACE)
        self.threads = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the sentence says this rank was doing. A collective that fails within ends the process with it."""
        before, self.doing = self.doing, name
        try:
            yield
        except RuntimeError as error:
            if not (self.threads and is_of_a_collective(error)):
                raise
            self.failed_at, self.failure = time.monotonic(), re.split(r"\. |\n", str(error))[0]
            self.threads[-1].join()  # does not return: `judge` looks who is gone, and ends the process
        finally:
            self.doing = before

    # ------------------------------------------------------------------------------------------ what is known

    def listen(self) -> None:
        while not self.over.wait(PERIOD):
            with suppress(RuntimeError):  # no answer: `judge` sees how long
                self.speak()
                self.hear()

    def speak(self) -> None:
        self.count += 1
        begun = {name: begun_in(group) for name, group in self.groups.items()}
        self.store.set(f"watch/{self.mesh.rank}", json.dumps([self.count, self.step, self.doing, begun]))

    def hear(self) -> None:
        ranks = list(self.words) if self.mesh.main or self.failure else [0, self.mesh.rank]
        texts = self.store.multi_get([f"watch/{rank}" for rank in ranks])
        if self.store.check([VERDICT]):
            self.told = self.store.get(VERDICT).decode()
        self.answered = time.monotonic()
        for rank, text in zip(ranks, texts, strict=True):
            self.words[rank].update(bytes(text), self.answered)

    # ------------------------------------------------------------------------------------------ what it means

    def judge(self) -> None:
        while not self.over.wait(PERIOD):
            sentences = self.told.splitlines() or self.verdict(time.monotonic())
            if not sentences:
                continue
            if not self.told:
                threading.Thread(target=self.publish, args=(sentences,), daemon=True).start()
            for sentence in sentences:
                print(f"tritium: {sentence}", file=sys.stderr)
            sys.stderr.flush()
            self.over.wait(PERIOD)  # for the store, which may be in this process
            os._exit(1)

    def publish(self, sentences: list[str]) -> None:
        with suppress(RuntimeError):
            self.store.set(VERDICT, "\n".join(sentences))

    def verdict(self, now: float) -> list[str]:
        """A sentence for each rank that is lost; nothing while the run may go on."""
        since = now - self.failed_at
        limit = min(self.limit, GRACE) if self.failure else self.limit
        if self.failure and since < limit + 2 * PERIOD:  # all words have been read, and read again
            return []
        if now - self.answered > limit:
            return [f"{self.store_lost(now)}{self.because()}"]
        known = self.words.keys() if self.mesh.main or self.failure else {0}
        others = {rank: self.words[rank] for rank in known if rank != self.mesh.rank}
        lost = {rank: f"not heard of for {now - w.heard:.0f} s" for rank, w in others.items() if now - w.heard > limit}
        if not lost and (self.mesh.main or self.failure):
            lost = {
                rank: f"nothing new from it for {now - word.moved:.0f} s"
                for rank, word in self.words.items()
                if now - word.moved > self.limit and self.missed(rank)
            }
        if not lost and self.failure:
            return [f"a collective failed on rank {self.mesh.rank} in {where(self)}: {self.failure}"]
        return [
            f"rank {rank} is lost: {why}. It was last in {where(self.words[rank])}{self.missed(rank)}{self.because()}"
            for rank, why in lost.items()
        ]

    def missed(self, rank: int) -> str:
        """The collective that others wait for it in, as part of a sentence; empty if there is none."""
        for name, begun in self.words[rank].begun.items():
            ahead = {r: word.begun[name] for r, word in self.words.items() if word.begun.get(name, 0) > begun}
            if ahead:
                shown = f"rank {listed(ahead)} waits" if len(ahead) == 1 else f"ranks {listed(ahead)} wait"
                return f", and did not come to collective {max(ahead.values())} of the {name} group, where {shown}"
        return ""

    def because(self) -> str:
        return f" (seen by rank {self.mesh.rank} in {where(self)}: {self.failure})" if self.failure else ""

    def store_lost(self, now: float) -> str:
        return (
            f"rank {self.mesh.rank}, in {where(self)}, has lost rank 0 or its host: the run's store there has not "
            f"answered for {now - self.answered:.0f} s"
        )


def where(of: Any) -> str:
    return f"step {of.step}, {of.doing}"


def listed(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def named_groups(mesh: Mesh) -> dict[str, ProcessGroup]:
    """This rank's groups; a group has the same name on all its ranks, and on no others."""
    groups = {"tp": mesh.tp_group, "cp": mesh.cp_group, "dp": mesh.dp_group, "data": mesh.data_group}
    named, seen = {"world": dist.group.WORLD}, [dist.group.WORLD]
    for axis, group in groups.items():
        if group is not None and group not in seen:
            seen.append(group)
            named[f"{axis} (ranks {listed(dist.get_process_group_ranks(group))})"] = group
    return named


def begun_in(group: ProcessGroup) -> int:
    """How many collectives this rank has begun in the group, by all of its backends."""
    backends = {id(b): b for d in group._device_types for b in [group._get_backend(torch.device(d))]}
    return sum(backend._get_sequence_number_for_group() for backend in backends.values())


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether a peer or the network failed: gloo has no class of error for that."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL", "TCPStore"))
